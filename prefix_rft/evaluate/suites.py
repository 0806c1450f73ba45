"""The benchmarks by name: where their problems come from, and how they are sampled. Pure.

Sizes and sampling are those of the Prefix-RFT paper (arXiv 2507.01679): avg@32 on the small ones,
one sample a problem on the others, temperature 0.6, top_p 1, 8,192 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prefix_rft.checks import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark and its protocol."""

    name: str
    hub: str  # hub id[:configuration]
    split: str
    num_problems: int  # of the whole benchmark
    data_source: str  # what a file that holds several benchmarks calls it
    num_samples: int  # k of avg@k
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 8192  # of a response
    answer_pattern: str = "boxed"
    greedy: bool = False  # also one answer at temperature 0


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="aime24",
            hub="HuggingFaceH4/aime_2024",
            split="train",
            num_problems=30,
            data_source="aime",
            num_samples=32,
        ),
        Suite(
            name="aime25",
            hub="math-ai/aime25",
            split="test",
            num_problems=30,
            data_source="aime25",
            num_samples=32,
        ),
        Suite(
            name="amc",
            hub="AI-MO/aimo-validation-amc",
            split="train",
            num_problems=83,
            data_source="amc",
            num_samples=32,
        ),
        Suite(
            name="math500",
            hub="HuggingFaceH4/MATH-500",
            split="test",
            num_problems=500,
            data_source="math",
            num_samples=1,
        ),
        Suite(
            name="minerva",
            hub="math-ai/minervamath",
            split="test",
            num_problems=272,
            data_source="minerva",
            num_samples=1,
        ),
        Suite(
            name="olympiad",
            hub="math-ai/olympiadbench",
            split="test",
            num_problems=675,
            data_source="olympiad_bench",
            num_samples=1,
        ),
        Suite(
            name="gsm8k",
            hub="openai/gsm8k:main",
            split="test",
            num_problems=1319,
            data_source="gsm8k",
            num_samples=8,
            answer_pattern="####",
            greedy=True,
        ),
    )
}
SETS = {"math": ("aime24", "aime25", "amc", "math500", "minerva", "olympiad")}


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What a command asks for beside the protocol; None: as the protocol has it."""

    names: str  # of suites and sets, by comma
    data: str | None = None  # file of the problems; None: the hub
    names_key: str = "--suite"  # what messages call `names` and `data`
    data_key: str = "--suite-data"
    prompt: str | None = None  # by name; None: the model's own
    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    greedy: bool = False  # also one answer at temperature 0
    pass_at: tuple[int, ...] = ()  # ks of pass@k; (): the powers of 2 up to the samples
    limit: int | None = None  # problems of a suite at most, evenly spaced
    chunk_size: int = 512  # samples that are generated and kept together

    def __post_init__(self) -> None:
        for key, least in (("num_samples", 1), ("max_tokens", 2), ("limit", 1), ("chunk_size", 1)):
            value = getattr(self, key)
            flag = f"--{key.replace('_', '-')}"
            require(value is None or value >= least, flag, f"a number of at least {least}", value)
        require(
            self.temperature is None or self.temperature > 0,
            "--temperature",
            "above 0 (--greedy adds an answer at temperature 0)",
            self.temperature,
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1, "--top-p", "a number in (0, 1]", self.top_p
        )
        self.suites()

    def suites(self) -> list[Suite]:
        """The suites asked for, with the protocol as it is overridden.

        Raises:
            ConfigError: there is no such suite, or a k of pass@k is above its samples.
        """
        overrides = {
            key: value
            for key in ("num_samples", "temperature", "top_p", "max_tokens")
            if (value := getattr(self, key)) is not None
        }
        chosen = [
            replace(suite, greedy=suite.greedy or self.greedy, **overrides)
            for suite in find_suites(self.names, self.names_key)
        ]
        for suite in chosen:
            for k in self.pass_at:
                require(
                    1 <= k <= suite.num_samples,
                    "--pass-at",
                    f"k from 1 to the {suite.num_samples} samples of {suite.name}",
                    k,
                )
        return chosen


def find_suites(names: str, key: str = "--suite") -> list[Suite]:
    """The suites of a list by comma, a set's in its order, none twice.

    Raises:
        ConfigError: there is none of a name.
    """
    found: dict[str, Suite] = {}
    for name in map(str.strip, names.split(",")):
        if name not in SUITES and name not in SETS:
            known = ", ".join((*SETS, *SUITES))
            raise ConfigError(f"{key}: expected some of {known}, got {name!r}")
        for member in SETS.get(name, (name,)):
            found[member] = SUITES[member]
    return list(found.values())


def suite_list() -> str:
    """A line a suite: name, size, samples a problem, source."""
    lines = [
        f"{suite.name:<10}{suite.num_problems:>6} problems  avg@{suite.num_samples:<4}"
        f"{suite.hub} ({suite.split})"
        for suite in SUITES.values()
    ]
    return "\n".join([*lines, *(f"{name:<10}= {', '.join(m)}" for name, m in SETS.items())])


def rows_of(suite: Suite, rows: Iterable[dict], key: str, num_suites: int) -> list[dict]:
    """The rows of a suite in a file, which may hold several, told apart by `data_source`.

    Raises:
        ConfigError: the file has none, or does not say which rows are whose.
    """
    rows = list(rows)
    if "data_source" not in rows[0]:
        require(
            num_suites == 1, key, f"a column data_source to tell {num_suites} suites apart", "none"
        )
        return rows
    found = [row for row in rows if row["data_source"] in (suite.data_source, suite.name)]
    sources = sorted({str(row["data_source"]) for row in rows})
    require(bool(found), key, f"rows of {suite.name} (data_source {suite.data_source!r})", sources)
    return found


def evenly(items: Sequence, limit: int | None) -> list:
    """At most `limit` of the items, evenly spaced."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def is_test(problem_source: str, split: str, data_sources: Iterable[object]) -> bool:
    """Whether a dataset is one of the benchmarks, by its hub id and split or its rows' source."""
    known = {name for suite in SUITES.values() for name in (suite.data_source, suite.name)}
    hubs = {(suite.hub.partition(":")[0], suite.split) for suite in SUITES.values()}
    return (problem_source.partition(":")[0], split) in hubs or any(
        source in known for source in data_sources
    )
