"""Tables of what was measured: the engine and the kernels beside their peers, requests at once, the state cache."""

import json

from docs.tables import ENGINE, KERNELS, NONE, micros, pair, table
from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import draft_rates, latest, read
from serve.bench.engine.tables import tables
from serve.common import rows as plain
from serve.common.rows import Row
from serve.common.tables import tokens

MACHINES = {
    "One H200, bfloat16": "h200.jsonl",
    "One H100, FP8": "h100-fp8.jsonl",
    "Two H200, bfloat16": "h200-tp2.jsonl",
    "Two H100, bfloat16": "h100-tp2.jsonl",
}
"""The columns of README's table, and their rows."""


_K = 1024
_SUMMARY = {
    "Decode, batch 1, 4K context, ms/token": ("tpot", {"context": 4 * _K, "batch": "1"}),
    "Decode, batch 1, 128K context, ms/token": ("tpot", {"context": 128 * _K, "batch": "1"}),
    "TTFT, 1K prompt, ms": ("prefill", {"prompt": _K}),
    "TTFT, 8K prompt, ms": ("prefill", {"prompt": 8 * _K}),
    "TTFT, 32K prompt, ms": ("prefill", {"prompt": 32 * _K}),
    "p99 ITL, batch 64 at 4K, 8K prompts arrive, ms": (
        "mixed",
        {"decoders": 64, "context": 4 * _K, "prompt": 8 * _K},
    ),
    "Throughput, 64 × (4K prompt + 128 output), tokens/s": (
        "throughput",
        {"requests": 64, "prompt": 4 * _K, "output": 128},
    ),
    "Throughput, 256 × (1K prompt + 128 output), tokens/s": (
        "throughput",
        {"requests": 256, "prompt": _K, "output": 128},
    ),
    "Decode, largest batch, 4K context, tokens/s": ("tpot", {"context": 4 * _K, "batch": "largest"}),
    "Decode, largest batch, 32K context, tokens/s": ("tpot", {"context": 32 * _K, "batch": "largest"}),
    "Decode, largest batch, 128K context, tokens/s": ("tpot", {"context": 128 * _K, "batch": "largest"}),
}
"""The lines of README's table: a measurement and its case."""


def _rate(row: Row) -> float:
    return float(row["tokens_per_s"])


def _milliseconds(row: Row) -> float:
    if row["bench"] == "mixed":
        return float(row["itl"]["p99_ms"])
    return float(row["tpot" if row["bench"] == "tpot" else "ttft"]["p50_ms"])


def summary() -> str:
    """The table of README: ours and in-tree in a cell, the better one in bold."""
    found = [read(ENGINE / file) for file in MACHINES.values()]
    cells = [["vLLM", *(_header(rows)["vllm"].split()[-1] for rows in found)]]
    for label, (bench, case) in _SUMMARY.items():
        is_rate = label.endswith("tokens/s")
        value = _rate if is_rate else _milliseconds
        cells.append([label])
        for rows in found:
            points = latest(rows, bench)
            both = (points.get((name, json.dumps(case))) for name in (OURS, IN_TREE))
            ours, theirs = (None if row is None else value(row) for row in both)
            cells[-1].append(pair(ours, theirs, 2 if label.endswith("ms/token") else 0, more_is_better=is_rate))
    return table(["kimi-vllm / in-tree", *MACHINES], cells)


def _header(rows: list[Row]) -> dict[str, str]:
    env: dict[str, str] = next(row["env"] for row in reversed(rows) if row["bench"] == "header")
    return env


def measured(file: str) -> str:
    """Machine, versions and days of a file of rows."""
    rows = read(ENGINE / file)
    env = _header(rows)
    days = sorted({row["date"][:10] for row in rows if row["provider"] in (OURS, IN_TREE)})
    release = env["vllm"].split()[-1]
    return (
        f"{env['device'].removeprefix('NVIDIA ')}, driver {env['driver']}, vLLM {release}, torch {env['torch']}, "
        f"Triton {env['triton']}, {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    )


def every(file: str) -> str:
    """Every table of `serve.bench.engine` for a file of rows."""
    return "\n\n".join(found.markdown() for found in tables(read(ENGINE / file)))


def long_requests() -> str:
    """Largest batches with states of 16 bits, beside in-tree's default ones."""
    points = latest(read(ENGINE / "h200-options.jsonl"), "tpot")
    cells = []
    for (name, case), row in points.items():
        if name == OURS and row["case"]["batch"] == "largest":
            peer = points[IN_TREE, case]
            requests = " / ".join(str(some["requests"]) for some in (row, peer))
            rates = pair(_rate(row), _rate(peer), more_is_better=True)
            cells.append([tokens(row["case"]["context"]), requests, rates])
    return table(["kimi-vllm / in-tree, context", "requests", "tokens/s"], cells)


def concurrency() -> str:
    """Requests that run at once in 34 GiB."""
    found: dict[tuple[bool, int], dict[str, dict[int, int]]] = {}
    shares: dict[tuple[bool, int], float] = {}
    for row in plain.read(ENGINE / "concurrency.jsonl"):
        point = found.setdefault((row["prefix_caching"], row["prompt"]), {})
        point.setdefault(row["provider"], {})[row["max_num_seqs"]] = row["running"]
        if row["provider"] == OURS:
            shares[row["prefix_caching"], row["prompt"]] = row["running"] / min(row["max_num_seqs"], row["fits"])
    cells = []
    for (caching, prompt), point in sorted(found.items()):
        running = [" / ".join(map(str, dict.fromkeys(point[name].values()))) for name in (OURS, IN_TREE)]
        most = max(point[OURS])
        ratio = f"{point[OURS][most] / point[IN_TREE][most]:.2f}×"
        share = f"{shares[caching, prompt]:.1%}"
        cells.append([tokens(prompt), "on" if caching else "off", *running, ratio, share])
    return table(["prompt", "prefix caching", "kimi-vllm", "in-tree", "ratio", "of exact fit"], cells)


def cpu_kernels() -> str:
    """The CPU kernels beside plain torch operators."""
    found: dict[str, dict[str, Row]] = {}
    for row in plain.read(KERNELS / "cpu-2core-epyc.jsonl"):
        case = row["case"]
        if case["H"] == 32:
            what = f"decode, batch {case['N']}" if row["bench"] == "kda_decode" else f"prefill, {case['T']} tokens"
            found.setdefault(what, {})[row["provider"]] = row
    cells = []
    for what, point in found.items():
        rate = point["numba"]["rate_gbps"]
        times = [micros(point[name]["p50_us"]) for name in ("numba", "torch")]
        cells.append([what, *times, NONE if rate is None else f"{rate:.0f} GB/s"])
    return table(["one KDA layer of the 48B model", "numba kernel", "torch operators", "state traffic"], cells)


_GPU_CASES = (
    *(("decode", {"N": batch}, f"decode, batch {batch}") for batch in (1, 8, 32, 256)),
    *(("prefill", {"T": length, "N": 1}, f"prefill, {length} tokens") for length in (64, 512, 8192)),
    ("prefill", {"T": 1024, "N": 64}, "prefill, 64 sequences of 16 tokens"),
)


def gpu_kernels() -> str:
    """The Triton kernels beside vLLM's and flash-linear-attention's."""
    points = {
        (row["bench"], json.dumps(row["case"]), row["provider"]): row["p50_us"]
        for row in plain.read(KERNELS / "h200.jsonl")
        if row["dtype"]["state"] == "fp32"
    }
    cells = []
    for bench, size, what in _GPU_CASES:
        case = json.dumps({**size, "H": 32, "D": 128})
        ours, *others = (points[bench, case, name] for name in (OURS, IN_TREE, "fla"))
        cells.append([what, micros(ours), *(f"{micros(other)} ({other / ours:.2f}×)" for other in others)])
    return table(["one KDA layer of the 48B model", "kimi-vllm", "vLLM in-tree", "flash-linear-attention"], cells)


def versus_transformers() -> str:
    """`vllm serve` beside `generate`, on a CPU."""
    row = json.loads((ENGINE / "versus-transformers-2core-epyc.json").read_text())
    served = row["served"]["tokens_per_second"]["median"]
    cells = [["`vllm serve` with kimi-vllm, over HTTP", f"{served:,.0f}", NONE]]
    for key, words in (("one_by_one", "one request at a time"), ("batched", "one batch of all requests")):
        rate = row["transformers"][key]["median"]
        cells.append([f"transformers `generate`, {words}", f"{rate:,.0f}", f"{served / rate:.1f}×"])
    case = row["case"]
    what = f"{case['concurrency']} requests of {case['prompt_tokens']} + {case['tokens']} tokens, two CPU cores"
    return table([what, "tokens/s", "kimi-vllm is faster by"], cells)


def drafts() -> str:
    """N-gram drafts on a CPU, where answers repeat themselves and where they do not."""
    rows = json.loads((ENGINE / "drafts-2core.json").read_text())["rows"]
    cells = []
    for row in rows:
        rate = sorted(row["tokens_per_second"])[len(row["tokens_per_second"]) // 2]
        gain = f"{row['ratio']:.2f}×" if row["drafts"] else NONE
        accepted = f"{row['accepted_per_window']:.2f}" if row["drafts"] else NONE
        cells.append([row["answers"], f"{row['requests']}", f"{row['drafts']}", f"{rate:,.0f}", gain, accepted])
    return table(["answers", "requests at once", "drafts", "tokens/s", "to no drafts", "accepted per window"], cells)


def drafts_gpu() -> str:
    """Drafts on a GPU that are right to a set degree, beside no drafts and beside vLLM's own model."""
    found = draft_rates(read(ENGINE / "h200-drafts.jsonl"))
    cells = []
    for provider, requests, right in found:
        if provider != OURS or right is None:
            continue
        ours, plain_rate = found[OURS, requests, right], found[OURS, requests, None]
        theirs = found.get((IN_TREE, requests, right))
        compared = [f"{theirs:,.0f}", f"{ours / theirs:.2f}×"] if theirs else [NONE, NONE]
        cells.append([f"{requests}", f"{right:.0%}", f"{ours:,.0f}", f"{ours / plain_rate:.2f}×", *compared])
    return table(["requests at once", "drafts right", OURS, "to no drafts", IN_TREE, "ratio"], cells)


def drafts_row() -> str:
    """One line of README about drafts."""
    found = draft_rates(read(ENGINE / "h200-drafts.jsonl"))
    cells = [
        [
            f"{right:.0%} correct",
            pair(found[OURS, 64, right], found[IN_TREE, 64, right], 0, more_is_better=True),
            f"{found[OURS, 64, right] / found[OURS, 64, None]:.2f}×",
        ]
        for right in (0.8, 0.0)
    ]
    return table(["Three drafts, 64 × 4K, H200, FP8, tokens/s", "kimi-vllm / in-tree", "vs. no drafts"], cells)


def windows() -> str:
    """The kernel of windows beside a step of one token and vLLM's sequence, without rows of a search."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in plain.read(KERNELS / "h100-windows.jsonl"):
        found = times.setdefault((row["dtype"]["state"], row["case"]["N"]), {})
        found.setdefault(row["provider"], row["p50_us"])  # the searches, which time a decode again, come last
    cells = []
    for (state, count), found in sorted(times.items(), key=lambda item: (item[0][0] != "fp32", item[0][1])):
        ours, one, theirs = found[OURS], found["one token"], found.get(IN_TREE)
        beside = ["–", "–"] if theirs is None else [f"{theirs:,.1f}", f"{ours / theirs:.2f}"]
        cells.append([state, str(count), f"{ours:,.1f}", f"{one:,.1f}", f"{ours / one:.2f}", *beside])
    head = ["state", "rows", "window of four", "one token", "ratio", "in-tree, window of four", "ratio"]
    return table(head, cells, left=1)


_TRACES = {"chat": "chat, 32 users", "agent": "branching agents", "rag": "questions about documents"}


def cache_replay() -> str:
    """Share of reusable prompt tokens that are not computed again, the best of a line in bold."""
    share = {(row["trace"], row["memory"], row["policy"]): row["share"] for row in plain.read(ENGINE / "cache.jsonl")}
    policies = list(dict.fromkeys(policy for _, _, policy in share))
    cells = []
    for trace, memory in dict.fromkeys((trace, memory) for trace, memory, _ in share):
        found = [share[trace, memory, policy] for policy in policies]
        shown = (f"**{value:.1%}**" if value == max(found) else f"{value:.1%}" for value in found)
        cells.append([_TRACES[trace], memory, *shown])
    return table(["trace", "memory", *policies], cells, left=2)


def cache_first_token() -> str:
    """What hits are worth in a real engine."""
    found: dict[str, dict[str, float]] = {}
    for row in plain.read(ENGINE / "first-token-2core-epyc.jsonl"):
        column = f"{row['memory']}, {row['policy']}".removesuffix(", -")
        found.setdefault(row["trace"], {})[column] = row["ttft_mean_ms"]
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    cells = [[_TRACES[trace], *(f"{row[column]:.0f}" for column in columns)] for trace, row in found.items()]
    return table(["mean TTFT of the tiny model, ms", *columns], cells)


def scheduler() -> str:
    """What our part of a step costs on the host."""
    rows = plain.read(ENGINE / "scheduler-2core-epyc.jsonl")
    cells = [[row["what"], row["case"], f"{row['median_us']:.1f}", f"{row['p90_us']:.1f}"] for row in rows]
    return table(["256 requests", "step", "median, µs", "p90, µs"], cells, left=2)


def soak() -> str:
    """Counts of the long soak of the state cache."""
    row = json.loads((ENGINE / "soak-10000.json").read_text())
    counts = row["counts"]
    names = ("finished", "aborted", "preemptions", "evictions", "swaps_in", "hits", "leaked", "wrong", "model_mistakes")
    columns = [name.replace("_", " ").replace("model", "own") for name in names]
    return table(columns, [[f"{counts[name]:,}" for name in names]], left=0)
