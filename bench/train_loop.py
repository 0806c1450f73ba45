"""Tokens per second of the training loop by phase, for both rollout engines on 1 and 2 ranks.

    python -m bench.train_loop [--smoke] [--out FILE.csv] [--engines transformers vllm]

Runs `prefix-rft train` of the testbed for some steps in a fresh folder, once to make the base, once
for every engine and number of ranks, and takes medians over the steps after the first two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from bench.harness import ROOT, machine, write_rows

PHASES = ("push", "generate", "reward", "old_policy", "update", "step")
WARM_UP_STEPS = 2


def run(folder: Path, arguments: list[str], *, engine: str, ranks: int, steps: int) -> list[dict]:
    """The records of the training steps."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(ranks)]
    options = {
        "output-dir": folder / f"{engine}-{ranks}",
        "base.cache-dir": folder / "base",
        "rollout.engine": engine,
        "trainer.num-steps": steps,
        "trainer.checkpoint-every": 0,
        "data.num-eval": 8,
        "eval.num-samples": 1,
        "log.progress": "plain",
        "log.no-tensorboard": None,
    }
    if engine == "vllm" and not torch.cuda.is_available():
        options |= {"vllm.enforce-eager": None, "vllm.kv-cache-mib": 256}
    command = [*launcher, "-m", "prefix_rft", "train", "testbed", *arguments]
    for name, value in options.items():
        command += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT.parent,
        env=os.environ | threads,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    lines = (options["output-dir"] / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return records[min(WARM_UP_STEPS, steps - 1) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a base that has learnt nothing")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    steps, arguments = options.steps, []
    if options.smoke:
        steps = 2
        arguments = ["--base.num-batches", "2", "--rollout.max-response-length", "16"]
        arguments += ["--trainer.prompts-per-step", "4", "--trainer.prompts-per-update", "4"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in options.engines:
            for ranks in options.ranks:
                records = run(Path(folder), arguments, engine=engine, ranks=ranks, steps=steps)
                row = {"engine": engine, "ranks": ranks, "steps": len(records)}
                for phase in PHASES:
                    row[f"{phase}_s"] = median(each.get(f"time/{phase}_s", 0) for each in records)
                for phase in ("generate", "update", "step"):
                    name = f"throughput/{phase}_tokens_per_s"
                    row[f"{phase}_tokens_per_s"] = median(each.get(name) or 0 for each in records)
                rows.append(row | machine())
    write_rows(rows, options.out)


if __name__ == "__main__":
    main()
