"""Answers that are right or wrong by construction, made from gold answers by rules.

    python -m bench.grader_labels GOLDS.parquet [--out labels.jsonl]

A rewrite says the same as its gold answer in another way; a near miss differs from it in one thing.
The rules look at the text of the gold answer only and use nothing of the grader they are to test.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

SEED = 13
WHOLE_REWRITES = 6  # of a whole number, as most gold answers are one

_whole = re.compile(r"-?[0-9]+")
_decimal = re.compile(r"(-?[0-9]*)\.([0-9]+)")
_scientific = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)e(-?[0-9]+)")
_fraction = re.compile(r"(-?)\\d?frac\{([0-9]+)\}\{([0-9]+)\}")
_surd = re.compile(r"([0-9]+) ?\\sqrt\{([0-9]+)\}")
_pi = re.compile(r"([0-9]+) ?\\pi")
_degrees = re.compile(r"([0-9]+) ?\^ ?\{? ?\\circ ?\}?")
_percent = re.compile(r"([0-9.]+) ?\\?%")
_based = re.compile(r"([0-9]+)_([0-9])")
_mixed = re.compile(r"([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}")
_quantity = re.compile(r"([0-9.]+) ?\\(?:text|mbox)\{ ?([a-z]+)\}(\^2)?")
_word = re.compile(r"\\text\{([A-Za-z]+)\}")
_choice = re.compile(r"\\text\{\(([A-E])\)\}")
_interval = re.compile(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])")
_polynomial = re.compile(r"[0-9a-zR^+ {}-]*[a-zR][0-9a-zR^+ {}-]*")
_matrix = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")
_assignment = re.compile(r"([a-zA-Z]|[a-z]\([a-z]\)) ?= ?([^=]+)")
_digit = re.compile(r"(?<![_0-9])(?<!_\{)[0-9](?![0-9]*[.])")
_vulgar = {Fraction(1, 2): "½", Fraction(1, 3): "⅓", Fraction(2, 3): "⅔", Fraction(1, 4): "¼"} | {
    Fraction(3, 4): "¾",
    Fraction(1, 8): "⅛",
    Fraction(3, 8): "⅜",
}
_unicode = {r"\pi": "π", r"\infty": "∞", r"\cup": "∪", r"\pm": "±", r"\theta": "θ"} | {
    r"\omega": "ω",
    r"\alpha": "α",
    "-": "−",
    "^2": "²",
    "^{2}": "²",
    "^3": "³",
}
_other_units = {"cm": "m", "inches": "feet", "cents": "dollars", "degrees": "radians"}
_unit_words = {"cm": "centimeters", "inches": "in", "cents": "cent", "degrees": "degree"}
_base_words = {"6": "six", "8": "eight"}


class Label(NamedTuple):
    gold: str
    answer: str
    kind: str
    is_equal: bool


def labels(golds: list[str], seed: int = SEED) -> list[Label]:
    """Rewrites and near misses of every gold answer, each text once for a gold answer."""
    picks = random.Random(seed)
    found = []
    for gold in golds:
        plain = gold.strip()
        if plain.count("$") == 2 and plain[0] == plain[-1] == "$":
            plain = plain[1:-1].strip()
        rewrites = list(_rewrites(plain))
        if _whole.fullmatch(plain):
            rewrites = picks.sample(rewrites, min(WHOLE_REWRITES, len(rewrites)))
        rewrites = [("as it is", gold), *rewrites]
        misses = [miss for miss in _near_misses(plain, picks) if miss[1] != plain]
        for pairs, is_equal in ((rewrites, True), (misses, False)):
            texts = {text: kind for kind, text in reversed(pairs)}
            found += [Label(gold, text, kind, is_equal) for text, kind in reversed(texts.items())]
    return list(dict.fromkeys(found))


def _rewrites(gold: str) -> Iterator[tuple[str, str]]:
    yield "delimiters", f"${gold}$" if "$" not in gold else gold
    yield "delimiters", rf"\( {gold} \)" if "$" not in gold else gold
    yield "final stop", gold + "."
    if r"\!" not in gold:
        yield "spaces", re.sub(r" ?(?<![\\{])([,()+=]) ?", r" \1 ", gold).strip()
    if re.search(r"\\[dt]?frac\{", gold):
        yield "dfrac", re.sub(r"\\[dt]?frac\{", r"\\dfrac{", gold)
        yield "dfrac", re.sub(r"\\[dt]?frac\{", r"\\tfrac{", gold)
    if re.fullmatch(r"\(.*\)|\[.*[)\]]|\(.*\]", gold) and _depth_is_one(gold):
        yield "left and right", rf"\left{gold[:-1]}\right{gold[-1]}"
    as_unicode = gold
    for latex, char in _unicode.items():
        as_unicode = re.sub(re.escape(latex) + r"(?![a-zA-Z0-9]) ?", char, as_unicode)
    as_unicode = re.sub(r"\\sqrt\{([0-9]+)\}", r"√\1", as_unicode)
    if as_unicode != gold and r"\text" not in gold:
        yield "Unicode", as_unicode
    for rule in (_number_rewrites, _quantity_rewrites, _collection_rewrites, _algebra_rewrites):
        yield from rule(gold)


def _number_rewrites(gold: str) -> Iterator[tuple[str, str]]:
    value = _value(gold)
    if _whole.fullmatch(gold):
        yield from _whole_rewrites(int(gold))
    elif (decimal := _decimal.fullmatch(gold)) and value:
        yield "decimals", gold + "0"
        yield "decimals", re.sub(r"^(-?)0?\.", r"\1.", gold)
        yield "fractions", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield "e-notation", f"{value * 10 ** len(decimal[2])}e-{len(decimal[2])}"
        yield "times ten to the k", rf"{value / 10} \times 10^{{1}}".replace("/", r" / ")
        yield "equations", f"x = {gold}"
    elif scientific := _scientific.fullmatch(gold):
        base, power = scientific.groups()
        yield "times ten to the k", rf"{base} \times 10^{{{power}}}"
        yield "times ten to the k", rf"{base} \cdot 10^{{{power}}}"
        yield "e-notation", f"{base}E{int(power):+03d}"
        raised = power.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        yield "Unicode", f"{base} × 10{raised}"
        if abs(int(power)) < 13:
            plain = f"{int(value):,}" if value.denominator == 1 else _exact_decimal(value)
            yield "decimals", plain.replace(",", "")
            if value.denominator == 1:
                yield "thousands separators", plain
    elif fraction := _fraction.fullmatch(gold):
        sign, above, below = fraction.groups()
        yield "fractions", f"{sign}{above}/{below}"
        yield "fractions", rf"{sign}\frac{{{int(above) * 3}}}{{{int(below) * 3}}}"
        yield "fractions", rf"\frac{{{sign}{above}}}{{{below}}}"
        if len(above) == len(below) == 1:
            yield "fractions", rf"{sign}\frac{above}{below}"
        if _exact_decimal(value):
            yield "decimals", _exact_decimal(value)
        else:
            yield "decimals", f"{float(value):.10f}"
        if abs(value) > 1 and value.denominator > 1:
            whole, rest = divmod(abs(value), 1)
            yield "mixed numbers", rf"{sign}{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"
            yield "mixed numbers", f"{sign}{whole} {rest}"
        if abs(value) in _vulgar:
            yield "Unicode", sign + _vulgar[abs(value)]
        yield "equations", f"x = {gold}"
    elif mixed := _mixed.fullmatch(gold):
        whole, above, below = map(int, mixed.groups())
        yield "mixed numbers", rf"\frac{{{whole * below + above}}}{{{below}}}"
        yield "mixed numbers", f"{whole} {above}/{below}"
        yield "decimals", _exact_decimal(value)
        yield "Unicode", f"{whole}{_vulgar[Fraction(above, below)]}"
    elif based := _based.fullmatch(gold):
        digits, base = based.groups()
        yield "bases", f"{digits}_{{{base}}}"
        yield "bases", rf"{digits}_{{\text{{{_base_words[base]}}}}}"
        yield "bases", f"({digits})_{base}"
        yield "bases", digits


def _whole_rewrites(value: int) -> Iterator[tuple[str, str]]:
    text, size = str(value), len(str(abs(value)))
    yield "decimals", f"{text}.0"
    yield "decimals", f"{text}.00"
    yield "fractions", rf"\frac{{{3 * value}}}{{3}}"
    yield "equations", f"x = {text}"
    yield "equations", f"N={text}"
    yield "units", rf"{text}\text{{ units}}"
    yield "units", f"{text} cm"
    yield "leading zeros", f"{'-' * (value < 0)}0{abs(value)}"
    yield "Unicode", text.translate(str.maketrans("-0123456789", "−０１２３４５６７８９"))
    if size > 1:
        tail = text[-size + 1 :].rstrip("0") or "0"
        head = text[: -size + 1]
        yield "e-notation", f"{head}.{tail}e{size - 1}"
        yield "times ten to the k", rf"{head}.{tail} \times 10^{{{size - 1}}}"
        yield "times ten to the k", rf"{head}.{tail}\cdot 10^{size - 1}"
    if size > 3:
        for separator in (",", "{,}", r"\,", r",\!"):
            yield "thousands separators", f"{value:,}".replace(",", separator)
    if value > 1:
        yield "powers", rf"\sqrt{{{value**2}}}"


def _quantity_rewrites(gold: str) -> Iterator[tuple[str, str]]:
    if degrees := _degrees.fullmatch(gold):
        for spelled in ("°", " degrees", r" \text{ degrees}", r"^{\circ}", r"^\circ", ""):
            yield "degrees", degrees[1] + spelled
        yield "equations", rf"\theta = {gold}"
    if percent := _percent.fullmatch(gold):
        number = percent[1]
        for spelled in ("%", r"\%", " percent", r"\text{ percent}", ""):
            yield "percent", number + spelled
        yield "percent", _exact_decimal(Fraction(number) / 100)
    if quantity := _quantity.fullmatch(gold):
        number, unit, power = quantity.groups()
        square = "square " if power else ""
        yield "units", number
        yield "units", f"{number} {square}{_unit_words[unit]}"
        yield "units", rf"{number}\,\mathrm{{{unit}}}{power or ''}"
    if gold.startswith(r"\$"):
        yield "units", gold[2:]
        yield "units", f"${gold[2:]}"
        yield "units", gold[2:] + " dollars"
        yield "units", gold[2:] + r"\text{ dollars}"
    if word := _word.fullmatch(gold):
        yield "text", word[1]
        yield "text", rf"\textbf{{{word[1]}}}"
        yield "text", f"**{word[1]}**"
        yield "text", rf"\text{{ {word[1]} }}"
        yield "text", rf"\mathrm{{{word[1]}}}"
    if choice := _choice.fullmatch(gold):
        yield "text", f"({choice[1]})"
        yield "text", choice[1]
        yield "text", rf"\textbf{{({choice[1]})}}"


def _collection_rewrites(gold: str) -> Iterator[tuple[str, str]]:
    parts = _elements(gold)
    if len(parts) > 1:
        turned = parts[::-1]
        yield "sets in other orders", ", ".join(turned)
        yield "sets in other orders", ",".join(parts[1:] + parts[:1])
        yield "lists", ", ".join(parts[:-1]) + r" \text{ and } " + parts[-1]
        yield "lists", ", ".join(parts[:-1]) + " and " + parts[-1]
        if not any("=" in part for part in parts):
            yield "sets in other orders", r"\{" + ", ".join(parts) + r"\}"
            yield "sets in other orders", r"\left\{" + ", ".join(turned) + r"\right\}"
            yield "equations", "x = " + ", ".join(parts)
        if not any("(" in part for part in parts) and not any("=" in part for part in parts):
            yield "equations", ", ".join(f"x = {part}" for part in parts)
    if interval := _interval.fullmatch(gold.replace(r"\left", "").replace(r"\right", "")):
        opening, low, high, closing = interval.groups()
        is_interval = {opening, closing} != {"(", ")"} or r"\infty" in gold
        kind = "intervals" if is_interval else "tuples"
        yield kind, f"{opening}{low.strip()}, {high.strip()}{closing}"
        yield kind, rf"\left{opening}{low.strip()}, {high.strip()}\right{closing}"
        if is_interval:
            yield kind, rf"x \in {opening}{low},{high}{closing}"
            if high == r"\infty":
                yield kind, rf"{opening}{low},+\infty{closing}"
        elif _value(low.strip()) is not None:
            yield kind, f"(x, y) = ({low}, {high})"
            yield kind, rf"\left({low},\, {high}\right)"
            number = _value(low.strip())
            if number.denominator in (1, 2, 4, 5):
                yield kind, f"({_exact_decimal(number) or number}, {high})"
    if r" \cup " in gold:
        left, right = gold.split(r" \cup ")
        yield "intervals", rf"{right} \cup {left}"
        yield "intervals", f"{left}∪{right}"
    if matrix := _matrix.fullmatch(gold):
        rows = [row.strip() for row in matrix[1].split(r"\\")]
        for name in ("bmatrix", "pmatrix"):
            body = r" \\ ".join(rows)
            yield "matrices", rf"\begin{{{name}}} {body} \end{{{name}}}"
        body = r"\\".join(re.sub(r"(-?)([0-9]+)/([0-9]+)", r"\1\\frac{\2}{\3}", r) for r in rows)
        yield "matrices", rf"\begin{{pmatrix}}{body}\end{{pmatrix}}"
        body = r"\\".join(re.sub(r"(-?[0-9]+)/([0-9]+)", r"\\frac{\1}{\2}", row) for row in rows)
        yield "matrices", rf"\left[\begin{{matrix}}{body}\end{{matrix}}\right]"


def _algebra_rewrites(gold: str) -> Iterator[tuple[str, str]]:
    if surd := _surd.fullmatch(gold):
        times, inside = map(int, surd.groups())
        yield "roots", rf"\sqrt{{{times**2 * inside}}}"
        yield "roots", rf"\sqrt{{{inside}}} \cdot {times}"
        yield "roots", f"{times}*sqrt({inside})"
        yield "roots", f"{times}√{inside}"
        yield "decimals", f"{times * inside**0.5:.12f}"
    if pi := _pi.fullmatch(gold):
        yield "pi", rf"\pi \cdot {pi[1]}"
        yield "pi", f"{pi[1]}π"
        yield "pi", f"{pi[1]}*pi"
        yield "decimals", f"{int(pi[1]) * 3.141592653589793:.10f}"
    if assignment := _assignment.fullmatch(gold):
        name, side = assignment.groups()
        yield "equations", side
        yield "equations", f"{name} = {side}"
        yield "equations", f"{name}={side}"
        if len(name) == 1:
            yield "equations", f"{side} = {name}"
    terms = _terms(gold)
    if len(terms) > 1:
        turned = "".join(term if term[0] in "+-" else f"+{term}" for term in terms[::-1])
        yield "terms in other orders", turned.removeprefix("+")
        yield "spaces", gold.replace(" ", "")
        yield "equations", f"y = {gold}" if "y" not in gold else gold
        times = re.sub(r"(?<![0-9^])([0-9]+)([a-zR])", r"\1 \\cdot \2", gold)
        yield "products", times
        yield "products", re.sub(r"(?<![0-9^])([0-9]+)([a-zR])", r"\1*\2", gold)
        yield "powers", re.sub(r"\^([0-9])", r"^{\1}", gold)


def _near_misses(gold: str, picks: random.Random) -> Iterator[tuple[str, str]]:
    if gold.lstrip("0.") and not re.search(r"[=,_]|text|mbox|begin|pm|\\\$|\bm$|%|\\cup", gold):
        simple = _whole.fullmatch(gold) or _fraction.fullmatch(gold) or len(_terms(gold)) < 2
        negated = gold[1:] if gold[0] == "-" else f"-{gold}"
        yield "sign", negated if simple else f"-({gold})"
    digits = [match for match in _digit.finditer(gold) if not gold[: match.start()].endswith("_{")]
    if digits:
        digit = picks.choice(digits)
        if not re.search(r"[0-9]{8}", gold) or "." not in gold:
            other = str((int(digit[0]) + 1) % 10)
            yield "one digit", gold[: digit.start()] + other + gold[digit.end() :]
    if number := re.fullmatch(r"(-?[0-9]+)(\.[0-9]+)?", gold):
        yield "one more", f"{int(number[1]) + 1}{number[2] or ''}"
        yield "a hedge", f"{gold} or {int(number[1]) + 1}"
        yield "a hedge", f"{gold}, {int(number[1]) + 1}"
        yield "extra element", rf"\{{{gold}, {int(number[1]) + 7}\}}"
        if gold.strip("-0."):
            yield "ten times", rf"{gold} \times 10^{{1}}"
            yield "percent", rf"{gold}\% + 1"
            yield "square root", rf"\sqrt{{{int(number[1]) ** 2 + 1}}}"
    yield from _near_quantities(gold)
    yield from _near_collections(gold)
    yield from _near_algebra(gold)


def _near_quantities(gold: str) -> Iterator[tuple[str, str]]:
    value = _value(gold)
    if scientific := _scientific.fullmatch(gold):
        base, power = scientific[1], int(scientific[2])
        yield "power of ten", f"{base}e{power + 1}"
        yield "power of ten", rf"{base} \times 10^{{{-power}}}"
        yield "power of ten", base
    if (fraction := _fraction.fullmatch(gold)) and abs(value) != 1:
        sign, above, below = fraction.groups()
        yield "upside down", rf"{sign}\frac{{{below}}}{{{above}}}"
        yield "numerator only", sign + above
        if not _exact_decimal(value):
            yield "rounded", f"{float(value):.3f}"
    if mixed := _mixed.fullmatch(gold):
        yield "mixed numbers", rf"{mixed[1]} \cdot \frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if degrees := _degrees.fullmatch(gold):
        yield "another unit", f"{degrees[1]} radians"
        yield "another unit", rf"{degrees[1]}\text{{ cm}}"
    if percent := _percent.fullmatch(gold):
        yield "percent", rf"{Fraction(percent[1]) * 10}\%"
        yield "percent", _exact_decimal(Fraction(percent[1]) / 10)
    if quantity := _quantity.fullmatch(gold):
        number, unit, power = quantity.groups()
        yield "another unit", rf"{number} \text{{ {_other_units[unit]}}}{power or ''}"
        if power:
            yield "another unit", rf"{number} \text{{ {unit}}}"
            yield "another unit", rf"{number} \text{{ {unit}}}^3"
    if gold.startswith(r"\$"):
        yield "another unit", gold[2:] + " cents"
        yield "another unit", "€" + gold[2:]
    if based := _based.fullmatch(gold):
        digits, base = based.groups()
        yield "other base", f"{digits}_{{{int(base) + 1}}}"
        yield "other base", rf"{int(digits, int(base))}_{{{base}}}"
    if word := _word.fullmatch(gold):
        yield "text", rf"\text{{not {word[1]}}}"
        yield "text", rf"\text{{{word[1][:-1]}}}"
    if choice := _choice.fullmatch(gold):
        for letter in {"A", "D"} - {choice[1]}:
            yield "text", rf"\text{{({letter})}}"


def _near_collections(gold: str) -> Iterator[tuple[str, str]]:
    parts = _elements(gold)
    if len(parts) > 1:
        yield "missing element", ", ".join(parts[:-1])
        yield "missing element", ", ".join(parts[1:])
        yield "missing element", r"\{" + ", ".join(parts[1:]) + r"\}"
        if all(_whole.fullmatch(part) for part in parts):
            yield "extra element", ", ".join([*parts, "77"])
            yield "joined", "".join(parts)
    for interval in _interval.finditer(gold.replace(r"\left", "").replace(r"\right", "")):
        opening, low, high, closing = interval.groups()
        if {opening, closing} != {"(", ")"} or r"\infty" in gold:
            text = gold.replace(r"\left", "").replace(r"\right", "")
            before, after = text[: interval.start()], text[interval.end() :]
            if low.strip() != r"-\infty":
                other = {"(": "[", "[": "("}[opening]
                yield "open for closed", f"{before}{other}{low},{high}{closing}{after}"
            if high.strip() != r"\infty":
                other = {")": "]", "]": ")"}[closing]
                yield "open for closed", f"{before}{opening}{low},{high}{other}{after}"
        elif interval[0] == gold.replace(r"\left", "").replace(r"\right", ""):
            if low.strip() != high.strip():
                yield "swapped", f"({high},{low})"
            yield "missing element", low
            yield "extra element", f"({low},{high},0)"
    if re.fullmatch(r"\(-?[0-9]+(?:,-?[0-9]+){2,}\)", gold):
        numbers = gold[1:-1].split(",")
        yield "missing element", f"({','.join(numbers[:-1])})"
        if numbers[0] != numbers[1]:
            yield "swapped", f"({','.join([numbers[1], numbers[0], *numbers[2:]])})"
    if matrix := _matrix.fullmatch(gold):
        rows = matrix[1].strip().split(r"\\")
        for kind, other in (("missing element", rows[:-1]), ("swapped", rows[::-1])):
            body = r"\\".join(other)
            yield kind, rf"\begin{{pmatrix}}{body}\end{{pmatrix}}"
    if r" \cup " in gold:
        yield "missing element", gold.split(r" \cup ")[0]
        yield "another operator", gold.replace(r"\cup", r"\cap")


def _near_algebra(gold: str) -> Iterator[tuple[str, str]]:
    if surd := _surd.fullmatch(gold):
        yield "without the root", str(int(surd[1]) * int(surd[2]))
        yield "rounded", f"{int(surd[1]) * int(surd[2]) ** 0.5:.3f}"
    if pi := _pi.fullmatch(gold):
        yield "without pi", pi[1]
        yield "rounded", f"{int(pi[1]) * 3.14159265:.2f}"
        yield "rounded", rf"\frac{{{int(pi[1]) * 22}}}{{7}}"
    if (assignment := _assignment.fullmatch(gold)) and not re.search(r"text|where", gold):
        yield "one more", f"{assignment[1]} = {assignment[2]} + 1"
    terms = _terms(gold)
    if len(terms) > 1:
        yield "one more", f"{gold} + 1"
        yield "missing element", "".join(terms[:-1])
        flipped = terms[-1].translate(str.maketrans("+-", "-+"))
        yield "sign", "".join([*terms[:-1], flipped])
        if "w" not in gold:
            letter = re.search(r"[a-zR]", gold)[0]
            yield "another letter", gold.replace(letter, "w")
    if r"\pm" in gold and "," not in gold:
        yield "missing element", gold.replace(r"\pm", "+")


def _value(text: str) -> Fraction | None:
    """The value of a gold answer that is one number."""
    if mixed := _mixed.fullmatch(text):
        return int(mixed[1]) + Fraction(int(mixed[2]), int(mixed[3]))
    if fraction := _fraction.fullmatch(text):
        return Fraction(int(fraction[1] + fraction[2]), int(fraction[3]))
    if _whole.fullmatch(text) or _decimal.fullmatch(text) or _scientific.fullmatch(text):
        return Fraction(text)
    return None


def _exact_decimal(value: Fraction) -> str | None:
    """All digits of a value; None where they do not end."""
    places = next((k for k in range(26) if value * 10**k % 1 == 0), None)
    if places is None:
        return None
    digits = f"{abs(value) * 10**places}".rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return "-" * (value < 0) + text


def _elements(gold: str) -> list[str]:
    """The elements of a list or set; the gold answer alone where it is neither."""
    text = gold.replace("$", "")
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    text = text[2:-2] if is_set else text
    if re.search(r"text|where|begin|^f\(x\)=a|_|\\!", text):
        return [gold]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _terms(gold: str) -> list[str]:
    """The terms of a polynomial with their signs; one where it is none."""
    if (
        not _polynomial.fullmatch(gold)
        or _scientific.fullmatch(gold)
        or re.search(r"[a-zR]{3}|\{[^}]*$", gold)
    ):
        return [gold]
    text = gold.replace(" ", "")
    if re.search(r"\{[^}]*[+-]", text):
        return [gold]
    return re.findall(r"[+-]?[^+-]+", text)


def _depth_is_one(text: str) -> bool:
    """Whether the first bracket closes with the last."""
    depth = 0
    for i, char in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
        if depth == 0:
            return i == len(text) - 1
    return False


def read_golds(path: Path) -> list[str]:
    """The column `answer` of a parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["answer"])["answer"].to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("golds", type=Path, help="parquet file with a column answer")
    parser.add_argument("--out", type=Path, help="file for one JSON object a label")
    options = parser.parse_args()
    found = labels(read_golds(options.golds))
    if options.out:
        lines = [json.dumps(label._asdict(), ensure_ascii=False) + "\n" for label in found]
        options.out.write_text("".join(lines))
    num_equal = sum(label.is_equal for label in found)
    print(f"{num_equal} rewrites and {len(found) - num_equal} near misses")


if __name__ == "__main__":
    main()
