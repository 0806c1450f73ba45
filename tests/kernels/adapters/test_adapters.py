"""What holds for all adapters: patching, refusals by name, the workspace, the examples."""

import os
import subprocess
import sys

import pytest
from rft_kernels import adapters
from rft_kernels.adapters import _patch, liger, trl, verl

from tests.kernels.adapters.cases import ROOT, head


@pytest.mark.parametrize("module", [trl, liger, verl], ids=lambda module: module.__name__)
def test_patch_of_a_missing_library_says_so(module, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(_patch.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="cannot patch .*: No module named .* installed"):
        module.patch()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (trl, "ChunkedDivergenceFunction"),
        (liger, "LigerVocabParallelCEFunction"),
        (liger, "LigerFusedCETVDFunction"),
        (liger, "LigerFusedLinearScaledCrossEntropyTPFunction"),
        (verl, "vocab_parallel_entropy"),
        (verl, "vocab_parallel_log_probs_from_logits"),
    ],
)
def test_what_is_not_served_says_so(module, name):
    with pytest.raises(NotImplementedError, match=f"{name} is not served by .*: "):
        exec(f"from {module.__name__} import {name}")
    assert not hasattr(module, "anything_else")


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


def test_workspace_is_bounded_by_the_package(monkeypatch):
    found = []
    op = "rft_kernels.adapters._linear.linear_token_stats"
    monkeypatch.setattr(op, lambda *_, workspace_bytes, **__: found.append(workspace_bytes))
    hidden, weight, _, targets = head(4)
    verl.FusedLinearForPPO()(hidden, weight, targets)
    monkeypatch.setattr(adapters, "workspace_bytes", 12345)
    verl.FusedLinearForPPO()(hidden, weight, targets)
    assert found == [2**30, 12345]
