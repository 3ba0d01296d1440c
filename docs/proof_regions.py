"""The generated parts of `proof.md`: what the models of the synthetic tasks answered."""

import json
from typing import Any

from regions import ENGINE, _region, _table

ACCURACY, LONG = ENGINE / "synthetic-2core.json", ENGINE / "synthetic-long-2core.json"
PLAIN, THEIRS, BFLOAT16 = "one-shot", "transformers", "bfloat16"
MIB = 2**20


def _share(row: dict[str, Any]) -> str:
    return f"{row['right'] / row['asked']:.2%}"


@_region
def synthetic_accuracy() -> str:
    """Right answers by task and length, and answers of other modes that are not one-shot's."""
    tasks = json.loads(ACCURACY.read_text())["tasks"]
    lengths = list(next(iter(tasks.values()))[PLAIN])
    cells = []
    for task, modes in tasks.items():
        others = [row for mode, rows in modes.items() if mode not in (PLAIN, BFLOAT16) for row in rows.values()]
        asked, differ = sum(row["asked"] for row in others), sum(row["differ"] for row in others)
        shares = [_share(modes[PLAIN][length]) for length in lengths]
        cells.append([task, *shares, f"{differ} of {asked:,}", _share(modes[BFLOAT16][lengths[1]])])
    columns = ["right, sequences of", *(f"{length} tokens" for length in lengths), "not the same answer in other modes"]
    return _table([*columns, f"in bfloat16, {lengths[1]}"], cells)


@_region
def synthetic_modes() -> str:
    """Answers that are not one-shot's, by mode, all tasks and lengths together."""
    found = json.loads(ACCURACY.read_text())
    totals: dict[str, list[float]] = {}
    for modes in found["tasks"].values():
        for mode, rows in modes.items():
            total = totals.setdefault(mode, [0, 0, 0, 0.0])
            for row in rows.values():
                for place, key in enumerate(("asked", "right", "differ")):
                    total[place] += row[key]
                total[3] = max(total[3], row["margin"])
    cells = [
        [mode, f"{asked:,}", f"{right / asked:.3%}", str(differ), f"{margin:.1e}" if differ else "–"]
        for mode, (asked, right, differ, margin) in totals.items()
    ]
    return _table(["mode", "answers", "right", "not one-shot's", "one-shot's largest lead there, nats"], cells)


@_region
def synthetic_measured() -> str:
    """Where and how long the evaluation ran."""
    found = json.loads(ACCURACY.read_text())
    env, seconds = found["env"], found["seconds"]
    return (
        f"Measured on {found['date']}, {env['device']}, {env['cores']} cores, torch {env['torch']}, {env['vllm']}, "
        f"transformers {env['transformers']}: {seconds['cpu'] / 60:.1f} minutes of one core."
    )


@_region
def synthetic_long() -> str:
    """The long context: answers, time and memory."""
    found = json.loads(LONG.read_text())
    memory, sizes = found["memory"], found["sizes"]
    first, last = memory[0], memory[-1]
    cells = [
        [
            f"{row['depth']:.0%}",
            f"{row['tokens_ago']:,}",
            f"`{row['right']}`",
            f"`{row['answer']}`",
            f"{row['cached']:,}",
            f"{row['seconds']:,.1f} s",
            f"{row['cpu_seconds']:,.1f} s",
        ]
        for row in found["asked"]
    ]
    table = _table(["needle at", "tokens ago", "right", "answered", "from the prefix cache", "took", "CPU time"], cells)
    most = max(row["rss_mib"] for row in memory)
    used = last["pages"] * sizes["page_bytes"] / MIB
    return (
        f"{table}\n\n{found['tokens']:,} tokens in steps of {found['chunk']:,}, {found['threads']} threads. Resident "
        f"memory was {first['rss_mib']:,.0f} MiB after {first['tokens']:,} tokens, {last['rss_mib']:,.0f} after "
        f"{last['tokens']:,} and {most:,.0f} at most. State: {max(row['slots'] for row in memory)} slots of "
        f"{sizes['slot_bytes'] / MIB:.2f} MiB at most, at any length. KV cache: a page of "
        f"{sizes['page_bytes'] // 1024} KiB for 64 tokens, {last['pages']:,} pages or {used:,.0f} MiB in the "
        f"end, of a pool of {sizes['pages_bytes'] / MIB:,.0f} MiB that is there from the start."
    )
