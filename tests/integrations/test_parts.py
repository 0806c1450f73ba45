"""The parts that docs/in-your-trainer.md shows by themselves run so, without any trainer."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/in-your-trainer.md").read_text()


def test_each_part_runs_by_itself():
    parts = re.findall(r"^## Only the (\w+).*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in parts] == ["kernels", "grader", "prefix", "advantages", "selection"]
    lines = ["import sys"]
    for _, code in parts:
        assert "assert" in code and len(code.strip().splitlines()) <= 8
        lines.append(code)
    lines.append("rooms = ('prefix_rft.train', 'prefix_rft.integrations', 'trl', 'transformers')")
    lines.append("assert not set(rooms) & set(sys.modules), sorted(sys.modules)")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
