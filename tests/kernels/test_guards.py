"""What holds the packages apart: names on the path and directions of import."""

import ast
import dataclasses
import graphlib
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "rft_kernels"
NAME = "rft_kernels"
FILES = {  # by the name of the module
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A floor imports from those before it alone, and from a room only what its door names.
FLOORS = (
    ("_check", "_ops", "results"),
    ("_bundle", "_dispatch", "reference"),
    ("rows", "selection", "objective"),
    ("policy_loss", "function_loss"),
    ("linear",),
    ("lm_head",),
    ("adapters",),
)
REFERENCE = f"{NAME}.reference"
ALLOWED = {"rft_kernels", "torch", "triton"} | set(sys.stdlib_module_names)


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_no_package_is_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or ROOT not in Path(found.origin).parents


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_nothing_but_torch_and_triton_is_imported(path: Path):
    assert imported(path) <= ALLOWED


def targets(module: str) -> list[tuple[str, str | None]]:
    """What of the package a file imports, wherever in its code: (module, the name out of it)."""
    path, found = FILES[module], []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.append((inner, None) if inner in FILES else (source, alias.name))
    return [pair for pair in found if pair[0].split(".")[0] == NAME]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_files_import_each_other():
    graph = {module: {target for target, _ in targets(module)} for module in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [module for module in FILES if module != NAME])
def test_imports_run_downwards_and_through_doors(module: str):
    place = next(i for i, floor in enumerate(FLOORS) if module.split(".")[1] in floor)
    below = {f"{NAME}.{other}" for floor in FLOORS[:place] for other in floor}
    for target, name in targets(module):
        if room(target) == room(module):
            continue
        assert target in below, f"{target} is not a room below, or a file inside one"
        if FILES[target].name == "__init__.py":
            assert name in importlib.import_module(target).__all__


def test_the_specification_shares_nothing_but_the_types_of_results():
    found = {pair for module in FILES if room(module) == REFERENCE for pair in targets(module)}
    shared = {pair for pair in found if room(pair[0]) != REFERENCE}
    assert shared == {(f"{NAME}.results", x) for x in ("TokenStats", "LseStats", "PolicyLoss")}


def test_the_specification_has_the_defaults_of_the_package():
    from rft_kernels import PolicyConfig
    from rft_kernels.reference.objective import Config

    assert Config()._asdict() == dataclasses.asdict(PolicyConfig())


def launches(node: ast.AST, guarded: bool = False) -> list[tuple[str, bool]]:
    """Kernels launched below a node, and whether each is so on the device of its tensors."""
    found = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        name = ast.unparse(node.func.value)
        found += [(name, guarded)] if name.endswith("_kernel") else []
    if isinstance(node, ast.With):
        contexts = (ast.unparse(item.context_expr) for item in node.items)
        guarded |= any(context.startswith("torch.cuda.device_of(") for context in contexts)
    for child in ast.iter_child_nodes(node):
        found += launches(child, guarded)
    return found


def test_kernels_are_launched_on_the_device_of_their_tensors():
    """Triton launches on the current device, on its stream, wherever the tensors are."""
    found = [x for path in PACKAGE.rglob("*.py") for x in launches(ast.parse(path.read_text()))]
    defined = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert defined and defined == {name for name, _ in found}
    assert [name for name, guarded in found if not guarded] == []


def test_importing_the_package_brings_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import rft_kernels;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert set(done.stdout.split()) <= ALLOWED


def test_public_names():
    import rft_kernels

    assert all(hasattr(rft_kernels, name) for name in rft_kernels.__all__)
    assert {
        "token_stats",
        "token_stats_with_lse",
        "sum_squared_probs",
        "TokenStats",
        "LseStats",
        "linear_token_stats",
        "linear_token_stats_with_lse",
        "linear_token_loss",
        "token_loss",
        "select_top_entropy",
        "policy_objective",
        "PolicyConfig",
        "prefix_rft_loss",
        "linear_prefix_rft_loss",
        "PolicyLoss",
        "LMHead",
        "patch_lm_head",
    } == set(rft_kernels.__all__)
