"""The console while a run goes on: one live panel on a terminal, one line per step elsewhere."""

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prefix_rft.methods import declared_progress

Kind = Literal["train", "eval"]
Metrics = Mapping[str, float]

# What a person watches: a label, then (word, metric, format) for each figure under it; a "rare" one
# is left out where it is 0. What methods declare comes between the two.
FIRST_FIGURES = {
    "reward": (("", "reward/mean", ".3f"),),
    "loss": (("", "policy/loss_mean", ".3g"),),
}
FIGURES = {
    "entropy": (("continuation", "policy/continuation_entropy_mean", ".3f"),),
    "clipped": (("low", "policy/clip_low_frac", ".3f"), ("high", "policy/clip_high_frac", ".3f")),
    "rollouts": (
        ("left out", "rollout/left_out_frac", ".2f"),
        ("truncated", "rollout/truncated_frac", ".2f"),
        ("no answer", "grader/no_answer_frac", "rare"),
        ("grader timeouts", "grader/timeout_frac", "rare"),
        ("grader errors", "grader/error_frac", "rare"),
        ("tokens", "rollout/response_length_mean", ".0f"),
    ),
    "time": (
        ("", "time/step_s", "s"),
        ("push", "time/push_s", "s"),
        ("generate", "time/generate_s", "s"),
        ("reward", "time/reward_s", "s"),
        ("old policy", "time/old_policy_s", "s"),
        ("reference", "time/reference_s", "s"),
        ("update", "time/update_s", "s"),
    ),
    "speed": (("", "throughput/step_tokens_per_s", "tokens/s"),),
}


def format_seconds(seconds: float) -> str:
    """0.42s, 12.3s, 4m05s, 2h03m: three figures are enough."""
    if seconds < 59.95:
        return f"{seconds:.2f}s" if seconds < 9.995 else f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m"


def format_rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f} tokens/s"


def describe(metrics: Metrics) -> list[tuple[str, str]]:
    """(label, text) of every figure a person watches; what is not in `metrics` is left out."""
    lines: dict[str, tuple] = {}
    for label, figures in (*FIRST_FIGURES.items(), *declared_progress(), *FIGURES.items()):
        lines[label] = lines.get(label, ()) + figures
    described = []
    for label, figures in lines.items():
        texts = [
            f"{word} {_format(metrics[name], form)}".strip()
            for word, name, form in figures
            if name in metrics and not (form == "rare" and metrics[name] == 0)
        ]
        if texts:
            described.append((label, " ".join(texts)))
    return described


def _format(value: float, form: str) -> str:
    if form == "s":
        return format_seconds(value)
    if form == "tokens/s":
        return format_rate(value)
    return f"{value:.2f}" if form == "rare" else f"{value:{form}}"


class Display(Protocol):
    """Shows finite metrics of a step, and messages between them."""

    def show(self, step: int, metrics: Metrics, kind: Kind) -> None: ...

    def message(self, text: str) -> None: ...


def make_display(
    progress: Literal["auto", "rich", "plain"], *, num_steps: int, start_step: int
) -> AbstractContextManager[Display]:
    """The display that `log.progress` asks for; `auto` is rich on a terminal."""
    console = Console(highlight=False)
    rich = progress == "rich" or (progress == "auto" and console.is_terminal)
    clock = StepClock(num_steps)
    return RichDisplay(console, clock, start_step) if rich else PlainDisplay(clock)


class StepClock:
    """Counts steps done and estimates the rest from the median of the last ten step times."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._seconds: deque[float] = deque(maxlen=10)

    def tick(self, step: int, metrics: Metrics) -> str:
        """The time left after `step`, as text; empty where nothing is known or nothing is left."""
        if "time/step_s" in metrics:
            self._seconds.append(metrics["time/step_s"])
        left = self.num_steps - step - 1
        if not self._seconds or left <= 0:
            return ""
        return format_seconds(median(self._seconds) * left)


def evaluation_line(step: int, metrics: Metrics) -> str:
    figures = ", ".join(
        f"{name.removeprefix('eval/')} {value:.3g}" for name, value in metrics.items()
    )
    return f"evaluation after {step} steps: {figures}"


class PlainDisplay(AbstractContextManager[Display]):
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __exit__(self, *exc: object) -> None:
        return None

    def show(self, step: int, metrics: Metrics, kind: Kind) -> None:
        if kind == "eval":
            self.message(evaluation_line(step, metrics))
            return
        left = self._clock.tick(step, metrics)
        parts = [f"step {step + 1}/{self._clock.num_steps}"]
        parts += [f"{label} {text}" for label, text in describe(metrics)]
        parts += [f"left {left}"] if left else []
        self.message(" | ".join(parts))

    def message(self, text: str) -> None:
        print(text, flush=True)


class RichDisplay(AbstractContextManager[Display]):
    def __init__(self, console: Console, clock: StepClock, start_step: int) -> None:
        self._clock = clock
        self._live = Live(console=console, refresh_per_second=4)
        self._render(start_step, {}, "")

    def __enter__(self) -> "RichDisplay":
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, step: int, metrics: Metrics, kind: Kind) -> None:
        if kind == "eval":
            self.message(evaluation_line(step, metrics))
        else:
            self._render(step + 1, metrics, self._clock.tick(step, metrics))

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False)

    def _render(self, steps_done: int, metrics: Metrics, left: str) -> None:
        header = Table.grid(expand=True, padding=(0, 1))
        header.add_column(no_wrap=True)
        header.add_column(ratio=1)
        header.add_column(no_wrap=True)
        header.add_row(
            f"step {steps_done}/{self._clock.num_steps}",
            ProgressBar(total=self._clock.num_steps, completed=steps_done),
            f"left {left}" if left else "",
        )
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for label, text in describe(metrics):
            table.add_row(label, Text(text))
        self._live.update(Panel(Group(header, table), title="prefix-rft", title_align="left"))
