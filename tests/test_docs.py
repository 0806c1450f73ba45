"""The documents: their links, names and install lines hold, and their figures are the CSVs'."""

import csv
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from prefix_rft.config import Config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/cpu"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def prose(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_relative_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_install_lines_name_no_index(document: Path) -> None:
    text = document.read_text()
    assert not re.search(r"pip install \S*['\"]?(prefix-rft|rft-kernels)\b", text)
    assert "prefix-rft[" not in text


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 130


def test_readme_shows_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "prefix_rft").glob("*/__init__.py")}
    shown = re.findall(r"\]\(prefix_rft/(\w+)", (ROOT / "README.md").read_text())
    assert rooms <= set(shown)


@each_document
def test_configuration_keys_exist(document: Path) -> None:
    config = Config()
    for section, key in re.findall(r"(?<!\[)`(\w+)\.(\w+)(?: = [^`]*)?`", prose(document)):
        if is_dataclass(getattr(config, section, None)):
            assert hasattr(getattr(config, section), key), f"{section}.{key}"


def test_every_shipped_configuration_is_documented() -> None:
    names = {path.stem for path in (ROOT / "prefix_rft/configs").glob("*.toml")}
    assert names <= set(re.findall(r"`([\w.-]+)`", (ROOT / "docs/training.md").read_text()))


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def accuracies(*columns: tuple[str, str, str]) -> Iterator[list[str]]:
    """Rows of a table whose columns are models: (config, method, model)."""
    found = {(row["config"], row["method"], row["model"]): row for row in rows("testbed.csv")}
    for measure in ("greedy", "avg@8"):
        yield [measure, *(f"{float(found[column][measure]):.1%}" for column in columns)]


def losses() -> Iterator[list[str]]:
    found = {row["variant"]: row for row in rows("linear_loss.csv")}
    for label, variant in {
        "eager": "eager",
        "ours, every row with a gradient": "one pass, 1 active",
        "ours, a quarter of the rows with a gradient": "one pass, 0.25 active",
        "ours, a quarter of the rows, the others not reported": (
            "one pass, 0.25 active, the others unseen"
        ),
        "the three bare GEMMs": "three GEMMs",
    }.items():
        seconds, mib = (float(found[variant][key]) for key in ("median_ms", "peak_mib"))
        yield [label, f"{seconds / 1000:.2f} s", f"{mib:.0f} MiB"]


def throughputs() -> Iterator[list[str]]:
    for row in rows("train_loop.csv"):
        phases = (float(row[f"{phase}_tokens_per_s"]) for phase in ("generate", "update", "step"))
        engine = row["engine"].replace("vllm", "vLLM")
        yield [engine, row["ranks"], *(f"{each:,.0f}" for each in phases)]


def table(document: str, header: str) -> list[list[str]]:
    """The rows of the one table with that header."""
    lines = (ROOT / document).read_text().splitlines()
    body = takewhile(lambda line: line.startswith("|"), lines[lines.index(header) + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def test_readme_accuracies_are_those_of_the_csv() -> None:
    base = ("testbed", "prefix_rft", "base")
    trained = [("testbed", method, "trained") for method in ("prefix_rft", "rft")]
    found = table("README.md", "| held-out accuracy | base | Prefix-RFT | plain RFT |")
    assert found == list(accuracies(base, *trained))


def test_readme_losses_are_those_of_the_csv() -> None:
    assert table("README.md", "| | time | peak memory |") == list(losses())
    (gradients,) = {row["gradients_mib"] for row in rows("linear_loss.csv")}
    assert (
        f"{float(gradients):.0f} MiB\nof it are the gradients" in (ROOT / "README.md").read_text()
    )


def test_figures_of_the_real_model_are_those_of_the_csv() -> None:
    def shown(row: dict[str, str], measure: str) -> str:
        low, high = (row.get(f"{measure}_{end}") for end in ("low", "high"))
        around = f" ({float(low):.1%}–{float(high):.1%})".replace("%", "") if low else ""
        return f"{float(row[measure]):.1%}{around}"

    names = {"without an answer": "no_answer_frac", "truncated": "truncated_frac"}
    models = rows("smollm2_gsm8k.csv")
    found = table("docs/training.md", "| held out | base | after 15 steps |")
    assert len(found) == 5
    for name, *cells in found:
        assert cells == [shown(row, names.get(name, name)) for row in models]


def test_figures_of_losses_that_are_functions_are_those_of_the_csv() -> None:
    figures = {
        row["variant"]: [
            f"{float(row['median_ms']) / 1000:.2f} s",
            f"{float(row['peak_mib']):.0f} MiB",
        ]
        for row in rows("token_loss.csv")
    }
    found = table("kernels/README.md", "| loss | time | peak memory |")
    assert len(found) == 7
    assert all(figures[name] == shown for name, *shown in found)


def test_distributed_figures_are_those_of_the_csv() -> None:
    sharded = [("testbed-sharded", "prefix_rft", model) for model in ("base", "trained")]
    document = "docs/distributed.md"
    found = table(document, "| held-out accuracy | base | 2 processes, vLLM |")
    assert found == list(accuracies(*sharded))
    found = table(document, "| engine | processes | generation | update | whole step |")
    assert found == list(throughputs())


def test_the_comparison_is_that_of_the_csv() -> None:
    """Its main table line by line, and the sizes that its text repeats."""
    from bench.comparison import FOLDER, accuracy, read, table

    text = (ROOT / "docs/comparison.md").read_text()
    cells = read(FOLDER)
    for line in table(cells):
        assert line in text, line
    spoken = text[text.index("## What it shows") :]
    for cell in ("sft", "sft_then_rft", "sft_then_prefix_rft", "prefix_rft", "rl_sft_loss"):
        values = accuracy(cells[cell])
        assert f"{sum(values) / len(values):.1f}" in spoken, cell


def test_figures_of_the_grader_are_those_of_the_csv() -> None:
    with (ROOT / "bench/results/cpu/grader_accuracy.csv").open(newline="") as file:
        rows = {r["label"]: r for r in csv.DictReader(file) if r["kind"] == "all"}
    text = (ROOT / "docs/grading.md").read_text()
    rewrites, misses = rows["rewrite"], rows["near miss"]
    assert f"of {int(rewrites['answers']):,} | near misses taken for right, of" in text
    names = {"ours": "this grader", "math_verify": "Math-Verify", "sympy": "sympy alone"}
    for column, name in names.items():
        wrong, right = (int(row[f"{column}_wrong"]) for row in (rewrites, misses))
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.split(" (")[0].strip() for cell in line.strip("|").split("|")]
        assert cells[1:] == [f"{wrong:,}", f"{right:,}"], name
