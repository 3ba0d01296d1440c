"""Served decode throughput against transformers' `generate`, same checkpoint, dtype, prompts and machine.

Transformers is run both ways it can serve several requests: all in one batch of equal lengths, which is its best case
and needs them to arrive together, and one after another, which is what a loop around `generate` does.
"""

import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import AsyncOpenAI

from serve.common.environment import SERVER
from serve.common.paths import RECALL, ROOT
from serve.common.rows import save
from serve.common.server import Server
from serve.common.tables import ResultTable

LOG = ROOT / ".demo" / "bench.log"
PROMPT_TOKENS = 40


def measure_served(
    prompts: list[list[int]], tokens: int, repeats: int, port: int, options: list[str]
) -> dict[str, Any]:
    """Tokens per second of `vllm serve`, started as in `make demo`, over HTTP with all prompts in flight at once."""
    with Server(RECALL, LOG, *options, name="recall", port=port) as server:
        ready = server.wait_ready(300)
        rates = asyncio.run(_rounds(f"{server.url}/v1", prompts, tokens, repeats + 1))[1:]
    return {"ready_seconds": round(ready, 1), "tokens_per_second": _summary(rates)}


async def _rounds(url: str, prompts: list[list[int]], tokens: int, rounds: int) -> list[float]:
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    return [await _all_at_once(client, prompts, tokens) for _ in range(rounds)]


async def _all_at_once(client: AsyncOpenAI, prompts: list[list[int]], tokens: int) -> float:
    start = time.perf_counter()
    answers = await asyncio.gather(
        *(
            client.completions.create(
                model="recall", prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
            )
            for prompt in prompts
        )
    )
    seconds = time.perf_counter() - start
    return sum(answer.usage.completion_tokens for answer in answers if answer.usage) / seconds


def measure_transformers(prompts: list[list[int]], tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of `generate`, batched and one by one; the better of one and all threads."""
    import torch
    from transformers import KimiLinearForCausalLM

    model = KimiLinearForCausalLM.from_pretrained(RECALL, dtype=torch.float32).eval()

    def generate(batch: list[list[int]]) -> None:
        ids = torch.tensor(batch)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )

    def rate(batches: list[list[list[int]]]) -> float:
        start = time.perf_counter()
        for batch in batches:
            generate(batch)
        return sum(map(len, batches)) * tokens / (time.perf_counter() - start)

    best: dict[str, Any] = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        generate(prompts)
        batched = _summary([rate([prompts]) for _ in range(repeats)])
        single = _summary([rate([[prompt] for prompt in prompts])])
        if not best or batched["median"] > best["batched"]["median"]:
            best = {"threads": threads, "batched": batched, "one_by_one": single}
    return best


def measure_ready() -> float:
    """Seconds from `LLM(...)` to a usable engine, in a fresh process, imports included."""
    import subprocess

    script = (
        "import time, os; start = time.perf_counter()\n"
        "from vllm import LLM\n"
        f"LLM({str(RECALL)!r}, dtype='float32', max_num_seqs=8, max_model_len=2048, enforce_eager=True)\n"
        "print('READY', time.perf_counter() - start)"
    )
    environment = os.environ | SERVER
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("READY")).split()[1])


def _summary(rates: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(rates), 1), "min": round(min(rates), 1), "max": round(max(rates), 1)}


def main(
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens to generate per request.")] = 128,
    repeats: Annotated[int, typer.Option(help="Measured rounds; one more warms up.")] = 5,
    eager: Annotated[bool, typer.Option("--eager", help="Serve without torch.compile.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8077,
    output: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Compare `vllm serve` with transformers on the tiny checkpoint, fp32, on this machine."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 100) for _ in range(PROMPT_TOKENS)] for _ in range(concurrency)]
    options = ["--dtype", "float32", "--max-num-seqs", str(concurrency), "--max-model-len", "2048"]
    options += ["--kv-cache-memory-bytes", str(256 << 20), "--no-enable-prefix-caching"]
    options += ["--enforce-eager"] * eager
    served = measure_served(prompts, tokens, repeats, port, options)
    theirs = measure_transformers(prompts, tokens, repeats)
    ready = measure_ready()
    ours = served["tokens_per_second"]["median"]
    result = {
        "bench": "served_decode_vs_transformers",
        "case": {"concurrency": concurrency, "prompt_tokens": PROMPT_TOKENS, "tokens": tokens, "dtype": "float32"},
        "served": served | {"eager": eager},
        "transformers": theirs,
        "ratio": {
            "to_batched": round(ours / theirs["batched"]["median"], 2),
            "to_one_by_one": round(ours / theirs["one_by_one"]["median"], 2),
        },
        "llm_ready_seconds": round(ready, 1),
    }
    batched, single = theirs["batched"]["median"], theirs["one_by_one"]["median"]
    cells = [
        [f"vllm serve with kimi-vllm, {concurrency} requests at once", f"{ours:.0f}", ""],
        [f"transformers generate, one batch of {concurrency}", f"{batched:.0f}", f"{ours / batched:.2f}×"],
        ["transformers generate, one by one", f"{single:.0f}", f"{ours / single:.2f}×"],
    ]
    ResultTable("served and generated", ["", "tokens/s", "ratio"], cells).show()
    typer.echo(f"LLM(...) ready in {ready:.1f} s, vllm serve in {served['ready_seconds']:.1f} s")
    if output is not None:
        save(output, result, "torch", "transformers")
    else:
        typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
