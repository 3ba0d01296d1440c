"""The generated parts about the 48B model's engine on GPUs, beside vLLM's own model."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from docs.regions import ENGINE, NONE, _region, _table, _times
from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import Row, latest, read
from serve.bench.engine.tables import tables
from serve.common.tables import tokens

LATE_MS = 0.5  # the host's usual part of a decode step is 0.1 to 0.2 ms


def _h200() -> list[Row]:
    return read(ENGINE / "h200.jsonl")


def _pairs(bench: str, rows: Sequence[Row]) -> list[tuple[dict[str, Any], Row | None, Row | None]]:
    """Cases of a measurement in order, with our row and vLLM's, where there are rows."""
    points = latest(rows, bench)
    cases = dict.fromkeys(case for name, case in points if name in (OURS, IN_TREE))
    found = [(json.loads(case), points.get((OURS, case)), points.get((IN_TREE, case))) for case in cases]
    return sorted(found, key=lambda pair: [pair[0][key] for key in sorted(pair[0]) if key != "batch"])


@_region
def h200_measured() -> str:
    """Card, versions and dates of the rows below."""
    return _measured(_h200(), "One")


@_region
def h100_fp8_measured() -> str:
    """The same of the rows in FP8."""
    return _measured(_h100_fp8(), "One")


@_region
def h100_tp2_measured() -> str:
    """The same of the rows on two cards."""
    return _measured(read(ENGINE / "h100-tp2.jsonl"), "Two")


def _measured(rows: Sequence[Row], cards: str) -> str:
    env = next(row["env"] for row in reversed(rows) if row["bench"] == "header")
    dates = {
        name: " and ".join(
            sorted({row["date"][:10] for row in rows if row["provider"] == name and row["bench"] != "header"})
        )
        for name in (OURS, IN_TREE)
    }
    return (
        f"{cards} {env['device']}, driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, "
        f"{env['vllm'].replace('vllm', 'vLLM')}; kimi-vllm measured on {dates[OURS]}, in-tree on {dates[IN_TREE]}."
    )


@_region
def h200_tpot() -> str:
    """Time per output token of one request against its context."""
    return _tpot(_h200())


def _tpot(rows: Sequence[Row]) -> str:
    cells = []
    for case, ours, theirs in _pairs("tpot", rows):
        if case["batch"] != "1":
            continue
        own, other = (row and row["tpot"]["p50_ms"] for row in (ours, theirs))
        times = [NONE if time is None else f"{time:.2f}" for time in (own, other)]
        ratio = NONE if own is None or other is None else _times(other / own)
        busy, floor = " / ".join(_busy(row) for row in (ours, theirs)), (ours or theirs or {})["floor_ms"]
        cells.append([tokens(case["context"]), *times, ratio, busy, f"{floor:.2f}"])
    columns = ["batch 1, context", "kimi-vllm, ms per token", "in-tree", "", "GPU busy, ours / in-tree", "floor"]
    return _table(columns, cells)


def _busy(row: Row | None) -> str:
    profile = (row or {}).get("profile", {})
    return f"{profile['busy_ms']:.2f}" if "busy_ms" in profile else NONE


@_region
def h200_late() -> str:
    """A sentence about steps for which the GPU waited, or that there is none."""
    late = [
        f"{tokens(row['case']['context'])} ({row['provider']}, {row['profile']['gaps_ms']:.1f} ms)"
        for row in latest(_h200(), "tpot").values()
        if row["case"]["batch"] == "1" and row.get("profile", {}).get("gaps_ms", 0) > LATE_MS
    ]
    if not late:
        return "In none of these steps did the GPU wait for the host for more than half a millisecond."
    return f"At {', '.join(late)} the GPU waited for the host in every step; we do not know why."


@_region
def h200_batches() -> str:
    """Steps with as many requests as fit."""
    return _batches(_h200())


def _batches(rows: Sequence[Row]) -> str:
    cells = []
    for case, ours, theirs in _pairs("tpot", rows):
        if case["batch"] == "1":
            continue
        rates = [NONE if row is None else f"{row['tokens_per_s']:,.0f} tokens/s" for row in (ours, theirs)]
        if ours is not None and theirs is not None:
            rates[int(theirs["tokens_per_s"] > ours["tokens_per_s"])] = (
                f"**{rates[int(theirs['tokens_per_s'] > ours['tokens_per_s'])]}**"
            )
        steps = [
            NONE if row is None else f"{row['requests']} requests, {row['tpot']['p50_ms']:.1f} ms"
            for row in (ours, theirs)
        ]
        cells.append([tokens(case["context"]), steps[0], rates[0], steps[1], rates[1]])
    return _table(["as many as fit (at most 256), context", "kimi-vllm", "", "in-tree", ""], cells)


def _options() -> list[tuple[str, Row, Row]]:
    """By context: our row with options set for long requests, and vLLM's plain one, of another card."""
    theirs = {case["context"]: row for case, _, row in _pairs("tpot", _h200()) if row and case["batch"] != "1"}
    rows = [row for row in read(ENGINE / "h200-options.jsonl") if row["case"].get("batch") == "largest"]
    return [(tokens(row["case"]["context"]), row, theirs[row["case"]["context"]]) for row in rows]


@_region
def h200_options() -> str:
    """Steps with as many requests as fit, with options set for long requests."""
    cells = [
        [
            context,
            *(
                f"{r['requests']} requests, {r['tpot']['p50_ms']:.1f} ms, {r['tokens_per_s']:,.0f} tokens/s"
                for r in pair
            ),
        ]
        for context, *pair in _options()
    ]
    return _table(["as many as fit, context", "kimi-vllm with both options", "in-tree"], cells)


@_region
def h200_options_short() -> str:
    """The same in a sentence."""
    found = [
        f"{ours['tokens_per_s']:,.0f} tokens/s at {context} (in-tree {theirs['tokens_per_s']:,.0f})"
        for context, ours, theirs in _options()
        if context != "4K"
    ]
    return f"On another H200, with `typical_tokens` 32768 and `state_dtype` bfloat16: {' and '.join(found)}."


@_region
def h200_load() -> str:
    """Tokens while prompts arrive, and time to the first token."""
    rows, cells = _h200(), []
    for case, ours, theirs in _pairs("mixed", rows):
        what = f"p99 between tokens, {case['decoders']} decode at {tokens(case['context'])}, prompts of "
        cells.append(_compare(f"{what}{tokens(case['prompt'])} arrive", ours, theirs, lambda row: row["itl"]["p99_ms"]))
    for case, ours, theirs in _pairs("prefill", rows):
        what = f"first token of a prompt of {tokens(case['prompt'])}"
        cells.append(_compare(what, ours, theirs, lambda row: row["ttft"]["p50_ms"]))
    return _table(["", "kimi-vllm, ms", "in-tree, ms", ""], cells)


def _compare(
    what: str,
    ours: Row | None,
    theirs: Row | None,
    value: Callable[[Row], float],
    *,
    digits: int = 0,
    more: bool = False,
) -> list[str]:
    """A line of a table; `more` where the larger value is the better one."""
    shown = ["not measured" if row is None else f"{value(row):,.{digits}f}" for row in (ours, theirs)]
    if ours is None or theirs is None:
        return [what, *shown, NONE]
    ratio = value(ours) / value(theirs)
    return [what, *shown, _times(ratio if more else 1 / ratio)]


@_region
def h100_fp8() -> str:
    """One card of 80 GB in FP8: a token, many requests, first tokens, the next token while prompts arrive."""
    return _figures(_h100_fp8())


@_region
def h100_tp2() -> str:
    """The same of two cards in bfloat16."""
    return _figures(read(ENGINE / "h100-tp2.jsonl"))


def _figures(rows: Sequence[Row]) -> str:
    cells = []
    for case, ours, theirs in _pairs("tpot", rows):
        if case["batch"] == "1":
            what = f"one request, {tokens(case['context'])} of context, ms per token"
            cells.append(_compare(what, ours, theirs, lambda row: row["tpot"]["p50_ms"], digits=2))
    for case, ours, theirs in _pairs("prefill", rows):
        what = f"first token of a prompt of {tokens(case['prompt'])}, ms"
        cells.append(_compare(what, ours, theirs, lambda row: row["ttft"]["p50_ms"]))
    for case, ours, theirs in _pairs("mixed", rows):
        what = f"p99 between tokens, {case['decoders']} decode, prompts of {tokens(case['prompt'])} arrive, ms"
        cells.append(_compare(what, ours, theirs, lambda row: row["itl"]["p99_ms"]))
    for case, ours, theirs in _pairs("throughput", rows):
        what = f"{case['requests']} × ({tokens(case['prompt'])} + {case['output']}) at once, tokens/s"
        cells.append(_compare(what, ours, theirs, lambda row: row["tokens_per_s"], more=True))
    for case, ours, theirs in _pairs("tpot", rows):
        if case["batch"] != "1" and ours and theirs:
            what = f"as many as fit at {tokens(case['context'])} ({ours['requests']} / {theirs['requests']}), tokens/s"
            cells.append(_compare(what, ours, theirs, lambda row: row["tokens_per_s"], more=True))
    return _table(["", "kimi-vllm", "in-tree", ""], cells)


def _h100_fp8() -> list[Row]:
    return read(ENGINE / "h100-fp8.jsonl")


@_region
def h100_fp8_all() -> str:
    """Every table of serve/bench for one H100 in FP8."""
    return "\n\n".join(table.markdown() for table in tables(_h100_fp8()))


@_region
def h100_tp2_all() -> str:
    """Every table of serve/bench for two H100."""
    return "\n\n".join(table.markdown() for table in tables(read(ENGINE / "h100-tp2.jsonl")))


@_region
def h200_all() -> str:
    """Every table of serve/bench for the H200."""
    return "\n\n".join(table.markdown() for table in tables(_h200()))


@_region
def h200_variants() -> str:
    """The same for earlier states of the code."""
    return "\n\n".join(table.markdown() for table in tables(read(ENGINE / "h200-variants.jsonl")))
