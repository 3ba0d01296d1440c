"""Pictures of the synthetic tasks: accuracy by length and mode, and how the models were trained."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "osv^D*Px<>h8+"


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
        for number, (mode, rows) in enumerate(modes.items()):
            shares = [100 * row["right"] / row["asked"] for row in rows.values()]
            # Lines lie on each other where all is well: every mode has a marker of another size.
            look = {"marker": MARKERS[number % len(MARKERS)], "markersize": max(2, 12 - number), "fillstyle": "none"}
            panel.plot(list(rows), shares, label=mode, linewidth=0.8, **look)
        panel.set_title(task)
        panel.set_xlabel("tokens of a sequence")
        panel.set_ylim(0, 103)
    panels[0][0].set_ylabel("right answers, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.subplots_adjust(bottom=0.2)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def training(runs: dict[str, Any], others: dict[str, Any], path: Path) -> None:
    """Loss and held-out accuracy of every task against optimiser steps.

    Args:
        runs: training.json by task.
        others: the same from another seed, drawn dashed.
        path: the PNG.
    """
    figure, (top, bottom) = plt.subplots(2, len(runs), figsize=(3 * len(runs), 5), sharex="col", squeeze=False)
    for over, under, (task, run) in zip(top, bottom, runs.items(), strict=True):
        for style, one in (("-", run), ("--", others[task])):
            curve, seed = one["curve"], one["recipe"]["seed"]
            over.semilogy(
                curve["step"],
                [max(loss, 1e-5) for loss in curve["loss"]],
                f"C0{style}",
                linewidth=1,
                label=f"seed {seed}",
            )
            for colour, (length, shares) in enumerate(curve["accuracy"].items()):
                label = f"{length} tokens, seed {seed}"
                under.plot(
                    curve["step"], [100 * share for share in shares], f"C{colour}{style}", linewidth=1, label=label
                )
        over.set_title(f"{task}\n{run['device']}, {others[task]['device']}", fontsize=8)
        over.legend(fontsize=7)
        under.set_xlabel("steps")
        under.set_ylim(0, 103)
        under.legend(loc="lower right", fontsize=7)
    top[0].set_ylabel("loss, nats")
    bottom[0].set_ylabel("held out, %")
    _save(figure, path)
