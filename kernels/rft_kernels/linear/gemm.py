"""Products whose sums are kept in the dtype of the statistics, whatever their operands' (E9)."""

import torch
from torch import Tensor

MIXED_DEVICES = ("cuda",)  # take operands of 16 bits and give float32; others need them widened


def operand_dtypes(
    dtype: torch.dtype, result: torch.dtype, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """Of the operands of a projection, and of its two gradients, for weights of `dtype`.

    A gradient by logits is rounded to bfloat16, which has float32's range, but never to float16,
    where most of its entries would be 0.
    """
    if dtype == result or device.type not in MIXED_DEVICES:
        return result, result
    return dtype, dtype if dtype == torch.bfloat16 else result


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b"""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b"""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
