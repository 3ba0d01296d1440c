"""What all pictures of results have in common: no window, no frame on the right and above, a faint grid."""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def panels(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]; options as for `plt.subplots`."""
    return plt.subplots(rows, columns, squeeze=False, **options)


def tidy(axes: Any, title: str = "", x: str = "", y: str = "") -> Any:
    """Name the axes, and return them."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.set_axisbelow(True)
    return axes


def log_ticks(axes: Any, ticks: list[float], label: Any = "{:g}".format) -> None:
    """A logarithmic x-axis with ticks where there are points."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [label(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def save(figure: Any, path: Path, **layout: Any) -> Path:
    """Write a picture; options as for `tight_layout`."""
    figure.tight_layout(**layout)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def data_uri(figure: Any, **layout: Any) -> str:
    """The picture as SVG, for a page that needs no other file."""
    buffer = io.BytesIO()
    figure.tight_layout(**layout)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
