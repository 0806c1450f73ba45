"""Sets up .venv-vllm for tests/rollout/test_vllm.py: a rebuild of vLLM for machines without CUDA.

    vllm_install.py REQUIREMENT

It is a venv of its own, since what it brings would change how other packages behave, but sees the
packages of the venv that runs this script, and holds what those lack. Where pip fails, the reason
is left in .venv-vllm/failed, and the tests are skipped with it; the next call tries again.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

VENV = Path(__file__).parent.parent / ".venv-vllm"
PYTHON = VENV / "bin/python"
FAILED = VENV / "failed"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # of its torch, where PyPI has the CUDA one
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")  # which it names, but does not need


def main(requirement: str) -> None:
    installed = VENV / "installed"
    wanted = json.dumps([requirement, sys.prefix])
    if torch.cuda.is_available() or (installed.exists() and installed.read_text() == wanted):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, with_pip=True)
    _share(sysconfig.get_path("purelib"))
    install = ["install", "--only-binary=:all:", requirement]
    error = _pip(*install)
    if error is not None:
        error = _pip(*install, f"--extra-index-url={TORCH_INDEX}")
    if error is not None:
        shutil.rmtree(PYTHON.parent)
        FAILED.write_text(f"pip install {requirement}: {error}\n")
        print(
            f"tests/rollout/test_vllm.py will skip most of its tests: {FAILED.read_text()}", end=""
        )
        return
    error = _pip("uninstall", "--yes", *CUDA_BUILDS)
    if error is not None:
        raise SystemExit(f"pip uninstall {' '.join(CUDA_BUILDS)}: {error}")
    installed.write_text(wanted)


def _share(packages: str) -> None:
    """Let the venv import `packages` after its own, editable installs included."""
    command = [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    Path(own, "shared.pth").write_text(f"import site; site.addsitedir({packages!r})\n")


def _pip(*arguments: str) -> str | None:
    """Run pip in the venv; the last line that it complained with, None where it went well."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode == 0:
        return None
    return (result.stdout.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


if __name__ == "__main__":
    main(sys.argv[1])
