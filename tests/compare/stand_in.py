"""In the place of `python` in `python -m prefix_rft train CELL --resume`: leaves what a run leaves.

A cell with `reward.function = "fail"` fails, one with "stop" ends before it is done, and one with
"wait" waits for a signal.
"""

import json
import os
import signal
import sys
import tomllib
from pathlib import Path

config = tomllib.loads(Path(sys.argv[4]).read_text())
run_dir, seed = Path(config["output_dir"]), config["seed"]
level = len(run_dir.name) % 5 / 10 + seed / 100


def results(accuracy: float) -> dict:
    return {
        "num_problems": 4,
        "greedy": accuracy,
        "greedy_ci95": [accuracy - 0.1, accuracy + 0.1],
        "avg@2": accuracy,
        "avg@2_ci95": [accuracy - 0.1, accuracy + 0.1],
        "avg@2/hard": accuracy / 2,
        "pass@2": accuracy,
        "response_length_mean": 10.0,
        "statuses": {"wrong": 3, "correct": 5},
        "grader": {"math-verify": "0.9"},
    }


with (run_dir.parent / "order.txt").open("a") as stream:
    stream.write(f"{run_dir.name} {os.environ.get('OMP_NUM_THREADS')}\n")
print("\n".join(f"line {number}" for number in range(20)))
match config["reward"].get("function"):
    case "fail":
        sys.exit("error: this cell fails")
    case "stop":
        sys.exit(0)
    case "wait":
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        (run_dir / "partial").write_text(str(os.getpid()))
        (run_dir / "partial").rename(run_dir / "waits")
        signal.pause()

records = [{"step": 0, "kind": "eval", "eval/avg@2": 0.1, "eval/greedy": 0.1}]
for step in range(3):
    records.append(
        {
            "step": step,
            "kind": "train",
            "rollout/generated_tokens_sum": 100 + seed,
            "policy/loss_tokens_sum": 10,
            "optim/updates_sum": 2,
            "time/step_s": 1.5,
            "policy/continuation_entropy_mean": None if step == 2 else 0.5 - step / 10,
        }
    )
records.append({"step": 3, "kind": "eval", "eval/avg@2": level, "eval/greedy": level})
outcomes = [
    {"index": 7 + i, "group": "hard", "greedy": i < 2, "num_samples": 2, "num_correct": i % 3}
    for i in range(4)
]
(run_dir / "config.toml").write_text("")
for name, lines in (("metrics.jsonl", records), ("evaluation.jsonl", outcomes)):
    (run_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
summary = {"base": results(0.1), "trained": results(level), "model_step": 3}
(run_dir / "summary.json").write_text(json.dumps(summary))
