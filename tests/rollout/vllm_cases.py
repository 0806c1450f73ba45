"""Access to the vLLM of .venv-vllm, and a run that learns within a few steps."""

import os
from pathlib import Path

import pytest
import torch

from prefix_rft.config import Config, config_from_dict

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-vllm"
PYTHON = Path(os.environ.get("PREFIX_RFT_VLLM_PYTHON", VENV / "bin/python"))
TOLERANCE = 1e-4  # nats, for a log-prob
TOKEN_FILE = "server.token"  # beside the base that server and trainers share


def skip_without_vllm() -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU rebuild of vLLM is for machines without CUDA")
    if not PYTHON.exists():
        log = VENV / "failed"
        reason = log.read_text().strip().splitlines()[-1] if log.exists() else "run make test"
        pytest.skip(f"no vLLM for the CPU in {PYTHON}: {reason}")


def environment() -> dict[str, str]:
    """One thread, and without the setting that makes Triton interpret its kernels."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def learning_run(folder: Path, base_dir: Path, *, engine: str, **vllm: object) -> Config:
    """The testbed with a barely trained base, and a reward that rises within a few steps.

    Args:
        base_dir: where all runs find the same base.
        vllm: fields of the section `[vllm]`.
    """
    return config_from_dict(
        {
            "name": "run",
            "output_dir": str(folder),
            "data": {"path": "testbed", "num_eval": 16, "max_prompt_tokens": 160},
            "testbed": {"num_train": 64},
            "base": {"cache_dir": str(base_dir), "num_batches": 40, "batch_size": 16},
            "model": {"device": "cpu"},
            "rollout": {"engine": engine, "max_response_length": 40},
            "vllm": {
                "enforce_eager": True,
                "kv_cache_mib": 128,
                "token_file": str(base_dir / TOKEN_FILE),
            }
            | vllm,
            "reward": {"function": "tests.rollout.vllm_worker:many_digits"},
            "optimizer": {"lr": 5e-4},
            "trainer": {"num_steps": 8, "prompts_per_step": 8, "prompts_per_update": 8},
            "eval": {"num_samples": 2},
            "log": {"progress": "plain", "tensorboard": False},
        }
    )


def check_learnt(found: dict) -> None:
    """Check what the worker measured in a `learning_run`."""
    rewards = [record["reward/on_policy_mean"] for record in found["records"]]
    assert len(rewards) == 8
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.5
    assert found["summary"]["trained"]["greedy"] > found["summary"]["base"]["greedy"]
    # A step whose rollouts all get the same reward has no gap.
    gaps = [record.get("rollout/log_prob_gap_max") for record in found["records"]]
    gaps = [gap for gap in gaps if gap is not None]
    assert len(gaps) > 2 and max(gaps) < TOLERANCE
