"""Pictures of the synthetic tasks: accuracy by length and mode, and how the models were trained."""

from pathlib import Path
from typing import Any

from serve.common.plots import panels, save, tidy

MARKERS = "osv^D*Px<>h8+"


def accuracy(tasks: dict[str, Any], path: Path) -> None:
    """Draw what `python -m serve.eval run` found by task, mode and length: one panel a task, one line a mode."""
    figure, [axes] = panels(1, len(tasks), figsize=(3 * len(tasks), 4.2))
    for panel, (task, modes) in zip(axes, tasks.items(), strict=True):
        for number, (mode, rows) in enumerate(modes.items()):
            shares = [100 * row["right"] / row["asked"] for row in rows.values()]
            # Lines lie on each other where all is well: every mode has a marker of another size.
            look = {"marker": MARKERS[number % len(MARKERS)], "markersize": max(2, 12 - number), "fillstyle": "none"}
            panel.plot(list(rows), shares, label=mode, linewidth=0.8, **look)
        tidy(panel, task, "tokens of a sequence", "right answers, %" if panel is axes[0] else "").set_ylim(0, 103)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8, frameon=False)
    save(figure, path, rect=(0, 0.07, 1, 1))


def training(runs: dict[str, Any], others: dict[str, Any], path: Path) -> None:
    """Loss and held-out accuracy against steps, from each task's training.json; from another seed's, dashed."""
    figure, (top, bottom) = panels(2, len(runs), figsize=(3 * len(runs), 5), sharex="col")
    for over, under, (task, run) in zip(top, bottom, runs.items(), strict=True):
        for style, one in (("-", run), ("--", others[task])):
            curve, seed = one["curve"], one["recipe"]["seed"]
            losses = [max(loss, 1e-5) for loss in curve["loss"]]
            over.semilogy(curve["step"], losses, f"C0{style}", linewidth=1, label=f"seed {seed}")
            for colour, (length, shares) in enumerate(curve["accuracy"].items()):
                percent, label = [100 * share for share in shares], f"{length} tokens, seed {seed}"
                under.plot(curve["step"], percent, f"C{colour}{style}", linewidth=1, label=label)
        first = over is top[0]
        tidy(over, f"{task}\n{run['device']}, {others[task]['device']}", "", "loss, nats" if first else "")
        tidy(under, "", "steps", "held out, %" if first else "").set_ylim(0, 103)
        over.legend(fontsize=7)
        under.legend(loc="lower right", fontsize=7)
    save(figure, path)
