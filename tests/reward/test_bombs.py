"""What Math-Verify is not asked about, and that nothing of use is among it."""

import time

import pytest

from prefix_rft.reward.bombs import why_refused
from tests.reward.golds import needs_golds, read_golds


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9}}",
        "9^9^9",
        "9**9**9",
        "10^{10^8}",
        "2^{999999}",
        "((9^9)^9)^{9999}",
        "(99^{99})^{9999}",
        r"\frac{1}{7^{7^{77}}} x",
        "x^{x^{x^{x^{x^{x}}}}}",
        "e^{e^{100}}",
        r"\exp(\exp(20))",
        r"2^{3 \cdot 10^8}",
        r"\sqrt[999]{9^{9999999}}",
        "99999999!",
        "(9!)!",
        "9!!!",
        "(10^{30})!",
        r"\binom{1000000}{500000}",
        r"{1000000 \choose 5}",
        r"\Gamma(10^{9})",
        r"\sum_{n=1}^{1000000000} \frac{1}{n}",
        "(" * 41 + "1" + ")" * 41,
        "1" + ")" * 41,
        "x+" * 1001,
        "1," * 301 + "1",
        "__import__('os')",
        "eval('1')",
        r"\input{/dev/zero}",
    ],
)
def test_bombs_are_refused(text: str) -> None:
    assert why_refused(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "10^{100}",
        "10^{1 / 100}",
        "2^{2018}",
        "2^{2^{5}}",
        "2^{-2 / 3}",
        r"\frac{4 \cdot 999^{4}}{27}",
        "1/2018!",
        r"\frac{d !}{2 k(d-k) !}",
        r"\binom{2018}{1009}",
        r"\binom{n}{k} 2^{n^{2}}",
        "e^{-t^{2}}",
        "e^{e^{x}}",
        r"\sum_{k=1}^{n} k^{2}",
        r"3 \times 10^{-27}",
        "x^{8}+x^{7}+x^{6}+x^{5}+x^{4}+x^{3}+x^{2}+x+1",
        "(x+1)^{500}",
        "(" * 40 + "1" + ")" * 40,
        r"\text{open interval}",
        "",
    ],
)
def test_answers_of_use_are_not(text: str) -> None:
    assert why_refused(text) is None


def test_it_takes_no_time() -> None:
    for piece in ("9^{", "(", "9^", "1!", r"\exp(", "x_{1}", "9", "^", "{}", " "):
        start = time.monotonic()
        why_refused(piece * 2000)
        why_refused((piece * 2000)[:2000])
        assert time.monotonic() - start < 1.0, piece


@needs_golds
def test_no_gold_answer_and_no_rewrite_of_one_is_refused() -> None:
    from bench.grader_labels import labels
    from prefix_rft.reward.answers import read_answer
    from prefix_rft.reward.spelling import clean_answer

    texts = {label.answer for label in labels(read_golds()) if label.is_equal}
    assert len(texts) > 4000
    refused = [text for text in texts if why_refused(read_answer(clean_answer(text)).text)]
    assert refused == []
