"""One self-contained HTML page about a run: results, curves, configuration, rollouts."""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from prefix_rft.checks import UserError
from prefix_rft.metrics.charts import accuracy_charts, all_charts, chart_html
from prefix_rft.metrics.logger import METRICS_FILE, ROLLOUTS_FILE, read_records
from prefix_rft.metrics.progress import format_rate, format_seconds
from prefix_rft.metrics.summary import COLUMNS, result_rows

MAX_GROUPS = 6  # shown on the page, spread over the run
MAX_TOKENS = 1500  # shown of one rollout

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2126;
  --muted: #68707a; --line: #e3e5e8; --prefix: #dbe8fb; --good: #1a7f4b; --bad: #b3372f;
  --series-1: #2f6fc4; --series-2: #d9731a; --series-3: #2a9d6f; --series-4: #9a5bbd;
  --series-5: #c23b5a; --series-6: #7a7f45; --series-7: #3d8f99; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea;
  --muted: #97a0aa; --line: #31373d; --prefix: #223a5c; --good: #55c98c; --bad: #f08a80;
  --series-1: #6ea8f2; --series-2: #f0a35c; --series-3: #5fcaa0; --series-4: #c294e0;
  --series-5: #ee7f9a; --series-6: #b9bf77; --series-7: #79c6d0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 0.9rem; }
h3 { font-size: 0.95rem; margin: 0; }
small, .muted { color: var(--muted); font-weight: 400; }
header p { margin: 0.35rem 0 0; color: var(--muted); }
.tiles, .charts { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); margin-top: 1.5rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.tiles > div, figure, .group, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 0.9rem 1.1rem; margin: 0; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.25; }
.tiles b, table { font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: 0.45rem 0.75rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
.good { color: var(--good); }
.bad { color: var(--bad); }
figure { display: flex; flex-direction: column; justify-content: space-between; }
figure svg { display: block; width: 100%; height: auto; margin-top: 0.4rem; }
figure svg text { font-family: inherit !important; }
figure ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0;
  margin: 0.2rem 0 0; font-size: 0.8rem; color: var(--muted); }
figure li i { display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 3px;
  margin-right: 0.35rem; vertical-align: -1px; }
summary { cursor: pointer; }
pre, .text { font: 0.82rem/1.65 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.5rem 0 0; }
.group { margin-bottom: 0.8rem; }
.group h4 { margin: 1rem 0 0; font-size: 0.85rem; font-weight: 500; color: var(--muted); }
.group h4 b { font-weight: 600; }
.rollout { border-top: 1px solid var(--line); margin-top: 1rem; }
.p { background: var(--prefix); color: var(--ink); }
.s { font-weight: 700; text-decoration: underline 2px var(--series-2);
  text-underline-offset: 3px; }
"""


def write_report(run_dir: Path) -> Path:
    """Write report.html into the folder of a run, finished or not, and return its path.

    The page asks for nothing outside itself. Reads metrics.jsonl, and where they are there
    rollouts.jsonl, summary.json and config.toml.

    Raises:
        UserError: no metrics.jsonl, or a file that is not what a run writes.
    """
    if not (run_dir / METRICS_FILE).is_file():
        raise UserError(f"run folder: expected a folder with {METRICS_FILE}, got {run_dir}")
    rollouts = run_dir / ROLLOUTS_FILE
    page = report_html(
        name=run_dir.resolve().name,
        records=read_records(run_dir / METRICS_FILE),
        groups=read_records(rollouts) if rollouts.is_file() else [],
        summary=json.loads(_text(run_dir / "summary.json") or "{}"),
        config_text=_text(run_dir / "config.toml"),
    )
    partial = run_dir / ".partial-report.html"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, run_dir / "report.html")
    return run_dir / "report.html"


def report_html(
    *,
    name: str,
    records: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    config_text: str,
) -> str:
    """The page; every argument may be empty."""
    config = tomllib.loads(config_text)
    name = config.get("name", name)
    charts = [chart_html(chart, records) for chart in [*accuracy_charts(records), *all_charts()]]
    drawn = "".join(filter(None, charts)) or '<p class="muted">No step is recorded yet.</p>'
    parts = [
        _header(name, config, records, summary),
        _results(summary),
        f'<h2>Curves <small>over the steps done</small></h2><div class="charts">{drawn}</div>',
        _rollouts(groups),
    ]
    if config_text:
        parts.append(
            "<h2>Configuration</h2><details class='group'><summary>config.toml</summary>"
            f"<pre>{escape(config_text)}</pre></details>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - prefix-rft</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _header(
    name: str,
    config: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> str:
    train = [record for record in records if record["kind"] == "train"]
    steps_done = train[-1]["step"] + 1 if train else 0
    num_steps = config.get("trainer", {}).get("num_steps")
    tiles = [("steps", f"{steps_done}/{num_steps}" if num_steps else str(steps_done))]
    seconds = _values(train, "time/step_s")
    if seconds:
        tiles.append(("training", format_seconds(sum(seconds))))
    rates = _values(train, "throughput/step_tokens_per_s")
    if rates:
        tiles.append(("median speed", format_rate(median(rates))))
    for label, before, after, _ in result_rows(summary):
        if label == "greedy" and before and after:
            tiles.insert(0, (label, f"{before.split()[0]} → {after.split()[0]}"))
    method = config.get("method", {}).get("name")
    about = [f"method {method}"] if method else []
    about.append("finished" if "trained" in summary else "not finished")
    shown = "".join(f"<div><small>{escape(k)}</small><b>{escape(v)}</b></div>" for k, v in tiles)
    return (
        f"<header><h1>{escape(name)}</h1><p>{escape(' · '.join(about))}</p></header>"
        f'<div class="tiles">{shown}</div>'
    )


def _values(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _results(summary: Mapping[str, Any]) -> str:
    rows = result_rows(summary)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    num_problems = summary["base"].get("num_problems")
    about = f" <small>on {num_problems} problems</small>" if num_problems else ""
    return (
        f'<h2>Results{about}</h2><div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        '<p class="muted"><small>In brackets: 95% confidence interval. Change of fractions in '
        "percentage points.</small></p>"
    )


def _rollouts(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return ""
    count = min(MAX_GROUPS, len(groups))
    picks = sorted({round(i * (len(groups) - 1) / max(count - 1, 1)) for i in range(count)})
    shown = "".join(_group(groups[i], opened=i == picks[-1]) for i in picks)
    return (
        '<h2>Rollouts</h2><p class="muted"><span class="p">Shaded</span>: the prefix, taken from '
        'the demonstration. <span class="p s">Underlined</span>: prefix tokens selected for the '
        f"update. Point at a token for its entropy.</p>{shown}"
    )


def _group(group: Mapping[str, Any], *, opened: bool) -> str:
    rollouts = sorted(group["rollouts"], key=lambda rollout: rollout["prefix_length"] == 0)
    rewards = [r["reward"] for r in rollouts if r["reward"] is not None]
    title = f"step {group['step'] + 1}, problem {group['index']}"
    if rewards:
        mean = sum(rewards) / len(rewards)
        title += f": {len(rewards)} rollouts, mean reward {mean:.2f}"
    return (
        f'<details class="group"{" open" if opened else ""}><summary>{escape(title)}</summary>'
        f"<h4><b>Prompt</b></h4><pre>{escape(group['prompt'])}</pre>"
        f"<h4><b>Answer</b></h4><pre>{escape(group['answer'])}</pre>"
        f"{''.join(map(_rollout, rollouts))}</details>"
    )


def _rollout(rollout: Mapping[str, Any]) -> str:
    tokens, prefix_length = rollout["tokens"], rollout["prefix_length"]
    kind = f"hybrid, prefix of {prefix_length} tokens" if prefix_length else "on-policy"
    title, about = rollout["status"], ""
    if rollout["status"] is None:
        title, tone = "demonstration", "good"
    else:
        tone = "good" if rollout["status"] == "correct" else "bad"
        about = f"reward {rollout['reward']:g} · advantage {rollout['advantage']:+.3f} · {kind} · "
    spans = []
    for position, token in enumerate(tokens[:MAX_TOKENS]):
        in_prefix = position < prefix_length
        classes = "p" * in_prefix + " s" * bool(in_prefix and rollout["selected"][position])
        entropy = rollout["entropy"][position]
        tip = f' title="{entropy:.3f} nats"' if entropy is not None else ""
        css = f' class="{classes}"' if classes else ""
        spans.append(f"<span{css}{tip}>{escape(token)}</span>" if css or tip else escape(token))
    if len(tokens) > MAX_TOKENS:
        spans.append(f'<span class="muted"> … and {len(tokens) - MAX_TOKENS} more tokens</span>')
    return (
        f'<div class="rollout"><h4><b class="{tone}">{escape(title)}</b> · {escape(about)}'
        f'{len(tokens)} tokens</h4><div class="text">{"".join(spans)}</div></div>'
    )
