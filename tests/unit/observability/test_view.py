from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from megatron_rl.observability.live_view import LiveView
from megatron_rl.observability.make_view import make_view
from megatron_rl.observability.view import PlainView, View
from megatron_rl.utils.format import duration, number, sparkline

METRICS = {
    "reward/mean": 0.412,
    "entropy/token_mean": 0.298,
    "response_length/mean": 23.1,
    "response_length/truncated_fraction": None,
    "lpreg/selected_fraction": 0.0123,
    "perf/tokens_per_second": 12345.6,
    "train/lr": 3e-4,
}
EVALUATION = {"eval/held_out/avg@8": 0.468, "eval/held_out/pass@8": 0.938, "eval/held_out/p_wait_after_no": 0.031}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(total: int = 200) -> tuple[PlainView, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return PlainView(total, "a run", stream, clock), stream, clock


def live(width: int = 80, height: int = 24) -> tuple[LiveView, io.StringIO, Console, Clock]:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, height=height, _environ={})
    return LiveView(200, "[red]a run[/]", console, clock), stream, console, clock


def screen(view: LiveView, console: Console) -> list[str]:
    lines = console.render_lines(view.render(), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def test_the_plain_view_prints_steps_as_name_value_pairs() -> None:
    view, stream, clock = plain()
    for step in range(1, 11):
        clock.now += 0.5
        view.step(step, METRICS)
    first, tenth = stream.getvalue().splitlines()
    assert first.startswith("step=1/200 ")
    assert tenth == (
        "step=10/200 reward=0.412 entropy=0.298 length=23.1 truncated=- selected=0.012 tokens/s=12346 left=1min35s"
    )


def test_the_plain_view_prints_shares_without_a_reward_only_above_zero() -> None:
    view, stream, _ = plain()
    for step, share in ((10, 0.0), (20, 0.25), (30, None)):
        view.step(step, METRICS | {"reward/timeout_fraction": share, "reward/error_fraction": 0.0})
    lines = stream.getvalue().splitlines()
    assert [line.count("timeouts=0.250") for line in lines] == [0, 1, 0]
    assert "errors" not in stream.getvalue() and lines[0].count("timeouts") == lines[2].count("timeouts") == 0


def test_the_live_panel_has_rows_of_shares_without_a_reward_once_there_are_any() -> None:
    view, _, console, _ = live()
    view.step(1, METRICS | {"reward/timeout_fraction": 0.0, "reward/error_fraction": 0.0})
    assert "timeouts" not in "\n".join(screen(view, console))
    view.step(2, METRICS | {"reward/timeout_fraction": 0.25, "reward/error_fraction": 0.0})
    rows = {line[1:20].strip(): line[20:].split() for line in screen(view, console)}
    assert rows["timeouts"][:2] == ["0.250", "0.000"] and "errors" not in rows


def test_the_plain_view_prints_every_ten_seconds_and_at_the_end() -> None:
    view, stream, clock = plain(total=7)
    for step in range(1, 8):
        clock.now += 4
        view.step(step, METRICS)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["step=1/7", "step=4/7", "step=7/7"]


def test_the_plain_view_prints_one_line_per_evaluated_suite() -> None:
    view, stream, _ = plain()
    view.step(1, METRICS)
    view.eval(1, EVALUATION | {"eval/fresh/avg@8": None})
    assert stream.getvalue().splitlines()[1:] == [
        "eval step=1 suite=held_out avg@8=0.468 pass@8=0.938 p_wait_after_no=0.031",
        "eval step=1 suite=fresh avg@8=-",
    ]


def test_the_plain_view_prints_each_phase_once_and_throttles_the_warm_start() -> None:
    view, stream, clock = plain()
    with view:
        for _ in range(3):
            view.phase("rollout")
            view.phase("train")
        for step in range(1, 21):
            clock.now += 1
            view.warm_start(step, 20, 1.5, 20.0 - step)
        view.message("saved")
    assert stream.getvalue().splitlines() == [
        "a run: 200 steps",
        "phase=rollout",
        "phase=train",
        "warm_start=1/20 loss=1.500 left=19s",
        "warm_start=11/20 loss=1.500 left=9s",
        "warm_start=20/20 loss=1.500 left=0s",
        "saved",
    ]
    assert "\x1b" not in stream.getvalue()


@given(
    width=st.integers(40, 120),
    suites=st.integers(0, 12),
    warm=st.booleans(),
    share=st.sampled_from([0.0, 0.5]),
    names=st.text(st.characters(exclude_characters="/", exclude_categories=["C", "Z"]), min_size=1, max_size=60),
)
def test_the_live_panel_fits_the_terminal(width: int, suites: int, warm: bool, share: float, names: str) -> None:
    view, _, console, clock = live(width)
    view.phase("warm start")
    for step in range(1, 60):
        clock.now += 100
        failed = {"reward/timeout_fraction": share, "reward/error_fraction": share}
        view.step(step, METRICS | {"response_length/truncated_fraction": 0.1} | failed)
    for suite in range(suites):
        view.eval(50, {f"eval/{names}{suite}/avg@8": 0.5, f"eval/{names}{suite}/pass@8": 0.9})
    if warm:
        view.warm_start(3, 900, 2.5, 60.0)
    lines = screen(view, console)
    assert len(lines) <= 16
    assert all(cell_len(line) <= width for line in lines)
    numbers = next(line for line in lines if "loss" in line or "reward" in line)
    assert ("2.500" if warm else "0.412") in numbers, "a narrow terminal shortens names and history, not numbers"


def test_the_live_panel_shows_progress_and_main_metrics() -> None:
    view, _, console, clock = live()
    view.eval(0, {"eval/held_out/avg@8": 0.223, "eval/held_out/pass@8": 0.871})
    for step in range(1, 48):
        clock.now += 2
        view.step(step, METRICS | {"reward/mean": step / 100})
    view.eval(50, EVALUATION)
    view.phase("rollout")
    clock.now += 3
    text = "\n".join(screen(view, console))
    assert "[red]a run[/]" in text, "a title is text, not markup"
    assert "step 47/200" in text
    assert "5 min 03 s left" in text
    assert "rollout, 3 s" in text
    rows = {line[1:20].strip(): line[20:].split() for line in text.splitlines()}
    assert rows["reward"][:2] == ["0.470", "0.010"]
    assert rows["reward"][2][0] == "▁" and rows["reward"][2][-1] == "█"
    assert rows["held_out accuracy"][:2] == ["0.468", "0.223"]
    assert rows["held_out pass@8"][:2] == ["0.938", "0.871"]
    assert rows["selected share"][0] == "0.012"
    assert "truncated share" not in rows, "a metric without a value has no row"


def test_the_live_panel_shows_the_warm_start_and_then_the_steps() -> None:
    view, _, console, _ = live()
    view.warm_start(120, 900, 2.5, 61.0)
    before = "\n".join(screen(view, console))
    assert "warm start 120/900" in before and "warm-start loss" in before and "1 min 01 s left" in before
    view.step(1, METRICS)
    after = "\n".join(screen(view, console))
    assert "warm" not in after and "step 1/200" in after


def test_the_live_view_takes_over_the_history_of_a_resumed_run() -> None:
    view, _, console, clock = live()
    rows = [
        {"step": 0} | EVALUATION,
        *({"step": n, "time": 1.0} | METRICS | {"reward/mean": n / 10} for n in (1, 2, 3)),
    ]
    view.history(rows)
    text = "\n".join(screen(view, console))
    assert "step 3/200" in text and "left" not in text, "the time left comes from this process's steps"
    clock.now += 5
    view.step(4, METRICS | {"reward/mean": 0.9})
    text = "\n".join(screen(view, console))
    shown = {line[1:20].strip(): line[20:].split() for line in text.splitlines()}
    assert shown["reward"][:2] == ["0.900", "0.100"] and len(shown["reward"][2]) == 4
    assert shown["held_out accuracy"][:2] == ["0.468", "0.468"]


def test_the_live_view_restores_the_terminal_after_an_error() -> None:
    view, stream, _, _ = live()
    before = sys.stdout
    with pytest.raises(KeyboardInterrupt), view:
        view.message("saved step 5 [bold]")
        raise KeyboardInterrupt
    written = stream.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is visible again"
    assert sys.stdout is before
    assert "saved step 5 [bold]" in written and "stopped" in written


def test_the_view_off_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with make_view("off", 10, "a run") as view:
        view.phase("rollout")
        view.warm_start(1, 2, 0.5, None)
        view.step(1, METRICS)
        view.eval(1, EVALUATION)
        view.message("hello")
    assert capsys.readouterr() == ("", "")
    assert type(view) is View


def test_auto_selects_the_live_view_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_view("auto", 10, "a run"), PlainView)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_view("auto", 10, "a run"), LiveView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view("auto", 10, "a run"), PlainView)


def test_numbers_and_durations_are_formatted() -> None:
    values = (0.0, 0.4119, 23.14, 12345.6, 3.14e-5, None, float("nan"))
    assert [number(value) for value in values] == ["0.000", "0.412", "23.1", "12346", "3.1e-05", "-", "-"]
    assert [duration(s) for s in (9, 185, 7620, None)] == ["9 s", "3 min 05 s", "2 h 07 min", "-"]


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=200), width=st.integers(1, 40)
)
def test_a_sparkline_never_exceeds_its_width(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(width, len(values))


def test_the_sparkline_of_a_constant_is_flat() -> None:
    assert sparkline([0.012, 0.012 + 1e-17, 0.012] * 9, 5) == "▁" * 5
