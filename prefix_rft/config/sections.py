"""The sections of a configuration, each checked when it is made.

`None` in a field means "derived" or "off", as its comment says; TOML has no null, so the file
leaves such a key out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from prefix_rft.checks import require


def _check_each(section: object, names: tuple[str, ...], test: Callable, expected: str) -> None:
    """Require `test` of each named field that is not None."""
    prefix = type(section).__name__.removesuffix("Config").lower()
    for name in names:
        value = getattr(section, name)
        require(value is None or test(value), f"{prefix}.{name}", expected, value)


def _at_least(least: float, section: object, *names: str) -> None:
    _check_each(section, names, lambda value: value >= least, f"at least {least}")


def _above(bound: float, section: object, *names: str) -> None:
    _check_each(section, names, lambda value: value > bound, f"above {bound}")


def _fractions(section: object, *names: str) -> None:
    _check_each(section, names, lambda value: 0 <= value <= 1, "a fraction in [0, 1]")


def _require_clip_range(clip: tuple[float, float], key: str) -> None:
    low, high = clip
    require(0 <= low < 1 and high >= 0, key, "offsets from 1: 0 <= low < 1 and high >= 0", clip)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = "testbed"  # or a file (parquet, json, jsonl), a folder, a hub id[:configuration]
    split: str = "train"
    eval_path: str | None = None  # held-out problems; None: the last `num_eval` rows of `path`
    eval_split: str = "test"
    num_eval: int = 128  # held-out problems used at most
    # prompt / answer / demonstration -> column (a.b: field b of column a); empty: detected
    columns: dict[str, str] = field(default_factory=dict)
    eval_columns: dict[str, str] = field(default_factory=dict)  # the same for `eval_path`
    system_prompt: str | None = None  # put before prompts that have none
    answer_pattern: str = "boxed"  # how a text gives its answer: "boxed", or a marker like "####"
    max_prompt_tokens: int = 1024
    # share of rows that keep their demonstration; the others become plain RL rows
    demonstration_fraction: float = 1.0
    strict: bool = False  # refuse a dataset with unusable rows instead of dropping them

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "a path or hub id", self.path)
        _at_least(1, self, "num_eval", "max_prompt_tokens")
        _fractions(self, "demonstration_fraction")
        for key, columns in (("columns", self.columns), ("eval_columns", self.eval_columns)):
            require(
                not columns
                or {"prompt", "answer"} <= set(columns) <= {"prompt", "answer", "demonstration"},
                f"data.{key}",
                "the keys prompt, answer and, where there is one, demonstration",
                sorted(columns),
            )
        require(
            self.eval_path is not None or not self.eval_columns,
            "data.eval_columns",
            "none without data.eval_path",
            self.eval_columns,
        )
        require(
            bool(self.answer_pattern.strip()),
            "data.answer_pattern",
            '"boxed" or a marker',
            self.answer_pattern,
        )


@dataclass(frozen=True, kw_only=True)
class TestbedConfig:
    """The synthetic arithmetic problems of `data.path = "testbed"`."""

    __test__ = False  # keeps pytest from collecting the class

    num_train: int = 4096
    min_steps: int = 3  # of a problem
    max_steps: int = 8
    max_operand: int = 6
    max_value: int = 20  # no number in a problem, given or intermediate, is larger
    # What the base is taught, as shares of its texts:
    asked_fraction: float = 0.6  # the prompt asks for the steps, and they are shown
    easy_steps: int = 3  # problems of up to that many steps count as easy
    easy_worked_fraction: float = 0.95  # of the easy ones, where the prompt does not ask
    hard_worked_fraction: float = 0.02  # of the others; the rest are guessed at once

    def __post_init__(self) -> None:
        _at_least(1, self, "num_train", "max_operand")
        _at_least(0, self, "easy_steps")
        _fractions(self, "easy_worked_fraction", "hard_worked_fraction", "asked_fraction")
        require(
            1 <= self.min_steps <= self.max_steps <= 26,
            "testbed.min_steps",
            f"1 <= min_steps <= max_steps ({self.max_steps}) <= 26",
            self.min_steps,
        )
        require(
            self.max_value >= 2 * self.max_operand,
            "testbed.max_value",
            f"at least twice testbed.max_operand ({self.max_operand})",
            self.max_value,
        )


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The small base model that is trained from scratch where `model.path` is not given."""

    cache_dir: str = "runs/base"  # one folder per distinct base, named by a hash of what made it
    vocab_size: int = 320  # of the tokenizer, at most; 256 bytes and 5 special tokens are in it
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    intermediate_size: int = 384
    max_length: int = 512  # tokens of a training text at most; longer ones are left out
    max_position_embeddings: int = 2048
    num_batches: int = 1200
    batch_size: int = 64  # texts
    lr: float = 3e-3

    def __post_init__(self) -> None:
        _at_least(261, self, "vocab_size")
        _at_least(1, self, "hidden_size", "num_layers", "num_heads", "intermediate_size")
        _at_least(1, self, "max_length", "num_batches", "batch_size")
        _above(0, self, "lr")
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "base.num_heads",
            f"a divisor of half of base.hidden_size ({self.hidden_size})",
            self.num_heads,
        )
        require(
            self.max_position_embeddings >= self.max_length,
            "base.max_position_embeddings",
            f"at least base.max_length ({self.max_length})",
            self.max_position_embeddings,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str | None = None  # Hugging Face folder or hub id; None: build a base by [base]
    # of the compute; auto: bfloat16 on CUDA, float32 on CPU
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    device: str = "auto"  # auto: cuda where there is one, else cpu
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    liger: bool = False  # liger-kernel's RMSNorm, RoPE and SwiGLU; CUDA only
    # of adapters that are trained in place of the weights of the body; None: all weights are
    lora_rank: int | None = None
    lora_alpha: float = 32.0  # adapters are scaled by lora_alpha / lora_rank
    rope_theta: float | None = None  # None: as in the model
    max_position_embeddings: int | None = None  # None: as in the model
    chat_template: str | None = None  # Jinja text, or a path to it; None: as in the tokenizer

    def __post_init__(self) -> None:
        _above(0, self, "rope_theta", "lora_alpha")
        _at_least(1, self, "max_position_embeddings", "lora_rank")
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "model.device",
            "auto, cpu, cuda or cuda:<number>",
            self.device,
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    group_size: int = 8  # rollouts per prompt, hybrids included
    temperature: float = 1.0  # of sampling, and of every log-prob and entropy in training
    max_response_length: int = 8192  # tokens, prefix included
    max_batch_sequences: int = 256  # sequences generated at once
    # nats a token, mean of |engine - trainer|; above it the run stops; None: it never does
    max_log_prob_gap: float | None = 0.1

    def __post_init__(self) -> None:
        _at_least(2, self, "group_size", "max_response_length")
        _at_least(1, self, "max_batch_sequences")
        _above(0, self, "temperature", "max_log_prob_gap")


@dataclass(frozen=True, kw_only=True)
class VLLMConfig:
    """What the engines `vllm` and `vllm_server` need to know besides `[rollout]`."""

    tensor_parallel_size: int = 1  # neighbouring processes that share one copy of the weights
    # share of the device's memory (without CUDA: of the machine's) for weights and KV cache
    gpu_memory_utilization: float = 0.45
    kv_cache_mib: int | None = None  # of the KV cache; None: what the share leaves
    enforce_eager: bool = False  # no compilation, no CUDA graphs: a faster start, slower tokens
    # give up weights and KV cache while training; None: where there is CUDA
    sleep: bool | None = None
    weight_bucket_mib: int = 512  # gathered at once when new weights are pushed
    server_url: str = "http://127.0.0.1:8000"  # of prefix-rft serve, for the engine vllm_server

    def __post_init__(self) -> None:
        _at_least(1, self, "tensor_parallel_size", "kv_cache_mib", "weight_bucket_mib")
        is_url = self.server_url.startswith(("http://", "https://"))
        require(is_url, "vllm.server_url", "http://host:port", self.server_url)
        _above(0, self, "gpu_memory_utilization")
        _fractions(self, "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    num_hybrid: int = 1  # rollouts of a group that start from a piece of the demonstration
    schedule: Literal["cosine_window", "cosine", "linear_window", "uniform", "constant"] = (
        "cosine_window"
    )
    low: float = 0.05  # share of the demonstration
    high: float = 0.95
    horizon_steps: int | None = None  # steps of the decay; None: the run's own number
    min_prefix_tokens: int = 1

    def __post_init__(self) -> None:
        _at_least(0, self, "num_hybrid")
        _at_least(1, self, "horizon_steps", "min_prefix_tokens")
        require(
            0 <= self.low <= self.high <= 1,
            "prefix.low",
            "0 <= low <= high <= 1",
            (self.low, self.high),
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    name: Literal["prefix_rft", "rft"] = "prefix_rft"
    advantage: Literal["joint", "exclude_hybrid"] = "joint"  # whose mean is the baseline
    drop_negative_prefix_advantage: bool = False
    selection_fraction: float = 0.2  # share of prefix tokens that get gradient
    selection_scope: Literal["minibatch", "sequence"] = "minibatch"
    selection_order: Literal["high", "low", "random"] = "high"

    def __post_init__(self) -> None:
        _fractions(self, "selection_fraction")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The clipped objective; the fields of `rft_kernels.PolicyConfig`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    prefix_clip: Literal["same", "none"] | tuple[float, float] = "same"
    importance_level: Literal["token", "sequence"] = "token"
    importance_cap: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        _require_clip_range((self.clip_low, self.clip_high), "loss.clip_low, loss.clip_high")
        if isinstance(self.prefix_clip, tuple):
            _require_clip_range(self.prefix_clip, "loss.prefix_clip")
        _above(1, self, "dual_clip")
        _above(0, self, "importance_cap")
        _at_least(0, self, "entropy_coef")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    # dotted path to f(completions, **columns) -> list[float]; None: the math grader
    function: str | None = None
    num_workers: int = 2  # grader processes
    timeout_s: float = 5.0  # per answer; then the worker is killed and replaced
    memory_mib: int = 1024  # address space of a worker above its start
    max_error_fraction: float = 0.5  # of a step's rollouts; above it the run stops

    def __post_init__(self) -> None:
        _at_least(1, self, "num_workers")
        _at_least(64, self, "memory_mib")
        _above(0, self, "timeout_s")
        _fractions(self, "max_error_fraction")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: its state in 8 bits, by torchao
    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _above(0, self, "lr", "eps", "max_grad_norm")
        _at_least(0, self, "weight_decay", "warmup_steps")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            "two numbers in [0, 1)",
            self.betas,
        )


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How the processes that torchrun starts share the model; one process shares nothing."""

    replicas: int = 1  # whole copies of the model; the processes of one copy share it (FSDP2)
    cpu_offload: bool = False  # weights, gradients and optimizer state wait in host memory
    timeout_s: float = 1800.0  # a process that keeps the others waiting for longer is lost

    def __post_init__(self) -> None:
        _at_least(1, self, "replicas")
        _above(0, self, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    num_steps: int = 500
    prompts_per_step: int = 128
    # a mini-batch; prompts_per_step / prompts_per_update updates a step
    prompts_per_update: int = 64
    micro_batch_tokens: int = 16384  # tokens of one packed forward; a longer row goes alone
    checkpoint_every: int = 50  # steps; 0: only at the end
    keep_checkpoints: int = 2
    async_checkpoints: bool = True  # the next steps run while a checkpoint is written
    sample_every: int = 5  # steps between the rollouts kept for the report
    profile_steps: tuple[int, ...] = ()  # steps, from 0, of which a torch profiler trace is kept

    def __post_init__(self) -> None:
        _at_least(1, self, "num_steps", "prompts_per_step", "prompts_per_update")
        _at_least(1, self, "micro_batch_tokens", "keep_checkpoints", "sample_every")
        _at_least(0, self, "checkpoint_every")
        _check_each(
            self, ("profile_steps",), lambda steps: min(steps, default=0) >= 0, "steps >= 0"
        )
        require(
            self.prompts_per_step % self.prompts_per_update == 0,
            "trainer.prompts_per_update",
            f"a divisor of trainer.prompts_per_step ({self.prompts_per_step})",
            self.prompts_per_update,
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0  # steps between evaluations during training; 0: only base and end
    num_samples: int = 8  # k of avg@k and pass@k; greedy is always reported
    temperature: float = 0.6  # of the k samples
    max_response_length: int | None = None  # tokens; None: as in training

    def __post_init__(self) -> None:
        _at_least(0, self, "every")
        _at_least(1, self, "num_samples")
        _at_least(2, self, "max_response_length")
        _above(0, self, "temperature")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = True
    wandb_project: str | None = None  # None: no wandb
    progress: Literal["auto", "rich", "plain"] = "auto"  # auto: rich on a terminal
