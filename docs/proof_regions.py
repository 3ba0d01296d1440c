"""The generated parts of `proof.md`: what the models of the synthetic tasks answered."""

import json
from pathlib import Path
from typing import Any

from docs.regions import ENGINE, ROOT, _region, _table

ACCURACY, LONG = ENGINE / "synthetic-2core.json", ENGINE / "synthetic-long-2core.json"
ON_GPU = ENGINE / "synthetic-h100.json"
LONG_ON_GPU = (ENGINE / "synthetic-long-h100.json", ENGINE / "synthetic-long-h100-48b-heads.json")
TRAINED = ROOT / "configs" / "models" / "synthetic"
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


def _modes(path: Path, taught: bool = False) -> str:
    """Answers that are not one-shot's, by mode, all tasks and lengths together; `taught`: also up to 512 tokens."""
    found = json.loads(path.read_text())
    totals: dict[str, list[float]] = {}
    for modes in found["tasks"].values():
        for mode, rows in modes.items():
            total = totals.setdefault(mode, [0, 0, 0, 0.0, 0])
            for length, row in rows.items():
                for place, key in enumerate(("asked", "right", "differ")):
                    total[place] += row[key]
                total[3] = max(total[3], row["margin"])
                total[4] += row["differ"] * (int(length) <= 512)
    cells = [
        [
            *(mode, f"{asked:,}", f"{right / asked:.3%}", str(differ)),
            *[str(short)] * taught,
            f"{margin:.1e}" if differ else "–",
        ]
        for mode, (asked, right, differ, margin, short) in totals.items()
    ]
    columns = ["mode", "answers", "right", "not one-shot's", *["of these up to 512 tokens"] * taught]
    return _table([*columns, "one-shot's largest lead there, nats"], cells)


@_region
def synthetic_modes() -> str:
    """Answers of each mode on a CPU."""
    return _modes(ACCURACY)


@_region
def synthetic_gpu_modes() -> str:
    """Answers of each mode on a GPU."""
    return _modes(ON_GPU, taught=True)


def _measured(path: Path) -> str:
    found = json.loads(path.read_text())
    env, seconds = found["env"], found["seconds"]
    return (
        f"Measured on {found['date']}, {env['device']}, {env['cores']} cores, torch {env['torch']}, {env['vllm']}, "
        f"transformers {env['transformers']}: {seconds['cpu'] / 60:.1f} minutes of one core."
    )


@_region
def synthetic_measured() -> str:
    """Where and how long the evaluation ran on a CPU."""
    return _measured(ACCURACY)


@_region
def synthetic_gpu_measured() -> str:
    """Where and how long it ran on a GPU, and whether the answers are those of the CPU."""
    here, there = (json.loads(path.read_text())["tasks"] for path in (ACCURACY, ON_GPU))
    rights = [[row["right"] for modes in tasks.values() for row in modes[PLAIN].values()] for tasks in (here, there)]
    same = (
        "as many right in every task at every length as on the CPU" if rights[0] == rights[1] else "not as on the CPU"
    )
    return f"{_measured(ON_GPU)} One-shot: {same}."


@_region
def synthetic_seeds() -> str:
    """Accuracy of transformers after training from one seed and from another."""
    cells = []
    for task in json.loads(ACCURACY.read_text())["tasks"]:
        runs = [json.loads((TRAINED / task / name).read_text()) for name in ("training.json", "training-seed1.json")]
        shares = [f"{run['accuracy'][THEIRS][length]:.2%}" for length in ("256", "512") for run in runs]
        cells.append([task, *shares])
    return _table(["right, transformers", "256 tokens, seed 0", "seed 1", "512 tokens, seed 0", "seed 1"], cells)


@_region
def synthetic_gpu_long() -> str:
    """The long context on a GPU, for the shipped model and for one with the heads of 48B."""
    cells = []
    for path in LONG_ON_GPU:
        found = json.loads(path.read_text())
        asked, last, sizes = found["asked"], found["memory"][-1], found["sizes"]
        answers = ", ".join(f"`{row['answer']}`" for row in asked)
        right = "all right" if all(row["answer"] == row["right"] for row in asked) else "not all right"
        cells.append(
            [
                f"{found['kda_heads']} KDA, {found['mla_heads']} MLA heads, {found['dtype']}",
                f"{answers}: {right}",
                f"{asked[0]['seconds']:.1f} s, then {asked[1]['seconds']:.1f} and {asked[2]['seconds']:.1f} s",
                f"{last['slots']} slots of {sizes['slot_bytes'] / MIB:.2f} MiB",
                f"{last['pages']:,} pages, {last['pages'] * sizes['page_bytes'] / MIB:,.0f} MiB",
            ]
        )
    return _table(["a million tokens, NVIDIA H100", "at 1, 50 and 99 %", "answered after", "state", "KV cache"], cells)


@_region
def synthetic_long_short() -> str:
    """The long context on a CPU and on a GPU, in a sentence."""
    found, (small, large) = json.loads(LONG.read_text()), (json.loads(path.read_text()) for path in LONG_ON_GPU)
    rights = [sum(row["answer"] == row["right"] for row in run["asked"]) for run in (found, small, large)]
    seconds = [run["asked"][0]["seconds"] for run in (found, small, large)]
    first, *_, last = found["memory"]
    return (
        f"A context of {found['tokens']:,} tokens with notes at 1, 50 and 99 %, then a question about each: "
        f"{rights[0]} of 3 right on {found['threads']} CPU cores, read in {seconds[0]:,.0f} s; resident memory "
        f"{first['rss_mib']:,.0f} MiB after the first step, {last['rss_mib']:,.0f} after the last. On an H100 "
        f"{rights[1]} of 3 in {seconds[1]:.0f} s, and with {large['kda_heads']} KDA and {large['mla_heads']} MLA heads "
        f"{rights[2]} of 3 in {seconds[2]:.0f} s."
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
