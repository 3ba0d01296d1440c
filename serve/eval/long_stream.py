"""A context far longer than any in training: read in chunks, then asked what was said at three places in it."""

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm import SamplingParams, TokensPrompt

from kimi_vllm.geometry import geometry_of
from serve.common.engine import Engine, engine
from serve.common.tables import ResultTable
from serve.eval.tasks import BOS, FILLERS, FIRST_FILLER, NEEDLE_KEYS, NEEDLE_VALUES, TASKS

DEPTHS = (0.01, 0.5, 0.99)
MIB = 2**20
GPU_KV_BYTES = 4 * 2**30
"""A million latents of 576 in two bytes are 1.1 GiB."""


def make_context(length: int, seed: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
    """Filler of so many tokens with a needle at each of DEPTHS.

    Returns:
        Token ids, and key and value of each needle.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = TASKS["needle"].vocabulary
    first_key, first_value, note = (vocabulary.index(word) for word in ("k0", "v0", "<note>"))
    tokens = torch.randint(FIRST_FILLER, FIRST_FILLER + FILLERS, (length,), generator=generator)
    tokens[0] = BOS
    keys = first_key + torch.randperm(NEEDLE_KEYS, generator=generator)[: len(DEPTHS)]
    values = first_value + torch.randint(NEEDLE_VALUES, (len(DEPTHS),), generator=generator)
    for depth, key, value in zip(DEPTHS, keys, values, strict=True):
        at = 1 + round(depth * (length - 4))
        tokens[at : at + 3] = torch.stack([torch.tensor(note), key, value])
    return tokens.tolist(), list(zip(keys.tolist(), values.tolist(), strict=True))


def _ask(running: Engine, prompt: list[int], samples: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One greedy token, and how memory went on the way: `samples` gets an entry after every step."""
    process = psutil.Process()
    pages = running.scheduler.kv_cache_manager.block_pool
    free = pages.get_num_free_blocks()
    core = running.llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    start, cpu, steps = time.perf_counter(), time.process_time(), 0
    core.add_request("long", TokensPrompt(prompt_token_ids=prompt), parameters)
    while core.has_unfinished_requests():
        outputs = core.step()
        steps += 1
        if samples is not None and (requests := running.scheduler.running):
            samples.append(
                {
                    "tokens": requests[0].num_computed_tokens,
                    "seconds": round(time.perf_counter() - start, 1),
                    "rss_mib": round(process.memory_info().rss / MIB, 1),
                    "slots": running.slots.num_live,
                    "pages": free - pages.get_num_free_blocks(),
                }
            )
            if torch.cuda.is_available():
                samples[-1]["gpu_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
    [output] = outputs
    running.check_idle()
    return {
        "answer": TASKS["needle"].vocabulary[output.outputs[0].token_ids[0]],
        "cached": output.num_cached_tokens,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def read_and_ask(
    model: Path, tokens: int, chunk: int, threads: int, dtype: str = "float32", state_dtype: str = "float32"
) -> dict[str, Any]:
    """Read a context once and ask for each needle; all questions but the first find it in the prefix cache.

    Args:
        chunk: tokens in a step.
        threads: Threads of torch, whose attention takes most of the time on a CPU.

    Returns:
        Questions with answers and times, memory over time, and the sizes of a state, a block and all blocks in bytes.
    """
    vocabulary = TASKS["needle"].vocabulary
    context, needles = make_context(tokens)
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": tokens + 64,
        "max_num_seqs": 1,
        "max_num_batched_tokens": chunk,
        "enable_prefix_caching": True,
        "additional_config": {"kimi": {"state_dtype": state_dtype}},
    }
    if torch.cuda.is_available():
        options["kv_cache_memory_bytes"] = GPU_KV_BYTES
    asked: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    with engine(model, **options) as running:
        assert torch.cuda.is_available() or torch.get_num_threads() == threads
        for number, (depth, (key, value)) in enumerate(zip(DEPTHS, needles, strict=True)):
            prompt = [*context, vocabulary.index("<ask>"), key]
            found = _ask(running, prompt, samples if number == 0 else None)
            asked.append(
                {"depth": depth, "tokens_ago": tokens - round(depth * tokens), "right": vocabulary[value], **found}
            )
        geometry = geometry_of(running.worker.model_config)
        sizes = {
            "state_blocks": running.pool.layout.blocks,
            "slot_bytes": running.pool.layout.state_bytes,
            "page_bytes": running.pool.layout.block_bytes,
            "memory_bytes": running.pool.memory.nbytes,
        }
    return {
        "bench": "synthetic-long",
        "tokens": tokens,
        "chunk": chunk,
        "threads": threads,
        "dtype": dtype,
        "state_dtype": state_dtype,
        "kda_heads": geometry.linear_num_heads,
        "mla_heads": geometry.num_attention_heads,
        "asked": asked,
        "sizes": sizes,
        "memory": samples[:: max(1, len(samples) // 50)] + samples[-1:],
    }


def table(result: dict[str, Any]) -> ResultTable:
    """The result for people."""
    sizes, memory = result["sizes"], result["memory"]
    title = (
        f"{result['tokens']:,} tokens in steps of {result['chunk']:,}; resident memory "
        f"{memory[0]['rss_mib']:,.0f} MiB after the first step, {memory[-1]['rss_mib']:,.0f} after the last; "
        f"{memory[-1]['slots']} state of {sizes['slot_bytes'] / MIB:.2f} MiB, "
        f"{memory[-1]['pages']:,} pages of {sizes['page_bytes'] / 1024:.0f} KiB"
    )
    columns = ["needle at", "tokens ago", "right answer", "answer", "from cache", "steps", "seconds", "CPU seconds"]
    cells = [
        [
            *(f"{row['depth']:.0%}", f"{row['tokens_ago']:,}", row["right"], row["answer"], f"{row['cached']:,}"),
            *(str(row["steps"]), f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"),
        ]
        for row in result["asked"]
    ]
    return ResultTable(title, columns, cells, words=0)
