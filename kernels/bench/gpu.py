"""Timing on a CUDA device: graph replays with a cold second-level cache, and what its memory can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kimi_vllm.kernels.bench.common import machine, quantiles

Step = Callable[[], object]


def measure_graph(
    steps: Sequence[Step], replays: int = 25, flush: torch.Tensor | None = None
) -> tuple[float, float, float]:
    """Return the time per step, in microseconds, of a CUDA graph that runs all steps one after another.

    Args:
        steps: Together they must touch more memory than the second-level cache holds, or it must be flushed.
        replays: How often the graph is timed.
        flush: A buffer larger than the cache, cleared before each replay, outside of the time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps[:3]:
            step()  # compiles, and lets caches of the providers fill
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return quantiles([time / len(steps) for time in _time(graph.replay, replays, flush)])


def measure_eager(step: Step, repeats: int = 25, flush: torch.Tensor | None = None) -> tuple[float, float, float]:
    """Return the time of one call in microseconds, as its caller sees it: launches included."""
    for _ in range(3):
        step()
    return quantiles(_time(step, repeats, flush))


def _time(action: Step, repeats: int, flush: torch.Tensor | None) -> list[float]:
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times[2:]


def flush_buffer() -> torch.Tensor:
    """Return a buffer of four times the second-level cache."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(4 * size, dtype=torch.uint8, device="cuda")


def copy_rates() -> tuple[float, float]:
    """Return what a large copy, and a large update in place, reach in GB/s of bytes read plus bytes written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    # A kernel's copy: a graph would hand `copy_` to the slower copy engine.
    _, copied, _ = measure_graph([lambda: torch.mul(source, 1.0, out=target)], replays=10)
    _, updated, _ = measure_graph([lambda: source.mul_(1.0)], replays=10)
    return 2 * source.nbytes / copied / 1e3, 2 * source.nbytes / updated / 1e3


def environment() -> dict[str, Any]:
    """Return the device and what it can do, and the versions that made a number."""
    properties = torch.cuda.get_device_properties(0)
    copied, updated = copy_rates()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "copy_gbps": copied,
        "in_place_gbps": updated,
        **machine("torch", "triton", "kimi-vllm"),
    }
