"""The memory plan against a real update on the CPU and against sums by hand."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rft_kernels import PolicyConfig
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, config_from_dict
from prefix_rft.config.sections import ShardingConfig
from prefix_rft.data_types import TrainBatch
from prefix_rft.doctor import shapes as shapes_module
from prefix_rft.doctor.architectures import SIZES
from prefix_rft.doctor.memory import (
    UNCOUNTED_FRACTION,
    MemoryTerm,
    kv_cache_tokens,
    memory_terms,
    peak_bytes,
    shortfalls,
)
from prefix_rft.doctor.shapes import Place, Shapes, Weight, shapes_of
from prefix_rft.model.distributed import World
from prefix_rft.model.loading import load_model, load_policy
from prefix_rft.train.optimizer import make_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
TOKENS = 1024
# As published with each model.
NUM_PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live tensors, with `held` from the start, and their maximum."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out


def save_model(folder: Path, *, num_layers: int, ffn: int = 160, tied: bool = True) -> Path:
    sizes = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=ffn,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(sizes).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path):
    return save_model(tmp_path / "model", num_layers=3)


def forward(model: Qwen2ForCausalLM, dtype: str) -> torch.Tensor:
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        return model.model(ids, use_cache=False).last_hidden_state


def tiny_config(path, *, num_tokens: int = TOKENS, **model) -> Config:
    return config_from_dict(
        {
            "model": {"path": str(path), "device": "cpu"} | model,
            "data": {"max_prompt_tokens": 24},
            "rollout": {"max_response_length": num_tokens - 24},
            "trainer": {"micro_batch_tokens": num_tokens},
        }
    )


@pytest.mark.parametrize("lora_rank", [None, 8])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_of_an_update_is_what_a_real_one_holds_and_little_more(
    saved, dtype, gradient_checkpointing, lora_rank
) -> None:
    if lora_rank is not None:
        pytest.importorskip("peft")
    options = {"dtype": dtype, "gradient_checkpointing": gradient_checkpointing}
    config = tiny_config(saved, **options | ({"lora_rank": lora_rank} if lora_rank else {}))
    model = load_model(config.model, saved)
    optimizer = make_optimizer(model.parameters(), config.optimizer, CPU)

    forward(model, dtype).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with PeakMemory([*model.parameters(), *states]) as measured:
        forward(model, dtype).sum().backward()
    place = Place(device=CPU, device_bytes=GIB)
    terms = memory_terms(config, shapes_of(config, place), place)
    [logits] = [term for term in terms if term.name == "logits, rft_kernels"]  # none here
    assert measured.peak > 2**22
    assert 0.95 < (peak_bytes(terms, "update") - logits.num_bytes) / measured.peak < 1.2


@pytest.mark.parametrize("lora_rank", [None, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_more_layer_saves_what_the_plan_says(tmp_path, dtype, lora_rank) -> None:
    if lora_rank is not None:
        pytest.importorskip("peft")
    lived, planned = [], []
    for num_layers in (2, 3):
        path = save_model(tmp_path / str(num_layers), num_layers=num_layers)
        options = {"dtype": dtype} | ({"lora_rank": lora_rank} if lora_rank else {})
        config = tiny_config(path, **options)
        model = load_model(config.model, path)
        with PeakMemory(model.parameters()) as measured:
            output = forward(model, dtype)
        lived.append(measured.live)
        del output
        place = Place(device=CPU, device_bytes=GIB)
        terms = memory_terms(config, shapes_of(config, place), place)
        held = ("activations", "weights, trained", "weights, frozen", "weights, cast")
        planned.append(
            sum(t.num_bytes for t in terms if t.name in held and t.phase in ("always", "update"))
        )
    assert planned[1] - planned[0] == pytest.approx(lived[1] - lived[0], rel=0.015)


@pytest.mark.parametrize(
    ("num_tokens", "ffn", "model"),
    [
        (1024, 160, {"dtype": "bfloat16"}),  # mostly activations
        (32, 1600, {"dtype": "bfloat16"}),  # mostly weights, sharded and gathered
        (32, 1600, {"dtype": "bfloat16", "lora_rank": 8, "gradient_checkpointing": True}),
    ],
)
def test_the_plan_of_a_sharded_update_is_what_a_real_one_holds(
    tmp_path, num_tokens, ffn, model
) -> None:
    """On one rank, whose device is the host; the plan may miss only its uncounted fraction."""
    if "lora_rank" in model:
        pytest.importorskip("peft")
    path = save_model(tmp_path / "model", num_layers=4, ffn=ffn, tied=False)
    config = tiny_config(path, num_tokens=num_tokens, **model)
    config = replace(config, sharding=ShardingConfig(cpu_offload=True))
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    every = torch.ones(num_tokens, dtype=torch.bool)
    batch = TrainBatch(
        input_ids=ids,
        position_ids=torch.arange(num_tokens),
        targets=ids,
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        lengths=(num_tokens,),
        response_mask=every,
        prefix_mask=~every,
        selected_mask=~every,
        advantages=torch.ones(num_tokens),
        weights=torch.ones(num_tokens),
        rollout_log_probs=torch.zeros(num_tokens),
        active_rows=torch.arange(num_tokens),
    )
    with World(config.sharding, CPU) as world:
        policy = load_policy(config, path, vocab_size=16, world=world)
        optimizer = make_optimizer(policy.parameters(), config.optimizer, CPU)

        def backward() -> None:
            policy.loss(batch, normalizer=1.0, loss=PolicyConfig()).loss.backward()

        backward()
        optimizer.step()
        optimizer.zero_grad()
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        held = [*policy.parameters(), *states]
        with PeakMemory(x.to_local() if isinstance(x, DTensor) else x for x in held) as measured:
            backward()
    place = Place(device=CPU, device_bytes=GIB)
    terms = memory_terms(config, shapes_of(config, place), place)
    planned = peak_bytes(terms, "update") + peak_bytes(terms, "host")
    assert 1 - UNCOUNTED_FRACTION < planned / measured.peak < 1.1


@pytest.mark.parametrize("path", SIZES)
@pytest.mark.parametrize("lora_rank", [None, 16])
def test_parameters_are_those_of_the_published_model(path, lora_rank, monkeypatch) -> None:
    def not_reached(*args, **kwargs):
        raise OSError("no network, and nothing kept")

    monkeypatch.setattr(shapes_module.AutoConfig, "from_pretrained", not_reached)
    config = config_from_dict({"model": {"path": path}})
    if lora_rank is not None:
        pytest.importorskip("peft")
        config = replace(config, model=replace(config.model, lora_rank=lora_rank))
    place = Place(device=CUDA, device_bytes=80 * GIB)
    shapes = shapes_of(config, place)
    assert shapes.num_parameters == NUM_PARAMETERS[path]
    assert "shipped" in shapes.source
    terms = {term.name: term for term in memory_terms(config, shapes, place)}
    sizes = SIZES[path]
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    key = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    if lora_rank is None:
        assert terms["weights, trained"].num_bytes == 4 * NUM_PARAMETERS[path]
        assert terms["optimizer state, adamw"].num_bytes == 8 * NUM_PARAMETERS[path]
        return
    sides = 2 * (hidden + hidden) + 2 * (hidden + key) + 3 * (hidden + ffn)  # q o, k v, mlp
    adapters = sizes["num_hidden_layers"] * lora_rank * sides
    assert terms["weights, frozen"].num_bytes == 2 * NUM_PARAMETERS[path]
    assert terms["weights, trained"].num_bytes == 4 * adapters
    assert terms["gradients"].num_bytes == 4 * adapters


def hand_made(**changes: object) -> Shapes:
    """Two layers of 300 x 128 numbers, a head of 100 x 64 and a root of 10 x 64."""
    options = {"itemsize": 4, "is_trained": True}
    weights = (
        Weight(group="root", shape=(10, 64), **options),
        Weight(group="0", shape=(300, 128), **options),
        Weight(group="1", shape=(300, 128), **options),
        Weight(group="lm_head", shape=(100, 64), **options),
    )
    sizes = {"layers": 2, "hidden": 64, "query": 64, "key": 32, "ffn": 160, "vocabulary": 100}
    sizes |= {"lora_rank": 0, "tokens": 1024, "sequences": 4, "length": 50}
    sizes |= {"compute_bytes": 2, "residual_bytes": 2}
    return Shapes(**({"weights": weights, "source": "by hand"} | sizes | changes))


def plan(config: dict, place: Place, **changes: object) -> dict[str, MemoryTerm]:
    terms = memory_terms(config_from_dict(config), hand_made(**changes), place)
    return {term.name: term for term in terms}


def test_a_second_optimizer_has_a_state_of_its_own() -> None:
    place = Place(device=CUDA, device_bytes=GIB, num_processes=1)
    one, two = (plan({"method": {"name": name}}, place) for name in ("rft", "relift"))
    state = one["optimizer state, adamw"].num_bytes
    assert two["optimizer state, adamw"].num_bytes == state > 0
    assert two["optimizer state, adamw of sft"].num_bytes == state
    assert "optimizer state, adamw of sft" not in one


def test_ranks_share_what_replicas_and_offload_leave_them() -> None:
    place = Place(device=CUDA, device_bytes=GIB, num_processes=8)
    rows = [2 * 64, 38 * 128, 38 * 128, 13 * 64]  # the first of 8 shards is the largest
    terms = plan({}, place)
    assert terms["weights, trained"].num_bytes == 4 * sum(rows)
    assert terms["gradients"].num_bytes == 4 * sum(rows)
    assert terms["weights, gathered"].num_bytes == 2 * (640 + 3 * 300 * 128)
    assert terms["gradients, being summed"].num_bytes == (2 + 4) * 300 * 128
    terms = plan({"sharding": {"replicas": 2}}, place)
    assert terms["optimizer state, adamw"].num_bytes == 8 * (3 * 64 + 2 * 75 * 128 + 25 * 64)
    terms = plan({"sharding": {"cpu_offload": True}}, replace(place, num_processes=1))
    assert terms["gradients"].phase == terms["weights, trained"].phase == "host"
    assert peak_bytes(list(terms.values()), "host") == 16 * (640 + 2 * 300 * 128 + 6400)


def test_a_reference_is_held_in_the_dtype_of_the_compute_and_sharded(saved, tmp_path) -> None:
    place = Place(device=CUDA, device_bytes=GIB, num_processes=2)
    kl = {"loss": {"kl": "k3", "kl_coef": 0.1}}

    def term(place: Place = place, **sections: dict) -> MemoryTerm | None:
        config = config_from_dict({"model": {"path": str(saved)}} | sections)
        terms = memory_terms(config, shapes_of(config, place), place)
        return next((term for term in terms if term.name == "weights, reference"), None)

    numel = sum(p.numel() for p in Qwen2ForCausalLM.from_pretrained(saved).parameters())
    assert term() is None and term(loss={"kl": "k3"}) is None
    assert term(reference={"model": "nowhere"}) is None
    found = term(**kl)
    assert (found.num_bytes, found.phase) == (numel // 2 * 2, "always")  # all rows are even
    assert found.formula == f"{numel:,} parameters / 2 ranks x 2 bytes"
    assert term(**kl, sharding={"cpu_offload": True}).phase == "host"
    assert term(replace(place, device=CPU, num_processes=1), **kl).num_bytes == 4 * numel
    larger = save_model(tmp_path / "larger", num_layers=5)
    theirs = sum(p.numel() for p in Qwen2ForCausalLM.from_pretrained(larger).parameters())
    assert term(**kl, reference={"model": str(larger)}).num_bytes == theirs
    with pytest.raises(ConfigError, match="reference.model: expected a model folder"):
        term(**kl, reference={"model": str(tmp_path / "nothing")})

    adapters = {"model": {"path": str(saved), "lora_rank": 2}}
    assert term(**kl, **adapters) is None  # the frozen weights are the reference
    sides = 3 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))  # q o, k v, mlp
    moving = term(**kl, **adapters, reference={"update_every": 2})
    assert moving.num_bytes == numel + 2 * sides  # 2 and 4 bytes, on 2 ranks


def test_an_8_bit_state_is_as_large_as_torchao_makes_it() -> None:
    place = Place(device=CUDA, device_bytes=GIB)
    terms = plan({"optimizer": {"name": "adamw_8bit"}}, place)
    packed = 2 * 300 * 128 + 6400
    expected = 2 * (packed + 4 * packed // 256) + 8 * 640
    assert terms["optimizer state, adamw_8bit"].num_bytes == expected
    odd = Weight(group="0", shape=(65, 65), itemsize=4, is_trained=True)  # no whole blocks
    terms = plan({"optimizer": {"name": "adamw_8bit"}}, place, weights=(odd,))
    assert terms["optimizer state, adamw_8bit"].num_bytes == 8 * 65 * 65
    pytest.importorskip("torchao")
    from torchao.optim.subclass_8bit import OptimState8bit

    states = [OptimState8bit.zeros(shape) for shape in ((300, 128), (300, 128), (100, 64))]
    real = sum(state.codes.nbytes + state.scale.nbytes for state in states)
    assert expected == 2 * real + 8 * 640


def test_vllm_takes_its_fraction_while_it_is_awake() -> None:
    place = Place(device=CUDA, device_bytes=2**20)
    config = {"rollout": {"engine": "vllm"}, "vllm": {"gpu_memory_utilization": 0.5}}
    terms = plan(config, place)
    numel = 640 + 2 * 300 * 128 + 6400
    assert terms["engine, vllm"].num_bytes == 2**19
    assert terms["engine, vllm"].phase == "rollout"
    token_bytes = 2 * 2 * 32 * 2
    kv_tokens = kv_cache_tokens(config_from_dict(config), hand_made(), place)
    assert kv_tokens == (2**19 - 2 * numel) // token_bytes
    config["vllm"] |= {"sleep": False, "kv_cache_mib": 3}
    terms = plan(config, place)
    assert terms["engine, vllm"].phase == "always"
    assert terms["engine, vllm"].num_bytes == 2 * numel + 3 * 2**20
    terms = plan({"rollout": {"engine": "vllm_server"}}, place)  # on devices of its own
    assert "engine, vllm" not in terms and "KV cache" not in terms
    largest = 2 * 300 * 128
    assert terms["weights, being sent to the engine"].num_bytes == 2 * 512 * 2**20 + largest
    terms = plan({}, replace(place, num_processes=2))
    assert terms["KV cache"].num_bytes == 4 * 50 * token_bytes
    assert terms["weights, gathered to generate"].num_bytes == 2 * numel


def test_what_does_not_fit_is_said() -> None:
    config = config_from_dict({"rollout": {"engine": "vllm"}})
    shapes = hand_made()

    def reasons(num_bytes: int, **changes: object) -> list[str]:
        place = Place(device=CUDA, device_bytes=num_bytes)
        given = replace(shapes, **changes)
        return shortfalls(config, given, place, memory_terms(config, given, place))

    assert reasons(2 * GIB) == []
    [update, rollout] = reasons(2**22)
    assert update.startswith("update needs") and rollout.startswith("rollout needs")
    [cache] = reasons(2 * GIB, length=10**8)
    assert cache.startswith("the engine's KV cache holds") and "of 100,000,000 tokens" in cache


def test_shapes_come_from_the_model_folder_or_the_base(saved, tmp_path) -> None:
    place = Place(device=CPU, device_bytes=GIB)
    base = shapes_of(Config(), place)
    assert (base.layers, base.hidden, base.length) == (3, 128, 1024 + 8192)
    shapes = shapes_of(tiny_config(saved), place)
    model = Qwen2ForCausalLM.from_pretrained(saved)
    assert (shapes.query, shapes.key, shapes.ffn, shapes.compute_bytes) == (64, 32, 160, 4)
    assert {w.group for w in shapes.weights} == {"root", "0", "1", "2"}  # tied: no lm_head
    assert shapes.num_parameters == sum(p.numel() for p in model.parameters())
    assert shapes_of(tiny_config(saved), replace(place, device=CUDA)).compute_bytes == 2
    with pytest.raises(ConfigError, match="model.path: expected a model folder or a hub id"):
        shapes_of(tiny_config(tmp_path / "nothing"), place)
