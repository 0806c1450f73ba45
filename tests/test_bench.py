"""Every benchmark runs, on tiny shapes, and writes what a figure needs; and times on a CPU."""

import csv
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from rft_kernels import prefix_rft_loss, reference, select_top_entropy, token_stats
from torch.utils._python_dispatch import TorchDispatchMode

from bench import comparison, device, linear_rivals, plot, rivals, update_step

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("__init__", "harness", "device", "green", "plot", "rivals")
OPS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in SHARED)
FROM_LOGITS = ("token_stats", "policy_loss", "one_launch", "selection")
FROM_HIDDEN = ("linear_rivals", "update_step", "memory_table")
OTHERS = ("train_loop", "data_loading", "comparison", "grader", "grader_labels", "grader_rivals")
APART = (*FROM_LOGITS, *FROM_HIDDEN, *OTHERS)  # have tests of their own


@pytest.fixture(autouse=True)
def keep_threads():
    """A benchmark sets their number; other tests compare sums bit for bit."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_rows(path: Path) -> None:
    rows = read(path)
    assert len(rows) > 1
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert all(row[name] for name in ("device", "torch", "commit", "date"))
        if "of_floor" in row:
            assert float(row["of_floor"]) > 0 and float(row["copy_gb_s"]) > 0
        if "max_err_dlogits" in row:
            assert float(row["max_err_dlogits"]) < 0.02


def test_grader_smoke(tmp_path):
    """Labels, rivals, speed and hostile answers, from a few gold answers."""
    golds = pyarrow.table({"answer": [r"\frac{1}{2}", "3", "(1, 2)", "x+1", r"2\sqrt{3}"]})
    pyarrow.parquet.write_table(golds, tmp_path / "golds.parquet")
    options = ("--answers", "12", "--hostile", "20", "--per-kind", "1")
    done = run(
        sys.executable, "-m", "bench.grader", str(tmp_path / "golds.parquet"), *options,
        "--out-folder", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["label"]: row for row in read(tmp_path / "grader_accuracy.csv")}
    assert rows["near miss"]["ours_wrong"] == rows["rewrite"]["ours_wrong"] == "0"
    *speeds, hostile = read(tmp_path / "grader.csv")
    assert len(speeds) == 2 and all(float(row["answers_per_s"]) > 0 for row in speeds)
    assert hostile["correct"] == "0" and hostile["answers"] == "20"


def test_the_picture_of_the_comparison_is_drawn(tmp_path):
    shutil.copy(comparison.FOLDER / "comparison.csv", tmp_path)
    done = run(sys.executable, "-m", "bench.comparison", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == comparison.table(comparison.read(tmp_path))
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op not in APART])
def test_smoke(op, tmp_path):
    out = tmp_path / "rows.csv"
    done = run(
        sys.executable, "-m", f"bench.{op}", "--smoke", "--threads", "1", "--out", str(out)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_rows(out)
    if op == "autotune":
        assert "2: ((64, RowLaunch(" in done.stdout


@pytest.mark.slow
def test_data_loading_smoke(tmp_path):
    out = tmp_path / "data_loading.csv"
    done = run(sys.executable, "-m", "bench.data_loading", "--smoke", "--out", str(out))
    assert done.returncode == 0, done.stderr
    bare, first, second = read(out)
    assert float(second["cpu_s"]) < float(bare["cpu_s"]) < float(first["cpu_s"])


@pytest.mark.slow
def test_train_loop_smoke(tmp_path):
    out = tmp_path / "rows.csv"
    options = ("--smoke", "--engines", "transformers", "--ranks", "1", "--out", str(out))
    done = run(sys.executable, "-m", "bench.train_loop", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = read(out)
    assert (row["engine"], row["ranks"]) == ("transformers", "1")
    for phase in ("generate", "step"):
        assert float(row[f"{phase}_tokens_per_s"]) > 0


def without(folder: Path, module: str) -> dict[str, str]:
    """The environment of processes that find no such module."""
    (folder / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["token_stats", "policy_loss", "selection", *FROM_HIDDEN])
def test_on_a_cpu_triton_can_be_missing(op, tmp_path):
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", f"bench.{op}", "--smoke", "--out", str(out)]
    if op not in ("update_step", "memory_table"):
        command.append("--tests-green")
    done = run(*command, CUDA_VISIBLE_DEVICES="", **without(tmp_path, "triton"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(row["variant"].startswith("ours") for row in read(out))


@pytest.mark.parametrize("op", ["one_launch", "autotune"])
def test_benchmarks_of_triton_itself_say_that_it_is_missing(op, tmp_path):
    environment = without(tmp_path, "triton")
    done = run(sys.executable, "-m", f"bench.{op}", "--smoke", "--tests-green", **environment)
    assert done.returncode == 2
    assert (
        done.stderr == f"error: bench.{op} needs triton; run pip install '.[test]' in a checkout\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl_patch", "trl_grpo"])
def test_examples_say_what_they_need(name, tmp_path):
    environment = without(tmp_path, "trl")
    done = run(sys.executable, f"kernels/examples/{name}.py", **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "trl cannot be imported" in done.stderr and "pip install trl==" in done.stderr


@pytest.mark.slow
def test_gpu_check_smoke(tmp_path):
    """The script of the GPU runs its parts on a CPU: benchmarks, tests, pictures."""
    options = {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": ""}
    done = run("bash", "bench/gpu_check.sh", "--smoke", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts ok" in done.stdout
    ran, skipped = re.search(r"(\d+) tests ran, (\d+) were skipped, 0 failed", done.stdout).groups()
    assert int(ran) > 5 and (int(skipped) > 0 or torch.cuda.is_available())
    for op in FROM_LOGITS:
        check_rows(tmp_path / f"{op}.csv")
        assert (tmp_path / f"{op}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_gpu_check_smoke_from_hidden_states(tmp_path):
    """Its second call; every rival at hand runs, and is as exact as 16 bits allow."""
    options = {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": "", "PARTS": "hidden"}
    done = run("bash", "bench/gpu_check.sh", "--smoke", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts ok" in done.stdout and "=== tests" not in done.stdout
    for op in FROM_HIDDEN:
        assert (tmp_path / f"{op}.png").read_bytes().startswith(b"\x89PNG")
    for op in FROM_HIDDEN[:2]:
        check_rows(tmp_path / f"{op}.csv")

    rows = {(row["variant"], row["active"]): row for row in read(tmp_path / "linear_rivals.csv")}
    needs = {"eager": "torch", "TRL chunked": "trl"}
    needs |= {"Liger fused linear GRPO (no entropy)": "liger_kernel"}
    for name in (name for name, package in needs.items() if find_spec(package)):
        for row in (rows[name, "1"], rows[f"{name}, active alone", "0.25"]):
            ours = rows["ours, one pass", row["active"]]
            for gradient in ("max_err_dhidden", "max_err_dweight"):
                assert 0 < float(ours[gradient]) < float(row[gradient]) < 0.06
            assert row["lacks"] == ("entropy" if "no entropy" in name else "nothing")
    for variant, floor in (("one pass", "1 + 2a"), ("two passes", "1 + 3a")):
        floor = rows[f"bare GEMMs, {floor}", "0.25"]
        assert rows[f"ours, {variant}", "0.25"]["floor_ms"] == floor["median_ms"]

    found = {row["variant"] for row in read(tmp_path / "update_step.csv")}
    assert found == {"ours", "eager head"} | ({"TRL head"} if find_spec("trl") else set())
    assert [row["longest_tokens"] for row in read(tmp_path / "memory_table.csv")] == ["8", "8"]
    assert "| tiny | all weights | 8 → 8 |" in (tmp_path / "memory_table.md").read_text()


@pytest.mark.slow
def test_gpu_check_goes_on_after_a_failing_part(tmp_path):
    """Wheels that do not exist fail their part and the script, and nothing else."""
    missing = str(tmp_path / "none")
    options = {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": missing}
    options["PARTS"] = "rivals pictures"
    done = run("bash", "bench/gpu_check.sh", "--smoke", **options)
    assert done.returncode == 1
    assert "rivals: FAILED" in done.stdout and "pictures: ok" in done.stdout
    assert "some parts FAILED" in done.stdout


@pytest.mark.slow
def test_nothing_is_timed_while_tests_are_red(tmp_path):
    code = (
        "from bench.device import require_green; require_green(['tests/no_such_test.py']);"
        "print('timed')"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1 and "tests are red" in done.stderr and "timed" not in done.stdout


TESTS = """
import pytest
@pytest.mark.skip
def test_skipped(): ...
def test_passes(): ...
def test_fails(): assert False
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept, status, printed",
    [
        ("skipped", 1, "0 tests ran, 1 were skipped, 0 failed"),
        ("none", 1, "0 tests ran, 0 were skipped, 0 failed"),
        ("skipped or passes", 0, "1 tests ran, 1 were skipped, 0 failed"),
        ("passes or fails", 1, "2 tests ran, 0 were skipped, 1 failed"),
    ],
)
def test_green_is_some_that_ran(kept, status, printed, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    done = run(sys.executable, "-m", "bench.green", str(tmp_path), "-k", kept)
    assert (done.returncode, printed in done.stdout) == (status, True), done.stdout


@pytest.mark.slow
def test_the_exact_loss_of_liger_is_its_own():
    """Liger's kernels are held to the loss they define, which has advantages of sequences."""
    pytest.importorskip("liger_kernel")
    code = """
import torch
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
from bench import policy_loss
torch.manual_seed(0)
logits = torch.randn(64, 61) * 3
batch = policy_loss.Batch(logits, 1.0)
batch.old_log_probs += 0.3 * torch.randn(64)
theirs = lambda x, b: policy_loss.liger_loss(triton_grpo_loss, x, b)
found = lambda x, b: policy_loss.both(theirs, x, b)
for exact in (policy_loss.exact_liger, policy_loss.exact_loss):
    columns = policy_loss.error_columns(found, exact, logits, batch)
    print(columns["max_err_loss"] < 1e-6, columns["max_err_dlogits"] < 1e-6)
"""
    done = run(sys.executable, "-c", code, TRITON_INTERPRET="1")
    assert done.stdout.splitlines()[-2:] == ["True True", "False False"], done.stderr


def test_compilations_stop_where_their_time_is_over(monkeypatch, capsys):
    """Those left out are named; those that fail are left out too."""
    monkeypatch.setattr(sys, "argv", ["bench", "--tests-green", "--budget-s", "3"])
    monkeypatch.setattr(device, "copy_gb_s", lambda *args, **options: 1.0)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    bench = device.Bench(None, tests=[], smoke_test="")
    clock = iter(range(0, 60, 6))  # hundredths of a second a compilation, told as 0.6 s
    monkeypatch.setattr(device.time, "monotonic", lambda: next(clock) / 10)
    calls = []
    found = [bench.compiled(len, lambda f: calls.append(f), {"T": i}) for i in range(3)]
    assert [list(x) for x in found] == [["torch.compile"], [], []] and calls == [len]
    assert bench.skipped == [f"torch.compile, T={i}: out of time for compiling" for i in (1, 2)]

    def refuse(function):
        raise RuntimeError("no compiler")

    bench = device.Bench(None, tests=[], smoke_test="")
    assert bench.compiled(len, refuse, {"T": 9}) == {}
    assert bench.skipped == ["torch.compile, T=9: RuntimeError: no compiler"]


@pytest.mark.slow
def test_pictures_of_the_committed_figures(tmp_path):
    """Time and memory where both were measured; a CSV without times is left out."""
    for path in (ROOT / "bench/results/cpu").glob("*.csv"):
        shutil.copy(path, tmp_path)
    done = run(sys.executable, "-m", "bench.plot", str(tmp_path))
    assert done.returncode == 0, done.stderr
    drawn = [path.stem for path in tmp_path.glob("*.png")]
    assert "linear_loss" in drawn and "testbed" not in drawn
    assert "testbed.csv: nothing to draw" in done.stdout
    rows = plot.read(tmp_path / "linear_loss.csv")
    assert {plot.kind(row) for row in rows} == {"ours", "others", "the floor"}
    assert plot.unit_of("median_ms", 5275) == ("s", 1e-3)


def test_panels_of_many_bars_are_split_by_active_share():
    """Shapes that lack a few of the variants are drawn too, those that lack many are not."""
    bars = {(8, "1"): 20, (8, ".5"): 18, (4, "1"): 20, (2, "1"): 9}
    rows = [
        {"variant": str(i), "T": str(tokens), "active": share}
        for (tokens, share), count in bars.items()
        for i in range(count)
    ]
    found = plot.panels(rows)
    assert plot.chosen(found) == [
        ("T = 8", "active = 1"),
        ("T = 8", "active = .5"),
        ("T = 4", "active = 1"),
    ]
    assert plot.label(found["T = 8", "active = .5"][0]) == "0"
    assert list(plot.panels(rows[-9:])) == [("T = 2",)]


def small_inputs(share: float, dtype: torch.dtype = torch.float64) -> rivals.Inputs:
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, dtype=dtype).requires_grad_()
    weight = (torch.randn(61, 16, dtype=dtype) * 0.7).requires_grad_()
    return rivals.make_inputs(hidden, weight, share)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_truth_of_the_rivals_is_that_of_the_reference(share, monkeypatch):
    """By pieces of the weight; and errors are found, in their units."""
    monkeypatch.setattr(linear_rivals, "_CLASSES", 24)
    x = small_inputs(share)
    assert len(x.active_rows) == 40 * share
    assert x.advantages[x.active_rows].unique().tolist() == [-1, 1]
    loss = reference.linear_prefix_rft_loss(
        x.hidden, x.weight, x.targets, x.old_log_probs, x.advantages, x.response_mask,
        x.prefix_mask, normalizer=x.normalizer, selected_mask=x.prefix_mask,
    ).loss  # fmt: skip
    found = (loss.detach(), *torch.autograd.grad(loss, (x.hidden, x.weight)))
    exact = linear_rivals.truth(x)
    columns = linear_rivals.error_columns(lambda _: found, x, exact)
    assert max(columns.values()) < 1e-12

    dweight = found[2].clone()
    dweight[0] += 0.25 * dweight.abs().max()  # in the first piece alone
    wrong = (found[0] + 0.5, found[1] * 1.25, dweight)
    assert linear_rivals.error_columns(lambda _: wrong, x, exact) == pytest.approx(
        {"max_err_loss": 0.5, "mean_err_loss": 0.5}
        | {"max_err_dhidden": 0.25, "mean_err_dhidden": 0.25, "max_err_dweight": 0.25}
        | {"mean_err_dweight": 0.25 * 16 * (found[2].abs().max() / found[2].abs().sum()).item()}
    )


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_bare_gemms_are_those_of_the_schedule(share, monkeypatch):
    """By the flops that were counted, in several pieces."""
    monkeypatch.setattr(linear_rivals, "_FLOOR_ROWS", 16)
    x = small_inputs(share, torch.float32)
    expected = {"1 + 2a": 1 + 2 * share, "1 + 3a": 1 + 3 * share, "3a": 3 * share}
    for name, call in linear_rivals.bare_gemms(x).items():
        with GemmFlops() as counted:
            call()
        assert counted.flops == expected[name.removeprefix("bare GEMMs, ")] * 2 * 40 * 61 * 16


def test_verl_is_found_past_its_own_imports(tmp_path):
    """Every package above the function refuses to be imported; what it imports itself is real."""
    kernels = tmp_path / "verl/utils/kernel"
    kernels.mkdir(parents=True)
    for folder in (tmp_path / "verl", tmp_path / "verl/utils"):
        (folder / "__init__.py").write_text("import ray_that_is_not_installed\n")
    (kernels / "__init__.py").write_text("")
    (tmp_path / "verl/utils/device.py").write_text("name = 'cuda'\n")
    (kernels / "linear_cross_entropy.py").write_text(
        "from verl.utils.device import name\ndef linear_cross_entropy(): return name\n"
    )
    code = "from bench import rivals as x; print(x.verl_function()())"
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "cuda\n", done.stderr


class GemmFlops(TorchDispatchMode):
    flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "mm" in function.overloadpacket.__name__:
            a, b = arguments[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*arguments, **options or {})


@pytest.mark.parametrize("name", ["ours", "eager head", "TRL head"])
def test_heads_of_an_update_give_one_gradient(name):
    """Of every parameter; the rows that are not selected have none."""
    policy = update_step.make_policy("tiny", torch.device("cpu"))
    batch = update_step.make_batch(policy, num_rows=3, num_prompt=4, num_response=20)
    assert batch.prefix_mask.sum() == 10 and (batch.selected_mask & batch.prefix_mask).sum() == 2
    losses = update_step.heads()
    if name not in losses:
        pytest.skip("TRL is not installed")

    def gradients(loss) -> list[torch.Tensor]:
        return torch.autograd.grad(loss(policy, batch, 60), list(policy.parameters()))

    def reference_loss(policy, batch, normalizer) -> torch.Tensor:
        logits = policy.lm_head(policy.hidden_states(batch)).log_softmax(-1)
        inside = batch.response_mask & (~batch.prefix_mask | batch.selected_mask)
        log_probs = logits.gather(-1, batch.targets.clamp(min=0)[:, None])[:, 0]
        return -(log_probs * batch.advantages * inside).sum() / normalizer

    for found, expected in zip(gradients(losses[name]), gradients(reference_loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_update_whose_heads_disagree_is_not_timed(monkeypatch):
    heads = {"ours": update_step.ours, "wrong": lambda *x: 1.05 * update_step.ours(*x)}
    monkeypatch.setattr(update_step, "heads", lambda: heads)
    policy = update_step.make_policy("tiny", torch.device("cpu"))
    batch = update_step.make_batch(policy, num_rows=2, num_prompt=2, num_response=8)
    with pytest.raises(SystemExit, match="disagree"):
        update_step.measure(policy, batch, repeats=1)


def test_floors_that_are_variants_and_results_that_are_no_memory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--tests-green", "--smoke"])
    monkeypatch.setattr(device, "copy_gb_s", lambda *args, **options: 1.0)
    monkeypatch.setattr(device, "peak_mib", lambda *args: 10.0)
    bench = device.Bench(None, tests=[], smoke_test="")
    bench.slice_s = 1.0
    calls = {"op": lambda: None, "floor": lambda: None, "other": lambda: None}
    bench.add(
        {}, calls, share=1, floor_of={"op": "floor", "floor": "floor", "other": "none"}.get,
        result_bytes=lambda name: 3 * 2**20 if name == "op" else 0,
    )  # fmt: skip
    op, floor, other = bench.rows
    assert op["floor_ms"] == floor["median_ms"] and other["floor_ms"] != other["floor_ms"]
    assert [row["peak_mib"] for row in bench.rows] == [7, 10, 10]


@pytest.fixture
def rows() -> dict:
    rand = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=rand).requires_grad_()
    targets = torch.randint(1000, (64,), generator=rand)
    return {"logits": logits, "targets": targets}


def test_time_of_token_stats(benchmark, rows):
    found = benchmark(lambda: token_stats(**rows))
    assert found.entropy.shape == (64,)


def test_time_of_the_loss(benchmark, rows):
    mask = torch.ones(64, dtype=torch.bool)
    options = (torch.zeros(64), torch.ones(64), mask, torch.arange(64) < 32)

    def both():
        loss = prefix_rft_loss(*rows.values(), *options, normalizer=64).loss
        return torch.autograd.grad(loss, rows["logits"])[0]

    assert benchmark(both).any()


def test_time_of_selection(benchmark):
    entropy, mask = torch.rand(4096), torch.ones(4096, dtype=torch.bool)
    assert benchmark(lambda: select_top_entropy(entropy, mask)).sum() == 4096 - 4096 * 4 // 5
