"""Finds launch configurations of vLLM's Triton MoE kernel for a model, and writes them in the file vLLM reads.

python -m serve.bench.moe --output tuned --json tuned/rows.jsonl   # on the GPU that will serve

VLLM_TUNED_CONFIG_FOLDER=tuned vllm serve ...

For a geometry and GPU without such a file vLLM falls back on a rule of thumb. That default runs here too, and stays
where nothing beats it. Kernels are compiled first, by several processes at once. Then one process times whole layers
(products and everything around them) in CUDA graphs. Their calls differ in the experts they choose, so that weights
come from memory and not from the L2 cache. What is written has given the default's output, but for rounding.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from serve.bench.moe.space import Config, Experts, candidates, file_name, vllm_default, write
from serve.common.environment import prepare
from serve.common.paths import LARGE, ROOT
from serve.common.rows import append
from serve.common.tables import ResultTable

if TYPE_CHECKING:
    from serve.bench.moe.layer import Layer

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
DROP = 1.5
"""How many times the best time so far ends a configuration after its first repetition."""
FINALISTS = 3
ROUNDS = 3
ROUTINGS_OF_MANY = 2
TOLERANCE, FP8_TOLERANCE = 1e-2, 3e-2
"""Of a difference's norm relative to the output's. bfloat16 rounds each of three steps to 2⁻⁹; where that moves an
activation to the next value of FP8, it moves by 2⁻⁴."""
GAIN = 1.01
"""How many times faster than the default a configuration must be to replace it."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console(highlight=False)


def short(config: Config) -> str:
    """A configuration in few letters."""
    m, n, k, group = (config[key] for key in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"))
    return f"{m}x{n}x{k} group {group} warps {config['num_warps']} stages {config['num_stages']}"


def search(layer: "Layer", tokens: int, configs: list[Config], row: Callable[..., None]) -> tuple[Config, float, float]:
    """Time configurations for so many tokens; the first is vLLM's default.

    Args:
        row: takes tokens, configuration, stage of the search, and what was found.

    Returns:
        The one to launch, its microseconds, and those of the default.

    Raises:
        RuntimeError: the default does not run.
    """
    from serve.bench.moe.layer import difference, median_us

    routings = 4 if tokens <= 512 else ROUTINGS_OF_MANY
    run = layer.calls(tokens, routings)
    tolerance = FP8_TOLERANCE if layer.experts.fp8 else TOLERANCE
    default = configs[0]
    times: dict[int, float] = {}
    for index, config in enumerate(configs):
        worst = DROP * min(times.values(), default=float("inf"))
        try:
            times[index] = median_us(run, config, routings, worst, budget_us=8_000)
        except Exception as error:  # resources, or a compiler's failure: not for this GPU
            row(tokens, config, "search", error=f"{type(error).__name__}: {error}"[:300])
            continue
        row(tokens, config, "search", us=round(times[index], 2), dropped=times[index] > worst)
    if 0 not in times:
        raise RuntimeError(f"vLLM's default for {tokens} tokens does not run: {short(default)}")
    finalists = list(dict.fromkeys([*sorted(times, key=times.__getitem__)[:FINALISTS], 0]))
    rounds: dict[int, list[float]] = {index: [] for index in finalists}
    for _ in range(ROUNDS):
        for index in finalists:
            rounds[index].append(median_us(run, configs[index], routings, float("inf"), budget_us=12_000))
    final = {index: sorted(found)[ROUNDS // 2] for index, found in rounds.items()}
    reference = run(default)
    chosen = 0
    for index in sorted(final, key=final.__getitem__):
        error = difference(run, configs[index], reference)
        row(tokens, configs[index], "final", us=round(final[index], 2), default=index == 0, difference=error)
        if not chosen and error <= tolerance and final[index] * GAIN <= final[0]:
            chosen = index
    return configs[chosen], final[chosen], final[0]


def cutlass_us(layer: "Layer", tokens: int, default: Config, row: Callable[..., None]) -> float | None:
    """Microseconds of vLLM's grouped CUTLASS products for so many tokens, which take weights in FP8; else None."""
    from serve.bench.moe.layer import difference, median_us

    if not layer.experts.fp8:
        return None
    try:
        run = layer.cutlass_calls(tokens, ROUTINGS_OF_MANY)
        us = median_us(run, default, ROUTINGS_OF_MANY, float("inf"), budget_us=12_000)
        error = difference(run, default, layer.calls(tokens, ROUTINGS_OF_MANY)(default))
    except Exception as error:  # vLLM's build may have none for this GPU
        row(tokens, {}, "cutlass", error=f"{type(error).__name__}: {error}"[:300])
        return None
    row(tokens, {}, "cutlass", us=round(us, 2), difference=error)
    return us


@app.command(help=__doc__)
def tune(
    model: Annotated[Path, typer.Option(help="Folder with a config.json.", exists=True, file_okay=False)] = LARGE,
    fp8: Annotated[bool, typer.Option(help="Weights as with --quantization fp8, not in bfloat16.")] = False,
    ranks: Annotated[int, typer.Option(help="GPUs that share each expert: --tensor-parallel-size.", min=1)] = 1,
    tokens: Annotated[str, typer.Option(help="Tokens of the batches. vLLM launches what the nearest has.")] = TOKENS,
    output: Annotated[Path, typer.Option(help="Folder of the file, whose name vLLM gives.", file_okay=False)] = ROOT
    / "kimi_vllm"
    / "moe_configs",
    json: Annotated[Path | None, typer.Option(help="Append one JSON line per timing to this file.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile.", min=1)] = max(1, (os.cpu_count() or 1) - 1),
    compile_s: Annotated[float, typer.Option(help="Seconds for them; the rest is compiled while timing.")] = 180,
) -> None:
    """Time configurations per number of tokens, write the best."""
    prepare({"VLLM_LOGGING_LEVEL": "WARNING"})
    counts = sorted({int(word) for word in tokens.split(",")})
    experts = Experts.of_model(model, ranks, fp8=fp8)
    started = time.perf_counter()
    from serve.bench.moe.layer import Layer, compile_all  # which import vLLM

    plan = {}
    for count in counts:
        default = vllm_default(experts, count)
        plan[count] = [default, *(config for config in candidates(count, fp8=fp8) if config != default)]
    path = output / file_name(experts)
    console.print(f"{experts}\nvLLM imported after {time.perf_counter() - started:.0f} s")
    number, failures = compile_all(experts, plan, workers, compile_s)
    for failure in failures[:10]:
        console.print("not compiled:", failure[:300])
    console.print(
        f"{number - len(failures)} of {number} configurations compiled after {time.perf_counter() - started:.0f} s"
    )

    import torch

    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "experts": str(experts)}

    def row(tokens: int, config: Config, stage: str, **found: Any) -> None:
        if json is not None:
            case = {"bench": "moe", "tokens": tokens, "config": config, "stage": stage}
            append(json, case | found | {"env": environment})

    layer = Layer(experts)
    chosen: dict[int, Config] = {}
    cells = []
    for count, configs in plan.items():
        try:
            chosen[count], best_us, default_us = search(layer, count, configs, row)
        except (RuntimeError, AssertionError) as error:
            console.print(f"{count} tokens left out: {type(error).__name__}: {error}")
            continue
        other_us = cutlass_us(layer, count, configs[0], row)
        times = (f"{best_us:.1f}", f"{default_us:.1f}", f"{default_us / best_us:.2f}")
        times += ("" if other_us is None else f"{other_us:.1f}",)
        cells.append([str(count), short(chosen[count]), short(configs[0]), *times])
    columns = ["tokens", "best", "vLLM's default", "best, µs", "default, µs", "ratio", "CUTLASS, µs"]
    ResultTable(path.name, columns, cells, words=3).show()
    if not chosen:
        raise typer.Exit(1)
    write(path, chosen)
    console.print(f"{path} after {time.perf_counter() - started:.0f} s")
    if len(chosen) < len(counts):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
