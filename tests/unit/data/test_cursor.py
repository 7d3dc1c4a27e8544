"""Tests of the cursor: every row once per epoch, in an order that a checkpoint continues exactly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.cursor import Cursor
from megatron_rl.errors import UserError

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**40)
TAKES = st.lists(st.integers(0, 50), max_size=12)


@given(SIZES, SEEDS, st.booleans(), TAKES)
def test_each_epoch_has_every_row_once(size, seed, shuffle, takes):
    cursor = Cursor(size, seed, shuffle)
    rows = [row for n in takes for row in cursor.take(n)]
    assert len(rows) == sum(takes)
    assert all(type(row) is int for row in rows)
    for start in range(0, len(rows), size):
        epoch = rows[start : start + size]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(size))
    assert cursor.epoch == len(rows) // size


@given(SIZES, SEEDS, st.booleans(), TAKES, st.integers(0, 100))
def test_a_resumed_cursor_continues_exactly(size, seed, shuffle, takes, more):
    cursor = Cursor(size, seed, shuffle)
    for n in takes:
        cursor.take(n)
    state = json.loads(json.dumps(cursor.state()))
    resumed = Cursor(size, seed, shuffle)
    resumed.take(3)
    resumed.load_state(state)
    assert resumed.take(more) == cursor.take(more)


@given(SIZES, SEEDS, TAKES)
def test_the_order_does_not_depend_on_how_many_rows_are_taken_at_once(size, seed, takes):
    piecewise = Cursor(size, seed, True)
    assert [row for n in takes for row in piecewise.take(n)] == Cursor(size, seed, True).take(sum(takes))


def test_the_order_depends_on_seed_and_epoch():
    rows = Cursor(50, seed=1, shuffle=True).take(100)
    assert rows[:50] != rows[50:]
    assert rows[:50] != Cursor(50, seed=2, shuffle=True).take(50)
    assert rows[:50] != list(range(50))


def test_without_shuffling_the_file_order_repeats():
    assert Cursor(3, seed=1, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("other", [Cursor(9, 0, True), Cursor(8, 1, True), Cursor(8, 0, False)])
def test_a_state_of_other_data_is_refused(other):
    with pytest.raises(UserError, match="resume with the same data, seed and shuffle"):
        Cursor(8, 0, True).load_state(other.state())


@pytest.mark.parametrize(
    "damage", [{"position": 8}, {"position": -1}, {"position": None}, {"epoch": "1"}, {"epoch": -1}]
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    cursor = Cursor(8, 0, True)
    cursor.take(3)
    before = cursor.state()
    with pytest.raises(UserError, match="damaged"):
        cursor.load_state({**before, **damage})
    assert cursor.state() == before


def test_a_cursor_without_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        Cursor(0, 0, True)
    with pytest.raises(ValueError, match="cannot take -1"):
        Cursor(1, 0, True).take(-1)
