"""policy_objective against the specification: loss, metrics, gradients, what must not matter."""

import itertools

import pytest
import torch
from rft_kernels import PolicyConfig, policy_objective, reference
from rft_kernels.objective.policy_config import LOG_RATIO_BOUND

from tests.kernels.kernel_cases import seeded

LEVELS = ("token", "sequence")
TERMS = {
    "plain": {},
    "dual clip": {"dual_clip": 1.2, "clip_high": 0.28},
    "prefix free": {"prefix_clip": "none"},
    "prefix clip": {"prefix_clip": (0.1, 0.5)},
    "capped": {"importance_cap": 1.1, "dual_clip": 1.5},
    "bonus and k1": {"entropy_coef": 0.01, "kl": "k1", "kl_coef": 0.1},
    "k2": {"kl": "k2", "kl_coef": 0.1},
    "all": {
        "importance_cap": 0.9,
        "entropy_coef": -0.2,
        "kl": "k3",
        "kl_coef": 1.0,
        "dual_clip": 2,
    },
}
B, L = 4, 9


def tokens(layout: str = "flat", dtype: torch.dtype = torch.float64):
    """Positional arguments and options of policy_objective for B L tokens."""
    rand = seeded(0)
    shape = (B * L,) if layout == "flat" else (B, L)

    def normal():
        return torch.randn(*shape, generator=rand, dtype=torch.float64)

    log_probs = -normal().abs()
    positional = [
        log_probs.clone().to(dtype).requires_grad_(),
        log_probs + 0.4 * normal(),
        normal(),
        torch.rand(shape, generator=rand) > 0.2,
    ]
    options = {
        "entropy": normal().abs().to(dtype).requires_grad_(),
        "prefix_mask": torch.rand(shape, generator=rand) > 0.6,
        "rollout_log_probs": log_probs + 0.4 * normal(),
        "ref_log_probs": log_probs + 0.4 * normal(),
        "normalizer": 50,
    }
    options["rollout_log_probs"].view(-1)[::5] = torch.nan
    options["rollout_log_probs"].view(-1)[3] = -torch.inf
    if layout == "flat":
        options["cu_seqlens"] = torch.tensor([0, 7, 7, 20, B * L])
    return positional, options


def slopes(loss, positional, options):
    wrt = [positional[0], options["entropy"]]
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wrt, strict=True)]


@pytest.mark.parametrize("layout", ["flat", "[B, L]"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_equals_the_specification(terms, level, on_policy, layout):
    positional, options = tokens(layout)
    if on_policy:
        positional[1] = None
    config = PolicyConfig(importance_level=level, **terms)
    loss, metrics = policy_objective(*positional, config=config, **options)
    expected, expected_metrics = reference.policy_objective(*positional, config=config, **options)
    torch.testing.assert_close(loss, expected)
    for x, y in zip(
        slopes(loss, positional, options), slopes(expected, positional, options), strict=True
    ):
        torch.testing.assert_close(x, y, atol=1e-14, rtol=1e-9)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[name], msg=name)
        assert value.shape == () and not value.requires_grad


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_in_float64(level):
    positional, options = tokens()
    config = PolicyConfig(importance_level=level, **TERMS["all"])

    def loss(log_probs, entropy):
        return policy_objective(
            log_probs, *positional[1:], config=config, **options | {"entropy": entropy}
        )[0]

    # The importance weight follows old_log_probs, so nothing detached depends on the inputs.
    assert torch.autograd.gradcheck(loss, [positional[0], options["entropy"]])


@pytest.mark.parametrize("level", LEVELS)
def test_what_stands_outside_the_loss_has_no_part(level):
    positional, options = tokens()
    config = PolicyConfig(importance_level=level, **TERMS["all"])
    loss, metrics = policy_objective(*positional, config=config, **options)
    expected = slopes(loss, positional, options)
    outside = ~positional[3]
    for poison in (torch.nan, torch.inf, -torch.inf):
        spoiled = [positional[0].detach().clone(), positional[1].clone(), positional[2].clone()]
        extra = {
            k: v.detach().clone() if v.__class__ is torch.Tensor else v for k, v in options.items()
        }
        for x in (*spoiled, *(extra[k] for k in ("entropy", "rollout_log_probs", "ref_log_probs"))):
            x[outside] = poison
        spoiled[0].requires_grad_(), extra["entropy"].requires_grad_()
        found, spoiled_metrics = policy_objective(*spoiled, positional[3], config=config, **extra)
        assert torch.equal(found, loss) and spoiled_metrics == metrics
        for x, y in zip(slopes(found, spoiled, extra), expected, strict=True):
            assert torch.equal(x, y)


def test_exact_zeros():
    positional, options = tokens()
    log_probs, old, advantages, mask = positional
    advantages[:10] = 0
    loss, _ = policy_objective(*positional, **options)
    (gradient, _) = slopes(loss, positional, options)
    ratio = (log_probs - old).exp().detach()
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    zero = ~mask | clipped | (advantages == 0)
    assert (gradient[zero] == 0).all() and (gradient[~zero] != 0).all()
    assert clipped.any() and (~zero).any()


@pytest.mark.parametrize("level", LEVELS)
def test_log_ratio_is_bounded(level):
    log_probs = torch.tensor([-1.0, -1e4], requires_grad=True)
    old, mask = torch.tensor([-1e4, -1.0]), torch.ones(2, dtype=torch.bool)
    loss, metrics = policy_objective(
        log_probs, old, torch.tensor([-1.0, 1.0]), mask, normalizer=1,
        config=PolicyConfig(importance_level=level), cu_seqlens=torch.tensor([0, 1, 2]),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert metrics["ratio_max"] == pytest.approx(torch.tensor(LOG_RATIO_BOUND).exp().item())
    assert loss.isfinite() and gradient.tolist() == [0, 0]


def test_one_advantage_a_sequence():
    positional, options = tokens()
    bounds = options["cu_seqlens"]
    one_each = torch.tensor([1.0, 5.0, -2.0, 3.0])
    each = one_each.repeat_interleave(bounds.diff())
    full, _ = policy_objective(*positional[:2], each, positional[3], **options)
    short, _ = policy_objective(*positional[:2], one_each, positional[3], **options)
    assert torch.equal(full, short)

    positional, options = tokens("[B, L]")
    full, _ = policy_objective(
        *positional[:2], one_each[:, None].expand(B, L), positional[3], **options
    )
    short, _ = policy_objective(*positional[:2], one_each, positional[3], **options)
    assert torch.equal(full, short)


def test_micro_batches_sum_to_the_batch():
    positional, options = tokens("[B, L]")
    for level, terms in itertools.product(LEVELS, TERMS.values()):
        config = PolicyConfig(importance_level=level, **terms)
        whole, metrics = policy_objective(*positional, config=config, **options)
        parts = [
            policy_objective(
                *(x[rows] for x in positional), config=config,
                **{k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in options.items()},
            )
            for rows in (slice(0, 1), slice(1, 4))
        ]  # fmt: skip
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
        for name, value in metrics.items():
            both = torch.stack([part[name] for _, part in parts])
            total = both.max() if name.endswith("_max") else both.sum()
            torch.testing.assert_close(total, value, msg=name)


def test_no_tokens():
    empty, mask = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.bool)
    for level in LEVELS:
        loss, metrics = policy_objective(
            empty, empty, empty, mask, normalizer=1, cu_seqlens=torch.tensor([0, 0]),
            config=PolicyConfig(importance_level=level),
        )  # fmt: skip
        assert loss == 0 and all(value == 0 for value in metrics.values())


def test_normalizer_tensor_and_dtype_of_the_loss():
    positional, options = tokens(dtype=torch.float32)
    loss, _ = policy_objective(*positional, **options)
    scaled, _ = policy_objective(*positional, **options | {"normalizer": torch.tensor(100)})
    assert loss.dtype == torch.float32
    torch.testing.assert_close(scaled, loss / 2)
