"""vLLM with this plugin beside vLLM's own Kimi Linear: time per token, requests at once, mixed load, prefill.

python -m serve.bench.engine run                                          # the toy, on a CPU, a minute
python -m serve.bench.engine run --model configs/models/48b-a3b --json h200.jsonl     # one H200
python -m serve.bench.engine table h200.jsonl
python -m serve.bench.engine plot h200.jsonl --folder plots
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from json import loads as read_json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serve.bench.engine.plan import IN_TREE, MEASUREMENTS, ON_REQUEST, OURS, Plan
from serve.bench.engine.rows import Rows, read
from serve.bench.engine.tables import tables
from serve.bench.engine.variant import run_variant
from serve.common.environment import ENGINE
from serve.common.options import refuse_unknown
from serve.common.paths import RECALL, RESULTS, ROOT

SETTINGS = ENGINE | {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # with several GPUs, functions of this benchmark are sent to the workers
}
"""Of every variant's process, unless the caller has set them."""
# The experts are vLLM's in both, so what is tuned for them serves both.
MOE_CONFIGS = ROOT / "kimi_vllm" / "moe_configs"
PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "ours": (OURS, {"KIMI_VLLM_STRICT": "1"}),
    # Its all-reduce fused into a product needs a library that plain installations lack; on one GPU it has no use.
    "in-tree": (
        IN_TREE,
        {
            "KIMI_VLLM_DISABLE": "1",
            "VLLM_KIMI_K3_GEMM_AR": "0",
            "VLLM_TUNED_CONFIG_FOLDER": str(MOE_CONFIGS),
        },
    ),
}
GRACE_S = 60

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console(highlight=False)


def _numbers(text: str) -> tuple[int, ...]:
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [re.fullmatch(r"(\d+)([KM]?)", word) for word in text.upper().replace(" ", "").split(",")]
    if not all(found):
        raise typer.BadParameter(f"{text!r}: expected lengths in tokens such as 4K,128K,1M or 4096,131072")
    return tuple(int(length[1]) * units.get(length[2], 1) for length in found if length)


def _repeated(text: str) -> tuple[tuple[int, ...], ...]:
    found = [re.fullmatch(r"(\d+)x(\w+)", word.strip()) for word in text.split(",")]
    if not all(found):
        raise typer.BadParameter(f"{text!r}: expected prompts x tokens, such as 60x32K")
    return tuple((int(load[1]), *_numbers(load[2])) for load in found if load)


def _loads(text: str) -> tuple[tuple[int, ...], ...]:
    found = [re.fullmatch(r"(\d+)x(\w+)\+(\w+)", word.strip()) for word in text.split(",")]
    if not all(found):
        raise typer.BadParameter(f"{text!r}: expected requests x prompt + output, such as 64x4K+128")
    return tuple((int(load[1]), *_numbers(f"{load[2]},{load[3]}")) for load in found if load)


READ = {
    **dict.fromkeys(("contexts", "prompts", "prefills", "draft_requests", "beside", "resumed"), _numbers),
    "loads": _loads,
    "repeated": _repeated,
}
"""How options are read that are lists in a plan; the others are what they are there."""


@app.command()
def run(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Folder with a config.json.", exists=True, file_okay=False)] = RECALL,
    variant: Annotated[list[str], typer.Option(help="ours, in-tree; repeat for both.")] = [*PROVIDERS],  # noqa: B006
    measure: Annotated[
        list[str],
        typer.Option(
            help="Some of routing, ready, tpot, concurrency, mixed, prefill, throughput, drafts, resume, again; repeat."
        ),
    ] = [*MEASUREMENTS],  # noqa: B006
    json: Annotated[Path, typer.Option(help="Append one JSON line per point to this file.")] = RESULTS / "engine.jsonl",
    load_format: Annotated[str, typer.Option(help="dummy: no weights are read, random ones are drawn; or auto.")] = (
        "dummy"
    ),
    contexts: Annotated[str | None, typer.Option(help="tpot: tokens behind the decoded one, such as 4K,128K.")] = None,
    batch_cap: Annotated[int | None, typer.Option(help="tpot: most requests of the larger batch.")] = None,
    steps: Annotated[int | None, typer.Option(help="tpot: steps timed.")] = None,
    profiled: Annotated[int | None, typer.Option(help="tpot: steps under the profiler; 0 for none.")] = None,
    prompts: Annotated[str | None, typer.Option(help="concurrency: tokens of the prompts.")] = None,
    decoders: Annotated[int | None, typer.Option(help="mixed: requests that decode.")] = None,
    arrivals: Annotated[int | None, typer.Option(help="mixed: prompts that arrive.")] = None,
    every_s: Annotated[float | None, typer.Option(help="mixed: seconds between them.")] = None,
    beside: Annotated[
        str | None,
        typer.Option(help="mixed, ours: further limits of a step with prompts beside decodes, such as 1K,2K."),
    ] = None,
    prefills: Annotated[str | None, typer.Option(help="prefill: tokens of the prompts.")] = None,
    loads: Annotated[
        str | None, typer.Option(help="throughput: requests x prompt + output, such as 64x4K+128,256x1K+128.")
    ] = None,
    draft_requests: Annotated[str | None, typer.Option(help="drafts: requests at once, such as 64,128.")] = None,
    resumed: Annotated[
        str | None, typer.Option(help="resume: tokens of the sessions; --engine must set kimi.session_dir.")
    ] = None,
    repeated: Annotated[
        str | None,
        typer.Option(help="again: prompts x tokens, such as 60x32K; --engine must set enable_prefix_caching."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="throughput: how often each is timed.")] = None,
    batched_tokens: Annotated[int | None, typer.Option(help="Most tokens of a step, all variants.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most requests at once, all variants.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of the longest request.")] = None,
    engine: Annotated[str, typer.Option(help="Further options of vLLM's LLM, as a JSON object.")] = "{}",
    bandwidth_tbps: Annotated[
        float, typer.Option(help="Peak memory bandwidth for the floor, 10^12 bytes/s; 0: known for H100 and H200.")
    ] = 0,
    minutes: Annotated[float | None, typer.Option(help="Of one variant; no point is started after.")] = None,
    budget_s: Annotated[float | None, typer.Option(help="Seconds that one point may take.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show what the engines print.")] = False,
) -> None:
    """Start each variant's engine once, in a process of its own, and measure; defaults depend on the model's size.

    The engine's core is stepped directly: no tokenizer and no HTTP in any number. Prefix caching is off. Where a row
    says "synthetic", the context was made up instead of computed, see synthetic.py beside this.

    Exit status: 0 if all went well, 1 if a point or a variant failed. What was measured is in the file either way.
    """
    refuse_unknown("--variant", variant, PROVIDERS)
    refuse_unknown("--measure", measure, MEASUREMENTS + ON_REQUEST)
    plan = Plan.for_model(model.resolve())
    same = Plan.model_fields.keys() - {"model", "engine"}
    given = {name: value for name, value in context.params.items() if name in same and value is not None}
    chosen: dict[str, Any] = {name: READ.get(name, lambda value: value)(value) for name, value in given.items()}
    chosen |= {"measurements": tuple(measure), "engine": plan.engine | read_json(engine)}
    chosen |= {} if minutes is None else {"variant_s": minutes * 60}
    plan = plan.model_copy(update=chosen)
    first = len(read(json)) if json.exists() else 0
    good = True
    for name in variant:
        provider, environment = PROVIDERS[name]
        good &= _start(plan, provider, environment, json, verbose)
    for table in tables(read(json)[first:]) if json.exists() else ():
        table.show()
    raise typer.Exit(0 if good else 1)


@app.command(hidden=True)
def child(plan: str, provider: str, json: Path) -> None:
    """One variant; `run` starts this."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled there, but looking costs seconds
    raise typer.Exit(0 if run_variant(Plan.model_validate_json(plan), provider, json) else 1)


@app.command()
def table(json: Annotated[Path, typer.Argument(help="Rows that `run` wrote.", exists=True)]) -> None:
    """Print the results as Markdown tables; of a point that was measured twice, the last."""
    typer.echo("\n\n".join(one.markdown() for one in tables(read(json))))


@app.command()
def plot(
    json: Annotated[Path, typer.Argument(help="Rows that `run` wrote.", exists=True)],
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = RESULTS,
) -> None:
    """Draw the results. Needs matplotlib."""
    from serve.bench.engine.plots import plot as draw

    for path in draw(read(json), folder):
        console.print(str(path))


def _start(plan: Plan, provider: str, environment: dict[str, str], path: Path, verbose: bool) -> bool:
    console.print(f"{provider}: {Path(plan.model).name}, at most {plan.variant_s / 60:.1f} minutes")
    command = [
        sys.executable,
        "-m",
        "serve.bench.engine",
        "child",
        plan.model_dump_json(),
        provider,
        str(path.resolve()),
    ]
    with tempfile.TemporaryFile("w+") as log:
        try:
            code: int | str = subprocess.run(
                command,
                env=SETTINGS | dict(os.environ) | environment,
                stdout=None if verbose else log,
                stderr=None if verbose else subprocess.STDOUT,
                timeout=plan.variant_s + GRACE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {plan.variant_s + GRACE_S:.0f} s"
        log.seek(0)
        tail = "".join(deque(log, maxlen=30))
    if code == 0:
        return True
    console.print(f"{provider}: {code}\n{tail}", markup=False)
    if code != 1:  # 1: its rows hold the errors
        Rows(path, provider).write(
            "engine", {"model": Path(plan.model).name}, {"error": f"exit {code}\n{tail[-2000:]}"}
        )
    return False


if __name__ == "__main__":
    app()
