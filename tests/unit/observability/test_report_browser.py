"""Tests of the report in a real browser: figures, script errors, network access, keyboard and dark mode."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.observability.report import write_report

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass
class Browser:
    """A page, with its script errors and network requests."""

    page: Any
    problems: list[str] = field(default_factory=list)

    def open(self, path: Path) -> Any:
        self.page.goto(path.resolve().as_uri())
        return self.page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed: `make test-browser` installs one on Debian")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    found = Browser(context.new_page())
    found.page.on("pageerror", lambda error: found.problems.append(f"script: {error}"))
    found.page.on("console", lambda line: found.problems.append(line.text) if line.type == "error" else None)
    found.page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else
        found.problems.append(f"network: {request.url}"),
    )  # fmt: skip
    yield found
    context.close()
    assert not found.problems


def drawn(page: Any) -> list[int]:
    """Returns the number of marks (lines, points, bars, violins) in each plot of the page."""
    counts: list[int] = page.evaluate(
        """() => [...document.querySelectorAll('.plot')].map(plot =>
             plot.querySelectorAll('.scatterlayer path, .barlayer path, .violinlayer path').length)"""
    )
    return counts


def background(page: Any) -> str:
    return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))


def test_every_figure_is_drawn(recorded_run: Path, browser: Browser) -> None:
    page = browser.open(write_report(recorded_run))
    counts = drawn(page)
    assert len(counts) == page.locator("h3").count() - page.locator(".cloud").count()
    assert len(counts) >= 18 and all(count > 0 for count in counts), counts
    assert page.locator(".cloud li").count() >= 2
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def test_several_runs_are_drawn_side_by_side(recorded_run: Path, tmp_path: Path, browser: Browser) -> None:
    other = tmp_path / "other"
    shutil.copytree(recorded_run, other)
    (other / "config.yaml").write_text((recorded_run / "config.yaml").read_text().replace("lp_reg", "grpo"))
    page = browser.open(write_report([recorded_run, other], tmp_path / "both.html"))
    assert all(count > 0 for count in drawn(page))
    assert page.locator(".column").count() == 2
    assert page.locator("table", has_text="algorithm.name").count() == 1


def test_the_viewer_works_by_keyboard(recorded_run: Path, browser: Browser) -> None:
    page = browser.open(write_report(recorded_run))
    assert page.locator("#prompt").inner_text() == "problem <b>0</b>", "text, not markup"
    assert page.locator(".sample").count() == 4
    assert page.locator("#samples .token.selected").count() > 0
    assert "p 0." in (page.locator(".token").nth(3).get_attribute("title") or "")
    page.locator("#viewer").focus()
    page.keyboard.press("ArrowRight")
    second = page.locator("#prompt").inner_text()
    assert second != "problem <b>0</b>"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#prompt").inner_text() == "problem <b>0</b>"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#group").evaluate("select => select.selectedIndex") == 11, (
        "the first group is followed by the last"
    )
    for _ in range(30):  # Tab reaches every control
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "group":
            break
    else:
        pytest.fail("Tab does not reach the list of groups")


def test_the_page_switches_between_light_and_dark(recorded_run: Path, browser: Browser) -> None:
    page = browser.open(write_report(recorded_run))
    light = background(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    dark = background(page)
    assert dark != light
    page.keyboard.press("d")
    assert background(page) == light
    page.locator("#theme").click()
    assert background(page) == dark
    grid = page.evaluate("() => getComputedStyle(document.querySelector('.plot .xgrid')).stroke")
    assert grid == page.evaluate(
        """() => { const e = document.createElement('i'); e.style.color = 'var(--grid)'; document.body.append(e);
                   return getComputedStyle(e).color }"""
    ), "the charts follow the theme"
    assert all(count > 0 for count in drawn(page))


def test_an_empty_run_has_a_page(tmp_path: Path, browser: Browser) -> None:
    page = browser.open(write_report(tmp_path))
    assert drawn(page) == [] and page.locator("text=Nothing has been evaluated yet").count() == 1


def shown(page: Any) -> list[str]:
    """Returns the verdicts of the responses that the viewer shows."""
    return [text.strip() for text in page.locator(".sample .badge").all_inner_texts()]


def test_the_viewer_shows_label_and_verdict_and_filters_responses(recorded_run: Path, browser: Browser) -> None:
    page = browser.open(write_report(recorded_run))
    assert page.locator("#label").inner_text() == "Label: 24"
    assert shown(page) == ["wrong", "right", "wrong", "right"]
    everything = page.locator("#found").inner_text()
    page.locator("#verdicts").select_option("right")
    assert shown(page) == ["right", "right"] and page.locator("#found").inner_text() != everything
    page.locator("#verdicts").select_option("")
    page.locator("#search").fill("WAIT")
    texts = page.locator(".sample .tokens").all_inner_texts()
    assert texts and all("wait" in text for text in texts)
    page.locator("#search").fill("no response has this text")
    assert not shown(page) and page.locator("#found").inner_text().startswith("0 responses")
    page.locator("#search").fill("problem <b>2</b>")
    assert page.locator("#group option").count() == 3, "a text of the prompt finds its group at every step"


def test_a_rollout_is_shown_as_a_conversation(agent_run: Path, browser: Browser) -> None:
    page = browser.open(write_report(agent_run))
    first = page.locator(".sample").first
    assert first.locator(".role").all_inner_texts() == ["system", "system", "user", "assistant", "tool", "assistant"]
    assert page.locator(".sample.further").count() == 2
    assert "sequence 2 of 2 of rollout 1" in page.locator(".sample.further .facts").first.inner_text()
    assert first.locator(".turn.tool .token:not(.given)").count() == 0, "what a tool writes is given"
    assert first.locator(".turn.tool").inner_text().count("56") == 1
    answer = first.locator(".turn.assistant").last
    assert "It is <b>56</b>." in answer.inner_text(), "text, not markup"
    assert answer.locator(".token:not(.given)").count() == len("It is <b>56</b>.") + 1
    colours = page.evaluate(
        """() => ['.turn.tool .token.given', '.turn.assistant .token:not(.given)']
             .map(place => getComputedStyle(document.querySelector(place)).color)"""
    )
    assert colours[0] == page.evaluate(COLOUR, "--soft") and colours[1] == page.evaluate(COLOUR, "--text")
    page.locator("#search").fill("yes, wait")
    assert page.locator(".sample").count() == 2 and page.locator(".sample.further").count() == 2
    page.locator("#search").fill("")
    page.locator("#verdicts").select_option("wrong")
    assert page.locator(".sample").count() == 0
    page.set_viewport_size({"width": 700, "height": 900})
    page.locator("#verdicts").select_option("right")
    assert page.locator(".sample").count() == 4
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


COLOUR = """name => { const e = document.createElement('i'); e.style.color = `var(${name})`; document.body.append(e);
                      const found = getComputedStyle(e).color; e.remove(); return found }"""


@pytest.mark.parametrize("width", [700, 380])
def test_a_narrow_page_does_not_scroll_sideways_and_its_legends_stay_off_the_plots(
    recorded_run: Path, tmp_path: Path, browser: Browser, width: int
) -> None:
    other = tmp_path / "a-run-with-a-rather-long-name-of-its-own"
    shutil.copytree(recorded_run, other)
    (other / "config.yaml").write_text((recorded_run / "config.yaml").read_text().replace("lp_reg", "grpo"))
    browser.page.set_viewport_size({"width": width, "height": 900})
    page = browser.open(write_report([recorded_run, other], tmp_path / "both.html"))
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    overlap = page.evaluate(
        """() => [...document.querySelectorAll('.plot')].filter(plot => {
             const legend = plot.querySelector('.legend'), area = plot.querySelector('.bglayer, .plot .xy');
             if (!legend || !area) return false;
             const grid = plot.querySelector('.gridlayer').getBoundingClientRect();
             return legend.getBoundingClientRect().bottom > grid.top + 6;
           }).map(plot => plot.id)"""
    )
    assert overlap == []


def test_a_legend_names_each_run_once(recorded_run: Path, tmp_path: Path, browser: Browser) -> None:
    other = tmp_path / "other"
    shutil.copytree(recorded_run, other)
    (other / "config.yaml").write_text((recorded_run / "config.yaml").read_text().replace("lp_reg", "grpo"))
    page = browser.open(write_report([recorded_run, other], tmp_path / "both.html"))
    legends = page.evaluate(
        """() => [...document.querySelectorAll('.plot')].map(plot =>
             [...plot.querySelectorAll('.legendtext')].map(name => name.textContent))"""
    )
    assert any("pass@8" in legend for legend in legends), "grey entries show what dashes mean"
    for legend in legends:
        assert len(set(legend)) == len(legend), legend


def test_the_navigation_leads_to_every_section(recorded_run: Path, browser: Browser) -> None:
    page = browser.open(write_report(recorded_run))
    targets = page.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert len(targets) >= 6 and all(page.locator(f"h2{target}, section{target}").count() == 1 for target in targets)


def test_colours_are_distinct(recorded_run: Path, browser: Browser) -> None:
    """The distance is that of CIE 1976, on which about 2 is just visible."""
    page = browser.open(write_report(recorded_run))
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
        palette = page.evaluate("() => [...Array(12).keys()].map(i => css(`--c${i}`))")
        points = [lab(color) for color in palette]
        near = min(
            (sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) ** 0.5, palette[i], palette[i + 1 + j])
            for i, p in enumerate(points)
            for j, q in enumerate(points[i + 1 :])
        )
        assert near[0] > 20, (theme, near)


def lab(color: str) -> tuple[float, float, float]:
    """Returns CIE L*a*b* of a colour such as #0067b0."""
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in rgb)
    x, y, z = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505, 0.2126 * r + 0.7152 * g + 0.0722 * b, (
        0.0193 * r + 0.1192 * g + 0.9505 * b
    ) / 1.089  # fmt: skip
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
