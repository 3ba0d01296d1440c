"""What the generated parts of the documents say: results of benchmarks, options, profiles, metrics.

Each function makes one part as Markdown. Numbers that change have no other home in README.md and docs/.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import yaml

from kimi_vllm.options import KimiOptions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "serve" / "bench"))
from serving.plan import IN_TREE, OURS  # noqa: E402
from serving.rows import Row  # noqa: E402
from serving.tables import tokens  # noqa: E402

sys.path.insert(0, str(ROOT / "tests"))
from support.record import FEATURES  # noqa: E402

ENGINE = ROOT / "serve" / "bench" / "results"
KERNELS = ROOT / "kernels" / "bench" / "results"
CACHE = ROOT / "kimi_vllm" / "bench" / "results"
PROFILES = ROOT / "configs" / "serve"
LOAD_PICTURE = ROOT / "docs" / "images" / "load.png"
NONE = "–"

REGIONS: dict[str, Callable[[], str]] = {}
"""The parts by name."""


def _region(function: Callable[[], str]) -> Callable[[], str]:
    REGIONS[function.__name__.replace("_", "-")] = function
    return function


def _table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(ratio: float, digits: int = 2) -> str:
    """A ratio, bold where it says that the other is better."""
    text = f"{ratio:.{digits}f}×"
    return f"**{text}**" if ratio < 1 else text


def _micros(us: float) -> str:
    """Three digits, in the unit that fits."""
    number, unit = (us, "µs") if us < 500 else (us / 1000, "ms")
    return f"{number:.{max(0, 2 - int(math.log10(number)))}f} {unit}"


@_region
def concurrency() -> str:
    """Requests that run at once in 34 GiB."""
    found: dict[tuple[int, bool], dict[tuple[str, str], list[int]]] = {}
    for line in (ENGINE / "concurrency.jsonl").read_text().splitlines():
        row = json.loads(line)
        point = found.setdefault((row["prompt"], row["prefix_caching"]), {})
        point.setdefault((row["variant"], row["division"]), []).append(row["running"])
    cells = [
        [tokens(prompt), "on" if caching else "off"]
        + [
            " / ".join(map(str, dict.fromkeys(point[key])))
            for key in ((OURS, "default"), (OURS, "best"), (IN_TREE, "shared"))
        ]
        for (prompt, caching), point in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    columns = ["prompts of", "prefix caching", "by default, `--max-num-seqs` 256 / 1024", "divided for that length"]
    return _table([*columns, "in-tree, 256 / 1024"], cells)


def _kernel_rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (KERNELS / name).read_text().splitlines()]


@_region
def cpu_kernels() -> str:
    """The CPU kernels beside plain torch."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in _kernel_rows("cpu-2core-epyc.jsonl"):
        if row["case"]["H"] == 32:
            found.setdefault((row["bench"], json.dumps(row["case"])), {})[row["provider"]] = row
    cells = []
    for (bench, case), point in found.items():
        size = json.loads(case)
        what = f"decode, batch {size['N']}" if bench == "kda_decode" else f"prefill, {size['T']} tokens"
        rate, plain = point["numba"]["rate_gbps"], point["torch"]["p50_us"]
        traffic = "" if rate is None else f"{rate:.0f} GB/s"
        cells.append([what, _micros(point["numba"]["p50_us"]), traffic, _micros(plain)])
    return _table(["one KDA layer of the 48B model, two CPU cores", "time", "state traffic", "plain torch ops"], cells)


_H200_CASES = (
    ("decode", {"N": 1}, "decode, batch 1"),
    ("decode", {"N": 8}, "decode, batch 8"),
    ("decode", {"N": 32}, "decode, batch 32"),
    ("decode", {"N": 256}, "decode, batch 256"),
    ("prefill", {"T": 64, "N": 1}, "prefill, 64 tokens"),
    ("prefill", {"T": 512, "N": 1}, "prefill, 512 tokens"),
    ("prefill", {"T": 8192, "N": 1}, "prefill, 8192 tokens"),
    ("prefill", {"T": 1024, "N": 64}, "prefill, 64 sequences of 16 tokens"),
)


@_region
def h200_kernels() -> str:
    """The CUDA kernels beside vLLM's and fla's."""
    points = {
        (row["bench"], json.dumps(row["case"]), row["dtype"]["state"], row["provider"]): row["p50_us"]
        for row in _kernel_rows("h200.jsonl")
    }
    cells = []
    for bench, size, what in _H200_CASES:
        case = json.dumps({**size, "H": 32, "D": 128})
        ours, theirs, fla = (points[bench, case, "fp32", name] for name in (OURS, IN_TREE, "fla"))
        cells.append([what, _micros(ours), _micros(theirs), _times(theirs / ours), _micros(fla), _times(fla / ours)])
    return _table(["one KDA layer of the 48B model", "kimi-vllm", "vLLM in-tree", "", "fla", ""], cells)


@_region
def versus_transformers() -> str:
    """`vllm serve` beside `generate`."""
    row = json.loads((ENGINE / "versus-transformers-2core-epyc.json").read_text())
    case, served = row["case"], row["served"]["tokens_per_second"]["median"]
    cells = [["`vllm serve` with kimi-vllm, over HTTP", f"{served:,.0f}", ""]]
    for key, words in (("one_by_one", "the requests one by one"), ("batched", "all as one batch, its best case")):
        rate = row["transformers"][key]["median"]
        cells.append([f"transformers `generate`, {words}", f"{rate:,.0f}", f"{served / rate:.1f}× slower"])
    what = f"tiny model, {case['concurrency']} requests of {case['prompt_tokens']} + {case['tokens']} tokens"
    return _table([f"{what}, two CPU cores", "tokens/s", ""], cells)


_TRACES = {"chat": "chat, 32 users", "agent": "agents that branch", "rag": "questions about documents"}


@_region
def cache_replay() -> str:
    """Share of reusable tokens that are not computed again."""
    share = {}
    for line in (CACHE / "cache.jsonl").read_text().splitlines():
        row = json.loads(line)
        share[row["trace"], row["memory"], row["policy"]] = row["share"]
    memories = dict.fromkeys(memory for _, memory, _ in share)
    columns = ["trace", *(f"{policy}, {memory}" for memory in memories for policy in ("value", "lru", "align"))]
    cells = [
        [what]
        + [
            f"{share[trace, memory, policy]:.1%}" if (trace, memory, policy) in share else NONE
            for memory in memories
            for policy in ("value", "lru", "align")
        ]
        for trace, what in _TRACES.items()
    ]
    return _table(columns, cells)


@_region
def cache_first_token() -> str:
    """What hits are worth in a real engine."""
    found: dict[str, dict[str, float]] = {}
    for line in (CACHE / "engine-2core-epyc.jsonl").read_text().splitlines():
        row = json.loads(line)
        column = f"{row['memory']}, {row['policy']}".removesuffix(", -")
        found.setdefault(row["trace"], {})[column] = row["ttft_mean_ms"]
    columns = dict.fromkeys(column for row in found.values() for column in row)
    cells = [[_TRACES[trace], *(f"{row[column]:.0f} ms" for column in columns)] for trace, row in found.items()]
    return _table(["mean time to the first token, tiny model", *columns], cells)


@_region
def scheduler() -> str:
    """What our part of a step costs on the host."""
    rows = [json.loads(line) for line in (CACHE / "scheduler-2core-epyc.jsonl").read_text().splitlines()]
    cells = [[row["what"], row["case"], f"{row['median_us']:.1f} µs", f"{row['p90_us']:.1f} µs"] for row in rows]
    return _table(["256 requests", "step", "median", "p90"], cells)


@_region
def soak() -> str:
    """Counts of the long soak of the state cache."""
    row = json.loads((ENGINE / "soak-10000.json").read_text())
    counts = row["counts"]
    return (
        f"`{row['command']}`, {row['env']['cores']} cores, {counts['seconds'] / 60:.0f} minutes: "
        f"{counts['finished']:,} answers, {counts['aborted']:,} aborts, {counts['preemptions']:,} preemptions, "
        f"{counts['evictions']:,} evictions, {counts['swaps_in']:,} states back from the host, {counts['hits']:,} hits"
        f"; {counts['leaked']} slots or pages leaked, {counts['wrong']} wrong answers. {counts['model_mistakes']} more "
        "are the tiny model's own: asked alone without a cache it gives the same text."
    )


@_region
def compatibility() -> str:
    """What tests have run where: a row a feature, a column a vLLM and device."""
    known = json.loads((ROOT / "tests" / "tested.json").read_text())
    places = [
        (release, device) for release, devices in sorted(known.items()) for device in sorted(devices, reverse=True)
    ]
    cells = []
    for feature in FEATURES:
        said = [known[release][device].get(feature, "not tried") for release, device in places]
        cells.append([feature, *(text.removeprefix("tested ") for text in said)])
    names = [f"vLLM {release}, {device.removeprefix('NVIDIA ').removesuffix(' HBM3')}" for release, device in places]
    return _table(["", *names], cells)


@_region
def options() -> str:
    """The options of the plugin."""
    cells = []
    for name, field in KimiOptions.model_fields.items():
        default = "by memory" if field.default is None else str(field.default)
        shown = f'`"{default}"`' if isinstance(field.default, str) else default
        cells.append([f"`{name}`", shown, str(field.description)])
    return _table(["option", "default", "meaning"], cells)


@_region
def profiles() -> str:
    """The profiles of configs/serve: what for, and the two sizes that matter."""
    cells = []
    for path in sorted(PROFILES.glob("*.yaml")):
        first = path.read_text().splitlines()[0]
        profile = yaml.safe_load(path.read_text())
        most = profile["max-num-seqs"]
        what = first.removeprefix("# ").removeprefix("Kimi-Linear-48B-A3B ").split(";")[0].split(":")[0].rstrip(".")
        cells.append([f"[{path.stem}](../{path.relative_to(ROOT)})", what, str(most), tokens(profile["max-model-len"])])
    return _table(["profile", "for", "runs at once", "longest"], cells)


@_region
def scenarios() -> str:
    """The scenarios of the load test."""
    cells = []
    for path in sorted((ROOT / "serve" / "load" / "scenarios").glob("*.yaml")):
        scenario = yaml.safe_load(path.read_text())
        cells.append(
            [f"`{path.stem}`", scenario["about"].strip(), "starts its own" if "server" in scenario else "`--url`"]
        )
    return _table(["scenario", "what it shows", "server"], cells)


@_region
def metrics() -> str:
    """The metrics of the state cache, as `/metrics` names them."""
    from prometheus_client import REGISTRY

    from kimi_vllm import ARCHITECTURE
    from kimi_vllm.metrics import PREFIX, StateCacheMetrics

    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]), served_model_name="kimi")
    StateCacheMetrics(SimpleNamespace(model_config=model), [0])  # type: ignore[arg-type]
    cells = []
    for family in sorted(REGISTRY.collect(), key=lambda family: family.name):
        if family.name.startswith(PREFIX):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            kinds = dict.fromkeys(sample.labels["kind"] for sample in family.samples if "kind" in sample.labels)
            label = f"`{name}{{kind}}`: {', '.join(kinds)}" if kinds else f"`{name}`"
            cells.append([label, family.type, family.documentation])
    return _table(["metric", "type", "meaning"], cells)


@_region
def load_picture() -> str:
    """The page of a load test, once there is a picture of it."""
    if not LOAD_PICTURE.exists():
        return ""
    return f"![the page that make load writes]({LOAD_PICTURE.relative_to(ROOT)})"
