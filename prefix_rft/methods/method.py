"""What a training method decides; packing, ranks, optimizers and checkpoints are the trainer's.

1. Which sequences it wants for a problem: `plan_group`.
2. What the graded groups teach, as the updates of a step: `mini_batches`.
3. What must be known of the policy before an update, and what follows: `stats_rows`, `prepare`.
4. The loss of a token: `loss`.

A method is a pure function of its section of the configuration, the setting of its run, and what it
is given; what it has to remember from step to step it returns in `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from rft_kernels import PolicyConfig

    from prefix_rft.data_types import (
        Group,
        MiniBatch,
        Problem,
        Rollout,
        RolloutRequest,
        TrainBatch,
        Update,
    )
    from prefix_rft.methods.advantage import AdvantageScale
    from prefix_rft.methods.clipped import LossConfig

Limits = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method may know of the run that it is part of."""

    seed: int
    num_steps: int
    prompts_per_step: int
    prompts_per_update: int
    group_size: int  # rollouts per prompt
    max_response_length: int  # tokens
    mask_truncated: bool  # whether rollouts that were cut at it are not learnt from
    eos_token_id: int  # ends a response
    advantage_scale: AdvantageScale
    loss: LossConfig  # the section [loss]

    def masks(self, rollout: Rollout) -> bool:
        """Whether a rollout is not learnt from."""
        return self.mask_truncated and rollout.finish_reason == "length"


@dataclass(frozen=True)
class TokenLoss:
    """A loss in plain torch that looks at one token at a time; see `rft_kernels.linear_token_loss`.

    Attributes:
        function: (log_probs [n], entropy [n], *inputs [n]) -> losses [n], or a pair of them and
            further figures {name: [n]}, whose sums over tokens `Update.sums` has.
        inputs: names of the fields of `TrainBatch` that it takes.
        temperature: of log_probs and entropy; None: that of the rollouts.
    """

    function: Callable[..., torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]]
    inputs: tuple[str, ...] = ()
    temperature: float | None = None


class Figure(NamedTuple):
    """Part of a metric of the step: a total, or, with a count, of a mean."""

    name: str
    total: float | torch.Tensor
    count: float | torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Some metrics over the steps done; charts of one title are drawn as one."""

    title: str
    series: Mapping[str, str]  # metric -> legend
    unit: str = ""
    form: Literal["lines", "stack", "window"] = "lines"  # window: a band between the first two
    limits: Limits = (0.0, None)
    kind: Literal["train", "eval"] = "train"


class Method:
    """The interface, and what most methods do alike. Subclasses are named by `name`."""

    name: ClassVar[str]
    section: ClassVar[type | None] = None  # dataclass of the section [<name>] of the configuration
    # Whether it is pointless over problems of which none has a demonstration.
    needs_demonstrations: ClassVar[bool] = False
    scales_advantages: ClassVar[bool] = False  # whether `Setting.advantage_scale` is its own
    charts: ClassVar[tuple[Chart, ...]] = ()
    # Lines of the console: label -> (word, metric, format) of each figure.
    progress: ClassVar[Mapping[str, tuple[tuple[str, str, str], ...]]] = {}

    def __init__(self, config: Any, setting: Setting) -> None:
        self.config = config  # the section [<name>]
        self.setting = setting

    @classmethod
    def check(cls, config: Any, *, group_size: int, max_response_length: int) -> None:
        """Raise a ConfigError where the section does not go with these."""

    @classmethod
    def num_steps(cls, config: Any, num_problems: int, prompts_per_step: int) -> int | None:
        """The steps of a run over that many problems; None: `trainer.num_steps`."""
        return None

    @property
    def uses_reference(self) -> bool:
        """Whether its loss takes the log-probs of the reference model."""
        return False

    @classmethod
    def optimizers(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        """Optimizers beside "policy": name -> fields that differ from the section [optimizer]."""
        return {}

    @classmethod
    def accepts(cls, problem: Problem) -> bool:
        """Whether the method can learn from a problem; others are left out of training."""
        return True

    def schedule(self, step: int) -> dict[str, float]:
        """What changes with the step, as metrics."""
        return {}

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        """The sequences to generate and grade; a function of config, problem and step alone.

        A request without a budget (`max_new_tokens = 0`) is graded as it stands.
        """
        raise NotImplementedError

    def plan_rest(self, group: Group, step: int) -> list[RolloutRequest]:
        """Further sequences of a group, once those of `plan_group` are graded.

        They join the group's rollouts, behind the others.
        """
        return []

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        """The updates of this step, in order."""
        raise NotImplementedError

    def stats_rows(self, mini_batch: MiniBatch) -> list[int]:
        """Indices of the rows whose log-probs and entropies `prepare` wants to know."""
        return []

    def prepare(
        self, batch: TrainBatch, log_probs: torch.Tensor, entropy: torch.Tensor, step: int
    ) -> TrainBatch:
        """The batch with what follows from the statistics: a selection, advantages, weights.

        Args:
            batch: the whole mini-batch, of all ranks.
            log_probs, entropy: [T], of the policy before the update; 0 on rows not asked for.
        """
        return batch

    def loss(self, mini_batch: MiniBatch) -> PolicyConfig | TokenLoss:
        """The loss of a token of this mini-batch."""
        raise NotImplementedError

    def figures(
        self,
        groups: Sequence[Group],
        updates: Sequence[Update],
        has_answer: Callable[[Sequence[int]], bool],
    ) -> Iterator[Figure]:
        """Metrics of a step beside those that every method has.

        Args:
            has_answer: whether the text of some tokens holds an answer.
        """
        yield from ()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the method, as JSON has it."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a `state`."""
