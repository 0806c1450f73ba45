"""The sections of a configuration, each checked when it is made.

`None` in a field means "derived" or "off", as its comment says; TOML has no null, so the file
leaves such a key out.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from prefix_rft.checks import Fraction, config_section, require
from prefix_rft.methods import DEFAULT_METHOD, AdvantageScale

NonEmpty = Annotated[str, Field(min_length=1, description="a text")]
START = "start"  # as the reference: the model that the run starts from
AtLeastTwo = Annotated[int, Field(ge=2)]
Beta = Annotated[float, Field(ge=0, lt=1, description="a number in [0, 1)")]
Rounds = Annotated[int, Field(ge=0, le=16, description="a whole number in [0, 16]")]


@config_section("model")
class ModelConfig:
    """The model to train, and how it computes."""

    path: str | None = None  # model folder, run folder or hub id; None: a base by [base]
    # dtype of the compute; auto: bfloat16 on CUDA, float32 on CPU
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # device to compute on; auto: cuda if there is one, else cpu
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<number>"),
    ] = "auto"
    # implementation of the attention; auto: flash_attention_2 where it is installed, else sdpa
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    # recompute activations in the backward pass to save memory
    gradient_checkpointing: bool = False
    liger: bool = False  # liger-kernel's RMSNorm, RoPE and SwiGLU; CUDA only
    # rank of LoRA adapters, trained in place of the body's weights; None: train all weights
    lora_rank: PositiveInt | None = None
    lora_alpha: PositiveFloat = 32.0  # adapters are scaled by lora_alpha / lora_rank
    rope_theta: PositiveFloat | None = None  # base of the rotary embedding; None: as in the model
    max_position_embeddings: PositiveInt | None = None  # in tokens; None: as in the model
    chat_template: str | None = None  # Jinja text, or a path to it; None: as in the tokenizer


@config_section("rollout")
class RolloutConfig:
    """How rollouts are sampled in training."""

    # generates with the trained model itself, vLLM in process, or vLLM at vllm.server_url
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    group_size: AtLeastTwo = 8  # rollouts per prompt, hybrids included
    temperature: PositiveFloat = 1.0  # for sampling, log-probs and entropies
    max_response_length: AtLeastTwo = 8192  # tokens of a response at most, prefix included
    # end a response, besides the end-of-turn token of the chat template and the model's own
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    # texts that end a response as well, with the token that completes one; with vLLM each response
    # is generated to its own end before it is cut
    stop: tuple[NonEmpty, ...] = ()
    # rollouts that were cut at max_response_length count for their group, and are not learnt from
    mask_truncated: bool = False
    # rounds in which groups whose rewards are all equal are replaced by those of other prompts
    resample_groups: Rounds = 0
    max_batch_sequences: PositiveInt = 256  # sequences generated at once
    # rows whose probability by the trainer, over that by the engine, is above this, or below its
    # inverse, are left out of the loss; None: none is
    max_sequence_mismatch: Annotated[float, Field(gt=1)] | None = None
    # that ratio: of all tokens of a response that were sampled, or its geometric mean over them
    mismatch_level: Literal["sequence", "geometric"] = "sequence"
    # the run stops above this mean |engine - trainer|, in nats per token; None: it never does
    max_log_prob_gap: PositiveFloat | None = 0.1


@config_section("vllm")
class VLLMConfig:
    """Settings of the engines `vllm` and `vllm_server` besides `[rollout]`."""

    # neighbouring processes that share one copy of the weights
    tensor_parallel_size: PositiveInt = 1
    # fraction of the device's memory (without CUDA: the machine's) for weights and KV cache
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="a fraction in (0, 1]")
    ] = 0.45
    kv_cache_mib: PositiveInt | None = None  # size of the KV cache; None: what the fraction leaves
    enforce_eager: bool = False  # no compilation, no CUDA graphs: a faster start, slower tokens
    # free the engine's weights and KV cache while training; None: on CUDA only
    sleep: bool | None = None
    weight_bucket_mib: PositiveInt = 512  # size of the weights gathered at once for a push
    # address of prefix-rft serve, for the engine vllm_server
    server_url: Annotated[str, Field(pattern="^https?://", description="http://host:port")] = (
        "http://127.0.0.1:8000"
    )
    # file with the server's token, written by prefix-rft serve; None: server.token in the run
    # folder. The environment variable PREFIX_RFT_SERVER_TOKEN goes before it
    token_file: str | None = None
    # further arguments of vLLM's engine by their own names, such as speculative_config; in a file
    options: dict[str, Any] = field(default_factory=dict)


@config_section("method")
class MethodConfig:
    """What trains the model; each method's own options are in the section of its name."""

    name: str = DEFAULT_METHOD  # name of a method, or package.module:Class for your own
    # advantages of rft and prefix_rft are divided by the standard deviation of the rewards of their
    # group, or of the whole step
    advantage_scale: AdvantageScale = "none"


@config_section("reference")
class ReferenceConfig:
    """The model that a KL term holds the policy to; loaded where the method has such a term."""

    # "start", the model that the run starts from, or a model folder, run folder or hub id
    model: NonEmpty = START
    # steps after which the reference becomes the policy, again and again; 0: never
    update_every: NonNegativeInt = 0


MATH = "math"  # the name of the math grader among reward functions
# of metrics reward/<name>_mean that are no function's
RESERVED_NAMES = frozenset(["", "hybrid", "on_policy", "overlong_penalty"])


def function_name(path: str) -> str:
    """The last part of the dotted path of a reward function."""
    return path.replace(":", ".").rpartition(".")[2]


@config_section("reward")
class RewardConfig:
    """How responses are graded."""

    # dotted path to f(completions, **columns) -> list[float]; None: the math grader
    function: str | None = None
    # such a path, or "math" for the math grader -> weight: the reward is the weighted sum
    functions: dict[str, float] = field(default_factory=dict)
    # smallest reward of a correct response; where the math grader is asked, it decides
    correct_reward: float = 1.0
    retries: NonNegativeInt = 0  # further calls of a function after one that raised an exception
    retry_wait_s: NonNegativeFloat = 1.0  # seconds before the first retry, doubled for each next
    # None of a function means no reward, and where all of them give None, the rollout is left out
    # of everything. False: an error
    allow_none: bool = False
    # in training, a response loses up to `overlong_penalty` within the last so many tokens before
    # rollout.max_response_length; 0: no penalty
    overlong_tokens: NonNegativeInt = 0
    overlong_penalty: NonNegativeFloat = 1.0  # what a response of the full length loses
    num_workers: PositiveInt = 2  # grader processes
    timeout_s: PositiveFloat = 5.0  # processor seconds per answer; then its worker is replaced
    # address space of a worker beyond its start-up size
    memory_mib: Annotated[int, Field(ge=64)] = 1024
    max_error_fraction: Fraction = 0.5  # fraction of rollouts that may fail to be graded

    def __post_init__(self) -> None:
        require(
            not (self.function and self.functions),
            "reward.functions",
            f"none beside reward.function ({self.function!r})",
            self.functions,
        )
        names = [function_name(path) for path in self.functions]
        require(
            len(set(names)) == len(names) and not RESERVED_NAMES.intersection(names),
            "reward.functions",
            f"functions of different names, other than {', '.join(sorted(RESERVED_NAMES))}",
            list(self.functions),
        )

    @property
    def weights(self) -> dict[str, float]:
        """Path of each reward function, or `MATH`, -> weight."""
        return self.functions or {self.function or MATH: 1.0}


@config_section("optimizer")
class OptimizerConfig:
    """The optimizer, and its learning rate over the steps of a run."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: 8-bit state, by torchao
    lr: PositiveFloat = 1e-6  # peak learning rate
    weight_decay: NonNegativeFloat = 0.01  # decoupled weight decay
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # decay rates of the two moment estimates
    eps: PositiveFloat = 1e-8  # added to the denominator
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # learning rate after warm-up
    warmup_steps: NonNegativeInt = 0  # steps of linear warm-up
    warmup_fraction: Fraction = 0.0  # linear warm-up as a fraction of the run's steps
    final_lr_fraction: Fraction = 0.0  # linear and cosine end at this fraction of lr
    max_grad_norm: PositiveFloat = 1.0  # gradients are clipped to this norm

    def __post_init__(self) -> None:
        require(
            not (self.warmup_steps and self.warmup_fraction),
            "optimizer.warmup_fraction",
            f"0 beside optimizer.warmup_steps ({self.warmup_steps})",
            self.warmup_fraction,
        )
        require(
            self.schedule != "constant" or not self.final_lr_fraction,
            "optimizer.final_lr_fraction",
            "0 with the constant schedule",
            self.final_lr_fraction,
        )


@config_section("sharding")
class ShardingConfig:
    """How the processes started by torchrun share the model."""

    replicas: PositiveInt = 1  # full copies of the model, each sharded over its processes (FSDP2)
    cpu_offload: bool = False  # keep weights, gradients and optimizer state in host memory
    timeout_s: PositiveFloat = 1800.0  # longest wait for another process before the run fails


@config_section("trainer")
class TrainerConfig:
    """The steps of a run."""

    num_steps: PositiveInt = 500  # steps of the run; each generates, grades and updates
    prompts_per_step: PositiveInt = 128  # prompts per step, over all processes
    prompts_per_update: PositiveInt = 64  # prompts per mini-batch; a divisor of prompts_per_step
    micro_batch_tokens: PositiveInt = 16384  # tokens per packed forward; a longer row goes alone
    checkpoint_every: NonNegativeInt = 50  # steps between checkpoints; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # number of checkpoints to keep, the newest ones
    async_checkpoints: bool = True  # write checkpoints while the next steps run
    sample_every: PositiveInt = 5  # steps between rollouts kept for the report
    # steps, counted from 0, to record a torch profiler trace of
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
    """Evaluation on the held-out problems."""

    every: NonNegativeInt = 0  # steps between evaluations during training; 0: only base and end
    num_samples: PositiveInt = 8  # k of avg@k and pass@k; greedy is always reported
    temperature: PositiveFloat = 0.6  # sampling temperature of the k samples
    # tokens of a response at most; None: as in training
    max_response_length: AtLeastTwo | None = None
    # column of the held-out rows; avg@k and greedy are also reported for each of its values
    group_by: NonEmpty | None = None
    # benchmarks of prefix-rft eval --suite, by comma, that are evaluated as well
    suites: NonEmpty | None = None
    suite_data: NonEmpty | None = None  # file with their problems; None: the hub
    suite_limit: PositiveInt | None = None  # problems of a benchmark at most, evenly spaced
    suite_samples: PositiveInt | None = None  # of each of their problems; None: their protocol's
    # keep the model of the evaluation with the highest avg@k on the held-out problems ("held_out")
    # or on one of `suites`; None: the last model alone
    select_by: NonEmpty | None = None
    select_on_test: bool = False  # allow benchmarks in `select_by`, which then measure no more

    def __post_init__(self) -> None:
        known = ["held_out", *(self.suites or "").replace(" ", "").split(",")]
        require(
            self.select_by is None or self.select_by in known,
            "eval.select_by",
            "held_out or one of eval.suites",
            self.select_by,
        )


@config_section("log")
class LogConfig:
    """Where metrics are shown, besides the run folder's metrics.jsonl."""

    tensorboard: bool = True  # write TensorBoard files to the run folder
    wandb_project: str | None = None  # project to log to; None: no wandb
    progress: Literal["auto", "rich", "plain"] = "auto"  # console output; auto: rich on a terminal
