"""Both losses, from logits and from hidden states, against the specification and each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rft_kernels import (
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_stats,
    prefix_rft_loss,
    reference,
    token_loss,
)

from tests.kernels.kernel_cases import assert_as_exact, from_logits, gradients, loss_inputs, seeded

SOME_TERMS = {"dual_clip": 1.2, "entropy_coef": 0.05, "kl": "k3", "kl_coef": 0.1}
CONFIGS = {
    "plain": PolicyConfig(),
    "terms": PolicyConfig(**SOME_TERMS),
    "sequence": PolicyConfig(importance_level="sequence", prefix_clip="none"),
    "prefix free": PolicyConfig(prefix_clip="none", entropy_coef=0.01),
    "capped": PolicyConfig(importance_cap=1.1, prefix_clip=(0.1, 0.3)),
}
PREFIXES = ("selecting", "selected", "no prefix")
BOUNDS = torch.tensor([0, 6, 6, 15, 24])


def options(config, prefixes, inputs) -> dict:
    """Reference and engine log-probs for a config, and what is said of the prefix."""
    wobble = 0.3 * torch.randn(2, 24, generator=seeded(9), dtype=torch.float64)
    found = {
        "config": config,
        "ref_log_probs": inputs["old_log_probs"] + wobble[0],
        "rollout_log_probs": inputs["old_log_probs"] + wobble[1],
        "cu_seqlens": BOUNDS,
    }
    if prefixes == "selected":
        found["selected_mask"] = torch.rand(24, generator=seeded(8)) > 0.5
    elif prefixes == "no prefix":
        found["prefix_mask"] = None
    return found


@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_specification(config, prefixes, on_policy):
    inputs = loss_inputs()
    inputs |= options(config, prefixes, inputs)
    if on_policy:
        inputs["old_log_probs"] = None
    expected = reference.linear_prefix_rft_loss(**inputs)
    truth = gradients(expected.loss, inputs)
    for found in (
        from_logits(prefix_rft_loss, inputs),
        linear_prefix_rft_loss(**inputs),
        linear_prefix_rft_loss(**inputs, workspace_bytes=33 * 8 * 20),
    ):
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(gradients(found.loss, inputs), truth, atol=1e-14, rtol=1e-10)
        torch.testing.assert_close(found.log_probs, expected.log_probs)
        torch.testing.assert_close(found.entropy, expected.entropy)
        assert torch.equal(found.selected_mask, expected.selected_mask)
        torch.testing.assert_close(found.metrics, expected.metrics)
        assert not any(x.requires_grad for x in found[1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefixes", PREFIXES[1:])
def test_as_exact_as_torch(prefixes, dtype):
    inputs = loss_inputs(dtype=dtype)
    inputs |= options(CONFIGS["terms"], prefixes, inputs)
    same = reference.linear_prefix_rft_loss(**inputs)
    names = ("hidden", "lm_head_weight", "bias")
    doubles = inputs | {name: inputs[name].detach().double().requires_grad_() for name in names}
    truth = reference.linear_prefix_rft_loss(**doubles)
    for found in (linear_prefix_rft_loss(**inputs), from_logits(prefix_rft_loss, inputs)):
        assert found.loss.dtype == torch.float32
        ours = gradients(found.loss, inputs)
        for x, y, z in zip(
            ours, gradients(same.loss, inputs), gradients(truth.loss, doubles), strict=True
        ):
            assert x.dtype == dtype
            assert_as_exact(x, y, z)
    linear = linear_prefix_rft_loss(**inputs)
    for name in ("loss", "log_probs", "entropy"):
        assert_as_exact(*(getattr(x, name).detach() for x in (linear, same, truth)))


@pytest.mark.parametrize(
    "extra", [{"softcap": 2.0}, {"temperature": 0.6}, {"vocab_size": 30}], ids=str
)
@pytest.mark.parametrize("prefixes", PREFIXES[:2])
def test_options_of_the_head(prefixes, extra):
    inputs = loss_inputs() | extra
    inputs["targets"] = inputs["targets"].clamp(max=29)
    inputs |= options(CONFIGS["terms"], prefixes, inputs)
    expected = reference.linear_prefix_rft_loss(**inputs)
    found = linear_prefix_rft_loss(**inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    ours, truth = gradients(found.loss, inputs), gradients(expected.loss, inputs)
    torch.testing.assert_close(ours, truth, atol=1e-14, rtol=1e-10)
    if "vocab_size" in extra:
        assert (ours[1][30:] == 0).all() and (ours[2][30:] == 0).all()


def test_padding_of_the_head_may_hold_anything():
    inputs = loss_inputs() | {"vocab_size": 30}
    inputs["targets"] = inputs["targets"].clamp(max=29)
    plain = gradients(linear_prefix_rft_loss(**inputs).loss, inputs)
    inputs["lm_head_weight"].data[30:] = torch.nan
    inputs["bias"].data[30:] = torch.inf
    spoiled = gradients(linear_prefix_rft_loss(**inputs).loss, inputs)
    assert all(torch.equal(x, y) for x, y in zip(plain, spoiled, strict=True))


def test_temperature_a_row_and_a_layout_of_sequences():
    inputs = loss_inputs()
    inputs["temperature"] = torch.linspace(0.5, 2, 24)
    inputs["prefix_mask"] = None
    flat = linear_prefix_rft_loss(**inputs, cu_seqlens=torch.arange(5) * 6)
    per_token = ("targets", "old_log_probs", "advantages", "response_mask", "temperature")
    folded = {name: inputs[name].view(4, 6) for name in per_token}
    folded["hidden"] = inputs["hidden"].view(4, 6, -1)
    found = linear_prefix_rft_loss(**inputs | folded)
    assert found.log_probs.shape == (4, 6)
    assert torch.equal(found.loss, flat.loss)
    for x, y in zip(gradients(found.loss, inputs), gradients(flat.loss, inputs), strict=True):
        assert torch.equal(x, y)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40), st.integers(1, 2**14))
def test_schedules_and_tiles_do_not_show(seed, num_rows, vocab_size, workspace_bytes):
    inputs = loss_inputs(num_rows, 5, vocab_size, seed=seed)
    inputs["config"] = PolicyConfig(entropy_coef=0.05, dual_clip=1.2)
    dense = from_logits(prefix_rft_loss, inputs)
    truth = gradients(dense.loss, inputs)
    two_passes = linear_prefix_rft_loss(**inputs, workspace_bytes=workspace_bytes)
    inputs["selected_mask"] = dense.selected_mask
    one_pass = linear_prefix_rft_loss(**inputs, workspace_bytes=workspace_bytes)
    for found in (two_passes, one_pass):
        torch.testing.assert_close(found.loss, dense.loss)
        torch.testing.assert_close(gradients(found.loss, inputs), truth, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_active_statistics_change_no_gradient(config, prefixes):
    inputs = loss_inputs()
    inputs |= options(config, prefixes, inputs)
    inputs["advantages"][10:] = 0
    whole = linear_prefix_rft_loss(**inputs)
    active = inputs["response_mask"] & (inputs["targets"] != -100)
    if config.vanishes_without_advantage:
        active &= inputs["advantages"] != 0
    if prefixes == "selected":
        active &= ~inputs["prefix_mask"] | inputs["selected_mask"]
    rows = active.nonzero().flatten()
    for extra in ({}, {"active_rows": rows}):
        for call in (
            linear_prefix_rft_loss(**inputs, stats="active", **extra),
            linear_prefix_rft_loss(**inputs, **extra),
            from_logits(prefix_rft_loss, inputs, stats="active", **extra),
        ):
            torch.testing.assert_close(call.loss, whole.loss)
            assert torch.equal(call.selected_mask, whole.selected_mask)
            torch.testing.assert_close(
                gradients(call.loss, inputs), gradients(whole.loss, inputs), atol=1e-14, rtol=1e-10
            )
    few = linear_prefix_rft_loss(**inputs, stats="active")
    needed = active if prefixes != "selecting" else active | (few.entropy != 0)
    assert (few.log_probs[~needed] == 0).all() and (few.entropy[~needed] == 0).all()
    assert (whole.entropy[~needed] != 0).any()
    torch.testing.assert_close(few.entropy[needed], whole.entropy[needed])


def test_metrics_of_active_statistics_are_of_active_rows():
    inputs = loss_inputs() | {"prefix_mask": None}
    active = inputs["response_mask"] & (inputs["targets"] != -100) & (inputs["advantages"] != 0)
    whole = linear_prefix_rft_loss(**inputs)
    few = linear_prefix_rft_loss(**inputs, stats="active").metrics
    assert few["num_tokens"] == active.sum() < whole.metrics["num_tokens"]
    torch.testing.assert_close(few["entropy_sum"], whole.entropy[active].sum())


def test_rows_without_gradient_are_never_looked_at():
    inputs = loss_inputs()
    inputs["selected_mask"] = torch.rand(24, generator=seeded(1)) > 0.5
    dead = ~inputs["response_mask"] | (inputs["advantages"] == 0)
    dead |= (inputs["targets"] == -100) | (inputs["prefix_mask"] & ~inputs["selected_mask"])
    plain = linear_prefix_rft_loss(**inputs)
    expected = gradients(plain.loss, inputs)
    inputs["hidden"].data[dead] = torch.nan
    for stats in ("all", "active"):
        found = linear_prefix_rft_loss(**inputs, stats=stats)
        assert torch.equal(found.loss, plain.loss)
        ours = gradients(found.loss, inputs)
        assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
        assert (ours[0][dead] == 0).all()
    assert (ours[0][~dead] != 0).any(-1).float().mean() > 0.5


@given(st.integers(0, 10**6))
def test_exact_zeros_and_rows_that_sum_to_zero(seed):
    inputs = loss_inputs(30, 6, 20, seed=seed)
    rest = {k: x for k, x in inputs.items() if k not in ("hidden", "lm_head_weight", "bias")}
    with torch.no_grad():
        logits = torch.nn.functional.linear(inputs["hidden"], inputs["lm_head_weight"])
    logits.requires_grad_()
    found = prefix_rft_loss(logits, **rest)
    (dlogits,) = torch.autograd.grad(found.loss, logits)
    ratio = (found.log_probs - rest["old_log_probs"]).exp()
    a = rest["advantages"]
    zero = ~rest["response_mask"] | (rest["targets"] == -100) | (a == 0)
    zero |= rest["prefix_mask"] & ~found.selected_mask
    zero |= ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert (dlogits[zero] == 0).all()
    assert (dlogits[~zero] != 0).any(-1).all()
    assert dlogits.sum(-1).abs().max() < 1e-15


@given(st.integers(0, 10**6), st.floats(-50, 50))
def test_entropy_is_bounded_and_blind_to_shifts(seed, shift):
    inputs = loss_inputs(9, 4, 11, seed=seed)
    logits = (inputs["hidden"] @ inputs["lm_head_weight"].T).detach() * 5
    inputs = logits, inputs["targets"]
    found, moved = reference.token_stats(*inputs), reference.token_stats(logits + shift, inputs[1])
    bound = torch.log(torch.tensor(11.0)) + 1e-12
    for entropy in (found.entropy, linear_token_stats(*eye(logits), inputs[1]).entropy):
        assert (entropy >= 0).all() and (entropy <= bound).all()
    torch.testing.assert_close(found.entropy, moved.entropy, atol=1e-10, rtol=0)


def eye(logits):
    """Hidden states and weight whose projection is `logits`."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype)


def test_micro_batches_sum_to_the_batch():
    inputs = loss_inputs()
    whole = linear_prefix_rft_loss(**inputs)
    inputs["selected_mask"] = whole.selected_mask
    expected = gradients(whole.loss, inputs)
    total = [torch.zeros_like(x) for x in expected]
    rows = ("hidden", "targets", "old_log_probs", "advantages", "response_mask", "prefix_mask")
    for cut in (slice(0, 7), slice(7, 8), slice(8, 24)):
        part = inputs | {name: inputs[name][cut] for name in (*rows, "selected_mask")}
        found = linear_prefix_rft_loss(**part)
        total = [x + y for x, y in zip(total, gradients(found.loss, inputs), strict=True)]
    torch.testing.assert_close(total, expected, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("prefixes", PREFIXES[:2])
def test_gradients_in_float64(prefixes):
    inputs = loss_inputs(9, 3, 5)
    if prefixes == "selected":
        inputs["selected_mask"] = torch.rand(9, generator=seeded(1)) > 0.3
    config = PolicyConfig(**SOME_TERMS)
    ref = inputs["old_log_probs"] - 0.1
    names = ("hidden", "lm_head_weight", "bias")

    def loss(*wrt):
        named = inputs | dict(zip(names, wrt, strict=True))
        return linear_prefix_rft_loss(**named, config=config, ref_log_probs=ref, softcap=3.0).loss

    assert torch.autograd.gradcheck(loss, [inputs[name] for name in names])


def test_linear_token_stats_gradients_in_float64():
    inputs = loss_inputs(7, 3, 5)
    names = ("hidden", "lm_head_weight", "bias")

    def stats(hidden, weight, bias):
        row_mask = torch.arange(7) != 2
        return tuple(
            linear_token_stats(
                hidden, weight, inputs["targets"], bias=bias, row_mask=row_mask, temperature=0.7
            )
        )

    assert torch.autograd.gradcheck(stats, [inputs[name] for name in names])


@pytest.mark.parametrize("prefixes", PREFIXES[:2])
@pytest.mark.parametrize("frozen", [("hidden",), ("lm_head_weight", "bias")], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_none(frozen, prefixes):
    inputs = loss_inputs()
    if prefixes == "selected":
        inputs["selected_mask"] = torch.rand(24, generator=seeded(1)) > 0.3
    names = ("hidden", "lm_head_weight", "bias")
    full = dict(zip(names, gradients(linear_prefix_rft_loss(**inputs).loss, inputs), strict=True))
    for name in frozen:
        inputs[name] = inputs[name].detach()
    linear_prefix_rft_loss(**inputs).loss.backward()
    for name in names:
        if name in frozen:
            assert inputs[name].grad is None
        else:
            assert torch.equal(inputs[name].grad, full[name])


@pytest.mark.parametrize("prefixes", PREFIXES[:2])
def test_a_kept_graph_gives_the_same_gradient_again(prefixes):
    inputs = loss_inputs()
    if prefixes == "selected":
        inputs["selected_mask"] = torch.rand(24, generator=seeded(1)) > 0.3
    loss = linear_prefix_rft_loss(**inputs).loss
    first = gradients(3 * loss, inputs)
    for x, y in zip(first, gradients(loss, inputs), strict=True):
        torch.testing.assert_close(x, 3 * y)
    (3 * loss).backward()
    assert torch.equal(inputs["lm_head_weight"].grad, first[1])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_backward():
    inputs = loss_inputs()
    expected = gradients(from_logits(prefix_rft_loss, inputs).loss, inputs)
    found = from_logits(prefix_rft_loss, inputs, inplace_backward=True)
    names = ("hidden", "lm_head_weight", "bias")
    ours = torch.autograd.grad(found.loss, [inputs[name] for name in names])
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "all masked"])
@pytest.mark.parametrize("prefixes", PREFIXES)
def test_nothing_in_the_loss(prefixes, rows):
    inputs = loss_inputs(rows, 4, 5)
    inputs["response_mask"][:] = False
    if prefixes == "selected":
        inputs["selected_mask"] = inputs["prefix_mask"]
    elif prefixes == "no prefix":
        inputs["prefix_mask"] = None
    for found in (linear_prefix_rft_loss(**inputs), from_logits(prefix_rft_loss, inputs)):
        assert found.loss == 0 and found.metrics["num_tokens"] == 0
        assert all((x == 0).all() for x in gradients(found.loss, inputs))


@pytest.mark.parametrize("selecting", [False, True])
def test_softcap_from_logits(selecting):
    inputs = loss_inputs() | {"softcap": 2.0, "temperature": 0.7}
    if not selecting:
        inputs["selected_mask"] = inputs["prefix_mask"]
    ours, truth = (from_logits(op, inputs) for op in (prefix_rft_loss, reference.prefix_rft_loss))
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=0)
    pairs = zip(gradients(ours.loss, inputs), gradients(truth.loss, inputs), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)
    kept = ("hidden", "lm_head_weight", "targets", "bias", "normalizer", "softcap", "temperature")
    inputs = {name: inputs[name] for name in kept} | {"loss_fn": lambda log_probs, _: -log_probs}
    ours, truth = (from_logits(op, inputs) for op in (token_loss, reference.token_loss))
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=0)
