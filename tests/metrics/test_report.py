import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prefix_rft.checks import UserError
from prefix_rft.config import Config, save_config
from prefix_rft.config.sections import LogConfig, TrainerConfig
from prefix_rft.metrics.charts import accuracy_charts
from prefix_rft.metrics.logger import MetricsLogger
from prefix_rft.metrics.report import MAX_GROUPS, MAX_TOKENS, write_report
from prefix_rft.metrics.summary import result_rows

NASTY = "<script>alert(1)</script>&\"'"
SUMMARY = {
    "base": {
        "num_problems": 256,
        "greedy": 0.211,
        "greedy_ci95": [0.16, 0.26],
        "avg@8": 0.183,
        "response_length_mean": 81.25,
        "statuses": {"correct": 54},
    },
    "trained": {"num_problems": 256, "greedy": 0.79, "avg@8": 0.75, "response_length_mean": 121.0},
    "num_steps": 40,
}


def rollout(prefix_length: int, tokens: list[str]) -> dict:
    return {
        "tokens": tokens,
        "prefix_length": prefix_length,
        "selected": [i == 1 for i in range(len(tokens))],
        "entropy": [0.5 if i < 2 else None for i in range(len(tokens))],
        "reward": 1.0,
        "status": "correct",
        "advantage": 0.875,
    }


def sample(index: int = 7, tokens: tuple[str, ...] = ("one", "two", "three")) -> dict:
    rollouts = [rollout(0, list(tokens)), rollout(2, list(tokens))]
    return {"index": index, "prompt": f"Add {NASTY}", "answer": NASTY, "rollouts": rollouts}


def make_run(run_dir: Path, *, num_steps: int, **metrics: float) -> Path:
    config = LogConfig(tensorboard=False, progress="plain")
    with MetricsLogger(run_dir, config, num_steps=num_steps, start_step=0) as log:
        for step in range(num_steps):
            log.log(step, {name: value * (step + 1) for name, value in metrics.items()})
    return run_dir


def add_sample(run_dir: Path, step: int, group: dict) -> None:
    with (run_dir / "rollouts.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, **group}) + "\n")


class Page(HTMLParser):
    """Titles of the figures, external addresses, text, and whether every tag is closed."""

    VOID = {"meta", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.titles: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.spans: list[tuple[dict, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open_tags.append(tag)
        if tag == "span":
            self.spans.append((dict(attributes), ""))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open_tags[-1:] == ["h3"]:
            self.titles.append(data.strip())
        if self.open_tags[-1:] == ["span"]:
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


def read_page(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text())


def test_a_whole_run_has_results_curves_rollouts_and_configuration(tmp_path):
    config = Config(name="mine", trainer=TrainerConfig(num_steps=40))
    metrics = {"reward/on_policy_mean": 0.01, "reward/hybrid_mean": 0.02, "time/generate_s": 0.1}
    make_run(tmp_path, num_steps=40, **metrics, **{"prefix/low": 0.01, "prefix/high": 0.02})
    save_config(config, tmp_path / "config.toml")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "kind": "eval", "eval/greedy": 0.79, "eval/avg@8": 0.75}\n')
    add_sample(tmp_path, 35, sample())
    page = read_page(tmp_path)
    assert page.titles == ["Held-out accuracy", "Reward", "Prefix window", "Time of a step"]
    assert page.tags.count("svg") == 4
    for text in ("mine", "40/40", "finished", "21.1% → 79.0%", "21.1% (16.0–26.0)", "+57.9"):
        assert text in page.text
    assert "num_steps = 40" in page.text
    assert "not finished" not in page.text


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    make_run(tmp_path, num_steps=3, **{"reward/mean": 0.1, "policy/clip_low_frac": 0.1})
    page = read_page(tmp_path)
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    text = (tmp_path / "report.html").read_text()
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text


def test_texts_of_the_run_are_escaped(tmp_path):
    run_dir = make_run(tmp_path / "a<em>b", num_steps=1, **{"reward/mean": 0.5})
    add_sample(run_dir, 0, sample(tokens=("<b>", "</b>", NASTY)))
    page = read_page(run_dir)
    assert page.text.count("a<em>b") == 2 and "em" not in page.tags  # title and heading
    assert page.text.count(f"<b></b>{NASTY}") == 2 and "script" not in page.tags  # two rollouts
    assert page.text.count(NASTY) == 4  # and prompt and answer
    save_config(Config(output_dir=NASTY), run_dir / "config.toml")
    page = read_page(run_dir)
    assert "<script>alert(1)</script>" in page.text and "script" not in page.tags


def test_prefix_and_selected_tokens_are_marked_with_their_entropy(tmp_path):
    make_run(tmp_path, num_steps=1)
    add_sample(tmp_path, 0, sample())
    spans = [(a.get("class"), a.get("title"), text) for a, text in read_page(tmp_path).spans]
    # legend, then the hybrid rollout, then the on-policy one; tokens without a mark need no span
    assert spans == [
        ("p", None, "Shaded"),
        ("p s", None, "Underlined"),
        ("p", "0.500 nats", "one"),
        ("p s", "0.500 nats", "two"),
        (None, "0.500 nats", "one"),
        (None, "0.500 nats", "two"),
    ]


def test_long_rollouts_and_many_groups_are_cut(tmp_path):
    make_run(tmp_path, num_steps=1)
    for step in range(100):
        add_sample(tmp_path, step, sample(index=step, tokens=("w",) * (MAX_TOKENS + 3)))
    page = read_page(tmp_path)
    groups = re.findall(r"step (\d+), problem", page.text)
    assert len(groups) == MAX_GROUPS and (groups[0], groups[-1]) == ("1", "100")
    assert page.text.count("… and 3 more tokens") == 2 * MAX_GROUPS


def test_accuracies_by_group_have_charts_of_their_own():
    figures = {"eval/greedy": 0.5, "eval/avg@4": 0.25, "eval/num_problems/a": 3}
    figures |= {f"eval/greedy/{group}": 0.5 for group in "abcdefgh"} | {"eval/avg@4/a": 0.5}
    charts = accuracy_charts([{"step": 0, "kind": "eval"} | figures])
    assert [(chart.title, list(chart.series.values())) for chart in charts] == [
        ("Held-out accuracy", ["greedy", "avg@4"]),
        ("Held-out greedy by group", list("abcdefg")),
        ("Held-out greedy by group, from 8", list("h")),
        ("Held-out avg@4 by group", ["a"]),
    ]
    assert charts[2].series["eval/greedy/h"] == "h"


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step is recorded yet" in read_page(tmp_path).text
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "kind": "eval", "eval/greedy": 0.25}\n{"st'
    )
    (tmp_path / "summary.json").write_text(json.dumps({"base": SUMMARY["base"]}))
    page = read_page(tmp_path)
    assert page.titles == ["Held-out accuracy"]
    assert "not finished" in page.text and "21.1%" in page.text


def test_curves_stand_over_the_steps_done(tmp_path):
    make_run(tmp_path, num_steps=10, **{"reward/mean": 0.1})
    ticks = re.findall(r"<text[^>]*>(\d+)</text>", write_report(tmp_path).read_text())
    assert ticks[-1] == "10"


def test_figures_that_were_not_finite_leave_a_gap(tmp_path):
    make_run(tmp_path, num_steps=3, **{"optim/grad_norm_mean": math.nan, "reward/mean": 0.1})
    assert read_page(tmp_path).titles == ["Reward"]


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with metrics\.jsonl, got .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_result_rows_are_percent_points_or_plain_figures():
    assert result_rows(SUMMARY) == [
        ("greedy", "21.1% (16.0–26.0)", "79.0%", "+57.9"),
        ("avg@8", "18.3%", "75.0%", "+56.7"),
        ("response length mean", "81.2", "121.0", "+39.8"),
    ]
    assert result_rows({"base": {"greedy": 0.5}}) == [("greedy", "50.0%", "", "")]
    graded = {"base": {"reward_mean": 0.225}, "trained": {"reward_mean": 0.3}}
    assert result_rows(graded) == [("reward mean", "0.225", "0.300", "+0.075")]
    assert result_rows({}) == []
    grouped = {"num_problems/easy": 3, "avg@4/easy": 0.25, "avg@4/easy_ci95": [0.2, 0.5]}
    assert result_rows({"base": grouped, "trained": grouped | {"avg@4/easy": 0.5}}) == [
        ("avg@4/easy", "25.0% (20.0–50.0)", "50.0% (20.0–50.0)", "+25.0")
    ]
    assert result_rows({"base": {"greedy/hard": 0.5}}) == [("greedy/hard", "50.0%", "", "")]
