"""Served throughput with n-gram drafts and without, where answers repeat themselves and where they are sampled.

The tiny model's long greedy answers are periodic: nearly every draft is right. At temperature 1 fewer can be guessed.
"""

import asyncio
import json
import random
import re
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from openai import AsyncOpenAI

from serve.common.paths import RECALL, ROOT
from serve.common.rows import save
from serve.common.server import Server
from serve.common.tables import ResultTable

LOG = ROOT / ".demo" / "bench.log"
PROMPT_TOKENS = 40
ANSWERS = {"periodic": 0.0, "sampled": 1.0}
"""Temperatures."""


def measure(drafts: int, requests: list[int], tokens: int, repeats: int, port: int) -> list[dict[str, Any]]:
    """Rows of one server: tokens per second, and tokens that a step yields for a request."""
    options = [
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "1000000000",
    ]
    if drafts:
        ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        options += ["--speculative-config", json.dumps(ngram)]
    rows = []
    with Server(RECALL, LOG, *options, name="recall", port=port) as server:
        server.wait_ready(300)
        for kind, temperature in ANSWERS.items():
            for count in requests:
                rng = random.Random(count)
                prompts = [[rng.randrange(3, 100) for _ in range(PROMPT_TOKENS)] for _ in range(count)]
                before = _accepted(server.url)
                rates = asyncio.run(_rounds(f"{server.url}/v1", prompts, tokens, temperature, repeats + 1))[1:]
                windows, accepted = (after - old for after, old in zip(_accepted(server.url), before, strict=True))
                rows.append(
                    {
                        "answers": kind,
                        "drafts": drafts,
                        "requests": count,
                        "tokens_per_second": [round(rate, 1) for rate in sorted(rates)],
                        "accepted_per_window": round(accepted / windows, 2) if windows else 0.0,
                    }
                )
    return rows


async def _rounds(url: str, prompts: list[list[int]], tokens: int, temperature: float, rounds: int) -> list[float]:
    rates = []
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for _ in range(rounds):
            start = time.perf_counter()
            asked = (
                client.completions.create(
                    model="recall",
                    prompt=prompt,
                    max_tokens=tokens,
                    temperature=temperature,
                    seed=number,
                    extra_body={"ignore_eos": True},
                )
                for number, prompt in enumerate(prompts)
            )
            answers = await asyncio.gather(*asked)
            made = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
            rates.append(made / (time.perf_counter() - start))
    return rates


def _accepted(url: str) -> tuple[float, float]:
    """Windows with drafts, and drafts accepted, so far."""
    text = httpx.get(f"{url}/metrics").text
    names = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    found = [re.findall(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE) for name in names]
    first, second = (sum(map(float, values)) for values in found)
    return first, second


def main(
    drafts: Annotated[list[int], typer.Option(help="Drafts a step; 0: none. Repeat the option.")] = [0, 3, 5],  # noqa: B006
    requests: Annotated[list[int], typer.Option(help="Requests at once. Repeat the option.")] = [1, 8],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 200,
    repeats: Annotated[int, typer.Option(help="Rounds measured, after one that is not.")] = 3,
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure and print a table; ratios are to the row without drafts."""
    rows = [row for count in drafts for row in measure(count, requests, tokens, repeats, port)]
    plain = {(r["answers"], r["requests"]): statistics.median(r["tokens_per_second"]) for r in rows if not r["drafts"]}
    cells = []
    for row in rows:
        rate = statistics.median(row["tokens_per_second"])
        base = plain.get((row["answers"], row["requests"]))
        row["ratio"] = round(rate / base, 2) if base else None
        numbers = (row["requests"], row["drafts"], f"{rate:,.0f}", row["ratio"], row["accepted_per_window"])
        cells.append([row["answers"], *map(str, numbers)])
    columns = ["answers", "requests", "drafts", "tokens/s", "to none", "accepted per window"]
    ResultTable("n-gram drafts", columns, cells).show()
    if json_path is not None:
        save(json_path, {"rows": rows}, "torch", "numba")


if __name__ == "__main__":
    typer.run(main)
