"""Reading of an answer into its parts, from the outside inwards: conditions, lists, relations, sets, leaves."""

from __future__ import annotations

import re

from .domains import domain_in_words, half_line, split_domain, without_real_variable
from .names import is_numeric
from .notations import read_based, read_clock, read_ratio
from .numbers import read_number
from .parts import (
    EMPTY_SET,
    Bracket,
    Builder,
    Chain,
    Expression,
    Guarded,
    Matrix,
    NamedSet,
    Operation,
    Part,
    Quantity,
    Ratio,
    Unreadable,
    Words,
)  # fmt: skip
from .plus_minus import without_plus_minus
from .scan import balanced, enclosed, split
from .units import PERCENT, mixed_quantity, read_unit, split_unit

RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\le": r"\le", r"\ge": r"\ge", r"\ne": r"\ne", r"\approx": r"\approx",
    r"\equiv": r"\equiv", r"\in": r"\in", r"\notin": r"\notin", r"\to": r"\to", r"\sim": r"\sim", r"\cong": r"\cong",
    r"\parallel": r"\parallel", r"\perp": r"\perp", r"\subset": r"\subset", r"\subseteq": r"\subseteq",
    r"\propto": r"\propto", r"\mapsto": r"\to", r"\rightarrow": r"\to", r"\implies": r"\implies",
    r"\Rightarrow": r"\implies", r"\iff": r"\iff", r"\ll": r"\ll", r"\gg": r"\gg",
}  # fmt: skip
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)")
_TIGHT = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{1,3})+(?![\d.]|,\d)")
_SPACED = re.compile(r"([+-]?\d{1,3}(?: \d{3})+)((?:\.\d+)?(?![\d])\D*)")
_STRAY_DIGITS = re.compile(r"\d \d")
_AND_OR = re.compile(r"(?:,\s*)?\\text\{\s*,?\s*(?:and|or)\s*\}|(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_JOINTS = {r"\or": "or", r"\lor": r"\lor", r"\and": "and", r"\land": r"\land", ",": ",", ";": ","}
"""What may stand between the items of a list, the weakest first."""
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LETTER_WITH_UNIT = re.compile(r"([a-zA-Z])(\\text\s*\{.+)")
_CONDITION = re.compile(
    r"[,;]? ?(?:\\text\s*\{[ ,;]*(?P<inside>(?:for|where|with|when|if|unless|provided)\b[^{}]*)\}|\\forall|"
    r"(?<![a-zA-Z\\])(?:for (?:all|any|every|some)|where|when|if|unless) )(?P<rest>.*)$"
)
_ALL_REALS = re.compile(
    r"(?:(?:all|any|every|real|reals|numbers?|in|where|for|is|an|arbitrary|[a-z]|\\in|\\forall|\\mathbb\{r\})"
    r"(?: |,|$))+"
)
_MATRIX = re.compile(
    r"[(\[]?\\begin\{(?P<kind>[pbB]?matrix|array)\}(?:\{[clr|]+\})?(?P<rows>.*)\\end\{(?P=kind)\}[)\]]?"
)
_SET_WORDS = re.compile(
    r"(?:the |set of |all )*"
    r"(?P<name>real (?:numbers?(?: [a-z])?|[a-z]|values of [a-z])|reals|integers|"
    r"rational numbers|natural numbers|complex numbers)"
    r"(?: (?:except|other than|but|not equal to|excluding)(?: for)? (?P<without>.+))?"
)
_SIGNED = re.compile(
    r"(?:the |set of |all )*(?P<sign>positive|negative|non-?negative|non-?positive) (?:reals|real numbers?)"
)
_SET_NAMES = {"real": "R", "inte": "Z", "rati": "Q", "natu": "N", "comp": "C"}
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|(?:the )?(?:empty|null) set")
_CHOICE = re.compile(r"\(?([A-Z]|[IVX]{1,4})[).:]?")


def readings(text: str) -> list[Part]:
    """Returns the readings of a normalised text: one, or two if `70,110` can be a number and a list."""
    if match := _SPACED.fullmatch(text):
        text = match[1].replace(" ", "") + match[2]
    joined = _GROUPED.sub(_without_commas, _TIGHT.sub(_numbers_of_list, text))
    # A list has no item such as 000.
    is_number = joined == text or re.search(r",0\d", text) is not None
    return [read(joined)] if is_number else [read(joined), read(text)]


def _numbers_of_list(match: re.Match[str]) -> str:
    """Writes `12,000,15,000` as `12000,15000`: no item begins with 0, so commas separate thousands too."""
    numbers = re.findall(r"\d+(?:,\d{3})*", match[0])
    is_clear = re.search(r",0\d\d", match[0]) and len(numbers) > 1 and all("," in number for number in numbers)
    return ",".join(number.replace(",", "") for number in numbers) if is_clear else match[0]


def _without_commas(match: re.Match[str]) -> str:
    """Brackets around one such number make it a tuple: `(100,200)`."""
    around = match.string[match.start() - 1 : match.start()] + match.string[match.end() : match.end() + 1]
    is_tuple = around in ("()", "[]", "(]", "[)") or around == "{\\"
    return match[0] if is_tuple else match[0].replace(",", "")


def read(text: str) -> Part:
    """Returns the parts of a normalised text."""
    text = text.strip()
    if not balanced(text):
        return Unreadable(text)
    if (number := read_number(text)) is not None:
        return number
    if (clock := read_clock(text)) is not None:
        return clock
    if (match := _CONDITION.search(text)) and match.start():
        condition = " ".join(_TEXT.sub(r" \1 ", f"{match['inside'] or match[0]} {match['rest']}").lower().split())
        return Guarded(
            read(text[: match.start()]), "" if _ALL_REALS.fullmatch(condition) else domain_in_words(condition)
        )
    if (parts := split_domain(text)) is not None:
        return Guarded(read(parts[0]), parts[1])
    if (rest := without_real_variable(text)) is not None and split(rest, RELATIONS.__contains__)[1]:
        return read(rest)
    if (mixed := mixed_quantity(text)) is not None:
        return Quantity(read_number(str(mixed[0])) or Expression(str(mixed[0])), mixed[1])
    return _words(text) or _list(text)


def _words(text: str) -> Part | None:
    r"""Reads an answer without mathematics: `\text{Tuesday}`, `even`, the choice `(B)`, `no solution`."""
    plain = " ".join(_TEXT.sub(r" \1 ", text).split())
    if (match := _LETTER_WITH_UNIT.fullmatch(text)) and read_unit(match[2]):
        return None
    if choice := _CHOICE.fullmatch(plain.replace(" ", "")):
        return Words(choice[1])
    spoken = _TEXT.search(text) is not None
    if re.search(r"[\\=<>^_+*/{}\[\]|]", plain.replace("'", "")) or not re.search(r"[^\W\d_]", plain):
        return _whole_text(text)
    plain = plain.rstrip(".!").casefold()
    if _NO_SOLUTION.fullmatch(plain):
        return EMPTY_SET
    if match := _SIGNED.fullmatch(plain):
        bound = {"positive": ">", "negative": "<"}.get(match["sign"]) or (r"\ge" if "neg" in match["sign"] else r"\le")
        return half_line(rf"\mathbb{{R}}_{{{bound}0}}")
    if match := _SET_WORDS.fullmatch(plain):
        everything = NamedSet(_SET_NAMES[match["name"][:4]])
        if not match["without"]:
            return everything
        without = read(match["without"])
        return Operation(
            r"\setminus", everything, without if isinstance(without, Bracket) else Bracket(r"\{", r"\}", (without,))
        )
    if "," in plain or re.search(r"\b(?:and|or)\b", plain) or re.match(r"[-+]?[\d.]", plain):
        return _whole_text(text)
    letters = re.sub(r"[^a-z]", "", plain)
    long_enough = spoken or (len(letters) > 3 and re.search(r"[^\W\d_]{3}", plain) and not re.search(r"\d|\(", plain))
    return Words(plain) if long_enough and not re.match(r"\(|.*[a-z]\(", plain) else None


def _whole_text(text: str) -> Part | None:
    r"""Reads the inside of an answer that is one \text command: `\text{7 apples}`, `\text{A, C, F}`."""
    match = _TEXT.fullmatch(text)
    if not match:
        return None
    inside = match[1].strip()
    parts = [part.strip() for part in re.split(r",\s*(?:and\b|or\b)?|\b(?:and|or)\b", inside) if part.strip()]
    if len(parts) > 1:
        items = tuple(read(rf"\text{{{part}}}") if part.isalpha() else read(part) for part in parts)
        spoken = re.findall(r"\b(?:and|or)\b", inside)
        return Bracket("", "", items, "or" if "or" in spoken else "and" if spoken else ",")
    if match := re.fullmatch(r"([-+]?(?:\d[\d.,/:]*|\\\$ ?[\d.,]+)) ?(.*)", inside):
        return read(rf"{match[1]}\text{{ {match[2]}}}" if match[2] else match[1])
    return None


def _list(text: str) -> Part:
    text = _AND_OR.sub(_joint, text)
    if cases := _cases(text):
        return cases
    parts, found = split(text, _JOINTS.__contains__)
    parts = [part for part in parts if part]
    items = [item for part in parts for item in without_plus_minus(part)]
    if len(items) == 1:
        return _relation(items[0])
    joint = "and" if len(parts) == 1 and r"\ne" in parts[0] else _joint_of(found)  # x is neither of `x\ne\pm1`
    return Bracket("", "", tuple(_relation(item) for item in items), joint) if items else Unreadable(text)


def _cases(text: str) -> Bracket | None:
    """Reads a list of lists: `x=1, y=2 or x=2, y=1`, and `and` inside `or`. Returns None for any other text."""
    for outer in ({r"\or", r"\lor"}, {";"}, {r"\and", r"\land"}):
        groups, found = split(text, outer.__contains__)
        if not found or not all(groups):
            continue
        inside = [split(group, _JOINTS.__contains__) for group in groups]
        has_and = r"\or" in outer and any({r"\and", r"\land"} & set(signs) for _, signs in inside)
        names = {tuple(sorted(part.partition("=")[0] for part in parts if "=" in part)) for parts, _ in inside}
        if has_and or (len(names) == 1 and len(set(names.pop())) == len(inside[0][0]) > 1):
            return Bracket("", "", tuple(_list(group) for group in groups), _joint_of(found))
    return None


def _joint_of(separators: list[str]) -> str:
    return next((joint for token, joint in _JOINTS.items() if token in separators), ",")


def _joint(match: re.Match[str]) -> str:
    return r"\or " if "or" in match[0] else r"\and "


def _relation(text: str) -> Part:
    sides, signs = split(text, RELATIONS.__contains__)
    if not signs:
        return _operation(text)
    if not all(sides):
        return Unreadable(text)
    found = tuple(RELATIONS[sign] for sign in signs)
    if found == (r"\in",) and _is_name(sides[0]):
        return read(sides[1])
    return Chain(tuple(read(side) for side in sides), found, tuple(sides))


def _is_name(text: str) -> bool:
    return re.fullmatch(r"\\?[a-zA-Z]+(?:_\{[^{}]*\})?'*", text) is not None


def _operation(text: str) -> Part:
    for signs in ((r"\setminus", "-"), (r"\cup",), (r"\cap",)):
        operands, found = split(text, signs.__contains__)
        if not found or not all(operands):
            continue
        parts = [_operation(operand) for operand in operands]
        if found[0] == "-" and not all(_is_set(part) for part in parts):
            continue
        whole = parts[0]
        for part in parts[1:]:
            whole = Operation(signs[0], whole, part)
        return whole
    return _bracket(text)


def _is_set(part: Part) -> bool:
    is_set = isinstance(part, NamedSet | Operation | Builder) or part == EMPTY_SET
    return is_set or (isinstance(part, Bracket) and part.left == r"\{")


def _bracket(text: str) -> Part:
    if text == r"\emptyset":
        return EMPTY_SET
    if match := re.fullmatch(r"\\mathbb\{([RZQNC])\}", text):
        return NamedSet(match[1])
    if (half := half_line(text)) is not None:
        return half
    if match := _MATRIX.fullmatch(text):
        return _matrix(match["rows"]) if r"\begin" not in match["rows"] else Expression(text)
    if (group := enclosed(text)) is None or group[0] in (r"\lfloor", r"\lceil"):
        return _leaf(text)
    left, inside, right = group
    if left == "{":
        return read(inside)
    if not inside:
        return EMPTY_SET if left == r"\{" else Unreadable(text)
    if left == r"\{" and (builder := _builder(inside)) is not None:
        return builder
    parts, _ = split(inside, lambda token: token in (",", ";"))
    if left != r"\{" and len(parts) == 1:
        is_redundant = (left, right) == ("(", ")") or ((left, right) == ("[", "]") and is_numeric(inside))
        return read(inside) if is_redundant else Expression(text)
    if not all(parts):
        return Unreadable(text)
    if left == r"\{":
        parts = [item for part in parts for item in without_plus_minus(part)]
    items = tuple(_relation(part) for part in parts)
    return Bracket(*(("(", ")") if left == r"\langle" else (left, right)), items)


def _builder(inside: str) -> Builder | None:
    parts, _ = split(inside, lambda token: token in ("|", ":"))
    if len(parts) != 2 or not all(parts):
        return None
    head, domain = parts[0].replace(" ", ""), None
    sides, signs = split(head, lambda token: token == r"\in")
    if signs:
        head, domain = sides[0].replace(" ", ""), read(sides[1])
    condition_text = _AND_OR.sub(_joint, parts[1])
    conditions, joints = split(condition_text, _JOINTS.__contains__)
    kept = []
    for condition in conditions:
        sides, signs = split(condition, lambda token: token == r"\in")
        if signs and sides[0] == head and domain is None:
            domain = read(sides[1])
        elif condition:
            kept.append(_relation(condition))
    joint = _joint_of(joints)
    everything = Bracket("", "", tuple(kept), "and" if joint == "," else joint)
    return Builder(head, domain, kept[0] if len(kept) == 1 else everything)


def _matrix(rows: str) -> Part:
    lines, _ = split(rows, lambda token: token == r"\\")
    entries = tuple(tuple(read(cell) for cell in split(line, lambda token: token == "&")[0]) for line in lines if line)
    if not entries or len({len(row) for row in entries}) > 1:
        return Unreadable(rows)
    return Matrix(entries)


def _leaf(text: str) -> Part:
    if (number := read_number(text)) is not None:
        return number
    if (based := read_based(text)) is not None:
        return based
    if (clock := read_clock(text)) is not None:
        return clock
    if ":" in text or "to" in text:
        terms = read_ratio(text)
        if terms:
            return Ratio(tuple(_leaf(term) for term in terms))
    value, unit = split_unit(text)
    if unit is not None:
        inner = read(value)
        if isinstance(inner, Quantity) and unit != PERCENT:
            return Unreadable(text)
        return Quantity(inner, unit)
    if _STRAY_DIGITS.search(text):
        return Unreadable(text)
    return _words(text) or Expression(text)
