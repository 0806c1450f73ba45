"""What is decided without Math-Verify: each kind with its near misses."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_rft.reward.answers import decide, plain_number
from prefix_rft.reward.spelling import clean_answer


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("18", "18", True),
        ("1,000", "1000", True),
        ("1000", "1000.0", True),
        ("0.5", ".5", True),
        ("-3", "3", False),
        ("+3", "3", True),
        ("18", "81", False),
        ("0.333333", "0.3333331", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("0.333333", "0.33333", False),
        ("123456789012345678901", "123456789012345678902", False),
        ("Evelyn", r"\text{Evelyn}", True),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        ("1,2", "12", False),
        (r"\sqrt{4}", "2", None),
        ("5", "x" * 5000, False),
    ],
)
def test_equal_texts_and_plain_numbers_need_no_math_verify(gold, answer, expected):
    assert decided(gold, answer) is expected


@given(st.integers(-(10**15), 10**15), st.integers(-(10**15), 10**15))
@settings(derandomize=True, deadline=None)
def test_numbers_are_compared_by_value_however_they_are_written(a, b):
    for written in (f"{a}", f"{a:,}", f"{a}.0", f"{a:,}.", f"${a}"):
        assert decided(str(b), written) is (a == b)
        assert decided(str(a), written) is True


def decided(gold: str, answer: str) -> bool | None:
    decision = decide(clean_answer(gold), clean_answer(answer))
    return None if decision is None else decision.status == "correct"


MILLIONS = [
    "2.45e6",
    "2.45E+06",
    r"2.45 \times 10^{6}",
    r"2.45\times10^6",
    r"2.45 \cdot 10^{6}",
    "2.45 × 10⁶",
    "2.45*10^6",
    "2.45 x 10^6",
    "2450000",
    "2,450,000",
    "2 450 000",
    r"2\,450\,000",
    "2{,}450{,}000",
    "2.45 million",
    r"2.45 \text{ million dollars}",
    r"\frac{4900000}{2}",
    "２４５００００",
]


@pytest.mark.parametrize("gold", MILLIONS)
def test_a_number_is_a_number_in_every_spelling(gold: str) -> None:
    for answer in MILLIONS:
        assert decided(gold, answer) is True, answer
    for answer in ("2.45e5", r"2.45 \times 10^{-6}", "2.46e6", "-2.45e6", "2.45", "2450100"):
        assert decided(gold, answer) is False, answer


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        # what str() makes of floats
        ("1e-05", "0.00001", True),
        ("1e-05", r"10^{-5}", True),
        ("1e-05", "0.00002", False),
        ("1e+16", "10000000000000000", True),
        ("1e+16", "10000000000000001", False),
        ("3.3e-10", r"3.3 \times 10^{-10}", True),
        ("3.3e-10", "0.00000000033", True),
        ("3.3e-10", "3.3e-11", False),
        ("6.6e-34", "1.6e-19", False),
        ("0", "0.0000004", False),
        ("4e33", r"4 \times 10^{33}", True),
        ("4e33", "4e34", False),
        # exact ones exactly, a decimal within a millionth
        ("1000000", "1000001", False),
        ("1000000", "1000000.5", True),
        ("1000000", "1000001.5", False),
        ("6.02214076e23", "6.0221408e23", True),
        ("6.02214076e23", "6.0222e23", False),
        (r"\frac{22}{7}", r"\frac{355}{113}", False),
        ("1/3", "333333/1000000", False),
        ("-1./3", r"-\frac{1}{3}", True),
        # fractions and mixed numbers
        ("2 3/4", r"\frac{11}{4}", True),
        ("2 3/4", "2.75", True),
        ("2 3/4", r"2\frac{3}{4}", True),
        ("2 3/4", r"2 \dfrac34", True),
        ("2 3/4", "2¾", True),
        ("2 3/4", "23/4", False),
        ("2 3/4", "-2 3/4", False),
        ("-2 3/4", "-11/4", True),
        ("-2 3/4", "-5/4", False),
        ("1/2", "½", True),
        (r"\frac9{19}", r"\frac{9}{19}", True),
        ("-4", "–4", True),
        ("4", "–4", False),
        ("18", "１８", True),
        ("18", "**18**", True),
        (r"0.\overline{3}", r"\frac{1}{3}", True),
        (r"0.1\overline{6}", "1/6", True),
        (r"-2.\overline{45}", "-27/11", True),
        (r"0.\overline{3}", "0.3", False),
        (r"0.\overline{3}", "333333/1000000", False),
        # percent: a fraction, or the number itself
        (r"8 \%", "0.08", True),
        (r"8 \%", "8", True),
        (r"8 \%", "8 percent", True),
        (r"8 \%", r"\frac{2}{25}", True),
        (r"8 \%", "0.8", False),
        (r"8 \%", "800", False),
        (r"8 \%", "0.08 \\%", False),
        ("8", "0.08", False),
        ("5 million", "5", False),
        ("2 dozen", "24", True),
        ("1/0", "1", None),
    ],
)
def test_numbers(gold: str, answer: str, expected: bool | None) -> None:
    assert decided(gold, answer) is expected
    assert decided(answer, gold) is expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("45 cm", "45", True),
        ("45 cm", "45cm", True),
        ("45 cm", r"45 \text{ cm}", True),
        ("45 cm", r"45\,\mathrm{cm}", True),
        ("45 cm", "45 centimeters", True),
        ("45 cm", "45 m", False),
        ("45 cm", "0.45 m", False),
        ("45 cm", "44 cm", False),
        ("45 cm", r"45 \text{ cm}^2", False),
        (r"15\mbox{ cm}^2", "15 square centimeters", True),
        (r"15\mbox{ cm}^2", "15 cm²", True),
        (r"15\mbox{ cm}^2", "15 cm2", True),
        (r"15\mbox{ cm}^2", "15 sq cm", True),
        (r"15\mbox{ cm}^2", "15 cubic centimeters", False),
        (r"864 \mbox{ inches}^2", "864", True),
        ("60 mph", "60 miles per hour", True),
        ("60 mph", "60 miles", False),
        (r"9.8 \text{ m/s}^2", r"9.8\ \mathrm{m}/\mathrm{s}^{2}", True),
        (r"9.8 \text{ m/s}^2", r"9.8\ \mathrm{m}\,\mathrm{s}^{-2}", True),
        ("5 m/s", r"5 \frac{\text{m}}{\text{s}}", True),
        ("5 m/s", "5 m", False),
        ("10", "10 years old", True),
        ("3", r"3 \text{ or 4}", None),
        (r"5.4 \text{ cents}", "5.4", True),
        (r"5.4 \text{ cents}", "$5.4", False),
        ("$18", "18", True),
        ("$18", "18 dollars", True),
        ("$18", "€18", False),
        ("18 eggs", "18", True),
        ("18", "18 eggs", True),
        ("18 eggs", "18 fresh eggs", True),
        ("18 apples", "18 apple", True),
        ("18 eggs", "18 apples", False),
        ("18 eggs", "19 eggs", False),
        (r"90^\circ", "90", True),
        (r"90^\circ", "90°", True),
        (r"90^\circ", "90 degrees", True),
        (r"90^\circ", "90 radians", False),
        (r"90^\circ", r"91^{\circ}", False),
        (r"25^\circ C", r"25 ^{\circ} \mathrm{C}", True),
        (r"25^\circ C", "25 °F", False),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", True),
        (r"12\pi \text{ cm}^2", r"12\pi", True),
        (r"12\pi \text{ cm}^2", r"12\pi \text{ cm}", False),
        # no units: variables, words that count
        ("2", "2 n", None),
        ("2", "2c", None),
        ("2", "2 ab", None),
        ("3", "x + 3t", None),
        ("2", r"2 \text{ thirds}", None),
        ("5", "5 factorial", None),
        ("2", r"2 + \text{c}", None),
        # bases
        ("2516_8", "2516_{8}", True),
        ("2516_8", "2516", True),
        ("2516_8", r"2516_{\text{eight}}", True),
        ("2516_8", "2516 base 8", True),
        ("2516_8", "(2516)_8", True),
        ("2516_8", "2516_9", False),
        ("2516_8", "2517_8", False),
        ("2516_8", "1358_{10}", False),
        ("1A3_{16}", "1A3_{16}", True),
        ("2516_8", "2516₈", True),
        # times of day
        ("4:30 PM", "4:30 p.m.", True),
        ("4:30 PM", r"4:30 \text{ pm}", True),
        ("4:30 PM", "4:30", True),
        ("4:30 PM", "16:30", True),
        ("4:30 PM", "4:30 AM", False),
        ("4:30 PM", "4:31 PM", False),
        ("4:30 PM", "4", False),
        ("4:30 PM", "30", False),
        ("4 PM", "4:00 pm", True),
        ("4 PM", "4", True),
        ("4 PM", "5", False),
        ("12 AM", "0:00", True),
        ("12 AM", "12 PM", False),
        ("4:30", "8:60", None),
    ],
)
def test_units_bases_and_times(gold: str, answer: str, expected: bool | None) -> None:
    assert decided(gold, answer) is expected
    assert decided(answer, gold) is expected


@pytest.mark.parametrize(
    "text",
    ["1e99999", "9" * 5000, "1/" * 2000 + "1", r"\text{a}" * 500, "1" + " cm" * 1000, "(" * 4000],
)
def test_long_and_large_answers_are_read_quickly(text: str) -> None:
    start = time.monotonic()
    decided("5", text)
    assert plain_number(clean_answer(text)) is None or "cm" in text
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("16,3,1,1", "1, 1, 3, 16", True),
        ("16,3,1,1", "16, 3, 1", False),
        ("16,3,1,1", "16,3,3,1", False),
        ("1,2", r"1 \text{ and } 2", True),
        ("1,2", "2 or 1", True),
        ("1,2", "x = 1, x = 2", True),
        ("1,2", "x = 1, y = 2", None),
        ("1,2", r"\{2, 1, 1\}", True),
        ("1,2", r"\left\{2, 1\right\}", True),
        ("1,2", "1,2,3", False),
        ("1,2", "(1,2)", None),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", r"\left(\frac{2}{2},\,2.0\right)", True),
        ("(1,2)", "(1,2,0)", False),
        ("(1,2)", "[1,2)", None),
        ("1", "1 or 2", False),
        ("1", "1, 1", None),
        ("1,234", "1234", True),
        ("1,234", "1, 234", False),
        ("2,100,200", "2100, 200", False),
        ("x,y", "x,y,z", False),
        (r"1 \pm x, 2", "1+x, 1-x, 2", None),
        ("(-1,1),(2,3)", "(2,3),(-1,1)", None),
    ],
)
def test_lists_sets_and_tuples(gold: str, answer: str, expected: bool | None) -> None:
    assert decided(gold, answer) is expected
    assert decided(answer, gold) is expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("15x - 80", "15x-80", True),
        (r"\left(x,\frac{1}{2}\right]", r"\left ( x, \dfrac{1}{2} \right ]", True),
        (r"x^{2} + 1", "x^2+1", True),
        (r"c^{2} M_{1}", "c²M_1", True),
        (r"\cos (t)", r"\cos(t)", True),
        ("x^{23}", "x^{2}3", None),
        (r"\pi x", r"\pix", None),
        (r"\text{not even}", r"\text{noteven}", None),
    ],
)
def test_what_makes_no_difference_in_latex(gold: str, answer: str, expected: bool | None) -> None:
    assert decided(gold, answer) is expected
    assert decided(answer, gold) is expected
