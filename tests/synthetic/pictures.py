"""Pictures of the synthetic tasks: accuracy by length and mode, and how the models were trained."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "osv^D*Px<>"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def accuracy(tasks: dict[str, Any], path: Path) -> None:
    """One panel a task, one line a mode.

    Args:
        tasks: what `evaluate.py run` found, by task, mode and length.
        path: the PNG.
    """
    figure, panels = plt.subplots(1, len(tasks), figsize=(3 * len(tasks), 4.2), squeeze=False)
    for panel, (task, modes) in zip(panels[0], tasks.items(), strict=True):
        for (mode, rows), marker in zip(modes.items(), MARKERS, strict=False):
            shares = [100 * row["right"] / row["asked"] for row in rows.values()]
            # Lines lie on each other where all is well: every mode has a marker of another size.
            size = 12 - 1.2 * MARKERS.index(marker)
            panel.plot(list(rows), shares, marker=marker, markersize=size, fillstyle="none", label=mode, linewidth=0.8)
        panel.set_title(task)
        panel.set_xlabel("tokens of a sequence")
        panel.set_ylim(0, 103)
    panels[0][0].set_ylabel("right answers, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=8, fontsize=8, frameon=False)
    figure.subplots_adjust(bottom=0.2)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def training(runs: dict[str, Any], path: Path) -> None:
    """Loss and held-out accuracy of every task against optimiser steps.

    Args:
        runs: training.json by task.
        path: the PNG.
    """
    figure, (top, bottom) = plt.subplots(2, len(runs), figsize=(3 * len(runs), 5), sharex="col", squeeze=False)
    for over, under, (task, run) in zip(top, bottom, runs.items(), strict=True):
        curve = run["curve"]
        over.semilogy(curve["step"], [max(loss, 1e-5) for loss in curve["loss"]], linewidth=1)
        for length, shares in curve["accuracy"].items():
            under.plot(curve["step"], [100 * share for share in shares], linewidth=1, label=f"{length} tokens")
        over.set_title(f"{task}\n{run['device']}, {run['seconds']} s", fontsize=9)
        under.set_xlabel("steps")
        under.set_ylim(0, 103)
        under.legend(loc="lower right", fontsize=7)
    top[0].set_ylabel("loss, nats")
    bottom[0].set_ylabel("held out, %")
    _save(figure, path)
