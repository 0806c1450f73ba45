"""Scores responses with the math grader and functions of the user's."""

from prefix_rft.reward.answers import plain_number
from prefix_rft.reward.grader import Grader, RewardError, extract_answer, grader_info
from prefix_rft.reward.length import overlong_penalty
from prefix_rft.reward.response import response_ids, response_text
from prefix_rft.reward.reward import Rewarder, Score
from prefix_rft.reward.scoring import Scoring
from prefix_rft.reward.spelling import clean_answer
from prefix_rft.reward.verdicts import Verdict, grade, grade_file, verdicts

__all__ = [
    "Grader",
    "RewardError",
    "Rewarder",
    "Score",
    "Scoring",
    "Verdict",
    "clean_answer",
    "extract_answer",
    "grade",
    "grade_file",
    "grader_info",
    "overlong_penalty",
    "plain_number",
    "response_ids",
    "response_text",
    "verdicts",
]
