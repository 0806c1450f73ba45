"""The vLLM engine against the trainer's log-probs and the transformers engine; real vLLM on a CPU.

vLLM changes threads and process groups of the process that imports it, so that all of it happens in
others, by tests/rollout/vllm_worker.py, with the packages of .venv-vllm, which `make test` sets up.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from prefix_rft.checks import ConfigError
from prefix_rft.config import packages, save_config
from prefix_rft.config.sections import VLLMConfig
from prefix_rft.model import weights
from prefix_rft.rollout import vllm_engine
from prefix_rft.rollout.vllm_engine import VLLMEngine
from prefix_rft.rollout.vllm_options import request_seed
from tests.rollout.rollout_cases import VOCAB, make_requests
from tests.rollout.vllm_cases import TOLERANCE, check_learnt, learning_run
from tests.tiny import make_model

pytestmark = pytest.mark.slow

# As in the worker: the ids that end a completion, and those whose text does.
STOP_IDS = (7, 20, 45)
ENDS = {*range(0, VOCAB, 12), *STOP_IDS}
CPU = torch.device("cpu")


@pytest.fixture
def engine(measure) -> dict:
    return measure("engine")


def test_log_probs_are_those_of_the_trainer(engine):
    assert engine["gap"] < TOLERANCE
    assert engine["greedy_gap"] < TOLERANCE
    assert engine["gap_untied"] < TOLERANCE


def test_log_probs_follow_an_update_once_it_is_pushed(engine):
    assert engine["gap_cached"] < TOLERANCE  # prompts that fill blocks of the prefix cache
    assert engine["gap_faked"] > 1
    assert engine["gap_followed"] < TOLERANCE


def test_stale_or_no_weights_are_refused(engine):
    assert "the engine holds none" in engine["before_push"]
    assert "asked for version 1, the engine holds version 0" in engine["stale"]


def test_budgets_and_stopping(engine):
    requests = make_requests(32)
    reasons = set()
    for request, (ids, log_probs, reason) in zip(requests, engine["completions"], strict=True):
        assert len(ids) == len(log_probs)
        assert not set(ids[:-1]) & ENDS
        if reason == "stop":
            assert ids[-1] in ENDS and len(ids) <= request.max_new_tokens
        else:
            assert ids[-1] not in ENDS and len(ids) == request.max_new_tokens
        reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_without_ends_each_completion_has_its_full_length(engine):
    assert engine["ended_early"] > 3
    assert engine["endless"] == engine["budgets"]


def test_greedy_completions_are_those_of_the_transformers_engine(engine):
    assert engine["greedy"] == engine["greedy_expected"]
    assert {reason for _, reason in engine["greedy"]} == {"stop", "length"}
    assert {ids[-1] for ids, _ in engine["greedy"]} & set(STOP_IDS)


def test_ids_past_the_tokenizer_are_never_sampled(engine):
    assert engine["unmasked_id_max"] >= VOCAB  # if they are not masked out
    completions = [ids for ids, _, _ in engine["completions"]]
    assert max(max(ids) for ids in completions) < VOCAB


def test_draws_follow_the_distribution(engine):
    expected = np.array(engine["draw_probs"]) * len(engine["draws"])
    counts = np.bincount(engine["draws"], minlength=VOCAB)
    often = expected > 5
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum())
    assert degrees > 10
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_a_request_has_its_own_stream(engine):
    assert engine["repeated"]
    assert engine["alone"]  # whatever else is in the batch
    assert not engine["other_seed"]


def test_limits_and_odd_calls(engine):
    assert "requests[1]: expected at most 320 tokens" in engine["too_long"]
    assert engine["longest"] == "not refused"
    assert engine["no_requests"] == []
    assert all(math.isnan(value) for value in engine["not_finite"])
    assert "an interrupted generate left requests behind" in engine["interrupted"]


def test_completions_are_reported_as_they_finish(engine):
    told = [index for index, _ in engine["told"]]
    assert sorted(told) == list(range(32)) and told != sorted(told)
    completions = [ids for ids, _, _ in engine["completions"]]
    assert all(ids == completions[index] for index, ids in engine["told"])


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_ranks_push_and_generate(measure, tensor_parallel_size):
    found = measure("ranks", num_ranks=2, TENSOR_PARALLEL_SIZE=str(tensor_parallel_size))
    assert found["num"] == [6, 10]
    assert all(gap < TOLERANCE for gap in found["gap"])
    assert all(found["kept"])


@pytest.mark.parametrize(("engine", "num_ranks"), [("transformers", 1), ("vllm", 1), ("vllm", 2)])
def test_a_run_learns_with_either_engine(measure, base_dir, tmp_path, engine, num_ranks):
    config = learning_run(tmp_path / "run", base_dir, engine=engine)
    save_config(config, tmp_path / "config.toml")
    check_learnt(measure("run", tmp_path / "config.toml", num_ranks=num_ranks))


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[vllm\]'"):
        make_engine(make_model(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sleep": True}, "vllm.sleep: expected false"),
        ({"tensor_parallel_size": 2}, "vllm.tensor_parallel_size: expected a divisor of the 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(make_model(20), **changes)


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_device_that_vllm_would_not_take_is_refused(monkeypatch, rank):
    """Even if torchrun started the only process."""
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(ConfigError, match="model.device: .* got cuda:1"):
        make_engine(make_model(20), device=torch.device("cuda:1"))


def test_models_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="model.dtype: vLLM has no float64"):
        make_engine(make_model(20).double())
    with pytest.raises(ValueError, match="eos_token_ids: expected an id below 20, got none"):
        make_engine(make_model(20), eos_token_ids=[20])


def make_engine(model, *, device=CPU, eos_token_ids=(1,), **config) -> VLLMEngine:
    return VLLMEngine(
        model,
        config=VLLMConfig(**config),
        device=device,
        max_length=64,
        eos_token_ids=eos_token_ids,
        vocab_size=20,
        max_batch_sequences=4,
    )


def test_no_more_than_a_bucket_is_gathered_at_once(monkeypatch):
    gathered, bound, consumed, held = [], 10_000, 0, []

    def gather(weight: torch.Tensor) -> torch.Tensor:
        gathered.append(weight.nbytes)
        return weight

    monkeypatch.setattr(weights, "full_tensor", gather)
    model = make_model(20)
    for _, weight in weights.full_weights(model, dtype=torch.bfloat16, bucket_bytes=bound):
        held.append(sum(gathered) - consumed)
        assert held[-1] <= max(bound, weight.nbytes)
        consumed += weight.nbytes
    assert consumed == sum(gathered) == 2 * model.num_parameters()
    assert max(held) > bound / 2


class RecordingLLM:
    """The part of `vllm.LLM` that pushing weights and sleeping use."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.calls: list[object] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        self.calls += [method, *(name for name, _ in kwargs["weights_iterator"])][:2]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines use a `RecordingLLM`."""
    monkeypatch.setattr(vllm_engine, "import_vllm", lambda: SimpleNamespace(LLM=RecordingLLM))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


def test_weights_that_vllm_does_not_know_are_one_clear_error(recording, monkeypatch):
    def unknown(*arguments: object, **options: object) -> None:
        raise ValueError("There is no module or parameter named 'lm_head'")

    engine = make_engine(make_model(20))
    monkeypatch.setattr(engine._llm, "collective_rpc", unknown)
    with pytest.raises(ConfigError, match="vLLM does not accept the weights of Qwen2ForCausalLM"):
        engine.update_weights(make_model(20), 0)
    assert engine.weights_version is None


def test_on_cuda_the_engine_sleeps_until_new_weights_come(recording):
    """Only the order of calls; not that vLLM frees and restores memory."""
    model, requests = make_model(20), make_requests(1)
    engine = make_engine(model, device=torch.device("cuda"))
    push = ["reload_weights", "model.embed_tokens.weight"]
    engine.update_weights(model, 0)
    assert engine._llm.calls == [*push, "reset"]
    engine._llm.calls.clear()
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match="the engine holds none"):
        engine.generate(requests, temperature=1.0, seed=0, weights_version=0)
    engine.update_weights(model, 0)
    assert engine._llm.calls == ["sleep 2", "wake weights", *push, "wake kv_cache", "reset"]
    assert engine.weights_version == 0


def test_seeds_differ_and_fit():
    seeds = {request_seed(seed, index) for seed in (0, 1, 2**40) for index in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
