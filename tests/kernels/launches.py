"""Compiles for a Hopper GPU what a call would launch, on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ("cuda", 90, 32)
POINTERS = {"bool": "i1", "uint8": "u8", "int32": "i32", "int64": "i64"} | {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"
}  # fmt: skip


def compile_instead() -> None:
    """From here on a launch compiles its kernel, prints the kernel's name, and runs nothing."""
    import torch
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + POINTERS[str(value.dtype).removeprefix("torch.")]
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                signature[parameter.name] = "fp32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compile_kernel(source, target=GPUTarget(*TARGET), options=options)
        print(kernel.__name__)

    JITFunction.run = run


def compiled(code: str) -> list[str]:
    """Names of the kernels that `code` launches, each compiled; in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = f"from tests.kernels import launches; launches.compile_instead()\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()
