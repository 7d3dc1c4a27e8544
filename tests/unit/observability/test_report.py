from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from megatron_rl.cli import main
from megatron_rl.errors import UserError
from megatron_rl.observability.report import write_report
from megatron_rl.observability.report.curves import build_charts


def page(folder: Path) -> str:
    """Returns the report without the source of plotly, which mentions addresses that the page never requests."""
    text = write_report(folder).read_text()
    assert text.count(get_plotlyjs()) <= 1
    return text.replace(get_plotlyjs(), "")


def visible(text: str) -> str:
    return re.sub(r"<[^>]*>|\s+", " ", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S))


def chart_data(text: str) -> list[dict[str, Any]]:
    found = re.search(r"const charts = (.*);$", text, flags=re.M)
    assert found
    charts: list[dict[str, Any]] = json.loads(found.group(1))
    return charts


def test_the_report_of_a_finished_run_shows_facts_and_evaluations(run_folder: Path) -> None:
    text = page(run_folder)
    words = " ".join(visible(text).split())
    assert "Algorithm lp_reg paper Model runs/data/countdown/model Steps 200 of 200 " in words
    assert "held_out accuracy (avg@8) 0.223 step 0 0.673 step 200 +0.450 0.673 step 200 pass@8 0.871 step 0" in words
    assert "p_wait_after_no 0.031 step 0 0.631 step 200 +0.600" in words
    assert "proxy_source: lagged" in words
    assert not [path for path in run_folder.iterdir() if path.name.endswith(".partial")]


def test_the_report_loads_nothing_from_elsewhere(run_folder: Path) -> None:
    text = page(run_folder)
    assert "://" not in text
    assert not re.search(r"<(link|img|iframe|base)\b|\bsrc\s*=|\bhref\s*=\s*\"?[^\"#]|@import|url\(", text)
    assert "default-src 'none'" in text
    assert "</script" not in get_plotlyjs()


def test_every_metric_of_the_run_has_a_line(run_folder: Path, rows: list[dict[str, Any]]) -> None:
    charts = {chart.title: chart for chart in build_charts(rows)}
    assert len(charts) == 16
    accuracy = charts["Accuracy and pass@k"]
    assert [(line.name, line.color, line.dash) for line in accuracy.lines] == [
        ("held_out avg@8", 1, "solid"),
        ("fresh avg@8", 2, "solid"),
        ("held_out pass@8", 1, "dash"),
        ("fresh pass@8", 2, "dash"),
    ]
    assert [line.name for line in charts["Probes"].lines] == ["held_out p_wait_after_no", "fresh p_wait_after_no"]
    assert [line.name for line in charts["Seconds per phase"].lines] == ["rollout", "reward", "train", "weight sync"]
    assert charts["Lp-Reg threshold delta"].log and not charts["Gradient norm"].log
    assert 7 not in charts["Gradient norm"].lines[0].x, "a null value has no point"
    data = chart_data(page(run_folder))
    assert len(data) == 16
    assert len(data[0]["lines"][0]["raw"]) == len(data[0]["lines"][0]["y"]) == 200


def test_the_moving_average_stays_within_the_values_and_is_smoother(rows: list[dict[str, Any]]) -> None:
    (line,) = build_charts(rows)[0].lines
    assert line.smooth is not None
    assert line.smooth[0] == pytest.approx(line.y[0])
    assert min(line.y) <= min(line.smooth) and max(line.smooth) <= max(line.y)

    def roughness(values: list[float]) -> float:
        return sum(abs(b - a) for a, b in pairwise(values))

    assert roughness(line.smooth) < roughness(line.y) / 3


def test_markup_in_names_is_escaped(run_folder: Path) -> None:
    attack = "</script><img src=x onerror=alert(1)>{{ 7*7 }}"
    (run_folder / "config.yaml").write_text(f"run:\n  name: '{attack}'\nmodel:\n  path: '<b>m</b>'\n")
    row = {"step": 1, "time": 1.0, f"eval/{attack}/avg@8": 0.5, "reward/mean": 0.5}
    (run_folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text = page(run_folder)
    assert "<img" not in text and "<b>m" not in text and "{{ 7*7 }}" in text
    assert text.count("</script>") == 2
    assert chart_data(text)[1]["lines"][0]["name"].endswith("avg@8")


def test_a_run_without_metrics_has_a_report(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").write_text("")
    words = visible(page(run_folder))
    assert "Nothing has been evaluated yet." in words and "No training step has been logged yet." in words
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / "config.yaml").unlink()
    words = visible(page(run_folder))
    assert "countdown-lp_reg" in words and "no config.yaml" in words


@pytest.mark.parametrize("lines", [1, 2, 30])
def test_an_interrupted_run_has_a_report(run_folder: Path, lines: int) -> None:
    path = run_folder / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:lines]
    path.write_text("".join(kept) + '{"step": 40, "rewa')
    words = visible(page(run_folder))
    assert f"{lines - 1} of 200 (in progress or interrupted)" in words
    assert "0.223" in words and "+0.450" not in words


def test_a_row_may_have_a_step_only(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "reward/mean": null, "eval/a/avg@8": NaN}\n')
    assert "No training step has been logged yet." in visible(page(run_folder))


def test_missing_folders_and_broken_files_are_errors(run_folder: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_report(run_folder / "nowhere")
    (run_folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(run_folder)


@pytest.mark.parametrize("output", [".", "..", "/", "folder"])
def test_a_folder_as_output_is_an_error(
    run_folder: Path,
    tmp_path: Path,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run_folder), "--output", output]) == 2
    assert f"cannot write {output}: it is a folder" in capsys.readouterr().err


def test_a_failed_write_keeps_the_old_report(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(run_folder).read_bytes()

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_bytes() == old
