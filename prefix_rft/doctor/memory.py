"""The memory that one process of a run needs, computed from shapes; nothing is loaded."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from prefix_rft.config import Config
from prefix_rft.doctor.shapes import Place, Shapes, Weight
from prefix_rft.methods import find_method

WORKSPACE_BYTES = 2**30  # the default workspace of the vocabulary-sized ops of rft_kernels
# Device memory that no term counts: context, communication buffers, fragmentation, the kernels.
UNCOUNTED_FRACTION = 0.1
_FLOAT32 = 4
_BLOCK, _SMALLEST = 256, 4096  # torchao: numbers that share a scale; smaller tensors stay as is


@dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """Something that takes memory, and when."""

    name: str
    num_bytes: int
    formula: str
    # host: in host memory, always; avoided: not allocated, listed for comparison
    phase: Literal["always", "update", "rollout", "host", "avoided"]


def memory_terms(config: Config, shapes: Shapes, place: Place) -> list[MemoryTerm]:
    """All terms, with formulas, of the rank that needs the most memory."""
    is_sharded = place.num_processes > 1 or config.sharding.cpu_offload
    return [
        *_states(config, shapes, place),
        *(_gathered(shapes) if is_sharded else _cast(shapes, "update")),
        *_activations(shapes, is_checkpointed=config.model.gradient_checkpointing),
        *_lm_head(shapes),
        *_engine(config, shapes, place, is_sharded=is_sharded),
    ]


def peak_bytes(terms: Sequence[MemoryTerm], phase: Literal["update", "rollout", "host"]) -> int:
    """Memory in use at once in a phase; update and rollout alternate."""
    phases = ("host",) if phase == "host" else ("always", phase)
    return sum(term.num_bytes for term in terms if term.phase in phases)


def shortfalls(
    config: Config, shapes: Shapes, place: Place, terms: Sequence[MemoryTerm]
) -> list[str]:
    """Why the run does not fit into what `UNCOUNTED_FRACTION` leaves; empty if it fits."""
    limit = int((1 - UNCOUNTED_FRACTION) * place.device_bytes)
    reasons = [
        f"{phase} needs {peak_bytes(terms, phase) / 2**30:.1f} GiB of {limit / 2**30:.1f}"
        for phase in ("update", "rollout")
        if peak_bytes(terms, phase) > limit
    ]
    if config.rollout.engine == "vllm":
        tokens = kv_cache_tokens(config, shapes, place)
        if tokens < shapes.length:
            reasons.append(f"the engine's KV cache holds {tokens:,} of {shapes.length:,} tokens")
    return reasons


def kv_cache_tokens(config: Config, shapes: Shapes, place: Place) -> int:
    """Tokens that vLLM's KV cache can hold; vLLM needs at least `shapes.length` to start."""
    weights, cache = _engine_bytes(config, shapes, place)
    return max(0, cache) // (_kv_bytes(shapes) // config.vllm.tensor_parallel_size)


def _engine_bytes(config: Config, s: Shapes, place: Place) -> tuple[int, int]:
    """Bytes of vLLM's weights, and bytes left for its KV cache."""
    weights = s.num_parameters * s.compute_bytes // config.vllm.tensor_parallel_size
    if config.vllm.kv_cache_mib is not None:
        return weights, config.vllm.kv_cache_mib * 2**20
    return weights, int(config.vllm.gpu_memory_utilization * place.device_bytes) - weights


def _optimizers(config: Config) -> list[tuple[str, str]]:
    """What each optimizer of the method is called here, and its name in [optimizer]."""
    name = config.optimizer.name
    method = find_method(config.method.name)
    others = method.optimizers(config.section(method)).items()
    return [
        (name, name),
        *(
            (f"{changes.get('name', name)} of {own}", changes.get("name", name))
            for own, changes in others
        ),
    ]


def _states(config: Config, s: Shapes, place: Place) -> list[MemoryTerm]:
    """Weights, optimizer state, gradients, the reference: whole, or the shard of one rank."""
    num_shards = place.num_processes // config.sharding.replicas
    trained = [weight for weight in s.weights if weight.is_trained]
    offload = config.sharding.cpu_offload

    def term(name: str, weights: Sequence[Weight], size: Callable, phase: str) -> MemoryTerm:
        total = sum(weight.numel for weight in weights)
        num_bytes = sum(size(weight, weight.local_numel(num_shards)) for weight in weights)
        per_number = num_bytes * num_shards / total
        return MemoryTerm(
            name=name,
            num_bytes=num_bytes,
            formula=f"{total:,} parameters{_over(num_shards)} x {per_number:.3g} bytes",
            phase="host" if offload else phase,
        )

    def state_size(name: str, weight: Weight, numel: int) -> int:
        is_packed = name == "adamw_8bit" and numel >= _SMALLEST
        if is_packed and numel % _BLOCK == 0:
            return 2 * (numel + _FLOAT32 * numel // _BLOCK)
        return 2 * weight.itemsize * numel

    def plain_size(weight: Weight, numel: int) -> int:
        return weight.itemsize * numel

    frozen = [weight for weight in s.weights if not weight.is_trained]
    return [
        *([term("weights, frozen", frozen, plain_size, "always")] if frozen else []),
        term("weights, trained", trained, plain_size, "always"),
        *(
            term(f"optimizer state, {told}", trained, partial(state_size, name), "always")
            for told, name in _optimizers(config)
        ),
        term("gradients", trained, plain_size, "update"),
        *([term("weights, reference", s.reference, plain_size, "always")] if s.reference else []),
    ]


def _gathered(s: Shapes) -> list[MemoryTerm]:
    """What FSDP2 holds unsharded: the root at all times, two groups and the buffer of the next."""
    whole, trained = defaultdict(int), defaultdict(int)
    for weight in s.weights:
        whole[weight.group] += weight.numel
        trained[weight.group] += weight.numel * weight.is_trained
    root = whole.pop("root")
    first, *others = sorted(whole.values(), reverse=True)
    second = max(others, default=0)
    gathered = (root + 2 * first + second) * s.compute_bytes
    sum_bytes = s.compute_bytes + max(_FLOAT32, s.compute_bytes)
    return [
        MemoryTerm(
            name="weights, gathered",
            num_bytes=gathered,
            formula=f"({root:,} of embedding and norm + 2 x {first:,} of a group and its buffer + "
            f"{second:,} of the next) x {s.compute_bytes} bytes",
            phase="update",
        ),
        MemoryTerm(
            name="gradients, being summed",
            num_bytes=max(trained.values()) * sum_bytes,
            formula=f"{max(trained.values()):,} of the largest group x {sum_bytes} bytes",
            phase="update",
        ),
    ]


def _cast(s: Shapes, phase: str) -> list[MemoryTerm]:
    """The copies that autocast keeps of all weights that are not in the compute dtype."""
    numel = sum(w.numel for w in s.weights if w.itemsize != s.compute_bytes)
    if numel == 0:
        return []
    return [
        MemoryTerm(
            name="weights, cast",
            num_bytes=numel * s.compute_bytes,
            formula=f"{numel:,} parameters x {s.compute_bytes} bytes",
            phase=phase,
        )
    ]


def _activations(s: Shapes, *, is_checkpointed: bool) -> list[MemoryTerm]:
    """What autograd saves for Qwen2-like layers: everything, or only the inputs if checkpointed."""
    r, a = s.residual_bytes, s.compute_bytes
    # For each of the two norms: its input in float32; the normalised input if its weight is
    # trained; its output, once or, where autocast casts it, for each of five linear layers.
    outputs = 2 * r if r == a else 5 * a
    norms = 2 * (_FLOAT32 + (0 if s.lora_rank else r)) + outputs
    layer_token = norms * s.hidden + 2 * a * (s.query + s.key) + 4 * a * s.ffn
    layer_token += 7 * a * s.lora_rank
    gradient_token = 3 * a * s.ffn + r * s.hidden
    formula = f"{norms} hidden + {2 * a} (query + key) + {4 * a} ffn"
    formula += f" + {7 * a} lora_rank" if s.lora_rank else ""
    sizes = f"hidden {s.hidden:,}, query {s.query:,}, key {s.key:,}, ffn {s.ffn:,}"
    layers_tokens = f"{s.layers} layers x {s.tokens:,} tokens"
    return [
        MemoryTerm(
            name="activations",
            num_bytes=s.layers * s.tokens * layer_token,
            formula=f"{layers_tokens} x ({formula}) bytes; {sizes}",
            phase="avoided" if is_checkpointed else "update",
        ),
        MemoryTerm(
            name="activations, checkpointed",
            num_bytes=s.layers * s.tokens * r * s.hidden + s.tokens * layer_token,
            formula=f"{layers_tokens} x {r} hidden bytes, plus one layer in full",
            phase="update" if is_checkpointed else "avoided",
        ),
        MemoryTerm(
            name="gradients of activations",
            num_bytes=s.tokens * gradient_token,
            formula=f"{s.tokens:,} tokens x ({3 * a} ffn + {r} hidden) bytes",
            phase="update",
        ),
    ]


def _lm_head(s: Shapes) -> list[MemoryTerm]:
    eager = s.tokens * s.vocabulary * (s.compute_bytes + 3 * _FLOAT32)
    return [
        MemoryTerm(
            name="logits, eager",
            num_bytes=eager,
            formula=f"{s.tokens:,} tokens x {s.vocabulary:,} x ({s.compute_bytes} + 3 x 4) bytes: "
            "logits, and in float32 logits, log-softmax, gradient",
            phase="avoided",
        ),
        MemoryTerm(
            name="logits, rft_kernels",
            num_bytes=min(WORKSPACE_BYTES, eager),
            formula="at most the workspace",
            phase="update",
        ),
    ]


def _engine(config: Config, s: Shapes, place: Place, *, is_sharded: bool) -> list[MemoryTerm]:
    if config.rollout.engine == "transformers":
        return _own_engine(s, is_sharded=is_sharded)
    largest = max(weight.numel for weight in s.weights) * s.compute_bytes
    is_far = config.rollout.engine == "vllm_server"
    bucket = max(config.vllm.weight_bucket_mib * 2**20, largest)
    pushed = MemoryTerm(
        name="weights, being sent to the engine",
        num_bytes=2 * bucket + largest if is_far else bucket,
        formula="vllm.weight_bucket_mib, or the largest weight"
        + (", in two buffers, plus the largest weight" if is_far else ""),
        phase="host" if config.sharding.cpu_offload and not is_far else "rollout",
    )
    return [pushed] if is_far else [_vllm(config, s, place), pushed]


def _vllm(config: Config, s: Shapes, place: Place) -> MemoryTerm:
    sleeps = place.device.type == "cuda" if config.vllm.sleep is None else config.vllm.sleep
    weights, cache = _engine_bytes(config, s, place)
    tokens = kv_cache_tokens(config, s, place)
    return MemoryTerm(
        name="engine, vllm",
        num_bytes=weights + max(0, cache),
        formula=f"{s.num_parameters:,} weights{_over(config.vllm.tensor_parallel_size)} x "
        f"{s.compute_bytes} bytes, the rest for a KV cache of {tokens:,} tokens "
        f"({tokens / s.length:.1f} sequences of full length)",
        phase="rollout" if sleeps else "always",
    )


def _own_engine(s: Shapes, *, is_sharded: bool) -> list[MemoryTerm]:
    whole = _cast(s, "rollout")
    if is_sharded:
        numel = sum(weight.numel for weight in s.weights)
        whole = [
            MemoryTerm(
                name="weights, gathered to generate",
                num_bytes=numel * s.compute_bytes,
                formula=f"{numel:,} parameters x {s.compute_bytes} bytes",
                phase="rollout",
            )
        ]
    return [
        *whole,
        MemoryTerm(
            name="KV cache",
            num_bytes=s.sequences * s.length * _kv_bytes(s),
            formula=f"{s.sequences:,} sequences x {s.length:,} tokens x {s.layers} layers x 2 key "
            f"x {s.compute_bytes} bytes, if all get that long",
            phase="rollout",
        ),
    ]


def _over(num_ranks: int) -> str:
    return f" / {num_ranks} ranks" if num_ranks > 1 else ""


def _kv_bytes(s: Shapes) -> int:
    """Bytes of the KV cache per token."""
    return s.layers * 2 * s.key * s.compute_bytes
