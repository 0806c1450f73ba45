"""What holds the packages apart: names on the path and directions of import."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "rft_kernels"
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path: Path):
    assert imported(path) <= ALLOWED
    if path.parent.name == "reference":
        shared = {
            "objective",
            "policy_config",
            "policy_loss",
            "token_stats",
        }  # the types of arguments and results
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rft_kernels"):
                assert node.module.split(".")[1] in shared
                assert all(alias.name[0].isupper() for alias in node.names)
    else:
        text = path.read_text()
        assert "reference" not in {
            alias.name.split(".")[-1]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }


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
        "TokenStats",
        "linear_token_stats",
        "select_top_entropy",
        "policy_objective",
        "PolicyConfig",
        "prefix_rft_loss",
        "linear_prefix_rft_loss",
        "PolicyLoss",
        "LMHead",
        "patch_lm_head",
    } == set(rft_kernels.__all__)
