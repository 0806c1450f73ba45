"""The adapters from hidden states against the libraries whose signatures they have."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rft_kernels import adapters, linear_token_stats
from rft_kernels.adapters import liger, trl, verl
from torch.distributed.tensor import Shard, distribute_tensor

from tests.kernels.adapters import verl_stand_in
from tests.kernels.adapters.test_from_logits import seeded

ROOT = Path(__file__).resolve().parents[3]
B, L, V, D = 3, 7, 41, 16


def random(*shape: int, seed: int, scale: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=seeded(seed))).to(dtype)


def head(num_rows: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states [num_rows, D], weight, bias and classes; logits of a spread of about 2."""
    hidden = random(num_rows, D, seed=0, dtype=dtype).requires_grad_()
    weight = random(V, D, seed=1, scale=0.4, dtype=dtype).requires_grad_()
    bias = random(V, seed=2, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(V, (num_rows,), generator=seeded(3))


def outcome(function, *arguments, **options) -> list:
    """Outputs, and gradients by every argument that takes one, of a random sum of the outputs."""
    found = function(*arguments, **options)
    floats = [x for x in found if x is not None and x.requires_grad]
    weights = [random(*x.shape, seed=9 + i) for i, x in enumerate(floats)]
    total = sum((x * w).sum() for x, w in zip(floats, weights, strict=True))
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*found, *torch.autograd.grad(total, leaves)]


def assert_same(ours: list, theirs: list, *, rtol: float = 1e-4, atol: float = 5e-6) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.requires_grad == y.requires_grad
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def parameters_of(function) -> list[tuple]:
    names = inspect.signature(function).parameters.values()
    return [(x.name, x.default) for x in names if x.name not in ("self", "cls", "ctx")]


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


def test_workspace_is_bounded_by_the_package(monkeypatch):
    found = []
    op = "rft_kernels.adapters._linear.linear_token_stats"
    monkeypatch.setattr(op, lambda *_, workspace_bytes, **__: found.append(workspace_bytes))
    hidden, weight, _, targets = head(4)
    verl.FusedLinearForPPO()(hidden, weight, targets)
    monkeypatch.setattr(adapters, "workspace_bytes", 12345)
    verl.FusedLinearForPPO()(hidden, weight, targets)
    assert found == [2**30, 12345]


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


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7, "return_entropy": True}, {"ignore_index": 5, "return_entropy": True},
])  # fmt: skip
def test_liger_scaled_cross_entropy(liger_grpo, options):
    theirs = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
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
    monkeypatch.setattr(liger, "metrics", lambda *_: calls.append(_) or [])
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


@pytest.fixture(params=["verl's own", "as documented"])
def verl_modules(request, monkeypatch) -> dict[str, ModuleType]:
    stand_ins = verl_stand_in.modules()
    if request.param == "verl's own":
        reason = "verl is not installed"
        return {name: pytest.importorskip(name, reason=reason) for name in stand_ins}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_ins


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_verl_linear_cross_entropy(reduction, temperature):
    """Against verl's documented meaning: its own function is of a CUDA device alone."""
    theirs = verl_stand_in.modules()["verl.utils.kernel.linear_cross_entropy"]
    hidden, weight, _, labels = head(B * L)
    hidden = hidden.detach().view(B, L, D).requires_grad_()
    ours, theirs = (
        outcome(f, hidden, weight, labels.view(B, L), temperature, reduction)
        for f in (verl.linear_cross_entropy, theirs.linear_cross_entropy)
    )
    assert_same(ours, theirs)


def sharded(rank: int, store: str, results) -> None:
    """verl's head over two ranks of unequal shards, gradients as each rank has them."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    hidden, weight, _, labels = head(B * L)
    own = weight.detach().split([25, V - 25])[rank].requires_grad_()
    results[rank] = [
        x.detach()
        for x in outcome(
            verl.linear_cross_entropy, hidden, own, labels, 0.7, "none", dist.group.WORLD
        )
    ]
    mesh = dist.init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match="DTensor: gather it"):
        verl.FusedLinearForPPO()(hidden, distribute_tensor(weight, mesh, [Shard(0)]), labels)
    dist.barrier()
    os._exit(0)  # a torn down interpreter can abort on a thread of the process group


@pytest.mark.slow
def test_verl_linear_cross_entropy_over_ranks(tmp_path):
    """Gradients by hidden add up over ranks, those by the weight are each rank's own."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(sharded, (str(tmp_path / "store"), results), nprocs=2)
        first, second = results[0], results[1]
    theirs = verl_stand_in.modules()["verl.utils.kernel.linear_cross_entropy"]
    hidden, weight, _, labels = head(B * L)
    log_probs, entropy, dhidden, dweight = (
        x.detach() for x in outcome(theirs.linear_cross_entropy, hidden, weight, labels, 0.7)
    )
    whole = [first[2] + second[2], torch.cat([first[3], second[3]])]
    assert_same([*first[:2], *second[:2]], [log_probs, entropy] * 2)
    assert_same(whole, [dhidden, dweight])


def test_verl_fused_linear(verl_modules):
    theirs = verl_modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO
    hidden, weight, _, ids = head(B * L)
    for shape in ((B * L,), (B, L)):
        inputs = hidden.detach().view(*shape, D).requires_grad_()
        ours, own = (
            outcome(f(chunk_size=4), inputs, weight, ids.view(shape), 0.7)
            for f in (verl.FusedLinearForPPO, theirs)
        )
        assert_same(ours, own)


def test_verl_chunked_entropy(verl_modules):
    theirs = verl_modules["verl.utils.torch_functional"].entropy_from_logits_with_chunking
    logits = random(B * L, V, seed=0, scale=3).requires_grad_()
    ours, theirs = (
        outcome(lambda x, f=f: (f(x, chunk_size=4),), logits)
        for f in (verl.entropy_from_logits_with_chunking, theirs)
    )
    assert_same(ours, theirs)


def test_verl_refusals():
    hidden, weight, _, labels = head(4)
    with pytest.raises(ValueError, match="impl_backend must be one of torch, liger, got 'typo'"):
        verl.FusedLinearForPPO(impl_backend="typo")
    with pytest.raises(ValueError, match="reduction must be .* got 'max'"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")


def test_verl_signatures(verl_modules):
    linear = verl_modules["verl.utils.kernel.linear_cross_entropy"]
    theirs = getattr(linear, "LinearCrossEntropy", None)
    theirs = linear.linear_cross_entropy if theirs is None else theirs.forward
    assert parameters_of(verl.linear_cross_entropy) == parameters_of(theirs)
    module = verl_modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO
    for name in ("__init__", "forward"):
        pair = (getattr(x, name) for x in (verl.FusedLinearForPPO, module))
        assert len({str(parameters_of(function)) for function in pair}) == 1


def test_verl_patch(verl_modules):
    names = {
        "verl.utils.kernel.linear_cross_entropy": "linear_cross_entropy",
        "verl.utils.experimental.torch_functional": "FusedLinearForPPO",
        "verl.utils.torch_functional": "entropy_from_logits_with_chunking",
    }
    own = {module: getattr(verl_modules[module], name) for module, name in names.items()}
    with verl.patch():
        for module, name in names.items():
            assert getattr(verl_modules[module], name) is getattr(verl, name)
    assert own == {module: getattr(verl_modules[module], name) for module, name in names.items()}


@pytest.mark.slow
def test_verl_example():
    """verl's own actor forward, where it is installed; else how to install it."""
    path = os.pathsep.join([str(ROOT / "kernels"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "examples" / "verl_actor.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if importlib.util.find_spec("verl") is None:
        assert done.returncode == 1 and "pip install verl" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    table = {line[:16].strip(): line[16:].split() for line in done.stdout.splitlines()}
    for name in ("loss", "|dlm_head|"):
        own, ours = map(float, table[name])
        assert ours == pytest.approx(own, rel=1e-4)
    own, ours = map(float, table["peak, MiB"])
    assert ours < own / 2
