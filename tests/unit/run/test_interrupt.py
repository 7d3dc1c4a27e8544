from __future__ import annotations

import signal

import pytest

from megatron_rl.run.interrupt import stop_on_interrupt

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_signal_requests_a_stop_and_the_second_ends_the_run(
    first: signal.Signals, second: signal.Signals
) -> None:
    before = handlers()
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt(said.append) as stop:
        assert not stop.requested and not said
        signal.raise_signal(first)
        assert stop.requested
        (line,) = said
        assert line.startswith("Ctrl-C" if first == signal.SIGINT else "SIGTERM")
        assert "stops after this step, with a checkpoint" in line and "second" in line and "at once" in line
        signal.raise_signal(second)
    assert handlers() == before


def test_handlers_are_restored_with_and_without_an_error() -> None:
    before = handlers()
    with stop_on_interrupt(print) as stop:
        assert handlers() != before
    assert not stop.requested
    assert handlers() == before
    with pytest.raises(ValueError, match="mine"), stop_on_interrupt(print):
        raise ValueError("mine")
    assert handlers() == before
