"""The adapters against the libraries whose signatures they have: values, gradients, patching."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rft_kernels import token_stats
from rft_kernels.adapters import _patch, liger, trl, verl

from tests.kernels.adapters import verl_stand_in

ROOT = Path(__file__).resolve().parents[3]
B, L, V = 3, 7, 41


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, L, V] that require a gradient, and classes [B, L]."""
    logits = (3 * torch.randn(B, L, V, generator=seeded(0))).to(dtype).requires_grad_()
    return logits, torch.randint(V, (B, L), generator=seeded(1))


def compare(ours, theirs, *arguments, rtol=1e-4, atol=2e-6, wrt, **options):
    """Both functions on the same inputs: every output, and the gradient of a random sum of all."""

    def outcome(function):
        found = function(*arguments, **options)
        found = found if isinstance(found, tuple) else (found,)
        floats = [x for x in found if x.requires_grad]
        weights = [torch.randn(x.shape, generator=seeded(9)) for x in floats]
        total = sum((x * w).sum() for x, w in zip(floats, weights, strict=True))
        return [*found, *torch.autograd.grad(total, wrt)]

    for x, y in zip(outcome(ours), outcome(theirs), strict=True):
        assert x.requires_grad == y.requires_grad
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


@pytest.fixture(scope="module")
def trl_utils() -> ModuleType:
    return pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")


@pytest.fixture(scope="module")
def trl_trainer() -> type:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    return trainer.GRPOTrainer


def test_trl_signatures(trl_utils):
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        ours, theirs = getattr(trl, name), getattr(trl_utils, name)
        for x, y in zip(
            inspect.signature(ours).parameters.values(),
            inspect.signature(theirs).parameters.values(),
            strict=True,
        ):
            assert (x.name, x.default, x.kind) == (y.name, y.default, y.kind)


@pytest.mark.parametrize("classes", [(), (1,), (4,)], ids=["one", "K = 1", "K = 4"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_trl_selective_log_softmax(trl_utils, classes, temperature, masked):
    logits, _ = example()
    index = torch.randint(V, (B, L, *classes), generator=seeded(2))
    row_mask = (torch.rand(index.shape, generator=seeded(3)) > 0.3).long() if masked else None
    compare(
        trl.selective_log_softmax, trl_utils.selective_log_softmax, logits, index,
        temperature=temperature, row_mask=row_mask, wrt=logits,
    )  # fmt: skip


def test_trl_several_classes_where_logits_are_large():
    logits = (torch.randn(B, L, V, generator=seeded(0), dtype=torch.float64) + 1e4).float()
    index = torch.randint(V, (B, L, 4), generator=seeded(2))
    truth = logits.double().log_softmax(-1).gather(-1, index)
    found = trl.selective_log_softmax(logits, index)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row_mask", [torch.ones(B, L), torch.ones(4)])
def test_trl_row_mask_is_not_broadcast(row_mask):
    logits, _ = example()
    index = torch.zeros(B, L, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="row_mask must have shape"):
        trl.selective_log_softmax(logits, index, row_mask=row_mask)


@pytest.mark.parametrize("shape", [(1, L, 2), (B, 1, 2), (L, B, 2)])
def test_trl_index_is_not_broadcast(shape):
    """`gather` takes an index of fewer rows, and gives the wrong ones."""
    logits, _ = example()
    with pytest.raises(ValueError, match="index must have shape"):
        trl.selective_log_softmax(logits, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_trl_log_probs_and_entropy(trl_utils, with_gradient, masked):
    logits, index = example()
    row_mask = torch.rand(B, L, generator=seeded(3)) > 0.3 if masked else None
    compare(
        trl.selective_log_softmax_and_entropy, trl_utils.selective_log_softmax_and_entropy,
        logits, index, entropy_requires_grad=with_gradient, temperature=0.7, row_mask=row_mask,
        wrt=logits,
    )  # fmt: skip


def test_trl_entropy(trl_utils):
    logits, _ = example()
    theirs = trl_utils.entropy_from_logits
    compare(trl.entropy_from_logits, theirs, logits, chunk_size=4, wrt=logits)


def test_trl_values_of_16_bits_are_not_rounded(trl_utils):
    logits, index = example(torch.bfloat16)
    truth = logits.detach().double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
    ours, theirs = (f(logits, index) for f in (trl.selective_log_softmax, _own(trl_utils)))
    assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    assert (ours - truth).abs().max() < 1e-5 < (theirs - truth).abs().max()


def _own(trl_utils):
    return trl_utils.selective_log_softmax


class Ranks:
    """An accelerator as one of several processes sees it: all hand in values of equal length."""

    def __init__(self, *others: torch.Tensor) -> None:
        self.others = others

    def pad_across_processes(self, x, dim, pad_index):
        self.length = max(len(x), *(len(o) for o in self.others)) if self.others else len(x)
        self.pad_index = pad_index
        return self._padded(x)

    def _padded(self, x):
        return torch.nn.functional.pad(x, (0, self.length - len(x)), value=self.pad_index)

    def gather(self, x):
        return torch.cat([x, *map(self._padded, self.others)])


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.8, 1.0, 1 - 0.2])
@pytest.mark.parametrize("kind", ["plain", "ties", "bfloat16", "empty", "ranks"])
def test_trl_high_entropy_mask(trl_trainer, kind, threshold):
    for seed in range(5):
        entropies = 4 * torch.rand(5, 29, generator=seeded(seed))
        mask = (torch.rand(5, 29, generator=seeded(seed + 100)) > 0.3).long()
        ranks = Ranks()
        if kind == "ties":
            entropies = entropies.round()
        elif kind == "bfloat16":
            entropies = entropies.bfloat16()
        elif kind == "empty":
            mask = torch.zeros_like(mask)
        elif kind == "ranks":
            ranks = Ranks(4 * torch.rand(200, generator=seeded(seed + 200)), torch.rand(3))
        stub = SimpleNamespace(accelerator=ranks)
        theirs = trl_trainer.get_high_entropy_mask(stub, entropies, mask, threshold)
        ours = trl.get_high_entropy_mask(entropies, mask, threshold, accelerator=ranks)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_trl_high_entropy_mask_of_more_tokens_than_torch_takes_a_quantile_of():
    """TRL's own looks at the tokens of the mask alone; 2^24 is torch's bound."""
    entropies = torch.zeros(1, 2**24 + 1)
    entropies[0, :5] = torch.tensor([3.0, 1, 4, 1.5, 5])
    mask = torch.zeros_like(entropies, dtype=torch.bool)
    mask[0, :5] = True
    found = trl.get_high_entropy_mask(entropies, mask, 0.5)
    assert found[0, :6].tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize(
    ("mask", "threshold", "message"),
    [
        (torch.ones(L), 0.5, "mask must have shape"),
        (torch.ones(B, 1), 0.5, "mask must have shape"),
        (torch.ones(B, L), 1.5, "threshold must be at most 1"),
        (torch.ones(B, L), float("nan"), "threshold must be"),
    ],
)
def test_trl_high_entropy_mask_refusals(mask, threshold, message):
    with pytest.raises(ValueError, match=message):
        trl.get_high_entropy_mask(torch.rand(B, L), mask, threshold)


def counting(monkeypatch, module) -> list:
    """Arguments of every call of `token_stats` from an adapter."""
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return token_stats(*arguments, **options)

    monkeypatch.setattr(module, "token_stats", counted)
    return calls


def test_trl_patch_reaches_modules_that_imported_the_function(trl_utils, trl_trainer, monkeypatch):
    calls = counting(monkeypatch, trl)
    trainer = pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    own = trl_utils.selective_log_softmax_and_entropy
    own_mask = trl_trainer.get_high_entropy_mask
    logits, index = example()
    assert trainer.selective_log_softmax_and_entropy is own
    kernels, name = sys.modules["trl.kernels"], "selective_log_softmax_and_entropy"
    own_kernel = getattr(kernels, name, None)
    with trl.patch():
        if own_kernel is not None:  # TRL has it where it finds triton
            ours = getattr(kernels, name)
            assert ours is trl.kernels_selective_log_softmax_and_entropy
            signatures = [inspect.signature(x).parameters.keys() for x in (ours, own_kernel)]
            assert signatures[0] == signatures[1]
            found, expected = ours(logits, index, 0.7), token_stats(logits, index, temperature=0.7)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
            calls.clear()
        trainer.selective_log_softmax_and_entropy(logits, index)
        trl_utils.entropy_from_logits(logits)
        assert len(calls) == 2
        assert trl_trainer.get_high_entropy_mask is trl._get_high_entropy_mask
        with pytest.raises(RuntimeError, match="patched already"):
            trl.patch()
        late = ModuleType("trl.imported_while_patched")
        late.selective_log_softmax = trl_utils.selective_log_softmax
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert getattr(kernels, name, None) is own_kernel
    assert trainer.selective_log_softmax_and_entropy is own
    assert trl_utils.selective_log_softmax_and_entropy is own
    assert trl_trainer.get_high_entropy_mask is own_mask
    assert late.selective_log_softmax is trl_utils.selective_log_softmax
    assert late.selective_log_softmax is not trl.selective_log_softmax


@pytest.mark.parametrize("module", [trl, liger, verl], ids=lambda module: module.__name__)
def test_patch_of_a_missing_library_says_so(module, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(_patch.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="cannot patch .*: No module named .* installed"):
        module.patch()


def test_patch_of_a_missing_name_changes_nothing(trl_utils, trl_trainer, monkeypatch):
    own = trl_utils.selective_log_softmax
    monkeypatch.delattr(trl_trainer, "get_high_entropy_mask")
    with pytest.raises(ImportError, match="get_high_entropy_mask"):
        trl.patch()
    assert trl_utils.selective_log_softmax is own


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
        "from tests.kernels.adapters.test_from_logits import *;"
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


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (trl, "ChunkedDivergenceFunction"),
        (liger, "LigerFusedLinearCrossEntropyFunction"),
        (liger, "LigerFusedLinearScaledCrossEntropyTPFunction"),
        (verl, "vocab_parallel_entropy"),
        (verl, "vocab_parallel_log_probs_from_logits"),
    ],
)
def test_what_is_not_served_says_so(module, name):
    with pytest.raises(NotImplementedError, match=f"{name} is not served by .*: "):
        exec(f"from {module.__name__} import {name}")
    assert not hasattr(module, "anything_else")


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
    calls = counting(monkeypatch, liger)
    own = module.triton_grpo_loss
    ids = torch.zeros(B, L, dtype=torch.int64)
    handle = liger.patch()
    module.triton_grpo_loss(torch.zeros(B, L + 1, V), None, None, ids, torch.ones(B), beta=0)
    handle.undo()
    handle.undo()
    assert len(calls) == 1 and module.triton_grpo_loss is own


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl_patch", "alone"])
def test_examples_run(name):
    if name == "trl_patch":
        pytest.importorskip("trl", reason="TRL is not installed")
    path = os.pathsep.join([str(ROOT / "kernels"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "examples" / f"{name}.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
