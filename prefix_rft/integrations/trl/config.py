"""The options of `PrefixGRPOTrainer`: TRL's, and those of Prefix-RFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from prefix_rft.checks import ConfigError, require
from prefix_rft.methods import PrefixRFT, PrefixRFTConfig

# Options of Prefix-RFT -> their names here, where a word alone would not say whose they are.
_NAMES = {
    "num_hybrid": "num_hybrid",
    "schedule": "prefix_schedule",
    "low": "prefix_low",
    "high": "prefix_high",
    "horizon_steps": "prefix_horizon_steps",
    "min_prefix_tokens": "min_prefix_tokens",
    "shared_prefix": "shared_prefix",
    "advantage": "advantage_baseline",
    "drop_negative_prefix_advantage": "drop_negative_prefix_advantage",
    "selection_fraction": "selection_fraction",
    "selection_scope": "selection_scope",
    "selection_order": "selection_order",
}
FUSED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PrefixGRPOConfig(GRPOConfig):
    """TRL's options, and those of Prefix-RFT (docs/in-your-trainer.md, docs/configuration.md).

    Two defaults of TRL's are others: `loss_type` and `scale_rewards`, those of the paper. With
    `num_hybrid = 0` no rollout starts from a demonstration, and none of the options below counts.

    Raises:
        ConfigError: an option has a value that is not allowed, or that does not go with the others.
    """

    loss_type: str = _option("dr_grpo", "As in GRPOConfig.")
    scale_rewards: str | bool = _option("none", "As in GRPOConfig.")
    demonstration_column: str = _option(
        "completion",
        "Column of the demonstrations: text, or messages, of which the last of the assistant "
        "counts. A row without one has ordinary rollouts only.",
    )
    num_hybrid: int = _option(1, "Rollouts of each prompt that start inside its demonstration.")
    prefix_schedule: str = _option(
        "cosine_window", "cosine_window, cosine, linear_window, uniform or constant."
    )
    prefix_low: float = _option(0.05, "Shortest prefix, a fraction of the demonstration.")
    prefix_high: float = _option(0.95, "Longest prefix, a fraction of the demonstration.")
    prefix_horizon_steps: int | None = _option(
        None, "Optimizer steps of the schedule; None: those of the run."
    )
    min_prefix_tokens: int = _option(1, "Tokens of a prefix at least.")
    shared_prefix: bool = _option(False, "Whether the hybrid rollouts of a prompt share a prefix.")
    advantage_baseline: str = _option(
        "joint", "Rollouts that set the baseline: joint (all) or exclude_hybrid."
    )
    drop_negative_prefix_advantage: bool = _option(
        False, "Whether prefix tokens count only where their advantage is positive."
    )
    selection_fraction: float = _option(
        0.2, "Fraction of the prefix tokens of an optimizer step that are trained on."
    )
    selection_scope: str = _option("minibatch", "minibatch (an optimizer step) or sequence.")
    selection_order: str = _option("high", "Entropy of those selected: high, low or random.")
    head: str = _option(
        "fused",
        "fused: lm_head and loss in one op of rft_kernels, for the losses that it has. trl: TRL's "
        "own loss, for all of its options.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.head in ("fused", "trl"), "head", "'fused' or 'trl'", self.head)
        options = self.prefix_options()
        if not options.num_hybrid:
            return
        with _our_names():
            PrefixRFT.check(
                options,
                group_size=self.num_generations,
                max_response_length=self.max_completion_length,
            )
        require(
            self.steps_per_generation % self.gradient_accumulation_steps == 0,
            "steps_per_generation",
            "a multiple of gradient_accumulation_steps "
            f"({self.gradient_accumulation_steps}): the prefix tokens of an optimizer step are "
            "selected together, before it",
            self.steps_per_generation,
        )
        require(
            self.multi_objective_aggregation == "sum_then_normalize",
            "multi_objective_aggregation",
            "'sum_then_normalize': the advantages of hybrid rollouts are made from one reward",
            self.multi_objective_aggregation,
        )
        if self.head == "fused":
            self._check_fused()

    def prefix_options(self) -> PrefixRFTConfig:
        """The options that Prefix-RFT has everywhere, under their own names."""
        with _our_names():
            return PrefixRFTConfig(**{own: getattr(self, name) for own, name in _NAMES.items()})

    def _check_fused(self) -> None:
        """Refuse what the loss of the kernels does not have."""
        has_kl = self.beta != 0.0
        for name, allowed in (
            ("loss_type", FUSED_LOSSES),
            ("importance_sampling_level", ("token",)),
            ("delta", (None,)),
            ("top_entropy_quantile", (1.0,)),
            ("entropy_coef", (0.0,)),
            ("use_adaptive_entropy", (False,)),
            ("off_policy_mask_threshold", (None,)),
            ("cast_lm_head_to_fp32", (False,)),
            *([("use_bias_correction_kl", (False,))] if has_kl else []),
        ):
            value, expected = getattr(self, name), " or ".join(map(repr, allowed))
            require(
                value in allowed, name, f"{expected} with head = 'fused', or head = 'trl'", value
            )
        require(
            not (has_kl and self.loss_type == "grpo"),
            "beta",
            "0 with loss_type = 'grpo' and head = 'fused', or head = 'trl'",
            self.beta,
        )


@contextmanager
def _our_names() -> Iterator[None]:
    """Names an option of Prefix-RFT in an error as it is called here."""
    try:
        yield
    except ConfigError as error:
        key, _, text = str(error).partition(":")
        text = text.replace("rollout.group_size", "num_generations")
        text = text.replace("rollout.max_response_length", "max_completion_length")
        raise ConfigError(f"{_NAMES[key.split('.')[-1]]}:{text}") from None
