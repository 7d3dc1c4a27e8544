r"""Typographic characters as LaTeX: signs, vulgar fractions, roots, exponents, Greek letters."""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "\u2212\u2013\u2014\u2010\u2011": "-",
    "\u2018\u2019\u2032": "'",
    "\u201c\u201d\u2033\u00ab\u00bb": '"',
    "\u00a0\u2009\u202f\n\t\r": " ",
    "\u200b\ufeff\u2061\u2062\u2705\u2713\u2714\ufe0f": "",
    "\u00d7": r"\times ",
    "\u00b7\u22c5\u2022\u2219": r"\cdot ",
    "\u2217": "*",
    "\u00f7\u2044\u2215": "/",
    "\u221e": r"\infty ",
    "\u00b0\u00ba\u02da": r"^\circ ",
    "\u2264\u2a7d": r"\le ",
    "\u2265\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2261": r"\equiv ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u2208": r"\in ",
    "\u2216": r"\setminus ",
    "\u3002": ".",
    "\u2026\u22ef": r"\dots ",
    "\u2192": r"\to ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u2115": r"\mathbb{N}",
    "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}",
    "\u2220": r"\angle ",
    "\u2103": r"^\circ C",
    "\u2109": r"^\circ F",
    "\u03a9": r"\Omega ",
    "\u00b5": r"\mu ",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u230a": r"\lfloor ",
    "\u230b": r"\rfloor ",
    "\u2308": r"\lceil ",
    "\u2309": r"\rceil ",
    "\u2227": r"\land ",
    "\u2228": r"\lor ",
    "\uff05": r"\%",
    "\u221a": r"\sqrt",
    "\u221b": r"\sqrt[3]",
}
"""The spelling of each character, by groups of characters that mean the same."""
_CHARACTERS = {character: spelled for characters, spelled in _SIGNS.items() for character in characters}


def plain_characters(text: str) -> str:
    """Replaces typographic characters by LaTeX: vulgar fractions, roots, exponents, Greek letters and the like."""
    found: list[str] = []
    for character in re.sub(r"\u221a(\d+)", r"\\sqrt{\1}", text):
        piece = (
            _CHARACTERS[character]
            if character in _CHARACTERS
            else character
            if character.isascii()
            else _plain_character(character)
        )
        if found and piece[:2] in ("^{", "_{") and found[-1][:2] == piece[:2]:
            found[-1] = found[-1][:-1] + piece[2:]  # the digits of one exponent or of one index
        else:
            found.append(piece)
    return "".join(found)


def _plain_character(character: str) -> str:
    kind, _, letters = unicodedata.decomposition(character).partition("> ")
    plain = unicodedata.normalize("NFKC", character).replace("\u2044", "/").replace("\u2212", "-")
    if kind == "<fraction":
        over, _, under = plain.partition("/")
        return rf"\frac{{{over}}}{{{under}}}"
    if kind == "<super" and letters:
        return f"^{{{plain}}}"
    if kind == "<sub" and letters:
        return f"_{{{plain}}}"
    name = unicodedata.name(character, "")
    if match := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (?:FINAL )?([A-Z]+)", name):
        letter = match[2].lower().replace("lamda", "lambda")
        return rf"\{letter if match[1] == 'SMALL' else letter.capitalize()} "
    return plain if kind in ("<wide", "<font", "<compat", "<narrow") else character
