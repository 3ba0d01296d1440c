"""An `Inspection` as a table, as JSON and as a plot."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from kimi_vllm.cli.inspection import QUANTILES, Head, Inspection, InspectionError

LEGEND = (
    "|S|: norm of the state after the prompt, max: its largest element. alpha: decay of a step, 1st, 50th and 99th "
    "percentile. memory: tokens until a channel fades to 1/e, median and slowest channel. |A|: spectral norm of a "
    "step's transition, at most max alpha in a sound model."
)
_MIDDLE = len(QUANTILES) // 2


def table(inspection: Inspection, *, all_heads: bool) -> Table:
    """One row per head, or per layer: extremes over its heads, and |A| of the head that is closest to its bound."""
    frame: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    result = Table("layer", "head" if all_heads else "worst head", **frame)
    for column in ("|S|", "max", "alpha", "memory", "beta", "|A|", "max alpha"):
        # A narrow terminal may break lists of numbers, but not cut a number.
        result.add_column(column, justify="right", min_width=8 if column in ("|A|", "max alpha") else None)
    result.add_column("", min_width=7)
    for layer, heads in inspection.by_layer().items():
        for group in [[head] for head in heads] if all_heads else [heads]:
            result.add_row(str(layer), *_cells(group))
    return result


def _cells(heads: Sequence[Head]) -> list[str]:
    worst = max(heads, key=lambda head: head.badness)
    steepest = max(heads, key=lambda head: head.excess if head.finite else math.inf)
    low, middle, high = (
        min(head.alpha[0] for head in heads),
        median(head.alpha[_MIDDLE] for head in heads),
        max(head.alpha[-1] for head in heads),
    )
    slowest = max(head.memory_slowest for head in heads)
    return [
        str(worst.head),
        f"{max((head.state_norm for head in heads), key=_nan_as_most):.3g}",
        f"{worst.state_max:.3g}",
        f"{low:.3f} {middle:.3f} {high:.4f}",
        f"{_tokens(median(head.memory_median for head in heads))} {_tokens(slowest)}",
        f"{fmean(head.beta_mean for head in heads):.2f}",
        f"{steepest.spectral_norm:.6f}",
        f"{steepest.bound:.6f}",
        _verdict(worst),
    ]


def _tokens(count: float) -> str:
    return f"{count:.1f}" if count < 10 else f"{count:.0f}"


def _nan_as_most(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _verdict(head: Head) -> str:
    if not head.finite:
        return "[bold red]NaN/Inf"
    return "[green]ok" if head.bounded else "[bold red]|A| over the bound"


def summary(inspection: Inspection) -> Iterator[str]:
    """What was run, the worst head of all, and the verdict, as rich markup."""
    heads, tokens, samples = inspection.heads, inspection.num_tokens, len(inspection.positions)
    worst = max(heads, key=lambda head: head.badness)
    name = f"layer {worst.layer}, head {worst.head}"
    yield f"{escape(inspection.model)}, {inspection.dtype}: {tokens} tokens, |S| and |A| at {samples} of them."
    yield LEGEND
    if not worst.finite:
        yield f"[bold red]Worst: {name}: its state is not finite.[/] It is the first layer; look there and just before."
    elif not worst.bounded:
        yield f"[bold red]Worst: {name}: a step can grow its state:[/] |A| exceeds its bound by {worst.excess:.3g}."
    else:
        yield f"Worst: {name}, by the largest element of its state, {worst.state_max:.3g}."
    bad = sum(not head.sound for head in heads)
    yield (
        f"[bold red]{bad} of {len(heads)} heads are not sound." if bad else f"[green]All {len(heads)} heads are sound."
    )


def to_json(inspection: Inspection) -> str:
    """One JSON object with all heads; what is not finite is null, since JSON has no NaN."""
    values = {**asdict(inspection), "sound": inspection.sound, "alpha_quantiles": QUANTILES}
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_plot(path: Path) -> None:
    """Raise InspectionError if no plot can be written, before the model is loaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InspectionError(f"--plot needs matplotlib ({error}): pip install 'kimi-vllm[bench]'") from error
    if not path.parent.is_dir():
        raise InspectionError(f"--plot {path}: there is no folder {path.parent}.")
    if path.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        raise InspectionError(f"--plot {path}: the name must end in .png, .svg or .pdf.")


def plot(inspection: Inspection, path: Path) -> None:
    """Draw the states over the prompt, the memory of each head, and each transition's norm beside its bound."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    over_tokens, memory, transition = figure.subplots(1, 3)
    layers = inspection.by_layer()
    for rank, (layer, heads) in enumerate(layers.items()):
        colour = mpl.colormaps["viridis"](rank / len(layers))
        for index, head in enumerate(heads):
            label = f"layer {layer}" if index == 0 else None
            over_tokens.plot(inspection.positions, head.norms, color=colour, label=label, linewidth=1)
            at = layer + 0.8 * ((index + 0.5) / len(heads) - 0.5)
            memory.plot([at, at], [head.memory_median, head.memory_slowest], ".-", color=colour)
            transition.plot(at, head.spectral_norm, ".", color=colour if head.sound else "red")
            transition.plot(at, head.bound, "_", color="black", markersize=4)
    over_tokens.set(title="norm of each head's state", xlabel="token", ylabel="|S|")
    over_tokens.legend(fontsize="x-small", ncols=2)
    memory.set(title="memory of each head: median to slowest channel", xlabel="layer", ylabel="tokens", yscale="log")
    transition.set(title="transition: |A| (dot), max alpha (dash)", xlabel="layer", ylabel="spectral norm")
    transition.ticklabel_format(useOffset=False)
    figure.savefig(path, dpi=120)
