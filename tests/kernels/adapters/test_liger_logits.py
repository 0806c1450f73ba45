"""Liger's GRPO losses from logits, against Liger's own: values, gradients, patching."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from rft_kernels.adapters import _liger_grpo_logits, liger

from tests.kernels.adapters.cases import ROOT, B, L, V, counting, seeded

LIGER_CASES = [
    {"loss_type": loss_type, "importance_sampling_level": level, **extra}
    for loss_type, level, extra in [
        ("dapo", "token", {}),
        ("dapo", "token", {"beta": 0.0, "no_mask": True}),
        ("grpo", "token", {"delta": 1.45, "weight": "token"}),
        ("bnpo", "token", {"use_bias_correction_kl": True, "weight": "sequence"}),
        (
            "dr_grpo",
            "sequence",
            {"max_completion_length": 11, "delta": 1.1, "eps_high": 0.05, "flip": True},
        ),
        ("luspo", "sequence", {"use_bias_correction_kl": True, "weight": "token"}),
        ("grpo", "sequence", {"on_policy": True, "weight": "vector"}),
        ("cispo", "token", {"eps_high": 1.2, "num_items_in_batch": 29}),
        ("sapo", "token", {"weight": "token"}),
        ("vespo", "token", {"weight": "sequence", "on_policy": False}),
        ("vespo", "token", {"beta": 0.0}),
        ("dapo", "token", {"on_policy": True}),
    ]
]


def liger_outcomes(function) -> list[list]:
    """Outputs and the gradient of the logits, case by case, as lists of numbers."""
    outcomes = []
    for case in LIGER_CASES:
        for reduce in (False, True):
            options = {**case, "reduce": reduce, "inplace": False, "temperature": 0.9}
            rand = seeded(4)
            logits = torch.randn(B, L + 1, V, generator=rand).requires_grad_()
            completion_ids = torch.randint(V, (B, L), generator=rand)
            log_p = (logits.detach()[:, :-1] / 0.9).log_softmax(-1)
            log_p = log_p.gather(-1, completion_ids[..., None])[..., 0]
            old = log_p + 0.8 * torch.randn(B, L, generator=rand)
            ref = log_p + 0.4 * torch.randn(B, L, generator=rand)
            mask = (torch.rand(B, L, generator=rand) > 0.3).long()
            weights = {"token": (B, L), "sequence": (B, 1), "vector": (B,), None: ()}
            weight = options.pop("weight", None)
            drawn = torch.rand(weights[weight], generator=rand) + 0.5
            options["vllm_is_ratio"] = None if weight is None else drawn
            old = None if options.pop("on_policy", False) else old
            mask = None if options.pop("no_mask", False) else mask
            advantages = torch.tensor([1.0, -1.0, 0.5]) * (-1 if options.pop("flip", False) else 1)
            found = function(logits, old, ref, completion_ids, advantages, mask, **options)
            found = [found[0], *found[1]] if reduce else [x for x in found if x is not None]
            seeds = torch.randn(found[0].shape, generator=seeded(5))
            (dlogits,) = torch.autograd.grad((found[0] * seeds).sum(), logits)
            outcomes.append([x.detach().tolist() for x in (*found, dlogits)])
    return outcomes


FUNCTION_CASES = {
    "grpo": {},
    "not reduced": {"reduce": False, "beta": 0.0},
    "sequence": {"importance_sampling_level": "sequence", "use_bias_correction_kl": True},
    "vespo": {"loss_type": "vespo", "phi_seq": torch.tensor([0.5, 2.0, 1.3])},
    "vespo of [B, 1]": {"loss_type": "vespo", "phi_seq": torch.tensor([[0.5], [2.0], [1.3]])},
    "weight": {"loss_type": "bnpo", "vllm_is_ratio": torch.tensor([0.5, 2.0, 1.3])},
}


FUNCTION_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(liger.GrpoLossFunction.apply).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}


def function_outcomes(function) -> list[list]:
    """As `liger_outcomes`, of a `GrpoLossFunction`, which takes no keywords."""
    outcomes = []
    for case in FUNCTION_CASES.values():
        logits = torch.randn(B, L + 1, V, generator=seeded(4)).requires_grad_()
        ids = torch.randint(V, (B, L), generator=seeded(5))
        old, ref = (torch.randn(B, L, generator=seeded(i)) * 0.4 - 4 for i in (6, 7))
        mask = (torch.rand(B, L, generator=seeded(8)) > 0.3).long()
        tensors = (logits, old, ref, ids, torch.tensor([1.0, -1.0, 0.5]), mask)
        numbers = (0.9, case.get("beta", 0.1), 0.2, 0.3, False)
        rest = [case.get(name, default) for name, default in FUNCTION_DEFAULTS.items()]
        found = function.apply(*tensors, *numbers, *rest)
        (dlogits,) = torch.autograd.grad(found[0].sum(), logits)
        outcomes.append([x.detach().tolist() for x in (*found, dlogits) if x is not None])
    return outcomes


def log_softmax_outcomes(function) -> list[list]:
    """Of a `fused_selective_log_softmax`: ids and mask may be longer than the logits."""
    logits = torch.randn(B, L + 1, V, generator=seeded(4)).requires_grad_()
    ids = torch.randint(V, (B, L + 3), generator=seeded(5))
    mask = (torch.rand(B, L + 3, generator=seeded(8)) > 0.3).long()
    return [function(logits, ids, 0.7, x).tolist() for x in (None, mask)]


@pytest.fixture(scope="module")
def liger_own_outcomes() -> list[list]:
    """From Liger's kernels in Triton's interpreter, which a process must choose at its start."""
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    code = (
        "import json, sys, torch; torch.set_num_threads(1);"
        "from tests.kernels.adapters.test_liger_logits import *;"
        "from liger_kernel.transformers.grpo_loss import *;"
        "found = (liger_outcomes(triton_grpo_loss), function_outcomes(GrpoLossFunction),"
        "  log_softmax_outcomes(fused_selective_log_softmax));"
        "print(json.dumps(found))"
    )
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_liger_grpo_loss(liger_own_outcomes):
    """Values and gradients of every loss type, level and weight, masked and not."""
    found = liger_outcomes(liger.triton_grpo_loss)
    for i, (ours, theirs) in enumerate(zip(found, liger_own_outcomes[0], strict=True)):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                torch.tensor(x),
                torch.tensor(y),
                rtol=2e-4,
                atol=2e-6,
                msg=lambda text, i=i: f"{LIGER_CASES[i // 2]}: {text}",
            )


@pytest.mark.slow
def test_liger_functions_beneath(liger_own_outcomes):
    found = (
        function_outcomes(liger.GrpoLossFunction),
        log_softmax_outcomes(liger.fused_selective_log_softmax),
    )
    for ours, theirs in zip(found, liger_own_outcomes[1:], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            for a, b in zip(x, y, strict=True):
                torch.testing.assert_close(*map(torch.tensor, (a, b)), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("phi_seq", [None, torch.ones(B - 1), torch.ones(B, L)])
def test_liger_vespo_needs_a_weight_of_each_sequence(phi_seq):
    logits, ids = torch.zeros(B, L + 1, V), torch.zeros(B, L, dtype=torch.int64)
    arguments = (logits, None, None, ids, torch.ones(B), None, 1.0, 0.0, 0.2, 0.2, False, "vespo")
    with pytest.raises(ValueError, match="phi_seq must have shape"):
        liger.GrpoLossFunction.apply(*arguments, phi_seq=phi_seq)


def test_liger_signature():
    theirs = pytest.importorskip("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    pairs = [
        [(x.name, x.default) for x in inspect.signature(f).parameters.values()]
        for f in (liger.triton_grpo_loss, theirs)
    ]
    assert pairs[0] == pairs[1]


def test_liger_inplace_writes_the_gradient_over_the_logits():
    ids = torch.randint(V, (B, L), generator=seeded(1))
    leaf = torch.randn(B, L + 1, V, generator=seeded(0)).requires_grad_()
    logits = leaf * 1
    loss, _, _ = liger.triton_grpo_loss(logits, None, None, ids, torch.ones(B), beta=0)
    (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(dlogits, logits.detach()) and not torch.equal(leaf, logits)
    assert not dlogits[:, -1].any() and dlogits[:, :-1].any(-1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "sequence level"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0}, "sapo_temperature_pos"),
        ({"beta": 0.1}, "ref_logp"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"delta": float("nan")}, "delta must be"),
        ({"eps_high": float("nan")}, "eps_high must be finite"),
        ({"vespo_k_pos": float("inf")}, "vespo_k_pos must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
    ],
)
def test_liger_refusals(options, message):
    logits, ids = torch.zeros(B, L + 1, V), torch.zeros(B, L, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        liger.triton_grpo_loss(logits, None, None, ids, torch.ones(B), **{"beta": 0.0, **options})


WRONG_SHAPES = {
    "advantages": [(B, 1), (B, L), (1,)],
    "old_logp": [(L,), (1, L), (B, 1)],
    "ref_logp": [(L,), (B, 1)],
    "completion_mask": [(L,), (B, 1)],
    "completion_ids": [(L,), (B, 1), (B, L + 1)],
    "vllm_is_ratio": [(L,), (1,), (1, L)],
    "num_items_in_batch": [(1,)],
    "logits": [(B, L, V), (B, V)],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
def test_liger_broadcasts_nothing(name, shape):
    """What is broadcast instead gives another loss."""
    given = {
        "logits": torch.zeros(B, L + 1, V),
        "old_logp": torch.zeros(B, L),
        "ref_logp": torch.zeros(B, L),
        "completion_ids": torch.zeros(B, L, dtype=torch.int64),
        "advantages": torch.ones(B),
        "completion_mask": torch.ones(B, L),
    }
    given[name] = torch.ones(shape, dtype=torch.int64 if name == "completion_ids" else None)
    with pytest.raises(ValueError, match="must have"):
        liger.triton_grpo_loss(**given)


def test_liger_patch(monkeypatch):
    module = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    calls = counting(monkeypatch, _liger_grpo_logits)
    own = module.triton_grpo_loss
    ids = torch.zeros(B, L, dtype=torch.int64)
    handle = liger.patch()
    module.triton_grpo_loss(torch.zeros(B, L + 1, V), None, None, ids, torch.ones(B), beta=0)
    handle.undo()
    handle.undo()
    assert len(calls) == 1 and module.triton_grpo_loss is own
