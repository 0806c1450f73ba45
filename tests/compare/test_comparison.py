"""A comparison file: what it becomes, and how each bad one is refused before any work."""

from pathlib import Path

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.compare.comparison import SHIPPED, Comparison, load_comparison
from prefix_rft.methods import METHODS

GOOD = """
config = "testbed"
seeds = [0, 1]
[common]
data.seed = 3
[cells.sft]
method.name = "sft"
[cells.rft]
method.name = "rft"
optimizer.lr = 2e-4
[cells.chain]
start = "sft"
method = {name = "rft"}
seeds = [1]
"""


def load(folder: Path, text: str) -> Comparison:
    (folder / "mine.toml").write_text(text)
    return load_comparison(str(folder / "mine.toml"))


def test_cells_are_the_configuration_with_what_they_override(tmp_path: Path) -> None:
    comparison = load(tmp_path, GOOD)
    assert (comparison.name, comparison.reference) == ("mine", "sft")
    assert comparison.folder == Path("runs/compare/mine")
    runs = comparison.runs()
    assert [run.name for run in runs] == ["sft-0", "rft-0", "sft-1", "rft-1", "chain-1"]
    rft = runs[1].config
    assert (rft.method.name, rft.optimizer.lr, rft.seed, rft.data.seed) == ("rft", 2e-4, 0, 3)
    assert rft.trainer.num_steps == 60  # as in the configuration
    assert str(runs[1].folder) == "runs/compare/mine/rft-0"
    chain = runs[-1]
    assert chain.start is runs[2]
    assert chain.config.model.path == "runs/compare/mine/sft-1"


def test_a_cell_may_stand_before_the_one_it_starts_from(tmp_path: Path) -> None:
    head, cells = GOOD.split("[cells.sft]")
    comparison = load(
        tmp_path,
        head
        + cells.split("[cells.chain]")[1].join(["[cells.chain]", ""])
        + "[cells.sft]\nmethod.name = 'sft'\n",
    )
    assert [run.name for run in comparison.runs()] == ["sft-0", "sft-1", "chain-1"]
    assert comparison.with_starts(("chain",)) == {"chain", "sft"}
    with pytest.raises(ConfigError, match="^--only: expected one of chain, sft, got 'rft'$"):
        comparison.with_starts(("rft",))


def test_a_configuration_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[trainer]\nnum_steps = 7\n")
    text = GOOD.replace('"testbed"', '"own.toml"')
    assert load(tmp_path, text).runs()[0].config.trainer.num_steps == 7


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "sft"', 'name = "stf"', "cells.sft: method.name: expected one of .*got 'stf'"),
        ('"testbed"', '"tetsbed"', "config: expected a TOML file or one of .*, got tetsbed"),
        ('config = "testbed"', "", "config: expected the name or path of a configuration, got N"),
        (
            "optimizer.lr",
            "optimiser.lr",
            r"cells.rft: unknown key 'optimiser'; did you mean 'optimizer",
        ),
        ("lr = 2e-4", "lr = -1", "cells.rft: optimizer.lr: expected a number above 0, got -1"),
        ("[common]", "[comon]", "key: expected one of config, seeds, .*, got 'comon'"),
        ("[cells.chain]", "[cells.rft]", "cells: two cells of the name 'rft' .at line 11"),
        ("[cells.chain]", "[cells.RFT]", "cells: 'rft' and 'RFT' would share one folder"),
        ("[cells.chain]", "[cells.'a b']", "cells.'a b': expected letters, digits, "),
        ('start = "sft"', 'start = "stf"', "cells.chain.start: expected one of .*, got 'stf'"),
        (
            '"rft"\noptimizer',
            '"rft"\nstart = "chain"\noptimizer',
            "cells.rft.seeds: expected seeds that cells.chain has too.*, got .0.",
        ),
        (
            '[cells.sft]\nmethod.name = "sft"',
            '[cells.sft]\nmethod.name = "sft"\nstart = "chain"',
            "cells.sft.start: expected no circle, got 'sft -> chain -> sft'",
        ),
        ("seeds = [1]", "seeds = [2]", "cells.chain.seeds: expected seeds that cells.sft has too"),
        ("seeds = [1]", "seeds = []", "cells.chain.seeds: expected a list of at least one whole"),
        ("seeds = [0, 1]", "seeds = []", "^[^ ]*: seeds: expected a list of at least one whole"),
        ("seeds = [0, 1]", "seeds = [0, 1.5]", "seeds: expected a list .*, got .0, 1.5."),
        ("seeds = [0, 1]", "seeds = [true]", "seeds: expected a list .*, got .True."),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds: expected a list .*, got .-1."),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds: expected each seed once, got .1, 1."),
        ("seeds = [0, 1]\n", "", "seeds: expected a list .*, got None"),
        ("optimizer.lr = 2e-4", "seed = 4", "cells.rft.seed: expected no such key: it follows"),
        ("data.seed = 3", "", "data.seed: expected a seed in the configuration or in .common."),
        (
            "optimizer.lr = 2e-4",
            "base.lr = 1e-2",
            r"cells.rft.base.lr: expected 0.002 as in cells.sft, since .*, got 0.01",
        ),
        (
            "optimizer.lr = 2e-4",
            "model.path = 'x'",
            "cells.rft.*: expected None as in cells.sft, since all cells share base",
        ),
        ("optimizer.lr = 2e-4", "data.seed = 4", "cells.rft.data.seed: expected 3 as in cells.sft"),
        ("optimizer.lr = 2e-4", "data.num_eval = 9", "cells.rft.data.num_eval: expected 192 as"),
        ("optimizer.lr = 2e-4", "eval.num_samples = 2", "cells.rft.eval.num_samples: expected 8"),
        (
            "optimizer.lr = 2e-4",
            "rollout.max_response_length = 90",
            "cells.rft.eval.max_response_length: expected 72 as in cells.sft",
        ),
        ('start = "sft"', 'start = "sft"\nmodel.path = "x"', "cells.chain.model.path: expected no"),
        ("config =", 'reference = "x"\nconfig =', "reference: expected one of sft, .*, got 'x'"),
        ("config =", "config = =", "no valid TOML: Invalid value .at line 2"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_error(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError, match=message) as refused:
        load(tmp_path, GOOD.replace(before, after, 1))
    assert str(refused.value).startswith(f"{tmp_path}/mine.toml: ")
    assert "\n" not in str(refused.value)


def test_no_cells_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cells: expected at least one cell, got None"):
        load(tmp_path, 'config = "testbed"\nseeds = [0]\n')
    with pytest.raises(ConfigError, match="comparison: expected a TOML file or one of testbed-me"):
        load_comparison("testbed-method")


def test_what_leaves_the_base_alone_may_differ(tmp_path: Path) -> None:
    for line in ("data.demonstration_fraction = 0.1", "eval.every = 5", "data.strict = true"):
        load(tmp_path, GOOD.replace("optimizer.lr = 2e-4", line))
    # With a base and held-out problems of their own, cells may train on different data.
    given = "model.path = 'x'\ndata.eval_path = 'held.jsonl'\ndata.path = 'a.jsonl'\n"
    text = GOOD.replace("data.seed = 3", given)
    load(tmp_path, text.replace("optimizer.lr = 2e-4", "data.path = 'b.jsonl'"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_comparisons_are_valid(path: Path, tmp_path: Path) -> None:
    """Cells of a method that is not there are put into the place of one that is."""
    text = path.read_text()
    for line in set(filter(lambda line: line.startswith("method.name"), text.splitlines())):
        if line.split('"')[1] not in METHODS:
            text = text.replace(line, 'method.name = "rft"')
    load(tmp_path, text)
