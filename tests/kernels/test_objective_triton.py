"""policy_objective as Triton kernels: compiled on a GPU, interpreted without one."""

from functools import partial

import pytest
import torch
from rft_kernels import PolicyConfig, linear_prefix_rft_loss, reference
from rft_kernels import policy_objective as objective_by_any_backend

from tests.kernels.kernel_cases import assert_as_exact, loss_inputs
from tests.kernels.launches import compiled
from tests.kernels.test_objective import LEVELS, TERMS, slopes, tokens

pytest.importorskip("triton", reason="triton is not installed")
from rft_kernels.objective import triton_backend  # noqa: E402

policy_objective = partial(objective_by_any_backend, backend="triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_backend, "TILE", 8)


def case(dtype=torch.float32, layout="flat", on_policy=False):
    """Arguments in float32, log_probs and entropy in `dtype`, on the device."""
    positional, options = tokens(layout, dtype)

    def moved(x):
        if not isinstance(x, torch.Tensor) or x.dtype == torch.int64:
            return x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        moved = x.detach().to(DEVICE)
        moved = moved.float() if x.dtype == torch.float64 else moved
        return moved.requires_grad_(x.requires_grad)

    positional = [moved(x) for x in positional]
    if on_policy:
        positional[1] = None
    return positional, {name: moved(x) for name, x in options.items()}


def widened(positional, options):
    """The same numbers in float64."""

    def wide(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return [wide(x) for x in positional], {name: wide(x) for name, x in options.items()}


def outcome(op, arguments, config):
    """Loss, metrics, gradients by log_probs and entropy."""
    positional, options = arguments
    loss, metrics = op(*positional, config=config, **options)
    return loss, metrics, slopes(loss, positional, options)


@pytest.mark.parametrize("layout", ["flat", "[B, L]"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_as_exact_as_torch(terms, level, on_policy, layout):
    config = PolicyConfig(importance_level=level, **terms)
    arguments = case(layout=layout, on_policy=on_policy)
    loss, metrics, grads = outcome(policy_objective, arguments, config)
    same = outcome(reference.policy_objective, arguments, config)
    truth = outcome(reference.policy_objective, widened(*arguments), config)
    assert_as_exact(loss.detach(), same[0].detach(), truth[0].detach())
    for ours, torchs, exact in zip(grads, same[2], truth[2], strict=True):
        assert_as_exact(ours, torchs, exact)
        assert torch.equal(ours == 0, exact == 0)
    assert metrics.keys() == truth[1].keys()
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad
        if name.startswith(("num_", "clipped_")):
            assert value == truth[1][name], name
        else:
            assert_as_exact(value, same[1][name], truth[1][name])


@pytest.mark.parametrize("level", LEVELS)
def test_what_stands_outside_the_loss_has_no_part(level):
    config = PolicyConfig(importance_level=level, **TERMS["all"])
    positional, options = case()
    loss, metrics, grads = outcome(policy_objective, (positional, options), config)
    with torch.no_grad():
        for x in (*positional[:3], *(options[k] for k in ("entropy", "ref_log_probs"))):
            x[~positional[3]] = torch.nan
    spoiled = outcome(policy_objective, (positional, options), config)
    assert torch.equal(spoiled[0], loss) and spoiled[1] == metrics
    assert all(torch.equal(x, y) for x, y in zip(spoiled[2], grads, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_nan_inside_the_loss_is_seen_wherever_torch_sees_it(level):
    config = PolicyConfig(importance_level=level, entropy_coef=0.1, dual_clip=2)
    for column in range(3):
        positional, options = case()
        with torch.no_grad():
            positional[column][positional[3].nonzero()[4]] = torch.nan
        loss, metrics, grads = outcome(policy_objective, (positional, options), config)
        in_torch = partial(objective_by_any_backend, backend="torch")
        other = outcome(in_torch, (positional, options), config)
        assert loss.isnan() and other[0].isnan()
        for name, value in metrics.items():
            assert torch.equal(value.isnan(), other[1][name].isnan()), name
        for x, y in zip(grads, other[2], strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
def test_log_ratio_is_bounded(level):
    log_probs = torch.tensor([-1.0, -1e4], device=DEVICE, requires_grad=True)
    old, advantages = (torch.tensor(x, device=DEVICE) for x in ([-1e4, -1.0], [-1.0, 1.0]))
    loss, metrics = policy_objective(
        log_probs, old, advantages, torch.ones_like(old, dtype=torch.bool), normalizer=1,
        config=PolicyConfig(importance_level=level),
        cu_seqlens=torch.tensor([0, 1, 2], device=DEVICE),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert metrics["ratio_max"].item() == pytest.approx(4.85165195e8)
    assert loss.isfinite() and gradient.tolist() == [0, 0]


def test_half_precision_log_probs():
    positional, options = case(torch.float16)
    config = PolicyConfig(**TERMS["all"])
    loss, metrics, grads = outcome(policy_objective, (positional, options), config)
    truth = outcome(reference.policy_objective, widened(positional, options), config)
    assert loss.dtype == grads[0].dtype == metrics["kl_sum"].dtype == torch.float16
    torch.testing.assert_close(loss.double(), truth[0], rtol=2e-3, atol=0)
    for ours, exact in zip(grads, truth[2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=1e-5)


def test_repetition_strides_and_one_advantage_a_sequence():
    positional, options = case()
    config = PolicyConfig(**TERMS["all"])
    first = outcome(policy_objective, (positional, options), config)
    spread = [torch.stack([x, x], -1)[..., 0] for x in positional[1:]]
    again = outcome(policy_objective, ([positional[0], *spread], options), config)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert all(torch.equal(x, y) for x, y in zip(first[2], again[2], strict=True))
    one_each = torch.tensor([1.0, 5.0, -2.0, 3.0], device=DEVICE)
    each = one_each.repeat_interleave(options["cu_seqlens"].diff())
    for advantages in (one_each, each):
        positional[2] = advantages
        first, again = again, outcome(policy_objective, (positional, options), config)
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize("level", LEVELS)
def test_no_tokens_in_the_loss(level, num_tokens):
    zeros = torch.zeros(num_tokens, device=DEVICE, requires_grad=True)
    nothing = torch.zeros(num_tokens, dtype=torch.bool, device=DEVICE)
    loss, metrics = policy_objective(
        zeros, zeros, zeros, nothing, normalizer=1, config=PolicyConfig(importance_level=level),
        cu_seqlens=torch.tensor([0, num_tokens], device=DEVICE),
    )  # fmt: skip
    loss.backward()
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert not zeros.grad.any()


def test_the_backend_asked_for_serves_the_whole_loss(monkeypatch):
    inputs = loss_inputs(dtype=torch.float32)
    moved = {
        name: x.detach().to(DEVICE).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) else x for name, x in inputs.items()
    }  # fmt: skip
    calls = []
    forward = triton_backend.objective_fwd
    record = lambda *args: (calls.append(1), forward(*args))[1]  # noqa: E731
    monkeypatch.setattr(triton_backend, "objective_fwd", record)
    for extra in ({}, {"selected_mask": moved["prefix_mask"]}):
        options = extra | {"config": PolicyConfig(entropy_coef=0.05)}
        expected = linear_prefix_rft_loss(**moved, **options, backend="torch")
        assert not calls
        found = linear_prefix_rft_loss(**moved, **options, backend="triton")
        assert calls
        torch.testing.assert_close(found.loss, expected.loss)
        wrt = [moved["hidden"], moved["lm_head_weight"]]
        for x, y in zip(
            torch.autograd.grad(found.loss, wrt), torch.autograd.grad(expected.loss, wrt),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(x, y)
        calls.clear()


@pytest.mark.parametrize("level", LEVELS)
def test_compiles_into_one_graph(level):
    positional, options = case()
    config = PolicyConfig(importance_level=level, **TERMS["all"])
    torch._dynamo.reset()

    def loss(log_probs, entropy, normalizer):
        named = options | {"entropy": entropy, "normalizer": normalizer}
        return policy_objective(log_probs, *positional[1:], config=config, **named)[0]

    wrt = [positional[0], options["entropy"]]
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for normalizer in (50, torch.tensor(50.0, device=DEVICE)):
        expected, found = loss(*wrt, normalizer), traced(*wrt, normalizer)
        assert torch.equal(found, expected)
        for x, y in zip(
            torch.autograd.grad(found, wrt), torch.autograd.grad(expected, wrt), strict=True
        ):
            torch.testing.assert_close(x, y)


def test_the_op_is_registered_as_it_behaves():
    positional, options = case()
    columns = [*positional[:1], options["entropy"], *positional[2:], positional[1]]
    columns += [options[k] for k in ("prefix_mask", "rollout_log_probs", "ref_log_probs")]
    columns = [x.detach() for x in columns]
    for entropy_coef, bounds in ((0.1, None), (0.0, options["cu_seqlens"])):
        choices = {"importance_cap": 2.0, "entropy_coef": entropy_coef, "kl": "k3", "kl_coef": 0.1}
        arguments = (*columns, *PolicyConfig(**choices).terms, bounds)
        torch.library.opcheck(torch.ops.rft_kernels.policy_objective, arguments)


LAUNCHES = """
import torch
from rft_kernels import PolicyConfig
from rft_kernels.objective import Tokens
from rft_kernels.objective.triton_backend import objective_fwd
x, mask, bounds = torch.zeros(9), torch.zeros(9) > 0, torch.tensor([0, 4, 9])
shared = {"prefix_clip": "none", "kl_coef": 0.1}
for cu_seqlens in (None, bounds):
    config = PolicyConfig(dual_clip=3, importance_cap=2, entropy_coef=0.1, kl="k3", **shared)
    objective_fwd(x, x, Tokens(x, mask, x, mask, x, x), config.terms, cu_seqlens)
    objective_fwd(x.bfloat16(), None, Tokens(x, mask), PolicyConfig().terms, cu_seqlens)
    for kl in ("k1", "k2"):
        config = PolicyConfig(importance_cap=2, kl=kl, **shared)
        objective_fwd(x, None, Tokens(x, mask, None, mask, x, x), config.terms, cu_seqlens)
"""


@pytest.mark.slow
def test_compiles_for_hopper():
    assert compiled(LAUNCHES) == ["_objective_kernel", "_sum_kernel"] * 8
