"""Warnings of a run that learns nothing: no answer is found, or all rewards are equal."""

from collections.abc import Mapping
from typing import Any

UNANSWERED_STEPS = 3  # steps in a row without an advantage and mostly without an answer
EQUAL_STEPS = 10  # steps in a row without an advantage, for whatever reason
UNANSWERED_FRACTION = 0.5  # fraction of a step's rollouts that makes it suspicious
UNANSWERED_EVAL_FRACTION = 0.9  # a tenth of a base's responses is enough to learn from
EXAMPLE_CHARS = 160


class Watch:
    """Looks at evaluations and at each step, and warns once for each reason.

    Args:
        answer_pattern: how a text gives its answer, see `data.answer_pattern`.
    """

    def __init__(self, answer_pattern: str) -> None:
        self._expected = r"\boxed{...}" if answer_pattern == "boxed" else repr(answer_pattern)
        self._unanswered = _Streak(UNANSWERED_STEPS)
        self._equal = _Streak(EQUAL_STEPS)

    def of_evaluation(self, results: Mapping[str, Any]) -> str | None:
        """The warning where almost no response has an answer."""
        statuses = results["statuses"]
        fraction = statuses.get("no_answer", 0) / max(sum(statuses.values()), 1)
        if fraction < UNANSWERED_EVAL_FRACTION:
            return None
        seen = f"{fraction:.0%} of the evaluated responses have no answer"
        return self._no_answer(seen, results["truncated_frac"])

    def of_step(self, metrics: Mapping[str, float], sample: Mapping[str, Any]) -> str | None:
        """The warning where this step is one too many.

        Args:
            metrics, sample: see `Trainer.train_step`.
        """
        is_equal = metrics.get("reward/zero_std_frac") == 1
        unanswered = metrics.get("grader/no_answer_frac", 0.0)
        is_unanswered = is_equal and unanswered > UNANSWERED_FRACTION
        # Both look at every step.
        is_long_equal = self._equal.goes_on(is_equal)
        if self._unanswered.goes_on(is_unanswered):
            seen = (
                f"no rollout of the last {UNANSWERED_STEPS} steps has an advantage, and "
                f"{unanswered:.0%} have no answer"
            )
            return self._no_answer(seen, metrics["rollout/truncated_frac"], sample)
        if is_long_equal and not is_unanswered:
            return (
                f"warning: no rollout of the last {EQUAL_STEPS} steps has an advantage: the "
                f"rewards of a problem are all equal (their mean is {metrics['reward/mean']:.3g}, "
                f"{metrics['rollout/truncated_frac']:.0%} of the rollouts are truncated). Choose "
                "problems that the model solves sometimes, or a reward that tells its responses "
                "apart"
            )
        return None

    def _no_answer(
        self, seen: str, truncated: float, sample: Mapping[str, Any] | None = None
    ) -> str:
        ends = [
            f", not in this one: ...{''.join(rollout['tokens'])[-EXAMPLE_CHARS:]!r}"
            for rollout in (sample or {}).get("rollouts", ())
            if rollout["status"] == "no_answer"
        ]
        return (
            f"warning: {seen}. The grader looks for {self._expected} (data.answer_pattern)"
            f"{''.join(ends[:1])}. Ask for it in data.system_prompt, or set data.answer_pattern to "
            f"what the model writes; {truncated:.0%} are truncated (max_response_length)"
        )


class _Streak:
    """Steps in a row; told once."""

    def __init__(self, limit: int) -> None:
        self._left = self._limit = limit
        self._is_told = False

    def goes_on(self, holds: bool) -> bool:
        """Whether it has reached its limit now, for the first time."""
        self._left = self._left - 1 if holds else self._limit
        if self._left > 0 or self._is_told:
            return False
        self._is_told = True
        return True
