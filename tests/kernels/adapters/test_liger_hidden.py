"""Liger's GRPO losses from hidden states, against Liger's own."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from rft_kernels import linear_token_stats
from rft_kernels.adapters import _liger_grpo_linear, liger

from tests.kernels.adapters.cases import B, D, L, assert_same, head, parameters_of, random, seeded

LIGER_CASES = {
    "default": {},
    "no bias": {"bias": False},
    "no reference": {"use_ref_model": False},
    "no KL": {"beta": 0.0},
    "reference from hidden": {"ref": "hidden"},
    "on-policy": {"old": False},
    "frozen head": {"frozen": True},
    "items": {"num_items_in_batch": 29},
    "temperature": {"temperature": 0.6, "ref": "hidden"},
    "grpo": {"loss_type": "grpo", "delta": 1.45, "ratio": "token"},
    "delta within the clip range": {"loss_type": "grpo", "delta": 1.1},
    "bnpo": {"loss_type": "bnpo", "use_bias_correction_kl": True, "ratio": "sequence"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 11, "epsilon_high": 0.3},
    "sequence": {
        "loss_type": "grpo", "importance_sampling_level": "sequence",
        "use_bias_correction_kl": True, "ratio": "vector", "epsilon_low": 0.01,
    },
    "luspo of tokens": {"loss_type": "luspo"},
    "luspo": {
        "loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "delta": 1.1,
    },
    "luspo with KL": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2, "ratio": "token"},
    "sapo": {"loss_type": "sapo", "ratio": "token"},
    "vespo": {"loss_type": "vespo", "ratio": "sequence"},
}  # fmt: skip


def liger_outcome(module: type, case: dict) -> list:
    """(loss, metrics, gradients by input, weight and bias) of one of `LIGER_CASES`."""
    case = dict(case)
    hidden, weight, bias, ids = head(B * L)
    hidden, ids = hidden.detach().view(B, L, D).requires_grad_(), ids.view(B, L)
    mask = (torch.rand(B, L, generator=seeded(5)) > 0.3).long()
    log_probs = linear_token_stats(hidden.detach(), weight.detach(), ids).log_probs
    calls = {"bias": bias if case.pop("bias", True) else None}
    if case.pop("old", True):
        calls["old_per_token_logps"] = log_probs + random(B, L, seed=6, scale=0.8)
    if case.pop("ref", "log-probs") == "hidden":
        calls["ref_input"] = hidden.detach() + random(B, L, D, seed=7, scale=0.2)
        calls["ref_weight"], calls["ref_bias"] = weight.detach() * 1.1, bias.detach()
    elif case.get("use_ref_model", True):
        calls["ref_per_token_logps"] = log_probs + random(B, L, seed=7, scale=0.4)
    shape = {"token": (B, L), "sequence": (B, 1), "vector": (B,)}.get(case.pop("ratio", None))
    if shape is not None:
        calls["vllm_is_ratio"] = torch.rand(shape, generator=seeded(8)) + 0.5
    weight.requires_grad_(not case.pop("frozen", False))
    calls["num_items_in_batch"] = case.pop("num_items_in_batch", None)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    loss, metrics = module(compiled=False, **case)(hidden, weight, ids, mask, advantages, **calls)
    leaves = [x for x in (hidden, weight, calls["bias"]) if x is not None and x.requires_grad]
    return [loss, *metrics, *torch.autograd.grad(3 * loss, leaves)]


@pytest.fixture(scope="module")
def liger_grpo() -> ModuleType:
    module = "liger_kernel.chunked_loss.grpo_loss"
    return pytest.importorskip(module, reason="Liger is not installed")


@pytest.mark.parametrize("name", LIGER_CASES)
def test_liger_fused_linear_grpo(liger_grpo, name):
    ours, theirs = (
        liger_outcome(module.LigerFusedLinearGRPOLoss, LIGER_CASES[name])
        for module in (liger, liger_grpo)
    )
    assert ours[0] != 0
    assert_same(ours, theirs, rtol=2e-4)


def test_liger_fused_linear_cases_clip(liger_grpo):
    """The cases do reach what clips, so that equal results mean equal clipping."""
    for name in ("default", "dr_grpo", "sequence", "luspo", "cispo"):
        found = liger_outcome(liger_grpo.LigerFusedLinearGRPOLoss, LIGER_CASES[name])
        clipped = found[1 if LIGER_CASES[name].get("beta") == 0 else 2]
        assert 0 < clipped < 1, name


def test_liger_fused_linear_signatures(liger_grpo):
    loss, function = "LigerFusedLinearGRPOLoss", "LigerFusedLinearGRPOFunction"
    for name in ("__init__", "forward"):
        ours, theirs = (getattr(getattr(x, loss), name) for x in (liger, liger_grpo))
        assert parameters_of(ours) == parameters_of(theirs)
    theirs = getattr(liger_grpo, function).forward
    assert parameters_of(getattr(liger, function).apply) == parameters_of(theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta"),
        ({"delta": -1.0}, "delta must be greater than 0"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "sequence level"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "sapo_temperature_neg"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"use_ref_model": True}, "ref_per_token_logps"),
        ({"vllm_is_ratio": torch.ones(B, 2)}, "vllm_is_ratio"),
    ],
)
def test_liger_fused_linear_refusals(options, message):
    hidden, weight, _, ids = head(B * L)
    options = {"use_ref_model": False, **options}
    call = {"vllm_is_ratio": options.pop("vllm_is_ratio", None)}
    ids, hidden = ids.view(B, L), hidden.view(B, L, D)
    loss = liger.LigerFusedLinearGRPOLoss(**options)
    with pytest.raises(ValueError, match=message):
        loss(hidden, weight, ids, torch.ones(B, L), torch.ones(B), **call)


WRONG_SHAPES = {
    "advantages": [(B, 1), (B, L), (1,)],
    "old_per_token_logps": [(L,), (1, L), (B, 1)],
    "ref_per_token_logps": [(L,), (B, 1)],
    "attention_mask": [(L,), (B, 1), (B,)],
    "selected_token_ids": [(L,), (B, 1)],
    "vllm_is_ratio": [(L,), (1,), (1, L)],
    "num_items_in_batch": [(1,)],
    "_input": [(B * L, D)],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
def test_liger_fused_linear_broadcasts_nothing(name, shape):
    """What is broadcast instead gives another loss."""
    hidden, weight, _, ids = head(B * L)
    given = {
        "_input": hidden.view(B, L, D),
        "selected_token_ids": ids.view(B, L),
        "attention_mask": torch.ones(B, L),
        "advantages": torch.ones(B),
        "old_per_token_logps": torch.zeros(B, L),
        "ref_per_token_logps": torch.zeros(B, L),
    }
    given[name] = torch.ones(shape, dtype=ids.dtype if name == "selected_token_ids" else None)
    with pytest.raises(ValueError, match=f"{name}.* must have"):
        liger.LigerFusedLinearGRPOFunction.apply(weight=weight, **given)


def test_liger_patch_reaches_modules_built_before(liger_grpo, monkeypatch):
    own = liger_grpo.LigerFusedLinearGRPOFunction
    built = liger_grpo.LigerFusedLinearGRPOLoss(compiled=False)
    calls = []
    monkeypatch.setattr(_liger_grpo_linear, "metrics", lambda *_: calls.append(_) or [])
    with liger.patch():
        liger_outcome(lambda **_: built, {})
        assert len(calls) == 1
    liger_outcome(lambda **_: built, {})
    assert len(calls) == 1 and liger_grpo.LigerFusedLinearGRPOFunction is own


@pytest.mark.parametrize("imported_first", [True, False])
def test_liger_patch_reaches_the_functional_form(liger_grpo, imported_first, monkeypatch):
    name = "liger_kernel.chunked_loss.functional"
    own = liger_grpo.LigerFusedLinearGRPOFunction.apply
    if not imported_first:
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = importlib.import_module(name) if imported_first else None
    with liger.patch():
        module = importlib.import_module(name)
        assert module.liger_fused_linear_grpo is liger.LigerFusedLinearGRPOFunction.apply
    assert module.liger_fused_linear_grpo == own
    assert before in (None, module)
