"""Draws the pictures of docs/lp-reg.md, and of the README, with lpreg's own statistics.

    python benchmarks/lp_reg_pictures.py [--folder docs]

The distribution is made up: a favourite, a few plausible tokens, a spark, and a long tail of noise. The same code gives
the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parents[1]))

from lpreg import token_stats

MIN_P, BETA = 0.02, 1.0
TOKENS = {"<eos>": 0.46, "so": 0.14, "hmm": 0.08, "wait": 0.03}
NOISE = 60
"""Number of noise tokens, which share the mass that is left."""
COLOURS = {"p": "#4c6a92", "noise": "#bbbbbb", "q": "#d08c2f", "spark": "#b4475a"}
MARKED = ((0.005, "the quickstart's task", (14, 26)), (0.385, "a task with a long tail", (10, -30)))
"""Mass, words and place of the words of the marked points. Both masses were measured after a failed attempt."""
_TEXT = {"textcoords": "offset points", "fontsize": 8, "color": "#444444"}
_ARROW = _TEXT | {"color": COLOURS["spark"], "arrowprops": {"arrowstyle": "-", "color": "#888888"}}
STYLE = {"svg.hashsalt": "lp-reg", "svg.fonttype": "none", "font.size": 9, "savefig.facecolor": "white"}


def distribution() -> torch.Tensor:
    """Returns the probabilities [V] of the made-up next token, most likely first."""
    named = torch.tensor(list(TOKENS.values()), dtype=torch.float64)
    weights = torch.linspace(1.6, 0.4, NOISE, dtype=torch.float64)
    return torch.cat([named, weights / weights.sum() * (1 - named.sum())])


def filter_picture(path: Path) -> None:
    """Draws the distribution, the threshold of the filter, and the proxy."""
    p, named = distribution(), len(TOKENS)
    stats = token_stats(p.log().expand(len(p), -1), torch.arange(len(p)), min_p=MIN_P)
    z = stats.log_z.exp()[0].item()
    q = torch.where(stats.in_filter, p / z, 0.0)
    places = [4.0 * i for i in range(named)] + [4.0 * named + i for i in range(NOISE)]
    widths = [3.0] * named + [0.8] * NOISE
    colours = [COLOURS["p"]] * (named - 1) + [COLOURS["spark"]] + [COLOURS["noise"]] * NOISE
    threshold, spark = MIN_P * p.max().item(), places[named - 1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 3.2), layout="constrained")
        axes.bar(places, p, color=colours, width=widths)
        axes.bar(places, q, color="none", edgecolor=COLOURS["q"], linewidth=1.6, width=widths, label="proxy q = p / Z")
        axes.axhline(threshold, color="#444444", linestyle="--", linewidth=0.9)
        axes.annotate("threshold of the filter: κ max p", (places[-1], threshold), (0, 3), ha="right", **_TEXT)
        axes.annotate("a spark: rare, but in the filter", (spark, q[named - 1].item()), (26, 20), **_ARROW)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.annotate(f"noise: {1 - z:.0%} of the mass, filtered", (45, 0.0022), (0, 0), ha="center", bbox=box, **_TEXT)
        axes.set(yscale="log", ylim=(0.0012, 1), ylabel="probability (log scale)", xlim=(-2.5, places[-1] + 1))
        axes.set_xticks(places[:named], list(TOKENS))
        axes.legend(frameon=False, loc="upper right")
        _clean(axes)
        _write(figure, path)


def shift_picture(path: Path) -> None:
    """Draws the shift of the advantage against the mass that the filter drops."""
    dropped = torch.linspace(0.001, 0.5, 200, dtype=torch.float64)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 2.8), layout="constrained")
        axes.plot(dropped, BETA * (1 / (1 - dropped) - 1), color=COLOURS["q"], linewidth=1.8)
        axes.axhspan(0.4, 1.1, color=COLOURS["p"], alpha=0.12, linewidth=0)
        axes.annotate("size of usual negative advantages", (0.01, 1.0), (0, -4), **_TEXT)
        for mass, words, place in MARKED:
            shift = BETA * (1 / (1 - mass) - 1)
            axes.plot([mass], [shift], "o", color=COLOURS["spark"], markersize=5)
            axes.annotate(words, (mass, shift), place, **_ARROW)
        axes.set(xlabel="1 - Z: mass that the filter drops", ylabel="β (1/Z - 1), with β = 1")
        axes.set(xlim=(0, 0.5), ylim=(0, 1.15))
        _clean(axes)
        _write(figure, path)


def seeds_picture(seeds: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draws the demonstration's outcomes, a line per seed from GRPO to Lp-Reg. `seeds`: seed -> measure -> values."""
    measures = {"accuracy": "accuracy", "pass@8": "pass@8", "p(wait after no)": "p(wait) after a failed attempt"}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(measures), figsize=(7.4, 2.9), layout="constrained")
        for axes, (measure, title) in zip(panels, measures.items(), strict=True):
            every = [outcomes[measure] for outcomes in seeds.values()]
            for each in every:
                colour = COLOURS["p"] if each["lp_reg"] > each["grpo"] else COLOURS["spark"]
                axes.plot([0, 1], [each["grpo"], each["lp_reg"]], "o-", color=colour, markersize=3.5, linewidth=1)
            before = sum(each["before"] for each in every) / len(every)
            axes.axhline(before, color="#888888", linestyle=":", linewidth=1)
            axes.annotate("before", (1.25, before), (0, 2), ha="right", **_TEXT)
            axes.set(title=title, xlim=(-0.3, 1.3))
            axes.title.set_fontsize(9)
            axes.set_xticks([0, 1], ["GRPO", "Lp-Reg"])
            _clean(axes)
        _write(figure, path)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)


def _write(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    folder = parser.parse_args().folder
    filter_picture(folder / "lp-reg-filter.svg")
    shift_picture(folder / "lp-reg-shift.svg")


if __name__ == "__main__":
    main()
