"""What is installed: the kernels alone, all of it, and the layout Hugging Face's builder reads."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "rft_kernels"
MODULES = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
SITE_PACKAGES = Path(torch.__file__).parents[1]

# `-S` leaves out the .pth files through which an editable install makes our packages importable.
ISOLATED = [sys.executable, "-I", "-S", "-c"]
ALONE = """
import runpy, sys
from importlib.util import find_spec

folder, site_packages, example = sys.argv[1:]
sys.path += [folder, site_packages]
assert find_spec("prefix_rft") is None
runpy.run_path(example, run_name="__main__")
assert sys.modules["rft_kernels"].__file__.startswith(folder)
"""

# As `kernels.get_kernel` does: from a path, under a name that stands in no import statement.
FROM_THE_HUB = """
import runpy, sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location

folder, site_packages, example = sys.argv[1:]
sys.path.append(site_packages)
assert find_spec("rft_kernels") is None
spec = spec_from_file_location("_rft_kernels_cpu_1234567", f"{folder}/__init__.py")
module = sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["rft_kernels"] = module
runpy.run_path(example, run_name="__main__")
"""

BUILDERS_OPS = """
def add_op_namespace_prefix(op_name):
    return f"_rft_kernels_cpu_1234567::{op_name}"
"""


def run_example(code: str, folder: Path) -> str:
    """What kernels/examples/alone.py prints with the package of `folder`, far from the checkout."""
    variables = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*ISOLATED, code, folder, SITE_PACKAGES, ROOT / "kernels/examples/alone.py"],
        cwd=folder.parent,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def install_wheel(project: Path, work: Path) -> Path:
    """A folder that holds the project's installed wheel and nothing else; no network is needed."""
    no_network = ["--no-index", "--no-deps"]
    pip("wheel", project, "--no-build-isolation", *no_network, "--wheel-dir", work)
    (wheel,) = work.glob("*.whl")
    pip("install", wheel, *no_network, "--no-compile", "--target", work / "site")
    return work / "site"


def copy_without_leftovers(source: Path, target: Path) -> None:
    """A wheel would take up modules of an earlier build, so each is built from a fresh copy."""
    leftovers = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(source, target, ignore=leftovers)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("wheel")
    copy_without_leftovers(ROOT / "kernels", work / "kernels")
    return install_wheel(work / "kernels", work)


@pytest.fixture
def distribution(installed: Path) -> Distribution:
    (metadata,) = installed.glob("*.dist-info")
    return PathDistribution(metadata)


def test_wheel_requires_torch_and_triton_alone(distribution: Distribution):
    assert distribution.name == "rft-kernels"
    required = [Requirement(line) for line in distribution.requires or []]
    assert {x.name: x.marker and str(x.marker) for x in required} == {
        "torch": None,
        "triton": 'platform_system == "Linux"',
    }


def test_wheel_holds_the_whole_package_and_nothing_else(distribution: Distribution):
    metadata = f"{distribution.name.replace('-', '_')}-{distribution.version}.dist-info"
    files = {str(path) for path in distribution.files or [] if path.parts[0] != metadata}
    assert files == {f"rft_kernels/{name}" for name in {*MODULES, "py.typed"}}
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_example_runs_with_the_wheel_alone(installed: Path):
    assert run_example(ALONE, installed).count("prefix tokens kept") == 3


def test_root_s_wheel_holds_both_packages(tmp_path: Path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("kernels", "prefix_rft"):
        copy_without_leftovers(ROOT / name, project / name)
    site = install_wheel(project, tmp_path)
    for package in (project / "prefix_rft", project / "kernels" / "rft_kernels"):
        files = {path.relative_to(package.parent) for path in package.rglob("*.*")}
        assert [path for path in sorted(files) if not (site / path).exists()] == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run(["make", "--silent", "hub", f"HUB={folder}"], cwd=ROOT, check=True)
    return folder


def test_hub_layout_is_that_of_the_builder(hub: Path):
    build = tomllib.loads((hub / "build.toml").read_text())
    general = build["general"]
    assert set(build) == {"general", "torch-noarch"} and general["edition"] == 5
    assert set(general) == {"name", "version", "edition", "license", "backends"}
    package = hub / "torch-ext" / general["name"].replace("-", "_")
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert modules == MODULES - {"_ops.py"}  # the builder refuses to overwrite it
    assert not list(hub.rglob("__pycache__"))
    assert (hub / "flake.nix").exists()


def test_example_runs_with_the_hub_s_kernel(hub: Path, tmp_path: Path):
    """The builder adds `_ops.py` and puts all files into a folder per backend."""
    variant = tmp_path / "torch-cpu"
    shutil.copytree(hub / "torch-ext" / "rft_kernels", variant)
    (variant / "_ops.py").write_text(BUILDERS_OPS)
    assert run_example(FROM_THE_HUB, variant).count("prefix tokens kept") == 3


def test_package_knows_no_name_of_its_own():
    """Several versions are loaded at once: no import by name, no fixed namespace of ops."""
    offences = []
    for name in sorted(MODULES - {"_ops.py"}):
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            match node:
                case ast.Import():
                    named = [alias.name for alias in node.names]
                case ast.ImportFrom(level=0):
                    named = [node.module]
                case ast.Constant(value=str(text)) if text.startswith("rft_kernels::"):
                    named = ["rft_kernels"]
                case _:
                    continue
            if any(x.split(".")[0] == "rft_kernels" for x in named):
                offences.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert offences == []
