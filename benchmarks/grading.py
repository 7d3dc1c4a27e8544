r"""Verdicts of the maths verifier on published labels: graded against themselves, respelled, and perturbed.

    python benchmarks/grading.py DATA [--workers 2] [--sets MATH-500 AIME] [--out benchmarks/results/grading.json]

DATA is a folder with math_500.jsonl, minerva_math.jsonl, olympiadbench.jsonl, aime24.jsonl, amc23.jsonl,
gsm8k_train.jsonl and gsm8k_test.jsonl, as their repositories publish them. Every label (each once, however many rows
have it) must equal itself and itself in another spelling, and must differ from itself with one digit, sign, function,
bracket, relation or letter changed. Rules (`exclusion`, `reason_to_be_equal`), not lists, say what is left out, and
each is counted under its name. Fails below the targets: 100 % of the first two right, 99.5 % of the perturbed ones
refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments, keep
from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward import RewardPool
from megatron_rl.types import Prompt, Response, Sample
from megatron_rl.utils.boxed import last_boxed

SETS = {
    "MATH-500": ["math_500"], "Minerva": ["minerva_math"], "OlympiadBench": ["olympiadbench"], "AIME": ["aime24"],
    "AMC": ["amc23"], "GSM8K": ["gsm8k_test", "gsm8k_train"],
}  # fmt: skip
TARGETS = {"itself": 1.0, "respelled": 1.0, "perturbed": 0.995}
MOST_OF_A_KIND = 6
"""Perturbations of one kind per label. Long lists would otherwise outweigh everything else."""
EXAMPLES = 40

_FUNCTIONS = {
    "sin": "cos",
    "cos": "sin",
    "tan": "sin",
    "cot": "tan",
    "ln": "sin",
    "log": "cos",
    "exp": "sin",
    "arcsin": "arccos",
}
_RELATIONS = {
    "<": ">",
    ">": "<",
    r"\le": r"\ge",
    r"\ge": r"\le",
    r"\leq": "<",
    r"\geq": ">",
    r"\geqslant": r"\leqslant",
}
_WORD = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\(?:left|right)(?![a-z])|\\[a-zA-Z]+|\\.")


def labels(folder: Path, files: list[str]) -> Iterator[str | None]:
    """Yields the label of each row, or None if the row names no answer."""
    for file in files:
        for line in (folder / f"{file}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if file == "minerva_math":
                yield last_boxed(row["solution"])
            elif file == "olympiadbench":
                yield ", ".join(row["final_answer"]) if row["final_answer"] else None
            else:
                yield str(row["answer"]).rpartition("####")[2].strip()


def exclusion(label: str | None) -> str | None:
    """Returns why a row is left out, or None."""
    if label is None:
        return "the row names no answer"
    if len(re.findall(r"(?<!\\)\$", label)) % 2:
        return "an odd number of dollar signs"
    brackets = re.sub(r"\\[()\[\]]", "", label)
    if sum(map(brackets.count, "([")) != sum(map(brackets.count, ")]")) or label.count("{") != label.count("}"):
        return "a bracket without its partner"
    return None


def plain(label: str) -> str:
    """Returns the label without the dollar signs that delimit mathematics."""
    return re.sub(r"(?<!\\)\$", "", label).strip()


def respellings(label: str) -> Iterator[tuple[str, str]]:
    """Yields other spellings of a label and their names."""
    bare = plain(label)
    yield "dollar signs", f"${bare}$"
    yield "spaces around", rf"\,{bare}\ "
    yield "bold", rf"\boldsymbol{{{bare}}}"
    yield "braces", f"{{{bare}}}"
    yield "full stop", f"{bare}."
    yield "parentheses of LaTeX", rf"\( {bare} \)"
    if r"\frac" in bare:
        yield "dfrac", bare.replace(r"\frac", r"\dfrac")
    if re.search(r"[(\[]|\\\{", bare) and not re.search(r"\\(?:left|text|big|Big|sqrt\[)", bare):
        left = re.sub(r"(?<!\\)([(\[])|(\\\{)", r"\\left\1\2", bare)
        yield "left and right", re.sub(r"(?<!\\)([)\]])|(\\\})", r"\\right\1\2", left)
    if re.fullmatch(r"[^{}]*(?:\\frac\{[^{}]*\}\{[^{}]*\}[^{}]*)+", bare) and not re.search(r"\d\s*\\frac|\{d ", bare):
        yield "slash", re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", bare)
    if re.search(r"\\sqrt\{\w+\}", bare) and not re.search(r"\d\s*\\sqrt", bare):
        yield "exponent one half", re.sub(r"\\sqrt\{(\w+)\}", r"\1^{1/2}", bare)
    if re.fullmatch(r"[^,(){}\[\]]*(?:, ?[^,(){}\[\]]*)+", bare) and not re.search(r"[a-zA-Z=!]|,\d{3}", bare):
        yield "another order", ", ".join(reversed(bare.split(",")))
    if r"\text" not in bare and r"\mbox" not in bare:
        yield "spaces inside", re.sub(r"(?<=[\w)}])([+=<>]|-(?=\w))(?=[\w(\\])", r" \1 ", bare)
    if re.fullmatch(r"\\text\{[^{}]*\}", bare):
        yield "another text font", bare.replace(r"\text", r"\textbf")
        yield "no text command", bare[6:-1]
    if re.fullmatch(r"-?\d+", bare):
        yield "decimal point", f"{bare}.0"
    if re.fullmatch(r"\d{4,}", bare):
        yield "thousands", f"{int(bare):,}".replace(",", "{,}")


def perturbations(label: str) -> Iterator[tuple[str, str, str]]:
    """Yields a kind, the label with one change of this kind, and the reason to leave it out, if there is one."""
    bare = plain(label)
    found: Counter[str] = Counter()
    for kind, start, end, replacement in _changes(bare):
        if found[kind] < MOST_OF_A_KIND:
            found[kind] += 1
            changed = bare[:start] + replacement + bare[end:]
            yield kind, changed, reason_to_be_equal(kind, bare, changed, start, end)


def _changes(bare: str) -> Iterator[tuple[str, int, int, str]]:
    commands = [match.span() for match in _WORD.finditer(bare)]
    inside = {index for start, end in commands for index in range(start, end)}
    is_words = re.fullmatch(r"\\(?:text|mbox)\s*\{[^{}\d]*\}", bare) is not None
    if is_words:
        for match in re.finditer(r"(?<=[a-zA-Z{(])[a-zA-Z](?=[a-zA-Z)}])", bare[5:]):
            letter = match[0]
            yield "letter", match.start() + 5, match.end() + 5, "x" if letter != "x" else "y"
        return
    if re.match(r"[\da-zA-Z.]|\\(?:frac|dfrac|sqrt|pi|binom|sin|cos|ln)", bare):
        yield "sign", 0, 0, "-"
    for index, character in enumerate(bare):
        if index in inside:
            continue
        if character.isdigit():
            yield "digit", index, index + 1, str((int(character) + 1) % 10)
        elif character in "+-":
            is_exponent_of_ten = bare[index - 1 : index] in ("e", "E") and bare[index + 1 : index + 2].isdigit()
            yield ("exponent" if is_exponent_of_ten else "sign"), index, index + 1, "-" if character == "+" else "+"
        elif character in "([" and bare[index - 1 : index] != "\\" and re.search(r",[^()\[\]]*[)\]]", bare[index:]):
            if r"\infty" in bare or r"\cup" in bare or ("]" in bare and "sqrt" not in bare):
                yield "bracket", index, index + 1, "[" if character == "(" else "("
        elif character in _RELATIONS:
            yield "relation", index, index + 1, _RELATIONS[character]
    for start, end in commands:
        name = bare[start + 1 : end]
        if name in _FUNCTIONS:
            yield "function", start, end, "\\" + _FUNCTIONS[name]
        elif name == "sqrt" and bare[end : end + 1] != "[":
            yield "function", start, end, r"\sqrt[3]" if bare[end : end + 1] == "{" else r"\ln "
        elif bare[start:end] in _RELATIONS:
            yield "relation", start, end, _RELATIONS[bare[start:end]] + " "
        elif name == "pi":
            yield "function", start, end, "e "


def reason_to_be_equal(kind: str, bare: str, changed: str, start: int, end: int) -> str:
    """Returns why the changed label is still the same by mathematics, or an empty text."""
    if kind == "sign" and re.match(r"[+-]?0(?![.\d]*[1-9])(?![\d^!])", changed[start:]):
        return "the sign of zero"
    if kind == "digit":
        values = [_decimal_at(text, start) for text in (bare, changed)]
        if None not in values and abs(values[0] - values[1]) <= Fraction(1, 10**6):
            return "within the tolerance of decimals"
    if kind == "bracket" and changed[end:].lstrip().startswith((r"-\infty", r"\infty")):
        return "an infinite end is open in any case"
    return ""


def _decimal_at(text: str, index: int) -> Any:
    for match in re.finditer(r"\d+\.\d+(?![\deE.])", text):
        if match.start() <= index < match.end():
            return Fraction(match[0])
    return None


def sample(label: str, answer: str) -> Sample:
    return Sample(
        Prompt("bench:0", (1,), "", label), Response([1], [0.0], "stop", 0), rf"The answer is \boxed{{{answer}}}."
    )


def cases(label: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields for a label: the check, its kind, the answer to grade, and the reason to leave it out."""
    yield "itself", "itself", label, ""
    for kind, text in respellings(label):
        yield "respelled", kind, text, ""
    for kind, text, reason in perturbations(label):
        yield "perturbed", kind, text, reason


def grade(name: str, folder: Path, pool: RewardPool) -> dict[str, Any]:
    """Returns the counts of one set. Verdicts depend on the label alone, so each label counts once."""
    rows = list(labels(folder, SETS[name]))
    excluded = Counter(reason for label in rows if (reason := exclusion(label)))
    counted = sorted({label for label in rows if label is not None and not exclusion(label)})
    entries = [(label, *case) for label in counted for case in cases(label)]
    left_out = Counter(reason for *_, reason in entries if reason)
    entries = [entry for entry in entries if not entry[4]]
    results = pool.score([sample(label, answer) for label, _, _, answer, _ in entries])
    counts: dict[str, Counter[str]] = {check: Counter() for check in TARGETS}
    wrong = []
    for (label, check, kind, answer, _), result in zip(entries, results, strict=True):
        is_right = result.outcome == "score" and (result.score == 1.0) is (check != "perturbed")
        counts[check]["graded"] += 1
        counts[check]["as they should be"] += is_right
        counts[check][f"without a verdict ({result.outcome})"] += result.outcome != "score"
        if not is_right:
            wrong.append([check, kind, label, answer, result.outcome if result.outcome != "score" else result.detail])
    return {
        "rows": len(rows),
        "labels": len(counted),
        "labels left out": dict(excluded),
        "changes left out": dict(left_out),
        **{check: {key: number for key, number in count.items() if number} for check, count in counts.items()},
        "not as they should be": wrong[:EXAMPLES],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", type=Path, help="folder with the published files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    options = parser.parse_args()
    results = {}
    with RewardPool(RewardSettings(name="math", workers=options.workers, timeout_seconds=20.0)) as pool:
        for name in options.sets:
            results[name] = grade(name, options.data, pool)
            print(name, json.dumps(results[name], indent=1, ensure_ascii=False))
    shares = {
        check: sum(result[check].get("as they should be", 0) for result in results.values())
        / sum(result[check]["graded"] for result in results.values())
        for check in TARGETS
    }
    keep(options.out, "grading", shares=shares, targets=TARGETS, sets=results)
    print(shares)
    if any(shares[check] < target for check, target in TARGETS.items()):
        sys.exit(f"below the targets {TARGETS}")


if __name__ == "__main__":
    main()
