"""Samples of benchmarks -> figures with standard errors and intervals, tables, files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefix_rft.evaluate.chunks import Sample, Sampling, chunk_file, write_whole
from prefix_rft.evaluate.statistics import Estimate, pass_at_k
from prefix_rft.evaluate.suites import Suite, SuiteOptions

RESULTS_FILE = "results.json"
NOTE = (
    "A 95% interval is over problems. Two models differ where the interval of their paired "
    "difference excludes 0; published differences on this protocol (50.1 against 51.8) are within "
    "one standard error of an unpaired comparison (about 1.8 points)."
)


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What a model did on one suite at one temperature."""

    label: str  # the suite, with `_greedy` for temperature 0
    hub: str
    num_problems: int
    num_problems_whole: int  # of the whole benchmark
    num_samples: int  # of each problem
    temperature: float
    top_p: float
    max_tokens: int
    num_cut: int  # problems that the model's positions leave fewer tokens for
    rows: str  # what the rows came to
    num_correct: dict[int, int]  # by problem: its row
    lengths: list[int]  # tokens of each response
    statuses: dict[str, int]
    truncated_frac: float
    no_answer_frac: float
    whole_text_frac: float  # responses without a </think>, graded whole
    figures: dict[str, Estimate] = field(default_factory=dict)  # avg@k, pass@k

    @classmethod
    def of(
        cls,
        suite: Suite,
        label: str,
        rows: str,
        sampling: Sampling,
        samples: Sequence[Sample],
        *,
        pass_at: Sequence[int] = (),
    ) -> SuiteResult:
        """The figures; pass@k for the ks of `pass_at`, by default for all samples of a problem."""
        n = sampling.num_samples
        ks = [k for k in pass_at or (n,) if 1 < k <= n]
        correct: dict[int, int] = {}
        for sample in samples:
            is_correct = sample.status == "correct"
            correct[sample.index] = correct.get(sample.index, 0) + is_correct
        counts = list(correct.values())
        name = "greedy" if sampling.temperature == 0 else f"avg@{n}"
        figures = {name: Estimate.of(np.array(counts) / n)}
        for k in ks:
            figures[f"pass@{k}"] = Estimate.of(np.array([pass_at_k(n, c, k) for c in counts]))

        def fraction(is_so: Sequence[bool]) -> float:
            return sum(is_so) / len(samples)

        return cls(
            label=label,
            hub=suite.hub,
            num_problems=len(correct),
            num_problems_whole=suite.num_problems,
            num_samples=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            num_cut=sampling.num_cut,
            rows=rows,
            num_correct=correct,
            lengths=[sample.num_tokens for sample in samples],
            statuses=dict(Counter(sample.status for sample in samples)),
            truncated_frac=fraction([sample.finish_reason == "length" for sample in samples]),
            no_answer_frac=fraction([sample.status == "no_answer" for sample in samples]),
            whole_text_frac=fraction([not sample.has_thought for sample in samples]),
            figures=figures,
        )

    @property
    def accuracies(self) -> np.ndarray:
        """Of each problem, the fraction of its samples that are correct."""
        return np.array(list(self.num_correct.values())) / self.num_samples


def average(results: Sequence[SuiteResult]) -> Estimate | None:
    """The mean of the sampled suites' avg@k; None of fewer than two."""
    sampled = [result.accuracies for result in results if result.temperature > 0]
    return Estimate.of_suites(sampled) if len(sampled) > 1 else None


COLUMNS = ("benchmark", "metric", "value", "std. error", "95% interval", "n")


def table_rows(results: Sequence[SuiteResult]) -> list[tuple[str, ...]]:
    """Rows of COLUMNS, in percent."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        n = str(result.num_problems)
        if result.num_problems != result.num_problems_whole:
            n += f" of {result.num_problems_whole}"
        for name, estimate in result.figures.items():
            rows.append((result.label, name, *_percent(estimate), n))
    if (mean := average(results)) is not None:
        names = sum(result.temperature > 0 for result in results)
        rows.append((f"average of {names}", "avg", *_percent(mean), ""))
    return rows


def _percent(estimate: Estimate) -> tuple[str, str, str]:
    low, high = estimate.ci95
    return (
        f"{100 * estimate.value:.1f}",
        f"{100 * estimate.stderr:.1f}",
        f"{100 * low:.1f} – {100 * high:.1f}",
    )


def notes(results: Sequence[SuiteResult]) -> list[str]:
    """What a reader of the table must know."""
    told = [NOTE]
    for result in results:
        facts = [
            f"{np.mean(result.lengths):.0f} tokens a response",
            f"{100 * result.truncated_frac:.1f}% truncated",
            f"{100 * result.no_answer_frac:.1f}% without an answer",
        ]
        if result.num_cut:
            facts.append(
                f"for {result.num_cut} of {result.num_problems} problems the model's positions "
                f"leave fewer than {result.max_tokens} tokens"
            )
        if result.whole_text_frac < 1:
            facts.append(
                "what follows the last </think> was graded, or, in "
                f"{100 * result.whole_text_frac:.1f}% of the responses, which have none, the whole"
            )
        told.append(f"{result.label}: {', '.join(facts)}")
    rows = [line for result in results for line in result.rows.splitlines()]
    return told + list(dict.fromkeys(rows))


def write_results(
    folder: Path,
    header: Mapping[str, Any],
    results: Sequence[SuiteResult],
    chunk_folders: Sequence[Path],
    options: SuiteOptions,
) -> None:
    """Write results.json and, for each suite, samples_<suite>.jsonl."""
    mean = average(results)
    values = {
        **header,
        "limit": options.limit,
        "results": [asdict(result) for result in results],
        "average": mean and mean._asdict(),
    }
    for result, each in zip(results, values["results"], strict=True):
        each["figures"] = {name: e._asdict() for name, e in result.figures.items()}
    for result, chunks in zip(results, chunk_folders, strict=True):
        files = sorted(chunks.glob(chunk_file(chunks, 0).name.replace("00000", "*")))
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        write_whole(folder / f"samples_{result.label}.jsonl", text)
    write_whole(folder / RESULTS_FILE, json.dumps(values, indent=2) + "\n")
