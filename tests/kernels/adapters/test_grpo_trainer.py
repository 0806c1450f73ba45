"""TRL's own GRPOTrainer with and without our head: the same losses and weights, less memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rft_kernels.adapters import trl as adapter

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "kernels" / "examples" / "trl_grpo.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("trl", reason="TRL is not installed")
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPTIONS = {
    "KL and two updates a batch": {},
    "entropy": {
        "beta": 0.0, "entropy_coef": 0.01, "top_entropy_quantile": 0.5, "loss_type": "dr_grpo",
        "gradient_accumulation_steps": 2, "num_iterations": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_same_losses_and_weights(example, name, monkeypatch):
    """SGD: the weights are then linear in the gradients, whatever their size."""
    calls = []
    own_head = adapter.head_stats

    def counted(*arguments, **options):
        calls.append(arguments)
        return own_head(*arguments, **options)

    monkeypatch.setattr(adapter, "head_stats", counted)
    options = {"steps": 3, "vocab_size": 150, "length": 8, "optim": "sgd", "learning_rate": 0.3}
    options |= OPTIONS[name]
    own = example.train(False, **options)
    assert not calls
    ours = example.train(True, **options)
    assert len(calls) >= options["steps"]

    assert len(own.losses) == 3 and len(set(own.losses)) == 3
    assert ours.losses == pytest.approx(own.losses, rel=1e-5, abs=1e-7)
    start = example.train(False, **options | {"learning_rate": 0.0}).weights
    for key, weights in own.weights.items():
        moved = (weights - start[key]).abs().max()
        assert moved > 1e-4, key
        assert (ours.weights[key] - weights).abs().max() < 1e-4 * moved + 1e-7, key


@pytest.mark.slow
def test_example_runs_with_less_memory():
    """Its smallest form: 900 rows of 32,000 classes, of which ours holds 256 at a time."""
    pytest.importorskip("trl", reason="TRL is not installed")
    path = os.pathsep.join([str(ROOT / "kernels"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "2", "--length", "16"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = {line[:12].strip(): line[12:].split() for line in done.stdout.splitlines()}
    assert table["loss 0"][0] == table["loss 0"][1] and table["loss 1"][0] == table["loss 1"][1]
    own, ours = map(float, table["peak, MiB"])
    assert ours < own / 3
