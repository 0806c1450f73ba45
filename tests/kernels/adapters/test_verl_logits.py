"""The adapter for verl from logits, against verl's own: values, gradients, patching."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from rft_kernels import token_stats
from rft_kernels.adapters import verl

from tests.kernels.adapters import verl_stand_in
from tests.kernels.adapters.cases import B, L, V, compare, counting, example, seeded


@pytest.fixture(params=["verl's own", "as documented"])
def verl_functional(request, monkeypatch) -> ModuleType:
    if request.param == "verl's own":
        reason = "verl is not installed"
        return pytest.importorskip("verl.utils.torch_functional", reason=reason)
    found = verl_stand_in.modules()
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found["verl.utils.torch_functional"]


def test_verl_functions(verl_functional):
    logits, labels = example()
    ours, theirs = verl, verl_functional
    compare(ours.entropy_from_logits, theirs.entropy_from_logits, logits, wrt=logits)
    compare(
        ours.logprobs_from_logits, theirs.logprobs_from_logits, logits, labels,
        inplace_backward=False, wrt=logits,
    )  # fmt: skip
    for name in ("logprobs_from_logits", "entropy_from_logits"):
        pairs = [
            [(x.name, x.default) for x in inspect.signature(getattr(f, name)).parameters.values()]
            for f in (ours, theirs)
        ]
        assert pairs[0] == pairs[1]


def test_verl_functions_that_leave_the_logits(verl_functional):
    logits, labels = example()
    name = "calculate_sum_pi_squared_from_logits"
    compare(getattr(verl, name), getattr(verl_functional, name), logits, wrt=logits)
    name = "logprobs_from_logits_v2"
    compare(getattr(verl, name), getattr(verl_functional, name), logits, labels, wrt=logits)
    before = logits.detach().clone()
    verl.logprobs_from_logits_v2(logits, labels).sum().backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kind", ["normal", "peaked", "huge", "masked"])
def test_verl_sum_of_squares_is_exact(kind):
    logits = torch.randn(B, L, V, generator=seeded(0), dtype=torch.float64)
    logits = {
        "normal": logits,
        "peaked": logits + 30 * torch.eye(V, dtype=torch.float64)[3],
        "huge": logits + 1e4,
        "masked": torch.where(torch.arange(V) < 9, -torch.inf, logits),
    }[kind].float()
    truth = logits.double().softmax(-1).square().sum(-1)
    found = verl.calculate_sum_pi_squared_from_logits(logits)
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, B * L), (B, L), (B * L,)])
def test_verl_labels_of_another_shape(shape):
    """verl's actor without padding passes labels [1, T] with logits [T, V]."""
    logits, labels = example()
    rows = logits.view(-1, V)
    found = verl.logprobs_from_logits(rows, labels.view(shape), inplace_backward=False)
    expected = token_stats(logits, labels).log_probs.flatten()
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"targets must have shape \[21\], got \[20\]"):
        verl.logprobs_from_logits(rows, labels.flatten()[1:])


def test_verl_inplace_backward_refuses_who_needs_the_logits_still():
    leaf, labels = example()
    logits = leaf * 1
    verl.logprobs_from_logits(logits, labels).sum().backward()
    torch.testing.assert_close(leaf.grad, logits.detach())
    logits = leaf * 1
    entropy = verl.entropy_from_logits(logits)
    log_probs = verl.logprobs_from_logits(logits, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (log_probs.sum() + entropy.sum()).backward()


def test_verl_patch(verl_functional, monkeypatch):
    calls = counting(monkeypatch, verl)
    own = verl_functional.logprobs_from_logits
    logits, labels = example()
    user = ModuleType("verl.workers.some_actor")
    user.logprobs_from_logits = own
    monkeypatch.setitem(sys.modules, user.__name__, user)
    with verl.patch():
        user.logprobs_from_logits(logits, labels)
        verl_functional.entropy_from_logits(logits)
    assert len(calls) == 2
    assert user.logprobs_from_logits is verl_functional.logprobs_from_logits is own
