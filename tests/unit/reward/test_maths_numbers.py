"""Tests of plain numbers: all spellings of a number are equal, and different numbers are not."""

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.reward.maths import verify_maths
from megatron_rl.reward.maths.numbers import close, read_number
from megatron_rl.reward.maths.units import read_unit, split_unit
from megatron_rl.types import Sample

MakeSample = Callable[..., Sample]
fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=1000)


def spellings(value: Fraction) -> list[str]:
    sign, over, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    whole, rest = divmod(over, under)
    found = [f"{sign}{over}/{under}", rf"{sign}\frac{{{over}}}{{{under}}}", rf"\dfrac{{{sign}{over}}}{{{under}}}"]
    if rest:
        found.append(rf"{sign}{whole}\frac{{{rest}}}{{{under}}}")
    if under == 1:
        found += [f"{sign}{over}", f"{sign}{over}.0", f"{sign}{over:,}"]
    return found


@given(fractions, st.data())
def test_spellings_of_one_number_are_equal(make_sample: MakeSample, value: Fraction, data: st.DataObject) -> None:
    label, answer = (data.draw(st.sampled_from(spellings(value))) for _ in range(2))
    assert verify_maths(make_sample(rf"\boxed{{{answer}}}", label)).score == 1.0


@given(fractions, fractions, st.data())
def test_different_numbers_are_not_equal(
    make_sample: MakeSample, one: Fraction, other: Fraction, data: st.DataObject
) -> None:
    if close(one, other):
        return
    label, answer = (data.draw(st.sampled_from(spellings(value))) for value in (one, other))
    assert verify_maths(make_sample(rf"\boxed{{{answer}}}", label)).score == 0.0


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_gets_a_verdict(make_sample: MakeSample, label: str, answer: str) -> None:
    if not label.strip() or "box" in label:
        return
    assert verify_maths(make_sample(rf"\boxed{{{answer}}}", label)).score in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "value", "decimal"),
    [
        ("1234.50", Fraction(2469, 2), True),
        ("-1./3", Fraction(-1, 3), False),
        ("3 1/3", Fraction(10, 3), False),
        ("-.5", Fraction(-1, 2), True),
        ("1e-3", Fraction(1, 1000), False),
        (r"2.5 \times 10^{3}", Fraction(2500), True),
        ("10^{-2}", Fraction(1, 100), False),
        (r"0.1\overline{6}", Fraction(1, 6), False),
        (r"-2\frac{1}{2}", Fraction(-5, 2), False),
    ],
)
def test_numbers_are_read_in_every_notation(text: str, value: Fraction, decimal: bool) -> None:
    number = read_number(text)
    assert number is not None and (number.value, number.is_decimal) == (value, decimal)


@pytest.mark.parametrize("text", ["", "x", "1/0", r"\frac{1}{0}", "1e99999", "3 4", "1,00", "--1", "1.2.3"])
def test_a_text_that_is_not_a_number_is_not_read(text: str) -> None:
    assert read_number(text) is None


def test_units_have_kinds_and_factors() -> None:
    assert split_unit(r"5 \text{ cm}^{2}")[0] == "5"
    square = read_unit("cm^{2}")
    assert square and square.kinds == {"length": 2} and square.factor == Fraction(1, 10_000)
    speed, written = read_unit("km/h"), read_unit("kilometers per hour")
    assert speed and written and (speed.kinds, speed.factor) == (written.kinds, written.factor)
    assert split_unit("2c") == ("2c", None), "a variable is not a unit"


def test_a_word_that_changes_the_number_is_no_unit() -> None:
    assert split_unit(r"34\text{ or more}") == (r"34\text{ or more}", None)
    million = split_unit(r"34\text{ million}")[1]
    assert million and million.scale == 10**6
