"""The head of TRL's trainers, from hidden states, against TRL's own."""

import pytest
import torch
from rft_kernels import linear_token_stats
from rft_kernels.adapters import trl

from tests.kernels.adapters.cases import B, L, assert_same, head, outcome, parameters_of, seeded


@pytest.fixture(scope="module")
def trl_function() -> type:
    reason = "TRL is not installed"
    return pytest.importorskip("trl.kernels", reason=reason).ChunkedLogProbFunction


TRL_CASES = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"final_logit_softcapping": 2.0, "bias": True},
    "scale": {"logit_scale": 0.3, "bias": True},
    "cap and scale": {"final_logit_softcapping": 2.0, "logit_scale": 1.7},
    "log-probs alone": {"outputs": ("log_probs",)},
    "metrics": {"outputs": ("is_top1", "log_sum_sq_probs"), "bias": True},
    "frozen": {"frozen": True, "bias": True},
}


@pytest.mark.parametrize("name", TRL_CASES)
def test_trl_chunked_log_probs(trl_function, name):
    """Every output and gradient, on more rows than one tile of the metrics has."""
    case = dict(TRL_CASES[name])
    hidden, weight, bias, targets = head(300)
    weight.requires_grad_(not case.pop("frozen", False))
    bias = bias if case.pop("bias", False) else None
    names = {"final_logit_softcapping": None, "logit_scale": 1.0, "outputs": trl._OUTPUTS}
    options = [case.pop(key, default) for key, default in names.items()]
    assert not case
    ours, theirs = (
        outcome(f.apply, hidden, weight, bias, targets, 0.7, 16, *options)
        for f in (trl.ChunkedLogProbFunction, trl_function)
    )
    assert len(ours) == 5 + hidden.requires_grad + weight.requires_grad + (bias is not None)
    assert_same(ours, theirs)


def test_trl_chunked_signature(trl_function):
    theirs = parameters_of(trl_function.forward)
    assert parameters_of(trl.ChunkedLogProbFunction.apply) == theirs


def test_trl_chunked_in_16_bits_is_more_exact(trl_function):
    arguments = head(300, torch.bfloat16)
    truth = outcome(
        trl_function.apply,
        *(x.detach().double().requires_grad_() for x in arguments[:3]),
        arguments[3], 0.7, 16, None, 1.0, ("entropy",),
    )  # fmt: skip
    ours, theirs = (
        outcome(f.apply, *arguments, 0.7, 16, None, 1.0, ("entropy",))
        for f in (trl.ChunkedLogProbFunction, trl_function)
    )
    for x, y, z in zip(ours, theirs, truth, strict=True):
        if x is not None:
            assert x.dtype == y.dtype and (x - z).abs().max() < (y - z).abs().max()


def test_trl_chunked_under_autocast():
    hidden, weight, bias, targets = head(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = outcome(trl.ChunkedLogProbFunction.apply, hidden, weight, bias, targets, 0.7, 16)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    theirs = outcome(trl.ChunkedLogProbFunction.apply, *rounded, targets, 0.7, 16)
    assert all(x.dtype == torch.float32 for x in ours[5:])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y.to(x.dtype))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"outputs": ("entropy", "perplexity")}, ValueError, "perplexity"),
        ({"partitioned": True}, NotImplementedError, "ZeRO-3"),
    ],
)
def test_trl_chunked_refusals(options, error, message):
    hidden, weight, bias, targets = head(2)
    if options.pop("partitioned", False):
        weight.ds_id = 0
    with pytest.raises(error, match=message):
        trl.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16, **options)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "cohere", "granite"])
def test_trl_fused_head_of_a_model(trl_function, make_model, model_type, monkeypatch):
    """TRL's own fused head, patched after it was added: caps and scales as TRL reads them."""
    utils = pytest.importorskip("trl.trainer.utils")
    given = {"cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 3.0}}
    model = make_model(model_type, **given.get(model_type, {}))
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *trl._OUTPUTS))
    labels = torch.randint(112, (B, L), generator=seeded(3))
    labels[0, :3] = labels[2, -2:] = -100
    calls = []

    def counted(*arguments, **options):
        calls.append(options["softcap"])
        return linear_token_stats(*arguments, **options)

    monkeypatch.setattr("rft_kernels.adapters._linear.linear_token_stats", counted)

    def results():
        found = model(input_ids=labels.clamp(min=0), labels=labels, fused_lm_head=True)
        total = found.loss + found.entropy.square().mean()
        grads = torch.autograd.grad(total, list(model.parameters()))
        names = ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return [*(getattr(found, name) for name in names), *grads]

    theirs = results()
    assert not calls
    with trl.patch():
        ours = results()
    assert calls == [30.0 if model_type == "gemma2" else None]
    assert_same(ours, theirs)
    assert_same(results(), theirs)
    assert len(calls) == 1
