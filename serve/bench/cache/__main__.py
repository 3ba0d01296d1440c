"""``python -m serve.bench.cache reuse``, ``concurrency``, ``fragmentation`` or ``scheduler``: what the cache spares."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.common.environment import ENGINE, prepare
from serve.common.machine import facts
from serve.common.options import refuse_unknown
from serve.common.rows import take

PACKAGES = ("torch", "numba", "kimi-vllm")
app = typer.Typer(no_args_is_help=True, add_completion=False)
Json = Annotated[Path | None, typer.Option(help="Append one JSON line per row to this file.")]


@app.callback()
def main() -> None:
    """Benchmarks of the state cache. None needs a GPU or more than this repository."""
    prepare(ENGINE)


@app.command()
def reuse(
    traces: Annotated[list[str], typer.Option(help="chat, agent, rag; repeat for several.")] = ["chat", "agent", "rag"],  # noqa: B006
    policies: Annotated[
        list[str],
        typer.Option(help="value and lru are ours; align is vLLM's own, -64 and -128 its --prefix-match-unit."),
    ] = ["value", "lru", "align", "align-64", "align-128"],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Draws the traces.")] = 0,
    engine: Annotated[
        bool, typer.Option(help="Serve shortened traces with a real engine instead, and time first tokens.")
    ] = False,
    json: Json = None,
) -> None:
    """Replay traffic with prefixes to reuse through vLLM's real scheduler, and count what need not be computed.

    Three traces: a chat of 32 users, agents that branch, questions about documents. Each is replayed with memory
    for all its states and with memory for a third of those it still needs. A minute, the same numbers every time.
    """
    from serve.bench.cache import reuse as bench
    from serve.bench.cache.traces import TRACES

    refuse_unknown("--traces", traces, TRACES)
    refuse_unknown("--policies", policies, bench.POLICIES)
    if engine:
        from serve.bench.cache import first_token as bench  # type: ignore[no-redef]
    _measure(bench, "engine" if engine else "cache", bench.rows(traces, policies, seed), json)


@app.command()
def concurrency(
    prompts: Annotated[list[int], typer.Option(help="Tokens of the prompts; repeat for several.")] = [  # noqa: B006
        1024,
        4096,
        32768,
        131072,
    ],
    cache_gib: Annotated[
        float, typer.Option(help="GiB for states and KV cache. 34: one H200, bf16 weights, 0.92.")
    ] = 34,
    ours_gib: Annotated[float | None, typer.Option(help="GiB for ours, if not --cache-gib.")] = None,
    in_tree_gib: Annotated[float | None, typer.Option(help="GiB for vLLM's own, if not --cache-gib.")] = None,
    json: Json = Path("serve/bench/results/concurrency.jsonl"),
) -> None:
    """Count the requests of the 48B model that run at once in a fixed memory, ours and vLLM's own.

    Prompts are offered to vLLM's real scheduler until no more are admitted, prefilled chunk by chunk, and decode on.
    Nothing is computed: tokens are made up. The same numbers every time.
    """
    from serve.bench.cache import concurrency as bench

    ours, in_tree = (int((cache_gib if own is None else own) * 2**30) for own in (ours_gib, in_tree_gib))
    _measure(bench, "concurrency", bench.rows(prompts, ours, in_tree), json)


@app.command()
def fragmentation(
    traces: Annotated[
        list[str] | None, typer.Option(help="lognormal, by-turns, reasoning, alike-1024 ...; repeat for several.")
    ] = None,
    ticks: Annotated[int | None, typer.Option(help="Decode steps of a trace; default: as many as it is long.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the traces.")] = 0,
    json: Json = None,
) -> None:
    """Count the requests that run at once where states and pages share a memory and requests come and go.

    Beside exact fit by bytes: ours, vLLM's own, and a memory divided at start. Pure counting, under a minute.
    """
    from serve.bench.cache import fragmentation as bench

    chosen = traces or list(bench.TRACES)
    refuse_unknown("--traces", chosen, bench.TRACES)
    _measure(bench, "fragmentation", bench.rows(chosen, ticks, seed), json)


@app.command()
def scheduler(json: Json = None) -> None:
    """Time our part of a scheduling step with 256 requests, its metadata, and what could grow with age and length."""
    from serve.bench.cache import overhead as bench
    from serve.bench.cache.age import age_rows

    _measure(bench, "scheduler", [*bench.scheduler_rows(), *bench.metadata_rows(), *age_rows()], json)


def _measure(bench: Any, name: str, rows: Iterable[Any], json: Path | None) -> None:
    """Write the rows as they come, and print the benchmark's table of them."""
    env = facts(*PACKAGES)
    bench.report(take(name, rows, env, json), env)


if __name__ == "__main__":
    app()
