"""The kernels of the Triton backend compile for Hopper, without a GPU, into the loads meant."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

# In a process of its own: this one may interpret its kernels, and those cannot be compiled.
SCRIPT = """
import json, sys, triton
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rft_kernels.rows import launch, triton_backend

def compiled(name, dtype, launch, softcap, more):
    kernel = getattr(triton_backend, name)
    stats = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "logits_col_stride": 1, "dlogits_col_stride": 1, "SOFTCAP": softcap, "DEPTH": launch.depth,
        "LANES": launch.lanes, "NUM_STAGES": launch.num_stages, "HAS_DLOG_PROBS": True,
        "HAS_DENTROPY": True, "HAS_ROW_TEMPERATURE": True, "HAS_SQUARES": more, "HAS_DLSE": more,
        "HAS_SQUARED": more,
    }
    if not more:
        constants |= {"squares_ptr": None, "dlse_ptr": None, "squared_ptr": None}
    types = {
        "logits_ptr": "*" + dtype, "dlogits_ptr": "*" + dtype, "targets_ptr": "*i64",
        "valid_ptr": "*i1", "temperature": "fp32", "logits_row_stride": "i32",
        "dlogits_row_stride": "i32", "num_classes": "i32",
    }
    names = kernel.arg_names
    signature = {x: "constexpr" if x in constants else types.get(x, "*" + stats) for x in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(names) if signature[x][0] in "*i"
    }
    found = triton.compile(
        ASTSource(kernel, signature, {x: c for x, c in constants.items() if x in names}, aligned),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.num_warps},
    )
    return found.asm

report = []
for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4), ("fp64", 8)):
    for softcap in (None, 30.0) if size > 2 else (None,):
        for name, more in product(("_row_stats_kernel", "_row_grad_kernel"), (False, True)):
            asm = compiled(name, dtype, launch.TABLES[9][size][-1][1], softcap, more)
            report.append({
                "kernel": name, "dtype": dtype, "softcap": softcap, "more": more,
                "binary": len(asm["cubin"]),
                "conversions": asm["ttgir"].count("convert_layout"),
                "wide loads": asm["ptx"].count("cp.async.cg.shared.global"),
                "wide stores": asm["ptx"].count("st.global.v4.b32"),
                "exponentials": asm["ptx"].count("ex2.approx.ftz.f32"),
            })
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    from triton import knobs

    if not os.path.exists(knobs.nvidia.ptxas.path):
        pytest.skip("this build of triton has no ptxas")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # From a file, since triton reads the source of what it compiles.
    script = tmp_path_factory.mktemp("script") / "compile_kernels.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles(report):
    assert len(report) == 24 and all(found["binary"] > 0 for found in report)


def test_no_tile_changes_its_layout(report):
    assert not any(found["conversions"] for found in report)


def test_memory_is_read_and_written_16_bytes_a_thread(report):
    for found in report:
        if found["dtype"] != "fp64":
            assert found["wide loads"] > 0
            assert found["kernel"] == "_row_stats_kernel" or found["wide stores"] > 0


def test_exponentials_are_one_instruction(report):
    assert all(found["exponentials"] > 0 for found in report if found["dtype"] != "fp64")


def test_squares_and_lse_cost_no_exponential(report):
    """The compiler shares those of the running sums, as the source counts on."""
    pairs = {}
    for found in report:
        key = found["kernel"], found["dtype"], found["softcap"]
        pairs.setdefault(key, []).append(found["exponentials"])
    assert len(pairs) == 12 and all(len(set(pair)) == 1 for pair in pairs.values())
