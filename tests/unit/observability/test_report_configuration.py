"""Tests of the report's configuration section, which shows the source of every value."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from megatron_rl.observability.report import write_report
from megatron_rl.observability.report.configuration import chosen_settings, config_lines

SOURCES = """\
# The effective configuration of this run.
run:
  name: 'a # in a name'  # file runs/mine.yaml
  folder: runs/a#1  # default
seed: 3  # override
algorithm:
  name: lp_reg  # file runs/base.yaml
  preset: paper  # default
  lp_reg:
    rho: 0.01  # preset paper
    kappa: 1.0  # default
actor:
  optimizer:
    betas:  # preset paper
    - 0.9
    - 0.95
data:
  label: "two
    lines # of text"  # override
profile: []  # default
"""


def test_trailing_comments_are_split_from_their_lines() -> None:
    lines = config_lines(SOURCES)
    assert lines[0].text == "# The effective configuration of this run."
    by_text = {line.text.strip(): (line.source, line.kind) for line in lines}
    assert by_text["name: 'a # in a name'"] == ("file runs/mine.yaml", "file")
    assert by_text["folder: runs/a#1"] == ("default", "default")
    assert by_text["rho: 0.01"] == ("preset paper", "preset")
    assert by_text['lines # of text"'] == ("override", "override")
    assert by_text["algorithm:"] == ("", "")
    assert yaml.safe_load("\n".join(line.text for line in lines)) == yaml.safe_load(SOURCES)


def test_settings_with_a_source_other_than_default_are_listed() -> None:
    assert [(setting.key, setting.value, setting.line.source) for setting in chosen_settings(SOURCES)] == [
        ("run.name", "a # in a name", "file runs/mine.yaml"),
        ("seed", "3", "override"),
        ("algorithm.name", "lp_reg", "file runs/base.yaml"),
        ("algorithm.lp_reg.rho", "0.01", "preset paper"),
        ("actor.optimizer.betas", "[0.9, 0.95]", "preset paper"),
        ("data.label", "two lines # of text", "override"),
    ]


def test_a_configuration_without_sources_has_no_list_of_chosen_settings() -> None:
    plain = "seed: 0\nmodel: {path: m, note: 'a # b'}\n"
    assert [line.text for line in config_lines(plain)] == plain.splitlines()
    assert chosen_settings(plain) == []
    assert config_lines("") == [] and chosen_settings("") == []


def test_the_page_shows_the_source_of_every_value(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SOURCES)
    page = write_report(tmp_path).read_text()
    assert "Settings of this run that are not defaults" in page
    row = '<td>algorithm.lp_reg.rho</td><td>0.01</td><td><span class="source preset">preset paper</span></td>'
    assert row in page
    found = re.search(r"<pre>(.*?)</pre>", page, flags=re.S)
    assert found
    every = found.group(1)
    assert '\n    kappa: 1.0  <span class="source default">default</span>\n' in every
    assert '\nseed: 3  <span class="source override">override</span>\nalgorithm:\n  name: lp_reg  <span' in every


def test_the_page_shows_a_configuration_without_sources_unchanged(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    text = (run_folder / "config.yaml").read_text()
    assert f"<pre>\n{text}</pre>" in page
    assert "that are not defaults" not in page
