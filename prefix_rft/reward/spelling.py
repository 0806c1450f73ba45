"""One spelling for an answer: what carries no meaning goes, Unicode becomes ASCII and LaTeX."""

import re
import unicodedata

_brace = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_bare_box = re.compile(r"\\boxed(?:\s+|(?=[0-9]))([+-]?(?:\.?[0-9]|\\[a-z])[^\s$]*)")

_delimiters = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_fraction = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_side = re.compile(r"\\(?:left|right) ?(?=[()\[\]|]|\\[{}|])")
_script = re.compile(r"([\^_]) ?\{ ?(\w) ?\}")
# Not between words, nor in a list of numbers: 1, 234 is none.
_no_meaning = re.compile(
    r"(?<![a-zA-Z0-9]) (?!(?<=[0-9], )[0-9])|(?<=[0-9]) (?=[a-zA-Z])| (?![\w])"
)
_bold = re.compile(r"(?<![\w)}\]])\*\*(.+?)\*\*")
_no_space = re.compile(r"\s*(?<!\\)\\!\s*")
_space = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z]))|~")
_currency = re.compile(r"(-?)\s*(\\?\$|[€£¥])\s*(?=\.?[0-9])")
_currencies = {"€": "euros", "£": "pounds", "¥": "yen"}

_raised, _lowered = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉₊₋"
_ascii = str.maketrans(_raised + _lowered, "0123456789+-ni0123456789+-")
_scripts = re.compile(f"[{_raised}]+|[{_lowered}]+")
_root = re.compile(r"([√∛])\s*([0-9.]+|[a-z])?")
_commands = {
    "∞": r"\infty ",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "−": "-",
    "°": r"^{\circ}",
    "±": r"\pm ",
    "≈": r"\approx ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
}


def last_boxed(text: str) -> str | None:
    r"""The content of the `\boxed{}` or `\fbox{}` that closes last, or None; linear time.

    `\boxed 18`, without braces, counts as one.
    """
    open_braces: list[int | None] = []  # start of the content where the brace opens a box
    found = None
    for token in _brace.finditer(text):
        if token[0] == "}":
            if open_braces and (start := open_braces.pop()) is not None:
                found = (start, token.start())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
    after = 0 if found is None else found[1]
    for bare in _bare_box.finditer(text, after):
        found = bare.span(1)
    return None if found is None else text[slice(*found)]


def clean_answer(answer: str) -> str:
    """`answer` without math delimiters, emphasis, an enclosing box, or a final full stop.

    Spaces are single, Unicode is spelled in LaTeX, and a currency sign is a unit behind the number.
    """
    if not answer.isascii():
        answer = _spelled(answer)
    # Single spaces first: the patterns look through a run of them from each of its places.
    answer = _space.sub(" ", _no_space.sub("", " ".join(answer.split())))
    answer = _bold.sub(r"\1", " ".join(answer.split()))
    answer = answer.removeprefix("**").removesuffix("**").strip("` ")
    for opening, closing in _delimiters:
        if len(answer) > len(opening) and answer.startswith(opening) and answer.endswith(closing):
            answer = answer[len(opening) : -len(closing)].strip()
    if answer.startswith("\\boxed") and answer.endswith("}"):
        inside = last_boxed(answer)
        if inside is not None and f"\\boxed{{{inside}}}" == answer:
            answer = inside.strip()
    sign = _currency.match(answer)
    if sign and (answer.count("$") == 1 or sign[2] in _currencies):
        unit = _currencies.get(sign[2], "dollars")
        answer = f"{sign[1]}{answer[sign.end() :].removesuffix('.')} \\text{{{unit}}}"
    return answer.replace("\\$", "").replace("$", "").strip().removesuffix(".").rstrip()


def canonical(answer: str) -> str:
    """A cleaned answer without what makes no difference in LaTeX; two that are the same say it."""
    answer = _fraction.sub(r"\\frac", _side.sub("", answer))
    return _no_meaning.sub("", _script.sub(r"\1\2", answer))


def _spelled(text: str) -> str:
    text = _scripts.sub(lambda run: f"{'^_'[run[0][0] in _lowered]}{{{run[0]}}}", text)
    text = _root.sub(_spelled_root, text.translate(_ascii))
    return "".join(map(_spelled_char, text))


def _spelled_root(root: re.Match) -> str:
    command = r"\sqrt[3]" if root[1] == "∛" else r"\sqrt"
    return f"{command}{{{root[2]}}}" if root[2] else command


def _spelled_char(char: str) -> str:
    if char.isascii():
        return char
    if char in _commands:
        return _commands[char]
    kind = unicodedata.category(char)
    if kind in ("Pd", "Cf"):  # dashes, and what is not seen
        return "-" if kind == "Pd" else ""
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if unicodedata.decomposition(char).startswith("<fraction>"):
        numerator, _, denominator = unicodedata.normalize("NFKC", char).partition("⁄")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    plain = unicodedata.normalize("NFKC", char)
    if plain != char:
        return "".join(map(_spelled_char, plain))
    match unicodedata.name(char, "").split():
        case ["GREEK", "SMALL", "LETTER", name]:
            return f"\\{name.lower().replace('lamda', 'lambda')} "
        case ["GREEK", "CAPITAL", "LETTER", name]:
            return f"\\{name.capitalize().replace('Lamda', 'Lambda')} "
    return char
