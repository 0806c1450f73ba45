"""The section [loss]: the clipped objective that methods of policy gradient share."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from prefix_rft.checks import config_section, require

if TYPE_CHECKING:
    from rft_kernels import PolicyConfig


@config_section("loss")
class LossConfig:
    """The clipped objective; the fields of `rft_kernels.PolicyConfig`."""

    clip_low: float = 0.2  # ratios are clipped at 1 - clip_low from below
    clip_high: float = 0.2  # ratios are clipped at 1 + clip_high from above
    # largest ratio that counts where the advantage is negative; None: any
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    # clip of prefix tokens: that of the others, none, or their own [low, high]
    prefix_clip: Literal["same", "none"] | tuple[float, float] = "same"
    importance_level: Literal["token", "sequence"] = "token"  # what a ratio is taken over
    # largest weight that corrects for the engine's log-probs; None: no correction
    importance_cap: PositiveFloat | None = None
    entropy_coef: NonNegativeFloat = 0.0  # coefficient of the entropy bonus
    # estimator of the KL divergence to [reference] that the loss adds, by d = log-prob - reference:
    # k1: d, k2: d^2 / 2, k3: e^-d - 1 + d
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: NonNegativeFloat = 0.0  # its coefficient

    def __post_init__(self) -> None:
        _require_clip_range((self.clip_low, self.clip_high), "loss.clip_low, loss.clip_high")
        if isinstance(self.prefix_clip, tuple):
            _require_clip_range(self.prefix_clip, "loss.prefix_clip")

    @property
    def uses_kl(self) -> bool:
        return self.kl != "none" and self.kl_coef > 0

    def policy_config(self) -> PolicyConfig:
        from rft_kernels import PolicyConfig

        return PolicyConfig(**asdict(self))


def _require_clip_range(clip: tuple[float, float], key: str) -> None:
    low, high = clip
    require(0 <= low < 1 and high >= 0, key, "offsets from 1: 0 <= low < 1 and high >= 0", clip)
