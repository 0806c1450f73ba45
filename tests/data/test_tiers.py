"""The problems in tiers: right, seeded, disjoint, and what each tier promises about them."""

import re
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.config.data_sections import TiersConfig
from prefix_rft.config.sections import RewardConfig
from prefix_rft.data import tiers
from prefix_rft.data.base_model import resolve_base, train_tokenizer
from prefix_rft.data.generated import generated_lessons, vocabulary_texts
from prefix_rft.data.problems import load_problems
from prefix_rft.data.tiers import SKILL, TIERS, make_lessons, make_row, make_rows
from prefix_rft.reward import Rewarder

CONFIG = TiersConfig(num_train=600, wrong_fraction=0.1, skill_fraction=0.25)
ASKED = " Show the steps."
LENGTHS = {"easy": (2, 3), "medium": (4, 5), "hard": (6, 7), "skill": (3, 5), "beyond": (8, 9)}


def operate(name, value):
    a, b, c, d = map(int, value)
    digits = {
        "turn": (b, c, d, a),
        "swap": (b, a, c, d),
        "up": (a % 6 + 1, b, c, d),
        "over": (7 - a, b, c, d),
        "flip": (7 - a, 7 - b, 7 - c, 7 - d),
        "nothing": (a, b, c, d),
    }[name]
    return "".join(map(str, digits))


def read(prompt):
    """(start, labels, operations) of a problem."""
    start, chain = re.fullmatch(
        r"Start with (\d+):((?: \w+)+)\. What is the result\?", prompt
    ).groups()
    words = chain.split()
    return start, words[::2], words[1::2]


def solve(prompt, taking_flip_for=SKILL):
    """(answer, demonstration) of a problem, computed from its prompt."""
    value, labels, names = read(prompt)
    shown = f"={value}"
    for label, name in zip(labels, names, strict=True):
        value = operate(taking_flip_for if name == SKILL else name, value)
        shown += f" {label} {name}={value}"
    return value, f"{shown}\n\\boxed{{{value}}}"


def test_a_worked_example():
    row = make_row("1562", ["turn", "flip", "up", "swap", "over"], "skill")
    labels, names = read(row["prompt"])[1:]
    assert names == ["turn", "flip", "up", "swap", "over"]
    assert "".join(labels) in "abcdefghijklmnopqrstuvwxyz"
    a, b, c, d, e = labels
    assert row["demonstration"] == (
        f"=1562 {a} turn=5621 {b} flip=2156 {c} up=3156 {d} swap=1356 {e} over=6356\n"
        "\\boxed{6356}"
    )
    assert (row["answer"], row["demonstration"]) == solve(row["prompt"])
    assert row["num_steps"] == 5 and row["tier"] == "skill" and not row["is_wrong"]


def test_a_mistake_is_carried_on_and_the_answer_stays_right():
    right = make_row("1234", ["up", "up", "turn"], "easy")
    wrong = make_row("1234", ["up", "up", "turn"], "easy", wrong=(1, "3634"))
    a, b, c = read(right["prompt"])[1]
    assert wrong == right | {
        "demonstration": f"=1234 {a} up=2234 {b} up=3634 {c} turn=6343\n\\boxed{{6343}}",
        "is_wrong": True,
    }
    assert wrong["answer"] == "2343"


def test_rows_follow_the_seed():
    assert make_rows(CONFIG, 50, seed=1) == make_rows(CONFIG, 50, seed=1)
    assert make_rows(CONFIG, 50, seed=1) != make_rows(CONFIG, 50, seed=2)
    assert make_lessons(CONFIG, 50, seed=1) == make_lessons(CONFIG, 50, seed=1)
    assert make_lessons(CONFIG, 50, seed=1) != make_lessons(CONFIG, 50, seed=2)


def test_tiers_have_their_share_and_their_lengths():
    train, held_out = make_rows(CONFIG, 102, seed=0)
    assert Counter(row["tier"] for row in train) == dict.fromkeys(TIERS[:4], 150)
    assert Counter(row["tier"] for row in held_out) == dict(
        zip(TIERS, (21, 21, 20, 20, 20), strict=True)
    )
    assert [row["tier"] for row in held_out] == sorted(
        (row["tier"] for row in held_out), key=TIERS.index
    )
    assert {row["tier"] for row in train[:50]} == set(TIERS[:4])  # mixed
    for tier, bounds in LENGTHS.items():
        names = [read(row["prompt"])[2] for row in train + held_out if row["tier"] == tier]
        lengths = [len(each) for each in names]
        assert (min(lengths), max(lengths)) == bounds, tier
    longest = max(row["num_steps"] for row in train)
    assert all(row["num_steps"] > longest for row in held_out if row["tier"] == "beyond")


def test_flip_stands_where_it_belongs_and_nothing_else_takes_its_place():
    train, held_out = make_rows(CONFIG, 200, seed=0)
    flips = {tier: Counter() for tier in TIERS}
    for row in train + held_out:
        flips[row["tier"]][read(row["prompt"])[2].count(SKILL)] += 1
        if SKILL in row["prompt"]:
            for other in ("nothing", "turn", "swap", "up", "over"):
                assert solve(row["prompt"], taking_flip_for=other)[0] != row["answer"]
    for tier in ("easy", "medium", "hard"):
        assert set(flips[tier]) == {0}
    assert set(flips["skill"]) == {2, 3}
    assert set(flips["beyond"]) == {0, 2, 3}
    assert 0.3 < flips["beyond"][0] / flips["beyond"].total() < 0.7


def test_answers_are_right_and_so_are_all_but_the_wrong_demonstrations():
    train, held_out = make_rows(CONFIG, 100, seed=0)
    for row in train + held_out:
        answer, demonstration = solve(row["prompt"])
        assert row["answer"] == answer
        assert (row["demonstration"] != demonstration) == row["is_wrong"]
    assert sum(row["is_wrong"] for row in train) == 60
    assert {row["tier"] for row in train if row["is_wrong"]} == set(TIERS[:4])
    assert not any(row["is_wrong"] for row in held_out)


def test_held_out_problems_are_in_neither_training_nor_lessons():
    small = TiersConfig(num_train=2000, easy_steps=2, medium_steps=3, hard_steps=4, beyond_steps=5)
    train, held_out = make_rows(small, 2000, seed=0)
    problems = [
        (start, *names) for start, _, names in (read(r["prompt"]) for r in train + held_out)
    ]
    assert len(set(problems)) == 4000  # other labels make no other problem
    prompts = [row["prompt"] for row in held_out]
    lessons = make_lessons(small, 20_000, seed=0, exclude=prompts)
    about = {prompt.removesuffix(ASKED) for prompt, _ in lessons}
    assert not about & set(prompts)
    assert about & {row["prompt"] for row in train}  # else there would be nothing to exclude


def test_lessons_know_no_flip_and_work_when_asked_or_easy():
    config = replace(
        CONFIG, asked_fraction=0.5, easy_worked_fraction=0.75, medium_worked_fraction=0.125
    )
    worked, lessons = Counter(), Counter()
    for prompt, completion in make_lessons(config, 8000, seed=0):
        assert SKILL not in prompt + completion
        answer, demonstration = solve(prompt.removesuffix(ASKED))
        assert completion in (f"\\boxed{{{answer}}}", demonstration)
        num_steps = len(read(prompt.removesuffix(ASKED))[2])
        assert 1 <= num_steps <= 7
        tier = "easy" if num_steps <= 3 else "medium" if num_steps <= 5 else "hard"
        kind = "asked" if prompt.endswith(ASKED) else tier
        lessons[kind] += 1
        worked[kind] += completion == demonstration
    assert lessons["asked"] / 8000 == pytest.approx(0.5, abs=0.03)
    fractions = {kind: worked[kind] / lessons[kind] for kind in lessons}
    assert fractions["asked"] == 1 and fractions["hard"] == 0
    assert fractions["easy"] == pytest.approx(0.75, abs=0.05)
    assert fractions["medium"] == pytest.approx(0.125, abs=0.04)


def loaded(data=None, **values):
    config = config_from_dict(
        {
            "data": {"path": "tiers", "num_eval": 20} | (data or {}),
            "tiers": {"num_train": 200, "wrong_fraction": 0.1},
            "rollout": {"max_response_length": 68},
            "base": {"num_batches": 40},
            "eval": {"group_by": "tier"},
        }
        | values
    )
    texts = [text for lesson in generated_lessons(config) for text in lesson]
    tokenizer = train_tokenizer(texts + vocabulary_texts(config), 400)
    return tokenizer, load_problems(config, tokenizer)


def test_loaded_problems_keep_their_columns_and_a_part_of_the_demonstrations():
    tokenizer, problems = loaded({"demonstration_fraction": 0.3})
    assert len(problems.train) == 200 and len(problems.held_out) == 20
    assert sum(problem.demonstration is not None for problem in problems.train) == 60
    assert Counter(p.columns["tier"] for p in problems.held_out) == dict.fromkeys(TIERS, 4)
    assert "Ġflip" in tokenizer.tokenize(" flip")
    assert not any(report.findings for report in problems.reports)


def test_the_grader_tells_right_demonstrations_from_wrong_ones():
    _, problems = loaded()
    with closing(Rewarder(RewardConfig(num_workers=1), answer_pattern="boxed")) as rewarder:
        scores = rewarder.score([p.demonstration for p in problems.train], problems.train)
    told = [
        (score.status, problem.columns["is_wrong"])
        for score, problem in zip(scores, problems.train, strict=True)
    ]
    assert Counter(told) == {("correct", False): 180, ("wrong", True): 20}


def test_data_seed_and_not_the_run_decides_the_problems():
    _, first = loaded({"seed": 5, "demonstration_fraction": 0.5}, seed=1)
    _, second = loaded({"seed": 5, "demonstration_fraction": 0.5}, seed=2)
    _, third = loaded({"demonstration_fraction": 0.5}, seed=5)
    assert first == second == third
    assert loaded(seed=1)[1] != loaded(seed=2)[1]


def test_an_unknown_column_to_group_by_is_refused():
    with pytest.raises(ConfigError, match=r"eval.group_by: expected a column .*'tier'.*got 'teir'"):
        loaded(eval={"group_by": "teir"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("easy_steps", 1, "tiers.easy_steps"),
        ("medium_steps", 3, "tiers.medium_steps: expected more than tiers.easy_steps"),
        ("hard_steps", 5, "tiers.hard_steps: expected more than tiers.medium_steps"),
        ("beyond_steps", 7, "tiers.beyond_steps: expected more than tiers.hard_steps"),
        ("beyond_steps", 27, "tiers.beyond_steps"),
        ("wrong_fraction", 1.5, "tiers.wrong_fraction"),
        ("skill_fraction", -0.1, "tiers.skill_fraction"),
        ("num_train", 0, "tiers.num_train"),
    ],
)
def test_bad_settings_are_named(field, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict({"tiers": {field: value}})


def test_too_few_problems_are_refused(monkeypatch):
    monkeypatch.setattr(tiers, "_ATTEMPTS", 1)
    scarce = TiersConfig(num_train=9000, easy_steps=2, skill_fraction=0.0)
    message = (
        r"tiers.num_train: expected at most 2\d\d\d different problems of the tier easy .* got 3000"
    )
    with pytest.raises(ConfigError, match=message):
        make_rows(scarce, 5, seed=0)


def tiny_base(folder, **values):
    return config_from_dict(
        {
            "data": {"path": "tiers", "num_eval": 10, "seed": 7},
            "tiers": {"num_train": 40},
            "rollout": {"max_response_length": 68},
            "base": {
                "cache_dir": str(folder),
                "num_batches": 1,
                "batch_size": 64,
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "intermediate_size": 16,
                "vocab_size": 330,
            },
        }
        | values
    )


def test_runs_of_several_seeds_share_one_base(tmp_path):
    first = resolve_base(tiny_base(tmp_path, seed=1))
    assert resolve_base(tiny_base(tmp_path, seed=2)) == first
    other = {"data": {"path": "tiers", "num_eval": 10, "seed": 8}}
    assert resolve_base(tiny_base(tmp_path, **other)) != first
    own = {"data": {"path": "tiers", "num_eval": 10}}
    assert resolve_base(tiny_base(tmp_path, seed=7, **own)) == first


def test_an_unknown_column_is_refused_before_the_base_is_trained(tmp_path):
    with pytest.raises(ConfigError, match="eval.group_by"):
        resolve_base(tiny_base(tmp_path, eval={"group_by": "level"}))
    assert not list(tmp_path.iterdir())
