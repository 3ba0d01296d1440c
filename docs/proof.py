"""Tables of proof.md: what the models of the synthetic tasks answered."""

import json
from typing import Any

from docs.tables import ENGINE, MIB, NONE, ROOT, table

CPU, GPU, CPU_LONG = "synthetic-2core.json", "synthetic-h100.json", "synthetic-long-2core.json"
GPU_LONG = ("synthetic-long-h100.json", "synthetic-long-h100-48b-heads.json")
TRAINED = ROOT / "configs" / "models" / "synthetic"
PLAIN, THEIRS, BFLOAT16 = "one-shot", "transformers", "bfloat16"


def _read(name: str) -> Any:
    return json.loads((ENGINE / name).read_text())


def _share(row: dict[str, Any]) -> str:
    return f"{row['right'] / row['asked']:.2%}"


def accuracy() -> str:
    """Right answers by task and length, and answers of other modes that are not one-shot's."""
    tasks = _read(CPU)["tasks"]
    lengths = list(next(iter(tasks.values()))[PLAIN])
    cells = []
    for task, modes in tasks.items():
        others = [row for mode, rows in modes.items() if mode not in (PLAIN, BFLOAT16) for row in rows.values()]
        asked, differ = sum(row["asked"] for row in others), sum(row["differ"] for row in others)
        shares = [_share(modes[PLAIN][length]) for length in lengths]
        cells.append([task, *shares, f"{differ} of {asked:,}", _share(modes[BFLOAT16][lengths[1]])])
    columns = ["accuracy, one-shot", *(f"{length} tokens" for length in lengths), "differ in other fp32 modes"]
    return table([*columns, f"bfloat16, {lengths[1]} tokens"], cells)


def modes(file: str = CPU) -> str:
    """Answers of each mode, over all tasks and lengths."""
    totals: dict[str, list[dict[str, Any]]] = {}
    for found in _read(file)["tasks"].values():
        for mode, rows in found.items():
            totals.setdefault(mode, []).extend({**row, "length": int(length)} for length, row in rows.items())
    cells = []
    for mode, rows in totals.items():
        asked, right, differ = (sum(row[key] for row in rows) for key in ("asked", "right", "differ"))
        short = sum(row["differ"] for row in rows if row["length"] <= 512)
        lead = f"{max(row['margin'] for row in rows):.1e}" if differ else NONE
        cells.append([mode, f"{asked:,}", f"{right / asked:.3%}", str(differ), str(short), lead])
    columns = ["mode", "answers", "right", "differ from one-shot", "up to 512 tokens", "largest top-2 margin, nats"]
    return table(columns, cells)


def measured(file: str) -> str:
    """Machine, versions and day of an evaluation."""
    found = _read(file)
    env = found["env"]
    versions = f"torch {env['torch']}, {env['vllm']}, transformers {env['transformers']}"
    minutes = found["seconds"]["cpu"] / 60
    return f"{env['device']}, {env['cores']} cores, {versions}, {found['date']}; {minutes:.1f} minutes of CPU time."


def seeds() -> str:
    """Accuracy in transformers after training from one seed and from another."""
    cells = []
    for task in _read(CPU)["tasks"]:
        runs = [json.loads((TRAINED / task / name).read_text()) for name in ("training.json", "training-seed1.json")]
        shares = [run["accuracy"][THEIRS][length] for length in ("256", "512") for run in runs]
        cells.append([task, *(f"{share:.2%}" for share in shares)])
    columns = [f"{length} tokens, seed {seed}" for length in (256, 512) for seed in (0, 1)]
    return table(["accuracy in transformers", *columns], cells)


def needles() -> str:
    """The long context on a CPU: a row per question."""
    cells = []
    for row in _read(CPU_LONG)["asked"]:
        answers = [f"`{row['right']}`", f"`{row['answer']}`"]
        times = [f"{row['cached']:,}", f"{row['seconds']:,.1f}", f"{row['cpu_seconds']:,.1f}"]
        cells.append([f"{row['depth']:.0%}", f"{row['tokens_ago']:,}", *answers, *times])
    return table(["needle at", "tokens ago", "expected", "answer", "cached tokens", "seconds", "CPU seconds"], cells)


def long_contexts() -> str:
    """Time and memory of the long context: a row per machine and model."""
    cells: list[list[str]] = []
    for found in map(_read, (CPU_LONG, *GPU_LONG)):
        asked, memory, sizes = found["asked"], found["memory"], found["sizes"]
        where = f"{found['threads']} CPU cores" if found["env"]["device"] == "x86_64" else found["env"]["device"]
        # The file of the CPU is older than models of other sizes.
        model = f"{found.get('kda_heads', 2)} + {found.get('mla_heads', 1)} heads, {found.get('dtype', 'float32')}"
        right = sum(row["answer"] == row["right"] for row in asked)
        state = f"{max(row['slots'] for row in memory)} × {sizes['slot_bytes'] / MIB:.2f}"
        pages = f"{memory[-1]['pages'] * sizes['page_bytes'] / MIB:,.0f}"
        resident = f"{memory[0]['rss_mib']:,.0f} / {memory[-1]['rss_mib']:,.0f}"
        cells.append([where, model, f"{right} of {len(asked)}", f"{asked[0]['seconds']:,.0f}", state, pages, resident])
    columns = ["1,000,000 tokens on", "KDA + MLA heads", "right", "seconds to read", "state, MiB", "KV cache, MiB"]
    return table([*columns, "RSS after first / last step, MiB"], cells, left=2)
