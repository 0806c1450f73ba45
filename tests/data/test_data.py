"""Rows of every known layout to problems, what is dropped and reported, training order."""

import copy
import re
from collections import Counter

import datasets
import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.config.data_sections import DataConfig
from prefix_rft.data.columns import DataError, find_map
from prefix_rft.data.problems import (
    batch_indices,
    keep_demonstrations,
    load_problems,
    problems_from_rows,
    split_held_out,
)
from tests.data.shapes import (
    EMPTY,
    OPENR1,
    TEMPLATE,
    UNUSABLE,
    VERL,
    bpe,
    flat,
    make_tokenizer,
    messages,
    run_config,
    write_jsonl,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def build(rows, tokenizer, *, max_response_length=1000, held_out=False, **config):
    return problems_from_rows(
        rows,
        DataConfig(**config),
        tokenizer,
        max_response_length=max_response_length,
        held_out=held_out,
    )


def kinds(report):
    return {finding.kind: (finding.count, finding.row) for finding in report.findings}


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "demonstration"),
    [
        (VERL, "<s>think<u>1+1?<a>", "2", "one more than one is 2"),
        (VERL | {"target": None}, "<s>think<u>1+1?<a>", "2", None),
        (OPENR1, "<u>1+1?<a>", "2", "it is 2"),
        (OPENR1 | {"correctness_math_verify": [False] * 4}, "<u>1+1?<a>", "2", None),
        (
            OPENR1
            | {
                "correctness_math_verify": [False] * 4,
                "correctness_llama": [False, False, False, True],
            },
            "<u>1+1?<a>",
            "2",
            "also 2",
        ),
        (
            {"question": "6*3?", "answer": "6*3 = <<6*3=18>>18 #### eggs\n#### 1,018"},
            "<u>6*3?<a>",
            "1,018",
            "6*3 = 18 #### eggs\n#### 1,018",
        ),
        ({"problem": "1+1?", "answer": 2, "source": "x"}, "<u>1+1?<a>", "2", None),
        (
            {"problem": "1+1?", "answer": "2", "solution": "it is 2"},
            "<u>1+1?<a>",
            "2",
            "it is 2",
        ),
        (
            {"problem": "1+1?", "answer": "2", "messages": OPENR1["messages"]},
            "<u>1+1?<a>",
            "2",
            "it is 3",
        ),
        (
            {"prompt": "1+1?", "answer": 2.5, "demonstration": "see"},
            "<u>1+1?<a>",
            "2.5",
            "see",
        ),
        ({"prompt": "1+1?", "answer": r"$\frac{1}{2}$"}, "<u>1+1?<a>", r"$\frac{1}{2}$", None),
    ],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_known_layouts(tokenizer, row, prompt, answer, demonstration, as_dataset):
    rows = datasets.Dataset.from_list([row]) if as_dataset else [row]
    (problem,), report = build(rows, tokenizer)
    assert (problem.prompt, problem.answer) == (prompt, answer)
    assert problem.demonstration == demonstration
    assert tokenizer.decode(problem.prompt_ids) == prompt
    assert tokenizer.decode(problem.demonstration_ids) == (demonstration or "")
    assert problem.columns["answer" if "answer" in row else "ability"] is not None
    assert (report.num_rows, report.num_problems, report.findings) == (1, 1, ())
    assert report.num_demonstrations == (demonstration is not None)


def test_columns_by_name(tokenizer):
    rows = [{"q": "1+1?", "meta": {"gold": 2}, "worked": "it is 2", "answer": "no"}]
    columns = {"prompt": "q", "answer": "meta.gold", "demonstration": "worked"}
    (problem,), report = build(rows, tokenizer, columns=columns)
    assert (problem.answer, problem.demonstration) == ("2", "it is 2")
    assert report.layout == "data.columns"
    worked = [rows[0] | {"meta": {"gold": "1+1=2\n#### 2"}}]
    (problem,), _ = build(worked, tokenizer, columns=columns)
    assert (problem.answer, problem.demonstration) == ("2", "it is 2")
    del columns["demonstration"]
    (problem,), _ = build(rows, tokenizer, columns=columns)
    assert problem.demonstration is None


def test_columns_that_are_not_there():
    with pytest.raises(DataError, match=r"data\.columns: no column \['gold'\].*\['a', 'q'\]"):
        find_map([{"q": "", "a": ""}], {"prompt": "q", "answer": "gold"}, key="data.columns")
    with pytest.raises(DataError) as caught:
        find_map([{"text": "", "label": ""}], {}, key="data.columns")
    for part in (
        "['label', 'text']",
        "data.columns",
        "question with answer: question",
        "flat: prompt",
    ):
        assert part in str(caught.value)
    assert str(caught.value).startswith("data.path: no known layout fits")
    with pytest.raises(ConfigError, match=r"data\.columns: expected the keys prompt, answer"):
        DataConfig(columns={"prompt": "q"})
    with pytest.raises(ConfigError, match=r"data\.eval_columns: expected none"):
        DataConfig(eval_columns={"prompt": "q", "answer": "a"})


def test_a_system_prompt_stands_before_prompts_that_have_none(tokenizer):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": VERL["prompt"], "answer": "1"}]
    problems, _ = build(rows, tokenizer, system_prompt="be brief")
    assert [p.prompt for p in problems] == ["<s>be brief<u>a<a>", "<s>think<u>1+1?<a>"]


@pytest.mark.parametrize(
    ("end", "demonstration", "expected"),
    [
        ("", "<think>\nhm</think>1", "<think>\nhm</think>1"),
        ("<think>\n", "<think>\nhm</think>1", "hm</think>1"),
        ("<think>\n", "<think>hm</think>1", "hm</think>1"),
        ("<think>\n", "\n<think>\n\nhm</think>1", "\nhm</think>1"),
        ("<think>\n\n", "<think>\nhm</think>1", "hm</think>1"),
        ("<think>", "<think>\nhm</think>1", "\nhm</think>1"),
        ("<think>", " <think>hm</think>1", "hm</think>1"),
        ("<think>\n", "hm</think>1", "hm</think>1"),
        ("<think> ", "<think>", ""),
        (EMPTY, "it is 1", "it is 1"),
        (EMPTY, EMPTY + "it is 1", "it is 1"),
        ("<think></think>", "<think></think>\nit is 1", "\nit is 1"),
        (EMPTY, "<think>\nhm</think>\n\nit is 1", "it is 1"),
        (EMPTY, "hm</think>it is 1", "it is 1"),
        (EMPTY, "<think>hm", ""),
    ],
)
def test_prompt_and_demonstration_have_one_thought(tokenizer, end, demonstration, expected):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<a>", f"<a>{end}")
    row = {"prompt": "a", "answer": "1", "demonstration": demonstration}
    (problem,), report = build([row], tokenizer)
    assert problem.prompt == f"<u>a<a>{end}"
    assert (problem.demonstration or "") == expected
    assert tokenizer.decode(problem.demonstration_ids) == expected
    assert kinds(report) == (
        ({"short_demonstration": (1, 0)} if not expected else {})
        | ({"left_out_thought": (1, 0)} if end == EMPTY and "hm" in demonstration else {})
    )
    assert ("chat template ends with an empty" in str(report)) == ("left" in str(kinds(report)))


def test_unusable_rows_are_counted_with_an_example_and_dropped(tokenizer):
    problems, report = build(UNUSABLE, tokenizer, max_prompt_tokens=50, max_response_length=20)
    assert [p.index for p in problems] == [0, 1, 2, 16, 17, 18, 19]
    assert [bool(p.demonstration_ids) for p in problems] == [True] * 3 + [False] * 3 + [True]
    assert [p.demonstration is None for p in problems] == [False] * 3 + [True] * 3 + [False]
    assert kinds(report) == {
        "no_prompt": (5, 3),
        "no_answer": (5, 8),
        "unparseable_answer": (2, 13),
        "long_prompt": (1, 15),
        "long_demonstration": (1, 16),
        "short_demonstration": (1, 17),
    }
    assert (report.num_rows, report.num_problems, report.num_demonstrations) == (20, 7, 4)
    text = str(report)
    for part in (
        "rows (flat): 7 problems from 20 rows, 4 with a demonstration",
        "5 rows dropped: no prompt",
        "the first is row 3: ' '",
        "2 rows dropped: the grader cannot parse the gold answer; the first is row 13: '???'",
        "1 row dropped: prompt above data.max_prompt_tokens; the first is row 15: '51 tokens'",
        "1 row without demonstration: below 2 tokens",
    ):
        assert part in text
    assert len(report.lines()) == 7


@pytest.mark.parametrize(
    "answer", ["it is eighteen", "it is 18", "18 ####", "18\n#### eighteen", None, 18]
)
def test_a_gsm8k_answer_without_number(tokenizer, answer):
    rows = [{"question": "q", "answer": "#### 3"}] * 2 + [{"question": "q", "answer": answer}]
    problems, report = build(rows, tokenizer)
    assert [p.answer for p in problems] == ["3", "3"]
    assert report.layout == "GSM8K" and kinds(report) == {"no_marker": (1, 2)}
    assert '"####"' in str(report) and "data.columns" in str(report)


@pytest.mark.parametrize("prompt", ["question", "problem", "prompt"])
@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_marker_of_gsm8k_is_looked_for_in_the_rows(tokenizer, prompt, as_dataset):
    def read(*answers):
        rows = [{prompt: "q", "answer": answer} for answer in answers]
        problems, report = build(
            datasets.Dataset.from_list(rows) if as_dataset else rows, tokenizer
        )
        return [(p.answer, p.demonstration) for p in problems], report

    worked = ("72", "it is 72\n#### 72")
    found, report = read("4.5e33", r"\frac{1}{2}", "x + 1")
    assert [answer for answer, _ in found] == ["4.5e33", r"\frac{1}{2}", "x + 1"]
    assert not report.findings
    found, report = read("18", worked[1], "3", None)
    assert found == [("18", None), worked, ("3", None)]
    assert kinds(report) == {"no_answer": (1, 3)}
    found, report = read(worked[1], worked[1], "so it is 24")
    assert found == [worked, worked] and kinds(report) == {"no_marker": (1, 2)}


def test_gold_answers_of_a_user_reward_need_not_parse(tokenizer):
    rows = [{"prompt": "q", "answer": "???"}]
    with pytest.raises(DataError, match="no usable row\n(.|\n)*cannot parse"):
        build(rows, tokenizer)
    (problem,), _ = problems_from_rows(
        rows, DataConfig(), tokenizer, max_response_length=9, check_answers=False
    )
    assert problem.answer == "???"


@pytest.mark.parametrize(
    "extra",
    [
        {"prompt": "q", "answer": ""},
        {"prompt": "q", "answer": "???"},
        {"prompt": "q" * 99, "answer": "1"},
        {"prompt": "q", "answer": "1", "demonstration": "z"},
    ],
)
def test_strict_refuses_what_would_be_dropped(tokenizer, extra):
    build(flat(2), tokenizer, strict=True)
    with pytest.raises(DataError, match=r"refused because of data\.strict\n(.|\n)*row 2"):
        build([*flat(2), extra], tokenizer, strict=True, max_prompt_tokens=50)


def test_no_rows_and_no_usable_row(tokenizer):
    with pytest.raises(DataError, match="rows: no rows"):
        build([], tokenizer)
    with pytest.raises(DataError, match=r"no usable row\n.*0 problems from 3 rows(.|\n)*prompt"):
        build(flat(3), tokenizer, max_prompt_tokens=2)


def test_a_template_that_is_missing_or_refuses(tokenizer):
    row = {"prompt": messages(("tool", "t"), ("user", "a")), "answer": "1"}
    with pytest.raises(
        DataError, match=r"row 0: .* refuses messages of \['tool', 'user'\]: no too"
    ):
        build([row], tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"no chat template; set one in model\.chat_template"):
        build(flat(1), bare)


@pytest.mark.parametrize(
    "options",
    [
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)},
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)},
        {
            "normalizer": normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        },
    ],
)
def test_a_demonstration_has_the_ids_that_it_has_behind_its_prompt(options):
    """Llama-2 and Mistral put a space before a text that stands alone."""
    tokenizer = bpe(("T", "h"), ("Th", "e"), ("▁", "The"), **options)
    assert tokenizer.tokenize("The") == ["▁The"]
    row = {"prompt": "a", "answer": "1", "demonstration": "The The"}
    (problem,), report = build([row], tokenizer, strict=True)
    assert tokenizer.convert_ids_to_tokens(problem.prompt_ids) == ["▁", "a", ">"]
    assert tokenizer.convert_ids_to_tokens(problem.demonstration_ids) == ["The", "▁The"]
    assert report.findings == ()


@pytest.mark.parametrize(
    ("merges", "prompt"),
    [
        ([("x", ">"), ("x>", "b")], ["a", "x>"]),  # behind ">" alone "b" keeps its token
        ([(">", "b")], ["a", "x", ">"]),  # but here it does not
    ],
)
def test_a_demonstration_that_would_share_a_token_with_its_prompt(merges, prompt):
    tokenizer = bpe(*merges, ("b", "a"), ("ba", "b"))
    rows = [
        {"prompt": "ax", "answer": "1", "demonstration": text} for text in ("ab:", "bab:", "ba:")
    ]
    problems, report = build(rows, tokenizer, strict=True)
    tokens = [tokenizer.convert_ids_to_tokens(p.demonstration_ids) for p in problems]
    assert tokens == [["a", "b", ":"], ["bab", ":"], ["ba", ":"]]
    assert {problem.prompt_ids for problem in problems} == {
        tuple(tokenizer.convert_tokens_to_ids(prompt))
    }
    assert kinds(report) == {"merged_boundary": (2, 1)}
    assert "2 rows whose prompt and demonstration would share a token" in str(report)


def test_more_rows_than_one_batch_of_the_tokenizer(tokenizer):
    rows = flat(2503)
    rows[1500]["demonstration"] = None
    problems, report = build(rows, tokenizer)
    assert report.num_demonstrations == 2502
    for i in (0, 999, 1000, 1499, 1501, 2502):
        assert problems[i].index == i
        assert tokenizer.decode(problems[i].prompt_ids) == f"<u>q{i}<a>"
        assert tokenizer.decode(problems[i].demonstration_ids) == f"so it is {i}"
    assert problems[1500].demonstration_ids == ()
    # With one object per token, not per id, a large dataset does not fit in memory.
    assert problems[0].demonstration_ids[0] is problems[2502].demonstration_ids[0]


def test_a_fraction_of_the_demonstrations_is_kept(tokenizer):
    rows = flat(200)
    for row in rows[:3]:
        row["demonstration"] = None
    problems, _ = build(rows, tokenizer)
    kept = {}
    for fraction in (0.0, 0.01, 0.1, 0.5, 1.0):
        left = keep_demonstrations(problems, fraction, seed=3)
        assert [p.index for p in left] == [p.index for p in problems]
        kept[fraction] = {p.index for p in left if p.demonstration_ids}
        assert {p.index for p in left if p.demonstration is not None} == kept[fraction]
        assert len(kept[fraction]) == round(fraction * 197)
    assert kept[0.01] < kept[0.1] < kept[0.5] < kept[1.0]
    again = keep_demonstrations(problems, 0.1, seed=3)
    assert {p.index for p in again if p.demonstration_ids} == kept[0.1]
    other = keep_demonstrations(problems, 0.1, seed=4)
    assert {p.index for p in other if p.demonstration_ids} != kept[0.1]


def test_the_last_rows_are_held_out(tokenizer):
    problems, _ = build(flat(5), tokenizer)
    train, held_out = split_held_out(problems, 2)
    assert [p.index for p in train] == [0, 1, 2] and [p.index for p in held_out] == [3, 4]
    with pytest.raises(DataError, match=r"data\.num_eval: expected fewer than the 5 .* got 5"):
        split_held_out(problems, 5)


def test_a_run_holds_out_its_last_rows(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*flat(10), {"prompt": "q", "answer": ""}])
    config = run_config(path=path, num_eval=4, demonstration_fraction=0.5)
    train, held_out, reports = load_problems(config, tokenizer)
    assert [p.index for p in train] == list(range(6))
    assert [p.index for p in held_out] == [6, 7, 8, 9]
    assert sum(bool(p.demonstration_ids) for p in train) == 3
    assert not any(p.demonstration_ids or p.demonstration for p in held_out)
    assert [kinds(report) for report in reports] == [{"no_answer": (1, 10)}]


@pytest.mark.parametrize("num_eval", [4, 10, 128])
def test_an_evaluation_may_ask_every_row(tokenizer, tmp_path, num_eval):
    config = run_config(path=write_jsonl(tmp_path / "a.jsonl", flat(10)), num_eval=num_eval)
    train, held_out, (report,) = load_problems(config, tokenizer, trains=False)
    assert [p.index for p in held_out] == list(range(10))[-num_eval:] and not train
    assert not any(p.demonstration_ids or p.demonstration for p in held_out)
    assert report.num_problems == 10
    if num_eval == 4:
        assert held_out == load_problems(config, tokenizer).held_out
    else:
        with pytest.raises(DataError, match=r"data\.num_eval: expected fewer than the 10 usable"):
            load_problems(config, tokenizer)


def test_an_evaluation_reads_no_training_problems(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "eval.jsonl", flat(3))
    config = run_config(path=str(tmp_path / "missing.jsonl"), eval_path=path)
    train, held_out, (report,) = load_problems(config, tokenizer, trains=False)
    assert not train and len(held_out) == 3 and report.source == path
    config = config_from_dict({"data": {"num_eval": 5}, "testbed": {"num_train": 20}})
    train, held_out, (report,) = load_problems(config, tokenizer, trains=False)
    assert not train and held_out == load_problems(config, tokenizer).held_out
    assert report.source == "testbed, held out"


def test_a_run_with_held_out_problems_of_their_own(tokenizer, tmp_path):
    train_rows = [{"q": "1?", "gold": "1", "why": "so it is"}] * 3
    eval_rows = [{"problem": f"p{i}", "answer": str(i), "solution": "x"} for i in range(10)]
    config = run_config(
        path=write_jsonl(tmp_path / "train.jsonl", train_rows),
        eval_path=write_jsonl(tmp_path / "eval.jsonl", eval_rows),
        num_eval=4,
        columns={"prompt": "q", "answer": "gold", "demonstration": "why"},
        strict=True,
    )
    train, held_out, reports = load_problems(config, tokenizer)
    assert len(train) == 3 and all(p.demonstration_ids for p in train)
    assert [p.index for p in held_out] == [0, 2, 5, 7]
    assert not any(p.demonstration for p in held_out)
    layouts = [(r.layout, r.num_rows, r.num_demonstrations) for r in reports]
    assert layouts == [("data.columns", 3, 3), ("problem with solution", 10, 0)]


def test_the_testbed_comes_with_held_out_problems(tokenizer):
    config = config_from_dict({"data": {"num_eval": 5}, "testbed": {"num_train": 20}})
    train, held_out, reports = load_problems(config, tokenizer)
    assert len(train) == 20 and all(p.demonstration_ids for p in train)
    assert len(held_out) == 5 and not any(p.demonstration_ids for p in held_out)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert [report.findings for report in reports] == [(), ()]


@pytest.mark.parametrize(("num_problems", "per_step"), [(7, 3), (6, 3), (5, 5), (3, 8), (1, 1)])
def test_every_epoch_passes_each_problem_once(num_problems, per_step):
    num_epochs = 12
    steps = num_problems * num_epochs // per_step
    order = [i for step in range(steps) for i in batch_indices(num_problems, per_step, step, 5)]
    assert len(order) == steps * per_step
    epochs = [order[k : k + num_problems] for k in range(0, len(order), num_problems)]
    for epoch in epochs[: len(order) // num_problems]:
        assert sorted(epoch) == list(range(num_problems))
    assert num_problems == 1 or len({tuple(epoch) for epoch in epochs}) > 2


def test_the_order_depends_on_step_and_seed_alone():
    late = batch_indices(100, 8, 50, seed=1)
    for step in range(50):
        batch_indices(100, 8, step, seed=1)
    assert batch_indices(100, 8, 50, seed=1) == late
    assert batch_indices(100, 8, 50, seed=2) != late
    assert max(Counter(batch_indices(3, 8, 0, seed=0)).values()) == 3


def test_batch_indices_refuses_nonsense():
    for arguments, name in (
        ((0, 1, 0), "num_problems"),
        ((1, 0, 0), "prompts_"),
        ((1, 1, -1), "step"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*: expected at least"):
            batch_indices(*arguments, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ({"q": "1"}, r"no known layout fits the columns \['q'\]; name them in data.{}columns"),
        ({"prompt": "q", "answer": ""}, "no usable row"),
    ],
)
def test_errors_name_the_file_and_the_argument_that_gave_it(tmp_path, tokenizer, content, message):
    good, bad = write_jsonl(tmp_path / "good.jsonl", flat(3)), str(tmp_path / "bad.jsonl")
    if content is not None:
        write_jsonl(tmp_path / "bad.jsonl", [content])
    for key, paths in (
        ("", {"path": bad}),
        ("eval_", {"path": good, "eval_path": bad, "num_eval": 1}),
    ):
        expected = rf"data\.{key}path: {re.escape(bad)}: {message.format(key)}"
        with pytest.raises(DataError, match=expected):
            load_problems(config_from_dict({"data": paths}), tokenizer)
