"""One self-contained HTML page about an evaluation: the table, lengths, every problem's samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from prefix_rft.evaluate.chunks import write_whole
from prefix_rft.evaluate.results import COLUMNS, SuiteResult, notes, table_rows
from prefix_rft.metrics import CSS

PAGE_FILE = "index.html"
MAX_SAMPLES = 8  # shown of a problem
MAX_CHARS = 6000  # shown of a response: its start and its end
_BINS = 24
_OWN_CSS = """
p, li { color: var(--muted); margin: 0.3rem 0; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
details { border-top: 1px solid var(--line); padding: 0.35rem 0; }
details details { margin-left: 1.2rem; }
summary { overflow-wrap: anywhere; }
summary b { display: inline-block; min-width: 4.2rem; font-variant-numeric: tabular-nums; }
.correct { color: var(--good); }
.wrong, .no_answer, .timeout, .error { color: var(--bad); }
.table svg { width: 100%; height: auto; max-width: 44rem; }
rect { fill: var(--series-1); }
svg text { fill: var(--muted); font-size: 11px; }
"""


def write_page(
    folder: Path, title: str, results: Sequence[SuiteResult], header: dict[str, Any]
) -> Path:
    """Write index.html from the results and the samples files that stand beside it."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(results),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(results)) + "</ul>",
    ]
    for result in results:
        samples = _by_problem(folder / f"samples_{result.label}.jsonl")
        parts += [
            f"<h2>{escape(result.label)}</h2>",
            f"<p>Tokens of a response, at most {result.max_tokens}</p>",
            f'<div class="table">{_histogram(result.lengths)}</div>',
            f"<p>{len(samples)} problems by row; of each at most {MAX_SAMPLES} samples, of each at "
            f"most {MAX_CHARS} characters; all of them are in the samples file.</p>",
            '<div class="table">' + "".join(map(_problem, samples)) + "</div>",
        ]
    told = escape(json.dumps(header, indent=2))
    parts.append(f"<h2>How it was made</h2><details><summary>Settings</summary><pre>{told}</pre>")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{_OWN_CSS}</style><main>{''.join(parts)}"
        "</details></main></html>\n"
    )
    write_whole(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _table(results: Sequence[SuiteResult]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table_rows(results)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _by_problem(file: Path) -> list[list[dict[str, Any]]]:
    problems: dict[int, list[dict[str, Any]]] = {}
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            problems.setdefault(sample["index"], []).append(sample)
    return list(problems.values())


def _problem(samples: Sequence[dict[str, Any]]) -> str:
    num_correct = sum(sample["status"] == "correct" for sample in samples)
    kind = "correct" if num_correct else "wrong"
    first = samples[0]
    start = " ".join(first["prompt"].split())[-160:]
    shown = "".join(map(_sample, samples[:MAX_SAMPLES]))
    return (
        f'<details><summary><b class="{kind}">{num_correct} of {len(samples)}</b> '
        f"row {first['index']} · {escape(start)}</summary><pre>{escape(first['prompt'])}</pre>"
        f"<p>answer: {escape(first['answer'])}</p>{shown}</details>"
    )


def _sample(sample: dict[str, Any]) -> str:
    response = sample["response"]
    if len(response) > MAX_CHARS:
        half = MAX_CHARS // 2
        left_out = len(response) - 2 * half
        response = f"{response[:half]}\n[{left_out} characters]\n{response[-half:]}"
    extracted = "none" if sample["extracted"] is None else sample["extracted"]
    return (
        f'<details><summary><span class="{escape(sample["status"])}">{escape(sample["status"])}'
        f"</span> · answer {escape(extracted)[:200]} · {sample['num_tokens']} tokens · "
        f"{escape(sample['finish_reason'])}</summary><pre>{escape(response)}</pre></details>"
    )


def _histogram(lengths: Sequence[int]) -> str:
    counts, edges = np.histogram(lengths, bins=min(_BINS, max(1, len(set(lengths)))))
    width, height, top = 600 / len(counts), 110, max(1, counts.max())
    bars = "".join(
        f'<rect x="{i * width + 1:.1f}" y="{height - height * count / top:.1f}" '
        f'width="{max(1, width - 2):.1f}" height="{height * count / top:.1f}">'
        f"<title>{edges[i]:.0f} to {edges[i + 1]:.0f} tokens: {count}</title></rect>"
        for i, count in enumerate(counts)
    )
    return (
        f'<svg viewBox="0 0 600 {height + 18}" role="img" aria-label="Response lengths">{bars}'
        f'<text x="0" y="{height + 14}">{edges[0]:.0f}</text>'
        f'<text x="600" y="{height + 14}" text-anchor="end">{edges[-1]:.0f} tokens</text></svg>'
    )
