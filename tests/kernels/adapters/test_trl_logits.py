"""The adapter for TRL from logits, against TRL's own: values, gradients, patching."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rft_kernels import token_stats
from rft_kernels.adapters import trl

from tests.kernels.adapters.cases import B, L, V, compare, counting, example, seeded


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


def test_patch_of_a_missing_name_changes_nothing(trl_utils, trl_trainer, monkeypatch):
    own = trl_utils.selective_log_softmax
    monkeypatch.delattr(trl_trainer, "get_high_entropy_mask")
    with pytest.raises(ImportError, match="get_high_entropy_mask"):
        trl.patch()
    assert trl_utils.selective_log_softmax is own
