"""The head sharded over ranks by classes, on two gloo ranks, against one rank with all of it."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rft_kernels import (
    LMHead,
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_loss,
    linear_token_stats,
    linear_token_stats_with_lse,
    reference,
)
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.kernels.kernel_cases import loss_inputs, seeded
from tests.kernels.test_token_loss import FUNCTIONS, luffy, options_of
from tests.kernels.test_token_loss import case as function_case
from tests.kernels.test_token_loss import positional as leading

pytestmark = pytest.mark.slow
SIZES = {"uneven": [20, 13], "one has nothing": [33, 0], "other has nothing": [0, 33]}
SHARDED = ("lm_head_weight", "bias")
CONFIG = PolicyConfig(entropy_coef=0.05, dual_clip=1.2)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0, "temperature": 0.7},
    "rows": {"temperature": torch.linspace(0.5, 2, 24), "workspace_bytes": 33 * 8 * 20},
    "padded": {"vocab_size": 18},
    "active": {"stats": "active", "bias": None},
    "sequences": {"config": PolicyConfig(importance_level="sequence"), "cu_seqlens": [0, 9, 24]},
    "masked classes": {"masked": True, "config": PolicyConfig()},
    "triton": {"backend": "triton", "softcap": 2.0, "temperature": 0.7},
}


FUNCTION_OPTIONS = {"softcap": 2.0, "temperature": 0.7}


def case(name: str, selecting: bool) -> dict[str, Any]:
    inputs = loss_inputs() | {"config": CONFIG} | CASES[name]
    if not selecting:
        inputs["selected_mask"] = torch.rand(24, generator=seeded(8)) > 0.5
    if "cu_seqlens" in inputs:
        inputs["cu_seqlens"] = torch.tensor(inputs["cu_seqlens"])
    if "vocab_size" in inputs:
        inputs["targets"] = inputs["targets"].clamp(max=17)
    if inputs.pop("masked", False):  # all classes of the second rank
        inputs["bias"].data[20:] = -torch.inf
        inputs["targets"] = inputs["targets"].clamp(max=19)
    return inputs


def outputs(inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Loss, statistics and gradients; twice the loss, to see that its gradient is heeded."""
    op = linear_token_loss if "loss_fn" in inputs else linear_prefix_rft_loss
    found = op(**inputs, **options)
    (2 * found.loss).backward()
    grads = {k: inputs[k].grad for k in ("hidden", *SHARDED) if inputs[k] is not None}
    return {"loss": found.loss.detach(), "stats": found[1:4], "grads": grads}


def own(inputs: dict[str, Any], sizes: list[int], rank: int) -> dict[str, Any]:
    """The inputs, with this rank's classes alone."""
    sharded = {k: inputs[k] for k in SHARDED if inputs[k] is not None}
    return inputs | {k: x.detach().split(sizes)[rank].requires_grad_() for k, x in sharded.items()}


def on_rank(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for name in CASES:
        for selecting in (False, True):
            for form, sizes in SIZES.items():
                inputs = own(case(name, selecting), sizes, rank)
                found = outputs(inputs, process_group=dist.group.WORLD)
                results[name, selecting, form, rank] = found
            inputs = case(name, selecting)
            for key in SHARDED:
                if inputs[key] is not None:
                    x = distribute_tensor(inputs[key].detach(), mesh, [Shard(0)])
                    inputs[key] = x.requires_grad_()
            found = outputs(inputs)
            found["grads"] = {
                k: x.to_local() if isinstance(x, DTensor) else x for k, x in found["grads"].items()
            }
            results[name, selecting, "DTensor", rank] = found
    for loss_fn in FUNCTIONS:
        for form, sizes in SIZES.items():
            inputs = own(function_case(loss_fn, FUNCTION_OPTIONS), sizes, rank)
            found = outputs(inputs, process_group=dist.group.WORLD, check=True)
            results[loss_fn.__name__, form, rank] = found
    others(rank, mesh, results)
    dist.barrier()
    os._exit(0)  # a torn down interpreter can abort on a thread of the process group


def others(rank: int, mesh: Any, results: Any) -> None:
    """What crosses ranks; the module; statistics alone; a buffer; a low-rank term; refusals."""
    crossed, all_reduce = [], dist.all_reduce

    def counted(x, *arguments, **options):
        crossed.append(x.numel())
        return all_reduce(x, *arguments, **options)

    inputs = own(case("plain", selecting=True), [20, 13], rank)
    dist.all_reduce = counted
    group = {"process_group": dist.group.WORLD}
    loss = linear_prefix_rft_loss(**inputs, **group).loss
    crossed.append("backward")
    loss.backward()
    dist.all_reduce = all_reduce
    results["crossed", rank] = crossed

    inputs = own(case("softcap", selecting=True), [20, 13], rank)
    results["lse", rank] = lse_of(inputs, **group)

    torch.manual_seed(0)
    head, (up, inner) = LMHead(8, 33, bias=False).double(), factors()
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    up = up.detach().split([17, 16])[rank].requires_grad_()
    up = DTensor.from_local(up, mesh, [Shard(0)], shape=(33, 2), stride=(2, 1))
    hidden = inputs["hidden"].detach().requires_grad_()
    buffer = torch.zeros(head.weight.to_local().shape, dtype=torch.float64)
    stats = head(hidden, inputs["targets"], low_rank=(inner, up))
    (stats.entropy - stats.log_probs).sum().backward()
    loss = head(hidden, *positional(inputs), normalizer=3, accumulate_dweight=buffer).loss
    loss.backward()
    results["module", rank] = [
        *(x.detach() for x in stats), head.weight.grad.to_local(), hidden.grad, inner.grad, buffer
    ]  # fmt: skip

    hidden.grad = inner.grad = head.weight.grad = None
    given = head_of(function_case(luffy), low_rank=(inner, up))
    head(hidden, **given).loss.backward()
    results["function", rank] = [head.weight.grad.to_local(), hidden.grad, inner.grad]

    refused = []
    whole = head.weight.detach().full_tensor()
    for weight, options in (
        (whole, {"bias": distribute_tensor(torch.ones(33).double(), mesh, [Shard(0)]), **group}),
        (distribute_tensor(whole, mesh, [Replicate()]), {}),
        (distribute_tensor(whole, mesh, [Shard(1)]), {}),
        (head.weight, group),
    ):
        try:
            linear_token_stats(hidden, weight, inputs["targets"], **options)
        except (TypeError, ValueError) as error:
            refused.append(str(error))
    results["refused", rank] = refused


def lse_of(inputs: dict[str, Any], op: Any = linear_token_stats_with_lse, **options: Any) -> dict:
    """As `outputs`, of the statistics with lse."""
    leading = [inputs[name] for name in ("hidden", "lm_head_weight", "targets")]
    options |= {name: inputs[name] for name in ("bias", "softcap", "temperature")}
    found = torch.stack(tuple(op(*leading, **options)))
    scalars = torch.randn(found.shape, generator=seeded(7), dtype=torch.float64)
    total = (found * scalars).sum()
    grads = torch.autograd.grad(total, [inputs[name] for name in ("hidden", *SHARDED)])
    grads = dict(zip(("hidden", *SHARDED), grads, strict=True))
    return {"loss": total.detach(), "stats": found.detach(), "grads": grads}


def head_of(inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What a module is called with beside the hidden states."""
    held = ("hidden", *SHARDED)
    return {k: x for k, x in inputs.items() if k not in held} | options


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    shapes = ((33, 2), (24, 2))
    return tuple(
        torch.randn(shape, generator=seeded(5), dtype=torch.float64).requires_grad_()
        for shape in shapes
    )


def positional(inputs: dict[str, Any]) -> list[torch.Tensor]:
    names = ("targets", "old_log_probs", "advantages", "response_mask", "prefix_mask")
    return [inputs[name] for name in names]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    store = tmp_path_factory.mktemp("ranks") / "store"
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, (str(store), results), nprocs=2)
        return dict(results)


@pytest.mark.parametrize("form", [*SIZES, "DTensor"])
@pytest.mark.parametrize("selecting", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(results, name, selecting, form):
    ranks = [results[name, selecting, form, rank] for rank in (0, 1)]
    assert_equal(*ranks, outputs(case(name, selecting)))


@pytest.mark.parametrize("form", SIZES)
@pytest.mark.parametrize("loss_fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_function_sees_the_same_on_two_ranks(results, loss_fn, form):
    inputs = function_case(loss_fn, FUNCTION_OPTIONS)
    expected = reference.linear_token_loss(*leading(inputs), **options_of(inputs))
    (2 * expected.loss).backward()
    grads = {k: inputs[k].grad for k in ("hidden", *SHARDED)}
    truth = {"loss": expected.loss.detach(), "stats": expected[1:4], "grads": grads}
    assert_equal(*(results[loss_fn.__name__, form, rank] for rank in (0, 1)), truth)


def test_lse_over_ranks(results):
    truth = lse_of(case("softcap", selecting=True), reference.linear_token_stats_with_lse)
    assert_equal(results["lse", 0], results["lse", 1], truth)


def assert_equal(first: dict, second: dict, expected: dict) -> None:
    """What two ranks found, which is the same on both or by classes, is what one finds."""
    assert torch.equal(first["loss"], second["loss"])
    assert torch.equal(first["grads"]["hidden"], second["grads"]["hidden"])
    close = {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(first["loss"], expected["loss"], **close)
    torch.testing.assert_close(first["stats"], expected["stats"], **close)
    for key, truth in expected["grads"].items():
        found = first["grads"][key]
        if key in SHARDED:
            found = torch.cat([found, second["grads"][key]])
        torch.testing.assert_close(found, truth, **close)


def test_four_numbers_a_row_and_the_gradient_of_the_hidden_states_cross(results):
    assert results["crossed", 0] == [23, 3 * 23, "backward", 24 * 8]  # one row has no target


def test_module_with_a_buffer_and_a_low_rank_term(results):
    inputs, (up, inner) = case("plain", selecting=True), factors()
    torch.manual_seed(0)
    head = LMHead(8, 33, bias=False).double()
    hidden = inputs["hidden"].detach().requires_grad_()
    stats = head(hidden, inputs["targets"], low_rank=(inner, up))
    (stats.entropy - stats.log_probs).sum().backward()
    dweight, head.weight.grad = head.weight.grad, None
    head(hidden, *positional(inputs), normalizer=3).loss.backward()
    for rank, own in enumerate((slice(17), slice(17, 33))):
        expected = [
            *(x.detach() for x in stats), dweight[own], hidden.grad, inner.grad,
            head.weight.grad[own],
        ]  # fmt: skip
        torch.testing.assert_close(results["module", rank], expected, rtol=1e-10, atol=1e-13)

    hidden.grad = inner.grad = head.weight.grad = None
    head(hidden, **head_of(function_case(luffy), low_rank=(inner, up))).loss.backward()
    for rank, own in enumerate((slice(17), slice(17, 33))):
        expected = [head.weight.grad[own], hidden.grad, inner.grad]
        torch.testing.assert_close(results["function", rank], expected, rtol=1e-10, atol=1e-13)


def test_refusals(results):
    mixed, replicated, columns, both = results["refused", 0]
    assert mixed.startswith("bias must be a DTensor as lm_head_weight is, without process_group")
    assert replicated.startswith("lm_head_weight must be placed Shard(0) on a mesh of one")
    assert "got (Shard(dim=1),)" in columns
    assert both.startswith("lm_head_weight must be a DTensor as") and "DTensor" in both
