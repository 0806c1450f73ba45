"""The specification against torch built-ins and examples worked by hand."""

import math

import pytest
import torch
from rft_kernels import PolicyConfig, reference

from tests.kernels.kernel_cases import from_logits, loss_inputs


def test_token_stats_is_cross_entropy_and_categorical_entropy():
    logits = torch.randn(4, 5, 11, dtype=torch.float64)
    targets = torch.randint(11, (4, 5))
    found = reference.token_stats(logits, targets, temperature=0.7)
    z = logits / 0.7
    expected = -torch.nn.functional.cross_entropy(
        z.flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(found.log_probs.flatten(), expected)
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=z).entropy())


def test_token_stats_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0), 9.0], [0.0, 0.0, 9.0], [1.0, 2.0, 3.0]]).double()
    found = reference.token_stats(logits, torch.tensor([1, 0, -100]), vocab_size=2)
    half = math.log(2.0)
    assert found.log_probs.tolist() == pytest.approx([math.log(0.75), -half, 0])
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert found.entropy.tolist() == pytest.approx([entropy, half, 0])


def test_selection_by_hand():
    entropy = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.5, 2.0])
    candidates = torch.tensor([True, True, True, True, True, False])
    keep = reference.select_top_entropy(entropy, candidates, fraction="0.4")
    assert keep.nonzero().flatten().tolist() == [0, 1]
    keep = reference.select_top_entropy(entropy, candidates, fraction="0.4", order="low")
    assert keep.nonzero().flatten().tolist() == [0, 3]
    bounds = torch.tensor([0, 3, 3, 6])
    keep = reference.select_top_entropy(entropy, candidates, fraction=0.2, cu_seqlens=bounds)
    assert keep.nonzero().flatten().tolist() == [1, 4]


def objective(ratios, advantages, **options):
    """Loss and its slopes for log-probs of log(ratio), old log-probs of 0 and normalizer 1."""
    log_probs = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    config = PolicyConfig(**options.pop("config", {}))
    loss, metrics = reference.policy_objective(
        log_probs,
        torch.zeros_like(log_probs),
        torch.tensor(advantages, dtype=torch.float64),
        torch.ones(len(ratios), dtype=torch.bool),
        normalizer=1,
        config=config,
        **options,
    )
    (slopes,) = torch.autograd.grad(loss, log_probs)
    return loss.item(), slopes.tolist(), metrics


def test_clip_by_hand():
    loss, slopes, metrics = objective([1.1, 1.5, 1.5, 0.5, 0.5], [2.0, 2.0, -2.0, 2.0, -2.0])
    assert loss == pytest.approx(-2.2 - 2.4 + 3.0 - 1.0 + 1.6)
    assert slopes == pytest.approx([-2.2, 0, 3.0, -1.0, 0])
    assert (metrics["clipped_low"], metrics["clipped_high"]) == (1, 1)
    assert metrics["ratio_max"] == 1.5 and metrics["ratio_sum"] == pytest.approx(5.1)


def test_dual_clip_by_hand():
    loss, slopes, metrics = objective([4.0, 2.0], [-1.0, -1.0], config={"dual_clip": 3.0})
    assert loss == pytest.approx(5.0) and slopes == pytest.approx([0, 2.0])
    assert metrics["clipped_dual"] == 1


def test_prefix_clip_by_hand():
    prefix = torch.tensor([True, False, True])
    ratios, advantages = [1.5, 1.5, 3.0], [1.0, 1.0, 1.0]
    for clip, expected in (("same", [0, 0, 0]), ("none", [-1.5, 0, -3]), ((0, 1), [-1.5, 0, 0])):
        _, slopes, metrics = objective(
            ratios, advantages, config={"prefix_clip": clip}, prefix_mask=prefix
        )
        assert slopes == pytest.approx(expected)
        assert (metrics["num_prefix"], metrics["num_selected"]) == (2, 2)


def test_sequence_ratio_by_hand():
    bounds = torch.tensor([0, 2, 3])
    loss, slopes, _ = objective(
        [4.0, 0.25, 1.1],
        [1.0, 3.0, 1.0],
        config={"importance_level": "sequence"},
        cu_seqlens=bounds,
    )
    assert loss == pytest.approx(-4 - 1.1)
    assert slopes == pytest.approx([-2, -2, -1.1])


def test_importance_weight_by_hand():
    rollout = -torch.tensor([0.5, 4.0, 4.0, 0.25, torch.nan, torch.inf], dtype=torch.float64).log()
    prefix = torch.tensor([False, False, True, False, False, False])
    loss, slopes, metrics = objective(
        [1.0] * 6, [-1.0] * 6, config={"importance_cap": 2.0}, prefix_mask=prefix,
        rollout_log_probs=rollout,
    )  # fmt: skip
    assert loss == pytest.approx(0.5 + 2.0 + 1.0 + 0.25)
    assert slopes == pytest.approx([0.5, 2.0, 1.0, 0.25, 0, 0])
    assert (metrics["num_tokens"], metrics["num_dropped"]) == (4, 2)


def test_entropy_bonus_and_kl_by_hand():
    entropy = torch.tensor([0.5, 0.25], dtype=torch.float64)
    loss, _, metrics = objective([1, 1], [0, 0], config={"entropy_coef": 0.1}, entropy=entropy)
    assert loss == pytest.approx(-0.075) and metrics["entropy_sum"] == pytest.approx(0.75)
    d = math.log(2.0)
    ref = torch.full((1,), -d, dtype=torch.float64)
    for kl, value, slope in (("k1", d, 1), ("k2", d * d / 2, d), ("k3", 0.5 + d - 1, 0.5)):
        config = {"kl": kl, "kl_coef": 10.0}
        loss, slopes, metrics = objective([1.0], [0.0], config=config, ref_log_probs=ref)
        assert loss == pytest.approx(10 * value) and slopes == pytest.approx([10 * slope])
        assert metrics["kl_sum"] == pytest.approx(value)


def test_on_policy_ratio_is_one_with_a_slope():
    log_probs = torch.tensor([-3.0, -0.1], requires_grad=True)
    advantages, mask = torch.tensor([2.0, -1.0]), torch.ones(2, dtype=torch.bool)
    loss, metrics = reference.policy_objective(log_probs, None, advantages, mask, normalizer=4)
    loss.backward()
    assert loss.item() == pytest.approx(-0.25) and log_probs.grad.tolist() == [-0.5, 0.25]
    assert metrics["ratio_max"] == 1 and metrics["approx_kl_sum"] == 0


def test_prefix_loss_by_hand():
    """Two prefix tokens, of which the one of higher entropy is kept, and one other token."""
    logits = torch.tensor([[5.0, 0], [0, 0], [0, 0]], dtype=torch.float64, requires_grad=True)
    found = reference.prefix_rft_loss(
        logits,
        torch.tensor([0, 0, 1]),
        None,
        torch.tensor([1.0, 2.0, 4.0]),
        torch.tensor([True, True, True]),
        torch.tensor([True, True, False]),
        normalizer=2,
        fraction="0.5",
    )
    found.loss.backward()
    assert found.selected_mask.tolist() == [False, True, False]
    assert found.loss.item() == pytest.approx(-(2 + 4) / 2)
    torch.testing.assert_close(logits.grad, torch.tensor([[0, 0], [-0.5, 0.5], [1, -1]]).double())


def test_linear_is_the_same_loss_of_projected_logits():
    inputs = loss_inputs()
    linear = reference.linear_prefix_rft_loss(**inputs)
    dense = from_logits(reference.prefix_rft_loss, inputs)
    assert torch.equal(linear.loss, dense.loss)


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_reference_gradients(kl: str):
    inputs = loss_inputs(7, 3, 5)
    ref = inputs["old_log_probs"] - 0.1
    config = PolicyConfig(entropy_coef=0.1, kl=kl, kl_coef=0.1)

    def loss(*wrt):
        named = dict(zip(("hidden", "lm_head_weight", "bias"), wrt, strict=True))
        options = {"softcap": 3.0, "temperature": 0.8, "ref_log_probs": ref, "config": config}
        return reference.linear_prefix_rft_loss(**(inputs | named), **options).loss

    assert torch.autograd.gradcheck(
        loss, [inputs["hidden"], inputs["lm_head_weight"], inputs["bias"]]
    )
