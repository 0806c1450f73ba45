"""Extraction of answers, and the one spelling that they are given."""

import pytest

from prefix_rft.reward.grader import extract_answer
from prefix_rft.reward.spelling import clean_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\boxed{never \boxed{7}", "7"),
        (r"an open { brace, \boxed{7}", "7"),
        (r"a stray } brace, \boxed{7}", "7"),
        (r"\boxed{x = \boxed{7}}", r"x = \boxed{7}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\\boxed{7}", None),
        (r"\boxed{}", ""),
        ("no box", None),
        ("", None),
        (r"\boxed 18", "18"),
        (r"\boxed18", "18"),
        (r"so $\boxed -\frac{1}{2}$.", r"-\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed 2", "2"),
        (r"\boxed 1, no: \boxed{2}", "2"),
        (r"\boxed 1 as in \boxed{never", "1"),
        (r"put it in \boxed and stop", None),
    ],
)
def test_the_box_that_closes_last(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (r"<think>\boxed{1}</think> it is \boxed{2}", "boxed", "2"),
        (r"<think>\boxed{1}</think> it is two", "boxed", None),
        (r"<think>\boxed{1}", "boxed", "1"),
        (r"\boxed{ }", "boxed", None),
        (r"\boxed{$5$}", "boxed", "5"),
        (r"\boxed{\boxed{5}}", "boxed", "5"),
        ("6 * 3 = 18\n#### 18", "####", "18"),
        ("#### 17\n#### 18\nDone.", "####", "18"),
        ("####\n18", "####", "18"),
        ("#### ", "####", None),
        (r"\boxed{18}", "####", None),
        ("Answer: #### $1,800.", "####", r"1,800 \text{dollars}"),
        ("#### **18**", "####", "18"),
        ("**#### 18.**", "####", "18"),
        ("#### 18 eggs", "####", "18 eggs"),
        (r"hence \boxed 18", "boxed", "18"),
    ],
)
def test_the_answer_of_a_response(text, pattern, answer):
    assert extract_answer(text, pattern) == answer


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        (" 5 ", "5"),
        ("$$x^2$$", "x^2"),
        (r"\(x\)", "x"),
        (r"\[ x \]", "x"),
        (r"\$18", r"18 \text{dollars}"),
        ("-$3.50.", r"-3.50 \text{dollars}"),
        ("€5", r"5 \text{euros}"),
        ("$5$", "5"),
        ("$1$, $2$", "1, 2"),
        ("18$", "18"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} + \boxed{2}", r"\boxed{1} + \boxed{2}"),
        ("\N{MINUS SIGN}3", "-3"),
        ("a\n  b", "a b"),
        ("5.", "5"),
        (r"12\,345", "12 345"),
        (r"10, \! 080", "10,080"),
        (r"3\ \mathrm{cm}~x\quad y", r"3 \mathrm{cm} x y"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("**18**", "18"),
        ("**18** eggs", "18 eggs"),
        ("18**", "18"),
        ("`18`", "18"),
        ("2**3 + 2**4", "2**3 + 2**4"),
        ("–4", "-4"),
        ("—4", "-4"),
        ("１８．５％", "18.5%"),
        ("٤٢", "42"),
        ("𝟏𝟖", "18"),
        ("2½", r"2\frac{1}{2}"),
        ("1⁄2", "1/2"),
        ("√2", r"\sqrt{2}"),
        ("√(2)", r"\sqrt(2)"),
        ("3√12", r"3\sqrt{12}"),
        ("∛5", r"\sqrt[3]{5}"),
        ("10⁻³ m²", "10^{-3} m^{2}"),
        ("a₁₂", "a_{12}"),
        ("∞", r"\infty"),
        ("90°", r"90^{\circ}"),
        ("2π", r"2\pi"),
        ("λΣ", r"\lambda \Sigma"),
        ("1\N{NARROW NO-BREAK SPACE}000\N{ZERO WIDTH SPACE}", "1 000"),
    ],
)
def test_what_carries_no_meaning_is_cleaned_away(answer, cleaned):
    assert clean_answer(answer) == cleaned
