"""Scores responses with the math grader or with a user's function."""

from prefix_rft.reward.grader import Grader, RewardError, clean_answer, plain_number
from prefix_rft.reward.reward import Rewarder, Score
from prefix_rft.reward.scoring import Scoring

__all__ = [
    "Grader",
    "RewardError",
    "Rewarder",
    "Score",
    "Scoring",
    "clean_answer",
    "plain_number",
]
