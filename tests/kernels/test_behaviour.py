"""What the ops do beside their values: memory, repetition, compilation, registration."""

import pytest
import torch
from rft_kernels import (
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_stats,
    policy_objective,
    prefix_rft_loss,
    select_top_entropy,
    token_stats,
)
from rft_kernels.linear import ops
from rft_kernels.rows import torch_backend
from torch.profiler import ProfilerActivity, profile

from tests.kernels.kernel_cases import from_logits, gradients, loss_inputs, seeded

CONFIG = PolicyConfig(entropy_coef=0.05, dual_clip=1.2)
WIDTH = 16
WIDE = {"num_rows": 96, "width": WIDTH, "vocab_size": 4000, "dtype": torch.float32}
LOGITS_BYTES = 96 * 4000 * 4
SLACK_BYTES = 96 * 8 * 48  # numbers a row, hidden states, small change


def peak_bytes(call) -> int:
    """How many bytes allocated by `call` are alive at once, at most; its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    del kept
    return most


def backward(loss):
    loss.backward()


def test_the_memory_of_eager_is_seen():
    inputs = loss_inputs(**WIDE)
    logits = inputs["hidden"] @ inputs["lm_head_weight"].T
    assert peak_bytes(lambda: torch.log_softmax(logits, -1).exp()) >= 2 * LOGITS_BYTES


@pytest.mark.parametrize("workspace_bytes", [LOGITS_BYTES // 10, LOGITS_BYTES // 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("selecting", [False, True], ids=["one pass", "two passes"])
def test_linear_loss_stays_within_its_workspace(selecting, softcap, dtype, workspace_bytes):
    inputs = loss_inputs(**WIDE | {"dtype": dtype}) | {"config": CONFIG, "softcap": softcap}
    inputs |= {"workspace_bytes": workspace_bytes, "normalizer": 7}
    if not selecting:
        inputs["selected_mask"] = inputs["prefix_mask"]
    peak = peak_bytes(lambda: linear_prefix_rft_loss(**inputs).loss.backward())
    entries, dbias_of_a_tile = 4000 * (WIDTH + 1), 4000 * 4
    rounding = 0 if dtype == torch.float32 else entries * dtype.itemsize  # once the tiles are gone
    allowed = entries * 4 + max(workspace_bytes + dbias_of_a_tile, rounding) + SLACK_BYTES
    assert peak <= allowed


@pytest.mark.parametrize("selecting", [False, True], ids=["one pass", "two passes"])
def test_backward_keeps_no_copy_of_the_gradient_it_hands_on(selecting):
    inputs = loss_inputs(8, 64, 4000, dtype=torch.float32) | {"workspace_bytes": 2**17}
    if not selecting:
        inputs["selected_mask"] = inputs["prefix_mask"]
    wide = inputs["lm_head_weight"].nbytes
    peak = peak_bytes(lambda: linear_prefix_rft_loss(**inputs).loss.backward())
    assert wide < peak < 1.5 * wide


def test_logits_ops_stay_within_their_scratch(monkeypatch):
    scratch = LOGITS_BYTES // 8
    monkeypatch.setitem(torch_backend._SCRATCH_BYTES, "cpu", scratch)
    logits = torch.randn(96, 4000, requires_grad=True)
    inputs = loss_inputs(**WIDE) | {"config": CONFIG}
    rest = {k: x for k, x in inputs.items() if k not in ("hidden", "lm_head_weight", "bias")}
    assert peak_bytes(lambda: prefix_rft_loss(logits, **rest)) <= scratch + SLACK_BYTES
    loss = prefix_rft_loss(logits, **rest).loss
    assert peak_bytes(loss.backward) <= LOGITS_BYTES + scratch + SLACK_BYTES
    buffer = logits * 1
    loss = prefix_rft_loss(buffer, **rest, inplace_backward=True).loss
    assert peak_bytes(lambda: torch.autograd.grad(loss, buffer)) <= scratch + SLACK_BYTES


def test_without_gradients_only_statistics_are_computed(monkeypatch):
    inputs = loss_inputs() | {"prefix_mask": None}
    expected = linear_prefix_rft_loss(**inputs)
    for op in ("policy", "token_stats_bwd"):
        monkeypatch.setattr(ops, op, None)
    with torch.no_grad():
        found = linear_prefix_rft_loss(**inputs)
    assert torch.equal(found.loss, expected.loss) and not found.loss.requires_grad
    with pytest.raises(TypeError):
        linear_prefix_rft_loss(**inputs)


@pytest.mark.parametrize("selecting", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repetition_gives_the_same_bits(dtype, selecting):
    inputs = loss_inputs(40, 16, 500, dtype=dtype) | {"config": CONFIG}
    if not selecting:
        inputs["selected_mask"] = inputs["prefix_mask"]
    results = []
    for _ in range(3):
        found = linear_prefix_rft_loss(**inputs, workspace_bytes=2**15)
        dense = from_logits(prefix_rft_loss, inputs)
        results.append(
            [found.loss, found.entropy, *gradients(found.loss, inputs), dense.loss]
            + gradients(dense.loss, inputs)
        )
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], again, strict=True))


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


SEQUENCES = {
    "config": PolicyConfig(importance_level="sequence"),
    "cu_seqlens": torch.tensor([0, 9, 24]),
}
COMPILED = {
    "selecting": {"config": CONFIG},
    "selected": {"config": CONFIG, "selected_mask": torch.rand(24, generator=seeded(1)) > 0.5},
    "on-policy": {"old_log_probs": None, "prefix_mask": None, "stats": "active"},
    "sequences": SEQUENCES,
    "normalizer": {"normalizer": torch.tensor(17.0), "temperature": torch.linspace(0.5, 2, 24)},
}
LOW_RANK = tuple(torch.rand(n, 2, generator=seeded(2), dtype=torch.float64) for n in (24, 33))


@pytest.mark.slow
@pytest.mark.parametrize("extra", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("op", [linear_prefix_rft_loss, prefix_rft_loss], ids=["linear", "logits"])
def test_losses_compile_into_one_graph(op, extra):
    inputs = loss_inputs() | extra
    if op is linear_prefix_rft_loss:
        inputs["low_rank"] = LOW_RANK

    def loss(hidden, weight, bias):
        named = inputs | {"hidden": hidden, "lm_head_weight": weight, "bias": bias}
        if op is prefix_rft_loss:
            return from_logits(op, named, inplace_backward=True).loss
        return op(**named).loss

    wrt = [inputs[name] for name in ("hidden", "lm_head_weight", "bias")]
    expected, found = loss(*wrt), compiled(loss)(*wrt)
    assert torch.equal(found, expected)
    for x, y in zip(
        torch.autograd.grad(found, wrt), torch.autograd.grad(expected, wrt), strict=True
    ):
        assert torch.equal(x, y)


def test_the_other_ops_compile_into_one_graph():
    inputs = loss_inputs()
    hidden, weight, targets = inputs["hidden"], inputs["lm_head_weight"], inputs["targets"]
    mask = inputs["response_mask"]

    def stats(hidden, weight):
        first = linear_token_stats(hidden, weight, targets, row_mask=mask)
        second = token_stats(hidden @ weight.T, targets, vocab_size=33)
        return (first.log_probs + first.entropy * second.entropy * second.log_probs).sum()

    def objective(log_probs):
        arguments = (inputs["old_log_probs"], inputs["advantages"], mask)
        return policy_objective(log_probs, *arguments, normalizer=3)[0]

    for function, wrt in ((stats, [hidden, weight]), (objective, [inputs["old_log_probs"] - 0.1])):
        wrt = [x.detach().requires_grad_() for x in wrt]
        expected, found = function(*wrt), compiled(function)(*wrt)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        for x, y in zip(
            torch.autograd.grad(found, wrt), torch.autograd.grad(expected, wrt), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    for options in ({"fraction": 0.3}, {"order": "random", "seed": 3}, {"cu_seqlens": targets[:0]}):
        if "cu_seqlens" in options:
            options = {"cu_seqlens": torch.tensor([0, 9, 24])}
        entropy = torch.rand(24, generator=seeded(2))
        found = compiled(lambda x, o=options: select_top_entropy(x, mask, **o))(entropy)
        assert torch.equal(found, select_top_entropy(entropy, mask, **options))


def recorded_calls() -> list[tuple]:
    """(op, arguments) of every custom op, as the public functions call them."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "rft_kernels":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    inputs = loss_inputs(8, 3, 5) | {"config": CONFIG}
    selected = {"selected_mask": inputs["prefix_mask"], "stats": "active"}
    rows = {"temperature": torch.linspace(0.5, 2, 8)}
    with Recorder():
        for extra in ({}, rows, selected, selected | rows):
            linear_prefix_rft_loss(**inputs, **extra).loss.backward()
            extended = (
                inputs
                | extra
                | {
                    "low_rank": (
                        torch.ones(8, 2).double(),
                        torch.ones(5, 2).double().requires_grad_(),
                    ),
                    "accumulate_dweight": torch.zeros(5, 3).double(),
                }
            )
            linear_prefix_rft_loss(**extended).loss.backward()
            for inplace in (False, True):
                from_logits(
                    prefix_rft_loss, inputs, inplace_backward=inplace, **extra
                ).loss.backward()
    return calls


def test_custom_ops_are_registered_as_they_behave():
    calls = recorded_calls()
    assert {func._opname for func, _ in calls} == {
        "token_stats",
        "token_stats_bwd",
        "token_stats_bwd_",
        "linear_token_stats",
        "linear_token_stats_bwd",
        "linear_policy",
    }
    for func, args in calls:
        differentiable = func._opname in ("token_stats", "linear_token_stats")
        args = [
            x.detach().clone().requires_grad_(x.requires_grad and differentiable)
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        ]
        torch.library.opcheck(func, args)
