"""Liger's cross entropies, against what they document in float64, and against Liger's own."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from rft_kernels.adapters import liger
from torch import Tensor

from tests.kernels.adapters.cases import (
    B,
    D,
    L,
    V,
    assert_same,
    head,
    parameters_of,
    random,
    seeded,
)

T = B * L
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "z-loss": {"lse_square_scale": 1e-2},
    "z-loss, returned": {"lse_square_scale": 1e-2, "return_z_loss": True},
    "weights of the classes": {"weight": True, "lse_square_scale": 1e-2, "return_z_loss": True},
    "sum": {"reduction": "sum", "lse_square_scale": 1e-2, "return_z_loss": True, "weight": True},
    "none": {"reduction": "none", "lse_square_scale": 1e-2, "return_z_loss": True, "weight": True},
    "plain sum": {"reduction": "sum", "lse_square_scale": 1e-2, "return_z_loss": True},
    "plain none": {"reduction": "none", "lse_square_scale": 1e-2, "return_z_loss": True},
    "ignore_index": {"ignore_index": 5, "lse_square_scale": 1e-2},
    "accuracy": {"return_token_accuracy": True, "return_predicted_tokens": True},
    "accuracy of rows": {"return_token_accuracy": True, "reduction": "none"},
    "softcap": {"softcap": 2.0, "lse_square_scale": 1e-2, "return_z_loss": True},
}
TOKEN_SCALING = {
    "tokens scaled": {"use_token_scaling": True, "lse_square_scale": 1e-2, "return_z_loss": True},
    "rows scaled": {"use_token_scaling": True, "lse_square_scale": 1e-2, "reduction": "none"},
}
# Liger's kernels of these do not run in Triton's interpreter.
NOT_INTERPRETED = {"softcap", *(name for name, case in CASES.items() if "weight" in case)}


@pytest.fixture(scope="module")
def liger_ops() -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("Liger's kernels take no CPU tensors where they are compiled")
    return pytest.importorskip("liger_kernel.ops", reason="Liger is not installed")


def targets(options: dict[str, Any], logits: Tensor | None = None) -> Tensor:
    """[T], three of them not in the loss, and with logits some of the others the likeliest."""
    found = torch.randint(6, V, (T,), generator=seeded(3))
    if logits is not None:
        found[::3] = logits.detach().argmax(-1)[::3].clamp(min=6)
    found[2:5] = options.get("ignore_index", -100)
    return found


def class_weights() -> Tensor:
    return torch.rand(V, generator=seeded(4)) + 0.5


def documented(
    logits: Tensor,  # [T, V]
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    use_token_scaling: bool = False,
    **wanted: bool,
) -> tuple[Tensor | None, ...]:
    """What Liger's docstrings and comments say, in plain torch."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    counted = target != ignore_index
    y = torch.where(counted, target, 0)
    lse = z.logsumexp(-1)
    nll = lse - z.gather(-1, y[:, None])[:, 0]
    z_loss = lse_square_scale * lse.square()
    scale = (-nll).detach().exp() if use_token_scaling else 1
    weights = torch.ones_like(nll) if weight is None else weight.to(nll)[y]
    if reduction == "mean":
        nll, z_loss = nll / weights[counted].sum(), z_loss / counted.sum()
    loss = torch.where(counted, (nll * weights + z_loss) * scale, 0)
    z_loss = torch.where(counted, z_loss * scale, 0).detach()
    predicted = torch.where(counted, z.argmax(-1), -1)
    correct = (predicted == target).float()  # as counts are, in any dtype
    accuracy = correct.sum() / counted.sum()
    if reduction != "none":
        loss, z_loss = loss.sum(), z_loss.sum()
    found = {
        "return_z_loss": z_loss,
        "return_token_accuracy": correct if reduction == "none" else accuracy,
        "return_predicted_tokens": predicted,
    }
    return loss, *(x if wanted.get(name, False) else None for name, x in found.items())


def results(found: tuple[Tensor | None, ...], wrt: list[Tensor]) -> list[Tensor | None]:
    """What a function returns, and the gradients of its loss times something."""
    scale = torch.linspace(0.5, 2, T).to(found[0]) if found[0].dim() else 3
    grads = torch.autograd.grad((found[0] * scale).sum(), wrt)
    return [x if x is None else x.detach() for x in (*found, *grads)]


def from_logits(function: Any, name: str, dtype: torch.dtype) -> list[Tensor | None]:
    options = dict(CASES[name])
    leaf = random(T, V, seed=0, scale=2.0).to(dtype).requires_grad_()
    target = targets(options, leaf)
    weight = class_weights().to(dtype) if options.pop("weight", False) else None
    if hasattr(function, "apply"):
        names = list(DEFAULTS)
        values = (options.get(n, DEFAULTS[n]) for n in names)
        found = function.apply(leaf * 1, target, weight, *values)
    else:
        found = function(leaf, target, weight, **options)
    return results(found, [leaf])


def from_hidden_states(function: Any, name: str, dtype: torch.dtype) -> list[Tensor | None]:
    options = dict((CASES | TOKEN_SCALING)[name])
    hidden, weight, bias, _ = (x.detach().to(dtype) for x in head(T))
    wrt = [x.requires_grad_() for x in (hidden, weight, bias)]
    ce_weight = class_weights().to(dtype) if options.pop("weight", False) else None
    target = targets(options, torch.nn.functional.linear(hidden, weight, bias))
    if hasattr(function, "apply"):
        values = [options.get(n, default) for n, default in LINEAR_DEFAULTS.items()]
        found = function.apply(hidden, weight, target, bias, ce_weight, *values)
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        found = function(logits, target, ce_weight, **options)
    return results(found, wrt)


def defaults(function: type, first: str) -> dict[str, Any]:
    found = dict(parameters_of(function.apply))
    names = list(found)
    return {name: found[name] for name in names[names.index(first) :]}


DEFAULTS = defaults(liger.LigerCrossEntropyFunction, "ignore_index")
LINEAR_DEFAULTS = defaults(liger.LigerFusedLinearCrossEntropyFunction, "ignore_index")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_from_logits_as_documented(name, dtype):
    ours = from_logits(liger.LigerCrossEntropyFunction, name, dtype)
    truth = from_logits(documented, name, torch.float64)
    assert ours[0].dtype == dtype
    assert_close(ours, truth, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES | TOKEN_SCALING)
def test_from_hidden_states_as_documented(name, dtype):
    ours = from_hidden_states(liger.LigerFusedLinearCrossEntropyFunction, name, dtype)
    truth = from_hidden_states(documented, name, torch.float64)
    assert_close(ours, truth, 2e-5 if dtype == torch.float32 else 1e-12)


def assert_close(ours: list, theirs: list, tolerance: float) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            scale = y.abs().max().item()
            torch.testing.assert_close(
                x.double(), y.double(), rtol=tolerance, atol=tolerance * scale
            )


@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_INTERPRETED))
def test_from_logits_as_liger(liger_ops, name):
    ours, theirs = (
        from_logits(module.LigerCrossEntropyFunction, name, torch.float32)
        for module in (liger, liger_ops)
    )
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", sorted((CASES | TOKEN_SCALING).keys() - NOT_INTERPRETED))
def test_from_hidden_states_as_liger(liger_ops, name):
    ours, theirs = (
        from_hidden_states(module.LigerFusedLinearCrossEntropyFunction, name, torch.float32)
        for module in (liger, liger_ops)
    )
    assert_close(ours, theirs, 2e-5)


def test_signatures(liger_ops):
    for name in ("LigerCrossEntropyFunction", "LigerFusedLinearCrossEntropyFunction"):
        ours, theirs = getattr(liger, name).apply, getattr(liger_ops, name).forward
        assert [x for x, _ in parameters_of(ours)] == [x for x, _ in parameters_of(theirs)]
        pairs = zip(parameters_of(ours), parameters_of(theirs), strict=True)
        assert all(x == y for x, y in pairs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted_is_no_loss(reduction):
    """Liger's is 0, where torch's mean is NaN."""
    target = torch.full((T,), -100)
    leaf = random(T, V, seed=0).requires_grad_()
    hidden, weight, bias, _ = head(T)
    for found, wrt in (
        (
            liger.LigerCrossEntropyFunction.apply(
                leaf * 1, target, class_weights(), -100, 1e-2, 0.0, reduction
            ),
            [leaf],
        ),
        (
            liger.LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, target, bias, class_weights(), -100, 1e-2, 0.0, reduction
            ),
            [hidden, weight, bias],
        ),
    ):
        assert not found[0].any()
        assert not any(x.any() for x in torch.autograd.grad(found[0].sum(), wrt))


def test_the_logits_become_their_gradient_unless_they_are_a_leaf():
    leaf, target = random(T, V, seed=0).requires_grad_(), targets({})
    logits = leaf * 1
    liger.LigerCrossEntropyFunction.apply(logits, target, None)[0].backward()
    assert torch.equal(leaf.grad, logits.detach())
    other = leaf.detach().clone().requires_grad_()
    liger.LigerCrossEntropyFunction.apply(other, target, None)[0].backward()
    assert torch.equal(other.grad, leaf.grad) and torch.equal(other, leaf)


def test_16_bits_are_not_rounded():
    logits, target = random(T, V, seed=0, dtype=torch.bfloat16), targets({})
    found = liger.LigerCrossEntropyFunction.apply(logits, target, None, reduction="none")[0]
    truth = documented(logits.double(), target, reduction="none")[0]
    assert found.dtype == torch.float32 and (found - truth).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 0.1}, NotImplementedError, "label_smoothing must be 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"lse_square_scale": float("nan")}, ValueError, "lse_square_scale must be finite"),
        ({"weight": torch.ones(V - 1)}, ValueError, "weight of the classes must have shape"),
        ({"softcap": 0.0}, ValueError, "softcap must be greater than 0"),
        ({"target": torch.zeros(T)}, TypeError, "target must be"),
        ({"target": torch.full((T,), V)}, ValueError, "targets must be -100 or between"),
        ({"target": torch.zeros(T, 1, dtype=torch.int64)}, ValueError, "targets must have shape"),
    ],
)
def test_refusals(options, error, message):
    options = {"target": targets({}), "weight": None} | options
    with pytest.raises(error, match=message):
        liger.LigerCrossEntropyFunction.apply(torch.zeros(T, V), **options)
    weight = torch.zeros(V, D)
    options = {{"weight": "ce_weight"}.get(name, name): x for name, x in options.items()}
    with pytest.raises(error, match=message):
        liger.LigerFusedLinearCrossEntropyFunction.apply(torch.zeros(T, D), weight, **options)


def test_patch(liger_ops, monkeypatch):
    """Modules, the functional form and what was built before; afterwards Liger's own again."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    transformers = importlib.import_module("liger_kernel.transformers")
    built = transformers.LigerCrossEntropyLoss(lse_square_scale=1e-2, return_z_loss=True)
    linear = transformers.LigerFusedLinearCrossEntropyLoss()
    calls = []
    for name in ("LigerCrossEntropyFunction", "LigerFusedLinearCrossEntropyFunction"):
        own = getattr(liger, name).apply
        monkeypatch.setattr(
            getattr(liger, name),
            "apply",
            staticmethod(lambda *x, f=own, n=name, **y: calls.append(n) or f(*x, **y)),
        )
    hidden, weight, bias, _ = head(T)
    logits, target = torch.nn.functional.linear(hidden, weight, bias), targets({})

    def outcomes() -> list[Tensor]:
        first = built(logits * 1, target)
        return [
            first.loss,
            first.z_loss,
            linear(weight, hidden, target, bias),
            functional.liger_cross_entropy(logits * 1, target),
            functional.liger_fused_linear_cross_entropy(hidden, weight, target, bias),
        ]

    theirs = outcomes()
    assert not calls
    with liger.patch():
        ours = outcomes()
    assert len(calls) == 4
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=1e-6)
    outcomes()
    assert len(calls) == 4


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7, "return_entropy": True}, {"ignore_index": 5, "return_entropy": True},
])  # fmt: skip
def test_scaled_cross_entropy(liger_ops, options):
    theirs = liger_ops.LigerFusedLinearScaledCrossEntropyFunction
    ours = liger.LigerFusedLinearScaledCrossEntropyFunction
    assert parameters_of(ours.apply) == parameters_of(theirs.apply)
    hidden, weight, _, ids = head(B * L)
    ids[ids == 5] = 6
    ids[2:4] = options.get("ignore_index", -100)

    def found(function):
        result = function.apply(hidden, weight, ids, **options)
        result = result if isinstance(result, tuple) else (result,)
        total = sum((x * (i + 1 + torch.arange(B * L))).sum() for i, x in enumerate(result))
        # Only of rows with a target: elsewhere theirs has the entropy, without a gradient.
        return *(x[4:] for x in result), *torch.autograd.grad(total, (hidden, weight))

    assert_same([*found(ours)], [*found(theirs)], rtol=2e-4)
    nll = ours.apply(hidden, weight, ids, **options | {"return_entropy": False})
    assert not nll[2:4].any() and not nll[2:4].signbit().any()
    with pytest.raises(NotImplementedError, match="selected_token_ids"):
        ours.apply(hidden, weight, ids, selected_token_ids=ids[:2])
    with pytest.raises(ValueError, match="targets must be"):
        ours.apply(hidden, weight, ids.fill_(-100), ignore_index=5)
