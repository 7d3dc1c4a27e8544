"""Draws the result of `scaling.py` for docs/benchmarks.md. The same figures give the same file, byte for byte."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = {"synchronous": "#4c6a92", "over-sampled": "#d08c2f", "partial": "#4f9d69", "asynchronous": "#b4475a"}
STYLE = {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9, "savefig.facecolor": "white"}


def picture(models: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Writes the picture as SVG. `models`: model -> nodes -> mode -> seconds per step; `rest`: without rollouts."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(models), figsize=(8.6, 3.6), sharey=True, layout="constrained")
        every = sorted({int(nodes) for times in models.values() for nodes in times})
        for axes, (model, times) in zip(panels, models.items(), strict=True):
            nodes = [int(each) for each in times]
            for mode, colour in COLOURS.items():
                axes.plot(nodes, [t[mode] for t in times.values()], color=colour, marker="o", ms=3, label=mode)
            rest = [t["rest"] for t in times.values()]
            axes.plot(nodes, rest, color="#888888", linestyle=":", label="without rollouts")
            axes.set(title=f"{model}, 2,048 responses per step", xlabel="nodes of 8 H100", xscale="log", yscale="log")
            axes.set_xticks(every, [str(each) for each in every])
            axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
            axes.minorticks_off()
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("seconds per step (simulated)")
        panels[-1].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
