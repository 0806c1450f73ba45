"""The rooms of prefix_rft: imports run downwards, through doors, without circles."""

import ast
import inspect
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from prefix_rft.methods import METHODS

PACKAGE = Path(__file__).parents[1] / "prefix_rft"
# A room may import from those on the floors below its own.
FLOORS = [
    {"checks", "data_types"},
    {"methods"},
    {"config"},
    {"reward"},
    {"model", "metrics"},
    {"data", "doctor"},
    {"rollout"},
    {"evaluate"},
    {"train"},
    {"compare"},
    {"cli", "integrations"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_METHOD_LINES = 90
MAX_ENTRIES = 20
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def offered(module: str) -> set[str]:
    """Names that a door has from the files behind it."""
    tree = ast.parse(MODULES[module].read_text())
    froms = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.name for node in froms for alias in node.names}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, wherever it does: lazily, for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("prefix_rft"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            if node.module.split(".")[0] == "prefix_rft":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = inner in MODULES and alias.name not in offered(node.module)
                    yield inner if is_module else node.module


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def violations(module: str, tree: ast.AST) -> list[str]:
    """Imports of a file that go up, sideways, or past a door."""
    room, found = room_of(module), []
    for target in imported(tree):
        other = room_of(target)
        if other == room:
            continue
        if FLOOR[other] >= FLOOR[room]:
            found.append(f"{module} imports {target}, which is not below it")
        elif target.count(".") > 1:
            found.append(f"{module} imports {target} past the door of {other}")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "prefix_rft"])
def test_imports_run_downwards_and_through_doors(module: str) -> None:
    assert violations(module, ast.parse(MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("from prefix_rft.checks import require", 0),
        ("from prefix_rft.methods import Method", 0),
        ("from prefix_rft.train import train", 1),
        ("def f():\n    import prefix_rft.train.run", 1),
        ("from prefix_rft.methods.rft import RFT", 1),
        ("from prefix_rft.metrics import StepMetrics", 1),
        ("from prefix_rft.model.policy import Policy", 0),
    ],
)
def test_the_rule_sees_what_it_forbids(line: str, number: int) -> None:
    assert len(violations("prefix_rft.model.policy", ast.parse(line))) == number


def test_there_is_no_circle() -> None:
    graph = {
        name: {target for target in imported(ast.parse(path.read_text())) if target != name}
        for name, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()
    graph["prefix_rft.checks"] |= {"prefix_rft.train"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_no_room_outside_methods_names_a_method() -> None:
    named = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] not in ("methods", "compare")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in METHODS
    ]
    assert named == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_small_file(name: str) -> None:
    file = Path(inspect.getsourcefile(METHODS[name]))
    assert file == PACKAGE / "methods" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= MAX_METHOD_LINES


def test_the_package_can_be_taken_in_at_a_glance() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES
