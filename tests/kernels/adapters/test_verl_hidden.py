"""The adapter for verl from hidden states, against verl's own."""

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rft_kernels.adapters import verl
from torch.distributed.tensor import Shard, distribute_tensor

from tests.kernels.adapters import verl_stand_in
from tests.kernels.adapters.cases import (
    ROOT,
    B,
    D,
    L,
    V,
    assert_same,
    head,
    outcome,
    parameters_of,
    random,
)


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
