"""Where a step's GPU time goes, by the names of its kernels."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

CATEGORIES: tuple[tuple[str, str], ...] = (
    # FlashAttention 3 is built on CUTLASS and carries its name, so attention comes before matrix products.
    ("MLA", r"flash|fmha|mla|merge_attn_states|_fwd_grouped_kernel|_fwd_kernel_stage"),
    (
        "KDA",
        r"kda|gdn|delta_rule|causal_conv1d|conv_state|fused_recurrent|l2norm|layer_norm_gated|layer_norm_fwd|solve_tril|"
        r"recompute_w_u|merge_16x16|chunk_|_chunk|gather_initial_states|scatter_states|aligned_state|"
        r"^_decode\b|^extend\b|^_norm\b|^_step_rows\b",
    ),
    ("MoE", r"moe|topk|top_k|silu_and_mul|act_and_mul|count_and_sort_expert|expert"),
    ("GEMM", r"nvjet|cutlass|gemm|cublas|gemv|splitk|xmma|dot_kernel|matmul|^_skinny\b"),
)
"""Category and a pattern of its kernels' names; the first that is found decides, what none finds is "other".

The products that fold MLA's up-projections into queries and outputs are counted as GEMM, and the activation of the
dense layer as MoE: their names do not tell them apart.
"""

_PATTERNS = tuple((category, re.compile(pattern, re.IGNORECASE)) for category, pattern in CATEGORIES)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch on the device, or a copy; times in microseconds."""

    name: str
    start_us: float
    duration_us: float


def categorise(name: str) -> str:
    """The category of a kernel."""
    return next((category for category, pattern in _PATTERNS if pattern.search(name)), "other")


def summarise(kernels: Iterable[Kernel], steps: int, wall_ms: float) -> dict[str, Any]:
    """GPU time per step by category, from the kernels of all profiled steps.

    Args:
        wall_ms: a step's time without the profiler.

    Returns:
        ``gpu_ms`` by category; ``kernel_sum_ms``; ``busy_ms``, in which streams that overlap count once; ``gaps_ms``,
        the rest of the wall time; ``kernels`` per step; the largest of them, and of those that belong to no category.
    """
    some = sorted(kernels, key=lambda kernel: kernel.start_us)
    by_category = dict.fromkeys([*(category for category, _ in CATEGORIES), "other"], 0.0)
    unknown: dict[str, float] = {}
    named: dict[str, float] = {}
    busy, end = 0.0, float("-inf")
    for kernel in some:
        category = categorise(kernel.name)
        by_category[category] += kernel.duration_us
        named[kernel.name] = named.get(kernel.name, 0.0) + kernel.duration_us
        if category == "other":
            unknown[kernel.name] = unknown.get(kernel.name, 0.0) + kernel.duration_us
        until = kernel.start_us + kernel.duration_us
        busy += max(0.0, until - max(kernel.start_us, end))
        end = max(end, until)
    per_step = 1e3 * steps
    busy_ms = busy / per_step
    return {
        "gpu_ms": {category: round(time / per_step, 4) for category, time in by_category.items()},
        "kernel_sum_ms": round(sum(by_category.values()) / per_step, 4),
        "busy_ms": round(busy_ms, 4),
        "gaps_ms": round(wall_ms - busy_ms, 4),
        "kernels": round(len(some) / steps, 1),
        "steps": steps,
        "kernels_ms": _largest(named, 24, per_step),
        "other_kernels_ms": _largest(unknown, 10, per_step),
    }


def _largest(times: dict[str, float], count: int, per_step: float) -> dict[str, float]:
    return {
        name[:120]: round(time / per_step, 4) for name, time in sorted(times.items(), key=lambda item: -item[1])[:count]
    }


def categorise_again(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile that was written before some kernel was known: what is listed by name goes where it belongs now."""
    if not (listed := profile.get("other_kernels_ms")):
        return profile
    times, unknown = dict(profile["gpu_ms"]), {}
    for name, time in listed.items():
        category = categorise(name)
        if category == "other":
            unknown[name] = time
        else:
            times[category] = round(times[category] + time, 4)
            times["other"] = round(times["other"] - time, 4)
    return profile | {"gpu_ms": times, "other_kernels_ms": unknown}


def profile_kernels(step: Callable[[], object], steps: int) -> list[Kernel]:
    """Run so many steps under torch's profiler; return what ran on the device.

    With vLLM's asynchronous scheduling a call of `step` launches one step and returns the tokens of the one before,
    so between two synchronisations as many steps are computed as calls were made.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
