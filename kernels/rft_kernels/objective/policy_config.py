"""What the loss of a token is: the choices of E4 to E7."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from .. import _check

SUMS = (
    "loss",
    "num_tokens",
    "num_prefix",
    "num_selected",
    "num_dropped",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "ratio_sum",
    "ratio_max",
    "approx_kl_sum",
    "entropy_sum",
    "kl_sum",
)
LOG_RATIO_BOUND = 20.0  # e^20 = 5e8: finite in every dtype's sums; beyond it a ratio has no slope


class Terms(NamedTuple):
    """The terms of a token's loss, as an op of torch can carry them."""

    clip_range: Sequence[float]  # lowest and highest ratio; the same of prefix tokens
    dual_clip: float | None
    importance_cap: float | None
    entropy_coef: float
    kl: str  # "none" where it has no coefficient
    kl_coef: float


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What the loss of a token is. Ratios are exp(log_prob - old_log_prob)."""

    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    dual_clip: float | None = None  # > 1: for A < 0 the loss is at most -A times this
    prefix_clip: str | tuple[float, float] = "same"  # "none", or (low, high), of prefix tokens
    importance_level: str = "token"  # "sequence": one ratio a row, from its mean log-ratio
    importance_cap: float | None = None  # > 0: weigh by min(exp(old - rollout log-prob), cap)
    entropy_coef: float = 0.0  # the loss falls by this times the entropy, nats
    kl: str = "none"  # estimator of the KL to the reference: "none", "k1", "k2", "k3"
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        _check.number("clip_low", self.clip_low, least=0, may_be_infinite=True)
        _check.number("clip_high", self.clip_high, least=0, may_be_infinite=True)
        if self.dual_clip is not None:
            _check.number("dual_clip", self.dual_clip, above=1)
        if isinstance(self.prefix_clip, str):
            _check.one_of("prefix_clip", self.prefix_clip, ("same", "none"))
        else:
            object.__setattr__(self, "prefix_clip", _pair("prefix_clip", self.prefix_clip))
        _check.one_of("importance_level", self.importance_level, ("token", "sequence"))
        if self.importance_cap is not None:
            _check.number("importance_cap", self.importance_cap, above=0)
        _check.number("entropy_coef", self.entropy_coef)
        _check.one_of("kl", self.kl, ("none", "k1", "k2", "k3"))
        _check.number("kl_coef", self.kl_coef)

    @property
    def uses_kl(self) -> bool:
        return self.kl != "none" and self.kl_coef != 0

    @property
    def terms(self) -> Terms:
        own = self.clip_low, self.clip_high
        other = {"same": own, "none": (inf, inf)}.get(self.prefix_clip, self.prefix_clip)
        return Terms(
            clip_range=[bound for low, high in (own, other) for bound in (1 - low, 1 + high)],
            dual_clip=self.dual_clip,
            importance_cap=self.importance_cap,
            entropy_coef=self.entropy_coef,
            kl=self.kl if self.uses_kl else "none",
            kl_coef=self.kl_coef,
        )

    @property
    def depends_on_row_alone(self) -> bool:
        """Whether the derivatives of a row need nothing from the forward of other rows."""
        return self.importance_level == "token"

    @property
    def vanishes_without_advantage(self) -> bool:
        """Whether a token whose advantage is 0 has no gradient."""
        return self.importance_level == "token" and not self.entropy_coef and not self.uses_kl


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f'{name} must be "same", "none" or (low, high), got {value!r}')
    for number in value:
        _check.number(name, number, least=0, may_be_infinite=True)
    return tuple(value)


DEFAULT_CONFIG = PolicyConfig()
