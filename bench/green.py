"""Whether tests are green, where a test that was skipped says nothing.

    python -m bench.green PYTEST_ARGUMENTS

Prints how many ran, were skipped and failed; the exit status is 0 if some ran and none failed.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from bench.harness import ROOT


def run_tests(arguments: list[str]) -> tuple[bool, str]:
    """Whether some test ran and none failed; and what to print of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            [*command, f"--junitxml={report}"],
            capture_output=True, text=True, check=False, cwd=ROOT.parent,
        )  # fmt: skip
        suite = xml.parse(report).getroot().find("testsuite") if report.exists() else None
    counts = {} if suite is None else suite.attrib
    skipped = int(counts.get("skipped", 0))
    failed = sum(int(counts.get(name, 0)) for name in ("failures", "errors"))
    ran = int(counts.get("tests", 0)) - skipped
    text = f"{ran} tests ran, {skipped} were skipped, {failed} failed"
    if done.returncode or not ran:
        text = f"{done.stdout[-3000:]}{done.stderr[-1000:]}{text}"
    return done.returncode == 0 and ran > 0, text


def require_green(tests: list[str]) -> None:
    """Runs the op's tests, and ends the program where one fails: no figures of a wrong op."""
    green, text = run_tests(["-x", *tests])
    print(text)
    if not green:
        sys.exit("tests are red: nothing is timed")


if __name__ == "__main__":
    green, text = run_tests(sys.argv[1:])
    print(text)
    sys.exit(not green)
