"""The sections of a configuration, each checked when it is made.

`None` in a field means "derived" or "off", as its comment says; TOML has no null, so the file
leaves such a key out.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from prefix_rft.checks import Fraction, config_section, require

AtLeastTwo = Annotated[int, Field(ge=2)]
Beta = Annotated[float, Field(ge=0, lt=1, description="a number in [0, 1)")]
Steps = Annotated[int, Field(ge=1, le=26, description="a whole number in [1, 26]")]


def _require_clip_range(clip: tuple[float, float], key: str) -> None:
    low, high = clip
    require(0 <= low < 1 and high >= 0, key, "offsets from 1: 0 <= low < 1 and high >= 0", clip)


@config_section("data")
class DataConfig:
    """The problems."""

    # "testbed", a file (parquet, json, jsonl), a folder, or a hub id[:configuration]
    path: Annotated[str, Field(min_length=1, description="a path or hub id")] = "testbed"
    split: str = "train"  # split of `path`
    eval_path: str | None = None  # held-out problems; None: the last `num_eval` rows of `path`
    eval_split: str = "test"  # split of `eval_path`
    num_eval: PositiveInt = 128  # held-out problems used at most
    # prompt / answer / demonstration -> column (a.b: field b of column a); empty: detected
    columns: dict[str, str] = field(default_factory=dict)
    eval_columns: dict[str, str] = field(default_factory=dict)  # the same for `eval_path`
    system_prompt: str | None = None  # put before prompts that have none
    # how a text gives its answer: "boxed", or a marker like "####" before it
    answer_pattern: Annotated[str, Field(pattern=r"\S", description='"boxed" or a marker')] = (
        "boxed"
    )
    max_prompt_tokens: PositiveInt = 1024  # problems with a longer prompt are left out
    # fraction of rows that keep their demonstration; the others become plain RL rows
    demonstration_fraction: Fraction = 1.0
    strict: bool = False  # refuse a dataset with unusable rows instead of dropping them

    def __post_init__(self) -> None:
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


@config_section("testbed")
class TestbedConfig:
    """The synthetic arithmetic problems of `data.path = "testbed"`."""

    __test__ = False  # keeps pytest from collecting the class

    num_train: PositiveInt = 4096  # problems to train on
    min_steps: Steps = 3  # arithmetic steps of the shortest problems
    max_steps: Steps = 8  # and of the longest
    max_operand: PositiveInt = 6  # the largest number that a step adds or subtracts
    max_value: int = 20  # no number in a problem, given or intermediate, is larger
    # fraction of the base's training texts whose prompt asks for the steps, which then are shown
    asked_fraction: Fraction = 0.6
    easy_steps: NonNegativeInt = 3  # problems of up to that many steps count as easy
    # fraction of the easy problems that are worked step by step where the prompt does not ask
    easy_worked_fraction: Fraction = 0.95
    hard_worked_fraction: Fraction = 0.02  # the same for the others; the rest is guessed at once

    def __post_init__(self) -> None:
        require(
            self.min_steps <= self.max_steps,
            "testbed.min_steps",
            f"at most testbed.max_steps ({self.max_steps})",
            self.min_steps,
        )
        require(
            self.max_value >= 2 * self.max_operand,
            "testbed.max_value",
            f"at least twice testbed.max_operand ({self.max_operand})",
            self.max_value,
        )


@config_section("base")
class BaseConfig:
    """The small base model that is trained from scratch where `model.path` is not given."""

    cache_dir: str = "runs/base"  # one folder per distinct base, named by a hash of what made it
    # entries of the tokenizer at most; 256 bytes and 5 special tokens are among them
    vocab_size: Annotated[int, Field(ge=261)] = 320
    hidden_size: PositiveInt = 128  # width of the model
    num_layers: PositiveInt = 3  # transformer blocks
    num_heads: PositiveInt = 4  # attention heads of a block
    intermediate_size: PositiveInt = 384  # width of the MLP
    max_length: PositiveInt = 512  # tokens of a training text at most; longer ones are left out
    max_position_embeddings: int = 2048  # positions, in tokens, that the model declares
    num_batches: PositiveInt = 1200  # updates of its training
    batch_size: PositiveInt = 64  # texts of an update
    lr: PositiveFloat = 3e-3  # peak learning rate

    def __post_init__(self) -> None:
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


@config_section("model")
class ModelConfig:
    """The model that is trained, and how it computes."""

    path: str | None = None  # Hugging Face folder or hub id; None: build a base by [base]
    # dtype of the compute; auto: bfloat16 on CUDA, float32 on CPU
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # auto: cuda where there is one, else cpu
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<number>"),
    ] = "auto"
    # implementation of the attention; auto: flash_attention_2 where it is installed, else sdpa
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False  # compute activations again in backward: less memory
    liger: bool = False  # liger-kernel's RMSNorm, RoPE and SwiGLU; CUDA only
    # rank of adapters that are trained in place of the body's weights; None: train all weights
    lora_rank: PositiveInt | None = None
    lora_alpha: PositiveFloat = 32.0  # adapters are scaled by lora_alpha / lora_rank
    rope_theta: PositiveFloat | None = None  # base of the rotary embedding; None: as in the model
    max_position_embeddings: PositiveInt | None = None  # tokens; None: as in the model
    chat_template: str | None = None  # Jinja text, or a path to it; None: as in the tokenizer


@config_section("rollout")
class RolloutConfig:
    """How the policy is sampled in training."""

    # transformers: in process; vllm: in process; vllm_server: at vllm.server_url
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    group_size: AtLeastTwo = 8  # rollouts per prompt, hybrids included
    temperature: PositiveFloat = 1.0  # of sampling, and of every log-prob and entropy in training
    max_response_length: AtLeastTwo = 8192  # tokens, prefix included
    max_batch_sequences: PositiveInt = 256  # sequences generated at once
    # nats a token, mean of |engine - trainer|; above it the run stops; None: it never does
    max_log_prob_gap: PositiveFloat | None = 0.1


@config_section("vllm")
class VLLMConfig:
    """What the engines `vllm` and `vllm_server` need to know besides `[rollout]`."""

    tensor_parallel_size: PositiveInt = (
        1  # neighbouring processes that share one copy of the weights
    )
    # fraction of the device's memory (without CUDA: the machine's) for weights and KV cache
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="a fraction in (0, 1]")
    ] = 0.45
    kv_cache_mib: PositiveInt | None = None  # size of the KV cache; None: what the fraction leaves
    enforce_eager: bool = False  # no compilation, no CUDA graphs: a faster start, slower tokens
    # give up weights and KV cache while training; None: where there is CUDA
    sleep: bool | None = None
    weight_bucket_mib: PositiveInt = 512  # gathered at once when new weights are pushed
    # address of prefix-rft serve, for the engine vllm_server
    server_url: Annotated[str, Field(pattern="^https?://", description="http://host:port")] = (
        "http://127.0.0.1:8000"
    )


@config_section("prefix")
class PrefixConfig:
    num_hybrid: NonNegativeInt = (
        1  # rollouts of a group that start from a piece of the demonstration
    )
    schedule: Literal["cosine_window", "cosine", "linear_window", "uniform", "constant"] = (
        "cosine_window"
    )
    low: float = 0.05  # share of the demonstration
    high: float = 0.95
    horizon_steps: PositiveInt | None = None  # steps of the decay; None: the run's own number
    min_prefix_tokens: PositiveInt = 1

    def __post_init__(self) -> None:
        require(
            0 <= self.low <= self.high <= 1,
            "prefix.low",
            "0 <= low <= high <= 1",
            (self.low, self.high),
        )


@config_section("method")
class MethodConfig:
    name: Literal["prefix_rft", "rft"] = "prefix_rft"
    advantage: Literal["joint", "exclude_hybrid"] = "joint"  # whose mean is the baseline
    drop_negative_prefix_advantage: bool = False
    selection_fraction: Fraction = 0.2  # share of prefix tokens that get gradient
    selection_scope: Literal["minibatch", "sequence"] = "minibatch"
    selection_order: Literal["high", "low", "random"] = "high"


@config_section("loss")
class LossConfig:
    """The clipped objective; the fields of `rft_kernels.PolicyConfig`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    prefix_clip: Literal["same", "none"] | tuple[float, float] = "same"
    importance_level: Literal["token", "sequence"] = "token"
    importance_cap: PositiveFloat | None = None
    entropy_coef: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        _require_clip_range((self.clip_low, self.clip_high), "loss.clip_low, loss.clip_high")
        if isinstance(self.prefix_clip, tuple):
            _require_clip_range(self.prefix_clip, "loss.prefix_clip")


@config_section("reward")
class RewardConfig:
    """How a response is graded."""

    # dotted path to f(completions, **columns) -> list[float]; None: the math grader
    function: str | None = None
    num_workers: PositiveInt = 2  # grader processes
    timeout_s: PositiveFloat = 5.0  # seconds per answer; then the worker is killed and replaced
    memory_mib: Annotated[int, Field(ge=64)] = 1024  # address space of a worker above its start
    max_error_fraction: Fraction = 0.5  # fraction of a step's rollouts; above it the run stops


@config_section("optimizer")
class OptimizerConfig:
    """The optimizer of the policy, and its learning rate over the steps."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: its state in 8 bits, by torchao
    lr: PositiveFloat = 1e-6  # learning rate after the warm-up
    weight_decay: NonNegativeFloat = 0.01  # decoupled, times the learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # decay of the two running averages
    eps: PositiveFloat = 1e-8  # added to the root of the second average
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup_steps: NonNegativeInt = 0  # steps of a linear warm-up
    max_grad_norm: PositiveFloat = 1.0  # the gradient's norm is clipped to it


@config_section("sharding")
class ShardingConfig:
    """How the processes that torchrun starts share the model; one process shares nothing."""

    replicas: PositiveInt = (
        1  # whole copies of the model; the processes of one copy share it (FSDP2)
    )
    cpu_offload: bool = False  # weights, gradients and optimizer state wait in host memory
    timeout_s: PositiveFloat = 1800.0  # seconds that a process may keep the others waiting


@config_section("trainer")
class TrainerConfig:
    """The steps of a run."""

    num_steps: PositiveInt = 500  # each: rollouts, their grading, and the updates they allow
    prompts_per_step: PositiveInt = 128  # problems whose groups are generated together
    # a mini-batch; prompts_per_step / prompts_per_update updates a step
    prompts_per_update: PositiveInt = 64
    micro_batch_tokens: PositiveInt = 16384  # tokens of one packed forward; a longer row goes alone
    checkpoint_every: NonNegativeInt = 50  # steps; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # newest checkpoints that stay on disk
    async_checkpoints: bool = True  # the next steps run while a checkpoint is written
    sample_every: PositiveInt = 5  # steps between the rollouts kept for the report
    # steps, from 0, of which a torch profiler trace is kept
    profile_steps: tuple[NonNegativeInt, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.prompts_per_step % self.prompts_per_update == 0,
            "trainer.prompts_per_update",
            f"a divisor of trainer.prompts_per_step ({self.prompts_per_step})",
            self.prompts_per_update,
        )


@config_section("eval")
class EvalConfig:
    """How held-out problems are sampled."""

    every: NonNegativeInt = 0  # steps between evaluations during training; 0: only base and end
    num_samples: PositiveInt = 8  # k of avg@k and pass@k; greedy is always reported
    temperature: PositiveFloat = 0.6  # of the k samples
    max_response_length: AtLeastTwo | None = None  # tokens; None: as in training


@config_section("log")
class LogConfig:
    """Where the metrics of a run go, besides its metrics.jsonl."""

    tensorboard: bool = True  # write TensorBoard files into the run folder
    wandb_project: str | None = None  # None: no wandb
    progress: Literal["auto", "rich", "plain"] = "auto"  # auto: rich on a terminal
