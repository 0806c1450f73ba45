"""The losses and the linear ops on Triton kernels: compiled on a GPU, interpreted without one."""

import pytest
import torch
from rft_kernels import (
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_stats,
    prefix_rft_loss,
    reference,
)
from torch import Tensor

from tests.kernels.kernel_cases import assert_as_exact, from_logits, gradients, loss_inputs, seeded
from tests.kernels.triton_cases import DEVICE, DTYPES, scalars_for, triton_backend

pytestmark = [  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def inputs_on_device(**options) -> dict:
    return {
        name: x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in loss_inputs(**options).items()
    }


TERMS = PolicyConfig(dual_clip=1.2, entropy_coef=0.05)
LOSSES = {
    "selecting": {"config": TERMS},
    "selected": {"config": TERMS, "selected_mask": torch.rand(24, generator=seeded(8)) > 0.5},
    "active": {"prefix_mask": None, "stats": "active", "temperature": 0.7},
    "padded": {"vocab_size": 30, "temperature": torch.linspace(0.5, 2, 24)},
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("extra", LOSSES.values(), ids=LOSSES)
def test_losses_equal_the_specification(extra, softcap, small_tiles):
    inputs = inputs_on_device()
    inputs |= {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in extra.items()}
    inputs["targets"] = inputs["targets"].clamp(max=29)
    for op, options in (
        (linear_prefix_rft_loss, {"softcap": softcap}),
        (linear_prefix_rft_loss, {"softcap": softcap, "workspace_bytes": 33 * 8 * 20}),
        (lambda **named: from_logits(prefix_rft_loss, named), {}),
    ):
        same = reference.linear_prefix_rft_loss(**inputs, **options)
        found = op(**inputs, **options, backend="triton")
        torch.testing.assert_close(found.loss, same.loss)
        torch.testing.assert_close(
            gradients(found.loss, inputs), gradients(same.loss, inputs), atol=1e-12, rtol=1e-9
        )
        assert torch.equal(found.selected_mask, same.selected_mask)


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_op_is_as_exact_as_torch(dtype, softcap, small_tiles):
    inputs = inputs_on_device(dtype=dtype)
    names = ("hidden", "lm_head_weight", "bias")
    results = []
    for backend, widen in (("triton", False), (None, False), (None, True)):
        wrt = {name: inputs[name].detach() for name in names}
        wrt = {name: (x.double() if widen else x).requires_grad_() for name, x in wrt.items()}
        op = reference.linear_token_stats if backend is None else linear_token_stats
        options = {} if backend is None else {"backend": backend}
        found = op(*list(wrt.values())[:2], inputs["targets"], bias=wrt["bias"], softcap=softcap,
                   temperature=0.7, **options)  # fmt: skip
        scalars = scalars_for(inputs["targets"]).to(found[0].dtype)
        total = (torch.stack(tuple(found)) * scalars).sum()
        results.append([x.detach() for x in found] + gradients(total, wrt))
    for x, y, z in zip(*results, strict=True):
        assert_as_exact(x, y, z)


def test_the_linear_ops_are_served_by_triton(monkeypatch, small_tiles):
    called = []
    for name in ("row_stats", "row_grad"):
        original = getattr(triton_backend, name)
        monkeypatch.setattr(
            triton_backend, name, lambda *a, n=name, f=original: called.append(n) or f(*a)
        )
    inputs = inputs_on_device()
    linear_prefix_rft_loss(**inputs, backend="triton").loss.backward()
    assert set(called) == {"row_stats", "row_grad"}


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_into_one_graph(inplace, small_tiles):
    inputs = inputs_on_device()

    def loss(hidden, weight, bias):
        named = inputs | {"hidden": hidden, "lm_head_weight": weight, "bias": bias}
        dense = from_logits(
            prefix_rft_loss, named, inplace_backward=inplace, config=TERMS, backend="triton"
        )
        return dense.loss + linear_prefix_rft_loss(**named, backend="triton").loss

    wrt = [inputs[name] for name in ("hidden", "lm_head_weight", "bias")]
    expected, found = loss(*wrt), compiled(loss)(*wrt)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    for x, y in zip(*(torch.autograd.grad(x, wrt) for x in (found, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
