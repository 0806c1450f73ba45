"""A run that learns nothing says so once, with what it saw and what to do."""

from pathlib import Path

import pytest

from prefix_rft.data_types import Group, Problem, Rollout
from prefix_rft.metrics import StepMetrics, Watch, measure_rollouts
from prefix_rft.metrics.watch import EQUAL_STEPS, UNANSWERED_STEPS
from prefix_rft.train.run import train
from tests.tiny import make_run

SAMPLE = {
    "rollouts": [
        {"status": "wrong", "tokens": ["#### 3"]},
        {"status": "no_answer", "tokens": ["x" * 500, "so the total is ", "18.", "<eos>"]},
    ]
}


def step(zero_std: float = 1.0, no_answer: float = 0.0, reward: float = 0.0) -> dict[str, float]:
    return {
        "reward/mean": reward,
        "reward/zero_std_frac": zero_std,
        "grader/no_answer_frac": no_answer,
        "rollout/truncated_frac": 0.25,
    }


def warned_at(watch: Watch, steps: list[dict[str, float]]) -> dict[int, str]:
    warnings = ((i, watch.of_step(each, SAMPLE)) for i, each in enumerate(steps, start=1))
    return {i: text for i, text in warnings if text is not None}


def test_steps_without_answers_are_warned_of_once() -> None:
    [(when, text)] = warned_at(Watch("####"), [step(no_answer=0.91)] * 50).items()
    assert when == UNANSWERED_STEPS and "\n" not in text
    for part in (
        "91% have no answer",
        "'####'",
        "so the total is 18.<eos>'",
        "data.system_prompt",
        "data.answer_pattern",
        "25% are truncated",
    ):
        assert part in text
    assert len(text) < 700
    boxed = warned_at(Watch("boxed"), [step(no_answer=0.91)] * 5)
    assert r"looks for \boxed{...} (" in boxed[UNANSWERED_STEPS]


@pytest.mark.parametrize(
    "steps",
    [
        [step(zero_std=0.9, no_answer=0.91)] * 50,
        [step(no_answer=0.5)] * (EQUAL_STEPS - 1),
        [*[step(no_answer=0.91)] * (UNANSWERED_STEPS - 1), step(zero_std=0.5)] * 10,
        [{}] * 50,  # nothing is generated
    ],
)
def test_a_run_that_learns_something_is_not_warned_of(steps) -> None:
    assert warned_at(Watch("boxed"), steps) == {}


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_are_warned_of_once(reward: float) -> None:
    steps = [step(reward=reward)] * 50
    [(when, text)] = warned_at(Watch("boxed"), steps).items()
    assert when == EQUAL_STEPS and f"mean is {reward:g}," in text and "\n" not in text


def test_an_evaluation_without_answers_is_warned_of() -> None:
    def warning(no_answer: int, wrong: int) -> str | None:
        statuses = {"no_answer": no_answer, "wrong": wrong}
        return Watch("####").of_evaluation({"statuses": statuses, "truncated_frac": 0.25})

    assert "95% of the evaluated responses have no answer. The grader looks for '####'" in (
        warning(95, 5) or ""
    )
    assert warning(80, 20) is None and warning(0, 100) is None


def group(*rollouts: tuple[float, str]) -> Group:
    problem = Problem(index=0, prompt="", prompt_ids=(), answer="1")
    return Group(
        problem=problem,
        rollouts=tuple(
            Rollout(
                prompt_ids=(),
                response_ids=(1,),
                prefix_length=0,
                rollout_log_probs=(0.0,),
                finish_reason="stop",
                text="",
                reward=reward,
                status=status,
            )
            for reward, status in rollouts
        ),
    )


def test_what_a_step_measures_of_it() -> None:
    metrics = StepMetrics()
    groups = [
        group((1, "correct"), (0, "no_answer")),
        group((0, "wrong"), (0, "no_answer"), (0, "timeout")),
        group((1, "correct")),  # one alone has nothing to be equal to
        group(),
    ]
    measure_rollouts(metrics, groups)
    result = metrics.result()
    assert result["reward/zero_std_frac"] == 0.5
    assert result["grader/no_answer_frac"] == pytest.approx(2 / 6)
    assert result["grader/timeout_frac"] == pytest.approx(1 / 6)
    assert result["grader/error_frac"] == 0


def test_a_run_without_answers_tells_it_from_the_base_on(tmp_path: Path, capsys) -> None:
    config = make_run(
        tmp_path,
        data={"answer_pattern": "####"},
        reward={"function": None, "num_workers": 1},
        trainer={"num_steps": UNANSWERED_STEPS + 1, "checkpoint_every": 0},
        log={"tensorboard": False},
        eval={"num_samples": 1},
    )
    train(config)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert "100% of the evaluated" in warnings[0] and "the last 3 steps" in warnings[1]
    assert len(warnings) == 2
    [first] = [line for line in lines if line.startswith("step 1/")]
    assert "no answer 1.00" in first and "grader errors" not in first
