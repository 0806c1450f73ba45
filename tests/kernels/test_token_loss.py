"""Losses of the caller's, from logits and from hidden states, against eager in float64."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rft_kernels import LMHead, PolicyConfig, linear_token_loss, reference, token_loss
from rft_kernels import linear_prefix_rft_loss as policy
from rft_kernels.linear import gemm, tiles

from tests.kernels.kernel_cases import gradients, loss_inputs, seeded
from tests.kernels.test_behaviour import SLACK_BYTES, backward, peak_bytes


def sft(log_probs, entropy):
    return -log_probs


def luffy(log_probs, entropy, advantages):
    p = log_probs.exp()
    return -advantages * p / (p + 0.1)


def weight_of_entropy(log_probs, entropy, advantages):
    return -advantages * log_probs * (entropy / 3).tanh() - 0.01 * entropy, {"tanh": entropy.tanh()}


def unsure(log_probs, entropy):
    p = log_probs.detach().exp()
    return -p * (1 - p) * log_probs


def clipped(log_probs, entropy, advantages, old_log_probs):
    ratio = (log_probs - old_log_probs).exp()
    bounded = ratio.clamp(0.8, 1.2)
    losses = torch.maximum(-advantages * ratio, -advantages * bounded)
    return losses, {"clipped": bounded != ratio}


def z_loss(log_probs, entropy, lse, advantages):
    return -advantages * log_probs + 0.01 * lse.square(), {"lse": lse}


FUNCTIONS = {
    sft: (),
    luffy: ("advantages",),
    weight_of_entropy: ("advantages",),
    unsure: (),
    clipped: ("advantages", "old_log_probs"),
    z_loss: ("advantages",),
}
WITH_LSE = {z_loss: {"with_lse": True}}
EVERY = pytest.mark.parametrize("loss_fn", FUNCTIONS, ids=lambda f: f.__name__)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0, "temperature": 0.7},
    "rows": {"temperature": torch.linspace(0.5, 2, 24), "normalizer": torch.tensor(7.0)},
    "padded": {"vocab_size": 30},
}


def case(loss_fn, extra: dict[str, Any] | None = None, *shape: int, **options: Any) -> dict:
    inputs = loss_inputs(*shape, **options) | (extra or {})
    tokens = tuple(inputs[name] for name in FUNCTIONS[loss_fn])
    kept = ("hidden", "lm_head_weight", "bias", "targets", "normalizer")
    kept += ("softcap", "temperature", "vocab_size")
    chosen = {name: x for name, x in inputs.items() if name in kept}
    if "vocab_size" in chosen:
        chosen["targets"] = chosen["targets"].clamp(max=chosen["vocab_size"] - 1)
    chosen |= {"loss_fn": loss_fn, "tokens": tokens, "mask": inputs["response_mask"]}
    return chosen | WITH_LSE.get(loss_fn, {})


def assert_equal(found, expected, grads, truth, atol: float = 1e-12) -> None:
    close = {"rtol": 1e-12, "atol": atol}
    torch.testing.assert_close(found[:3], expected[:3], **close)
    torch.testing.assert_close(found.metrics, expected.metrics, **close)
    torch.testing.assert_close(grads, truth, **close)
    assert found.selected_mask is None


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@EVERY
def test_from_hidden_states_as_the_specification(loss_fn, head):
    inputs = case(loss_fn, head)
    expected = reference.linear_token_loss(*positional(inputs), **options_of(inputs))
    truth = gradients(3 * expected.loss, inputs)
    for workspace in (2**30, 33 * 8 * 20):
        found = linear_token_loss(**inputs, workspace_bytes=workspace, check=True)
        assert_equal(found, expected, gradients(3 * found.loss, inputs), truth)


def positional(inputs: dict) -> list:
    return [inputs[name] for name in ("hidden", "lm_head_weight", "targets", "loss_fn")]


def options_of(inputs: dict) -> dict:
    names = ("hidden", "lm_head_weight", "targets", "loss_fn")
    return {name: x for name, x in inputs.items() if name not in names}


@EVERY
def test_from_logits_as_the_specification(loss_fn):
    inputs = case(loss_fn)
    rest = {k: x for k, x in inputs.items() if k not in ("hidden", "lm_head_weight", "bias")}
    logits = torch.nn.functional.linear(*(inputs[k].detach() for k in ("hidden", "lm_head_weight")))
    shaped = {k: shape(x) for k, x in rest.items()}
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        expected = reference.token_loss(x, **rest)
        (truth,) = torch.autograd.grad(expected.loss, x)
        y = (x * 1).view(4, 6, -1)
        found = token_loss(y, **shaped, inplace_backward=inplace, check=True)
        flat = found._replace(log_probs=found.log_probs.view(-1), entropy=found.entropy.view(-1))
        assert found.entropy.shape == (4, 6)
        assert_equal(flat, expected, torch.autograd.grad(found.loss, x)[0], truth)


def shape(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(shape, x))
    return x.view(4, 6) if isinstance(x, torch.Tensor) and x.dim() else x


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_and_backends(dtype, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = case(weight_of_entropy, dtype=dtype)
    wide = {k: x.detach().double().requires_grad_() for k, x in inputs.items() if k in GRADS}
    expected = reference.linear_token_loss(
        *positional(inputs | wide), **options_of(inputs | wide | {"tokens": inputs["tokens"]})
    )
    found = linear_token_loss(**inputs, backend=backend)
    assert found.loss.dtype == torch.float32
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(found.loss, inputs), gradients(expected.loss, wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=near, atol=near * y.abs().max().item())


GRADS = ("hidden", "lm_head_weight", "bias")


@pytest.mark.parametrize("stats", ["all", "active"])
def test_rows_that_the_caller_knows(stats):
    """No gradient outside `active_rows`; what counts there is the loss of "all" alone."""
    inputs = case(luffy)
    listed = torch.arange(0, 24, 2)
    inputs["tokens"][0][1::2] = 0
    expected = linear_token_loss(**inputs)
    found = linear_token_loss(**inputs, active_rows=listed, stats=stats)
    grads, truth = (gradients(x.loss, inputs) for x in (found, expected))
    torch.testing.assert_close([found.loss, *grads], [expected.loss, *truth], rtol=0, atol=1e-15)
    inside = inputs["mask"] & (inputs["targets"] >= 0)
    if stats == "all":
        torch.testing.assert_close(found, expected)
    else:
        inside[1::2] = False
        assert torch.equal(found.entropy, torch.where(inside, expected.entropy, 0))
    assert found.metrics["num_tokens"] == inside.sum()


def test_a_value_without_a_gradient_counts_where_all_statistics_do():
    inputs = case(sft)
    rows = torch.arange(5)
    every = linear_token_loss(**inputs)
    found = linear_token_loss(**inputs, active_rows=rows)
    assert torch.equal(found.metrics["num_tokens"], every.metrics["num_tokens"])
    torch.testing.assert_close(found.loss, every.loss)
    few = inputs | {"mask": inputs["mask"] & (torch.arange(24) < 5)}
    truth = gradients(linear_token_loss(**few).loss, inputs)
    torch.testing.assert_close(gradients(found.loss, inputs), truth)


def test_nothing_outside_the_mask_has_a_part():
    inputs = case(clipped)
    expected = linear_token_loss(**inputs)
    truth = gradients(expected.loss, inputs)
    for x in inputs["tokens"]:
        x[~inputs["mask"]] = torch.nan
    found = linear_token_loss(**inputs)
    assert torch.equal(found.loss, expected.loss) and found.metrics == expected.metrics
    for x, y in zip(gradients(found.loss, inputs), truth, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("counting", [True, False], ids=["counted", "as on a device"])
def test_only_rows_with_a_gradient_are_multiplied(counting, monkeypatch):
    dtype = torch.float64 if counting else torch.float32
    inputs = case(clipped, dtype=dtype) | {"workspace_bytes": 33 * 8 * 20}
    expected = reference.linear_token_loss(
        *positional(inputs), **{k: x for k, x in options_of(inputs).items() if k[:4] != "work"}
    )
    truth = gradients(expected.loss, inputs)
    multiplied, product = [], gemm.addmm

    def addmm(a, b, out):
        multiplied.append(len(a) if out.shape[1] == 8 and a.shape[1] == 33 else 0)
        product(a, b, out)

    monkeypatch.setattr(gemm, "addmm", addmm)
    options = {}
    if not counting:
        pytest.importorskip("triton")
        monkeypatch.setattr(tiles, "_COUNTING_DEVICES", ())
        monkeypatch.setattr(torch.Tensor, "nonzero", None)
        options = {"backend": "triton", "active_rows": torch.arange(20)}
    found = linear_token_loss(**inputs, **options)
    monkeypatch.undo()
    with_slope = expected.metrics["num_tokens"] - stuck(inputs, expected)
    assert 0 < with_slope < 20
    assert sum(multiplied) == (with_slope if counting else 20)
    if counting:
        assert_equal(found, expected, gradients(found.loss, inputs), truth)


def stuck(inputs: dict, expected: Any) -> torch.Tensor:
    """Tokens in the loss without a slope: clipped where it counts, or without advantage."""
    advantages, old = inputs["tokens"]
    ratio = (expected.log_probs - old).exp()
    beyond = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    inside = inputs["mask"] & (inputs["targets"] >= 0)
    return (inside & (beyond | (advantages == 0))).sum()


def test_the_policy_loss_is_one_of_them():
    inputs = loss_inputs() | {"prefix_mask": None}
    ours = policy(**inputs, config=PolicyConfig())
    found = linear_token_loss(**case(clipped))
    torch.testing.assert_close(found.loss, ours.loss)
    wrt = case(clipped)
    pair = gradients(linear_token_loss(**wrt).loss, wrt), gradients(ours.loss, inputs)
    torch.testing.assert_close(*pair)


def test_low_rank_terms_and_a_buffer_of_the_weight():
    inputs = case(luffy)
    inner, up = (
        torch.randn(n, 2, generator=seeded(n), dtype=torch.float64).requires_grad_()
        for n in (24, 33)
    )
    weight = inputs["lm_head_weight"]
    merged = torch.nn.functional.linear(inputs["hidden"], weight, inputs["bias"]) + inner @ up.T
    rest = {k: x for k, x in options_of(inputs).items() if k != "bias"}
    expected = reference.token_loss(merged, inputs["targets"], luffy, **rest)
    wrt = [inputs["hidden"], weight, inner, up]
    hidden, dweight, *others = torch.autograd.grad(expected.loss, wrt)
    buffer = torch.ones_like(weight)
    found = linear_token_loss(**inputs, low_rank=(inner, up), accumulate_dweight=buffer)
    found.loss.backward()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(buffer - 1, dweight, **close)
    grads = [inputs["hidden"].grad, inner.grad, up.grad]
    torch.testing.assert_close(grads, [hidden, *others], **close)
    assert weight.grad is None


def test_module():
    inputs = case(luffy)
    head = LMHead(8, 33).double()
    head.softcap, head.logits_divisor, head.vocab_size = 3.0, 2.0, 30
    targets = inputs["targets"].clamp(max=29)
    options = {k: inputs[k] for k in ("tokens", "mask", "normalizer")}
    found = head(inputs["hidden"], targets, loss_fn=luffy, **options)
    expected = linear_token_loss(
        inputs["hidden"], head.weight, targets, luffy, bias=head.bias, softcap=3.0, temperature=2.0,
        vocab_size=30, **options,
    )  # fmt: skip
    assert torch.equal(found.loss, expected.loss)
    rounded = options | {"tokens": (inputs["tokens"][0].bfloat16(),)}
    with pytest.raises(TypeError, match=re.escape("tokens[0] must be torch.float32")):
        head(inputs["hidden"], targets, loss_fn=luffy, **rounded)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_rows_in_the_loss(num_rows):
    inputs = case(weight_of_entropy, None, num_rows)
    inputs["mask"] = torch.zeros(num_rows, dtype=torch.bool)
    found = linear_token_loss(**inputs)
    assert found.loss == 0 and set(found.metrics) == {"num_tokens", "entropy_sum", "tanh"}
    assert all(x == 0 for x in found.metrics.values())
    assert not any(x.any() for x in gradients(found.loss, inputs))


def test_without_gradients():
    inputs = case(sft)
    with torch.no_grad():
        found = linear_token_loss(**inputs)
    expected = linear_token_loss(**inputs)
    assert torch.equal(found.loss, expected.loss) and not found.loss.requires_grad
    constant = linear_token_loss(
        **inputs | {"loss_fn": lambda log_probs, entropy: log_probs.detach()}
    )
    assert not any(x.any() for x in gradients(constant.loss, inputs))


def test_torch_compile_goes_round_it():
    inputs = case(luffy)
    hidden = inputs.pop("hidden")
    torch._dynamo.reset()

    def outcome(x):
        return linear_token_loss(x * 2, **inputs).loss * 3

    losses = outcome(hidden), torch.compile(outcome, backend="aot_eager")(hidden)
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_the_examples_of_the_readme():
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def luffy" in x)
    inputs = case(luffy)
    hidden, (advantages,) = inputs["hidden"], inputs["tokens"]
    head = LMHead(8, 33, bias=False).double()
    given = {"hidden": hidden, "lm_head": head, "advantages": advantages, "n": 7}
    given |= {"linear_token_loss": linear_token_loss}
    names = given | {k: inputs[k] for k in ("targets", "mask")}
    exec(code, names)
    options = {"mask": inputs["mask"], "normalizer": 7}
    expected = linear_token_loss(
        hidden, head.weight, inputs["targets"], luffy, tokens=(advantages,), **options
    )
    assert torch.equal(names["out"].loss, expected.loss)
    found, expected = (
        linear_token_loss(hidden, head.weight, inputs["targets"], f, **options, check=True)
        for f in (names["unsure"], unsure)
    )
    assert torch.equal(found.loss, expected.loss) and "p_sum" in found.metrics


ACROSS = {
    "mean": lambda log_probs, entropy: -log_probs * entropy.detach().mean(),
    "softmax": lambda log_probs, entropy: -log_probs * torch.softmax(entropy, 0),
    "running": lambda log_probs, entropy: -log_probs.cumsum(0),
    "gradient alone": lambda log_probs, entropy: (
        -log_probs + log_probs.sum() - log_probs.sum().detach()
    ),
}


@pytest.mark.parametrize("loss_fn", ACROSS.values(), ids=ACROSS)
def test_a_function_that_looks_across_rows_is_refused(loss_fn):
    inputs = case(sft) | {"loss_fn": loss_fn}
    linear_token_loss(**inputs)
    with pytest.raises(ValueError, match="loss_fn must look at one row at a time"):
        linear_token_loss(**inputs, check=True)


def test_memory_is_that_of_the_fused_path():
    wide = {"num_rows": 96, "width": 16, "vocab_size": 4000, "dtype": torch.float32}
    workspace = 96 * 4000 * 4 // 4
    inputs = case(weight_of_entropy, None, **wide) | {"workspace_bytes": workspace}
    peak = peak_bytes(lambda: backward(linear_token_loss(**inputs).loss))
    assert peak <= 4000 * 17 * 4 + workspace + 4000 * 4 + SLACK_BYTES


REFUSED = {
    "loss_fn must be callable, got NoneType": (TypeError, {"loss_fn": None}),
    "loss_fn's result must have shape [21], got []": (
        ValueError, {"loss_fn": lambda log_probs, entropy: -log_probs.sum()},
    ),
    "loss_fn's result must be a tensor, got float": (
        TypeError, {"loss_fn": lambda log_probs, entropy: 1.0},
    ),
    "loss_fn must not return a metric named 'num_tokens'": (
        ValueError, {"loss_fn": lambda log_probs, entropy: (log_probs, {"num_tokens": entropy})},
    ),
    "metric 'x' of loss_fn must have shape [21], got []": (
        ValueError, {"loss_fn": lambda log_probs, entropy: (log_probs, {"x": entropy.sum()})},
    ),
    "tokens must be a tuple of tensors, got Tensor": (TypeError, {"tokens": torch.zeros(24)}),
    "tokens[1] must have shape [24], got [3]": (
        ValueError, {"tokens": (torch.zeros(24), torch.zeros(3))},
    ),
    "tokens[0] must be a tensor, got int": (TypeError, {"tokens": (3,)}),
    "mask must be torch.bool, got torch.int64": (TypeError, {"mask": torch.zeros(24).long()}),
    "normalizer must be greater than 0, got 0": (ValueError, {"normalizer": 0}),
    "stats must be one of all, active, got 'some'": (ValueError, {"stats": "some"}),
    "active_rows must be torch.int64": (TypeError, {"active_rows": torch.zeros(1)}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    error, changed = REFUSED[message]
    inputs = case(sft) | {"mask": torch.arange(24) < 22} | changed
    with pytest.raises(error, match=re.escape(message)):
        linear_token_loss(**inputs)
