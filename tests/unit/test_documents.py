"""Pages name keys, files, links and counts that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lpreg.advantages import ESTIMATORS
from lpreg.losses.registry import METHODS
from megatron_rl.config.keys import is_known
from megatron_rl.config.reward import VERIFIERS
from megatron_rl.config.schema import Config
from megatron_rl.observability.diagnosis import rules_of
from tests.unit.observability.test_method_rules import configurations

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = "|".join(Config.model_fields)
KEY = re.compile(rf"(?<![\w./-])((?:{SECTIONS})(?:\.\w+)+)(?![\w/(-])(?!\.\w)")
FILES = re.compile(r"\.(py|md|yaml|json|jsonl|parquet|log|html|csv|svg|png|txt|toml)$")
LINK = re.compile(r"\]\(([^)\s]+)\)")
WORDS = {"five": 5, "six": 6, "seven": 7}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def keys_in(text: str) -> Iterator[str]:
    """Dotted names in code that begin with a section of the configuration, without names of files and Python."""
    text = re.sub(r"```python.*?```", "", text, flags=re.S)
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.S)
    for part in code:
        for key in KEY.findall(part):
            if not FILES.search(key):
                yield key


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_key_on_a_page_is_known(page: Path) -> None:
    unknown = {key for key in keys_in(page.read_text(encoding="utf-8")) if not is_known(tuple(key.split(".")))}
    assert unknown == set()


def test_keys_are_found_on_the_pages() -> None:
    """Otherwise the test above would say nothing."""
    found = {key for page in PAGES for key in keys_in(page.read_text(encoding="utf-8"))}
    assert len(found) > 80 and {"rollout.server.python", "algorithm.with_lp_reg", "train.keep_checkpoints"} <= found
    assert list(keys_in("`algorithm.lp_reg.kappa` and `train.steps=3`")) == ["algorithm.lp_reg.kappa", "train.steps"]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    roots = "megatron_rl|lpreg|tests|benchmarks|examples|docker|tools"
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(rf"(?<![\w/.])((?:{roots})/[\w./-]*\w\.(?:py|yaml|json|md|sh|typed))\b", text))
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_the_pages_count_and_name_the_methods() -> None:
    assert f"{len(METHODS)} losses" in (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "docs/your-own-run.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"`algorithm\.name` is one of (\d+) methods(.*?)each with the presets", text, flags=re.S)
    assert int(section[0]) == len(METHODS)
    assert all({"paper", "reference"} <= set(method.presets) for method in METHODS.values())
    assert set(re.findall(r"`(\w+)`", section[1])) == set(METHODS)
    (word,) = re.findall(r"with (\w+) advantage estimators", text)
    assert WORDS[word] == len(ESTIMATORS)


def test_the_page_on_methods_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), flags=re.M)
    assert set(METHODS) <= set(rows)


def test_the_page_on_rewards_names_every_verifier() -> None:
    text = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    assert [verifier for verifier in VERIFIERS if f"`{verifier}`" not in text] == []


def test_every_warning_is_on_its_page() -> None:
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    names = {rule.name for settings in configurations() for rule in rules_of(settings)}
    assert {warning for warning in names if f"| `{warning}` |" not in text} == set()


METRIC = re.compile(
    r"`((?:train|lpreg|rollout|reward|perf|logprob|entropy|response_length|weight_sync|memory|correction)/[\w/]+\w)`"
)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_metrics_on_a_page_are_in_the_code(page: Path) -> None:
    code = "".join(
        p.read_text(encoding="utf-8") for room in ("megatron_rl", "lpreg") for p in (ROOT / room).rglob("*.py")
    )
    found = METRIC.findall(page.read_text(encoding="utf-8"))
    named = {metric for metric in found if not (ROOT / "megatron_rl" / metric).exists()}  # some are folders
    composed = re.compile("_(seconds|fraction)$")  # the code puts a phase or an outcome before these
    assert {metric for metric in named if composed.sub("", metric.rpartition("/")[2]) not in code} == set()
