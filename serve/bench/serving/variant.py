"""One variant, from the start of its engine to its last row; runs in a process of its own."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from serving.plan import IN_TREE, Plan
from serving.rows import Rows, environment


def run_variant(plan: Plan, provider: str, path: Path) -> bool:
    """Measure all points of a plan with one engine, a row each; whether there was no error.

    A point that fails leaves a row with the error, and the next one starts with a clean engine.
    """
    import torch
    from serving.engine import BenchEngine
    from serving.measure import points

    started, cuda = time.perf_counter(), torch.cuda.is_available()
    rows = Rows(path, provider)
    case = {"model": Path(plan.model).name}
    if provider == IN_TREE and not cuda:
        rows.write("engine", case, {"skipped": "vLLM's own Kimi Linear does not start on CPUs"})
        return True
    rows.write("header", case, {"env": environment(), "plan": asdict(replace(plan, model=case["model"]))})
    try:
        engine = BenchEngine(plan, provider, cuda=cuda)
    except Exception:
        rows.write("engine", case, {"error": _tail()})
        traceback.print_exc()
        return False
    rows.write("engine", case, engine.facts)
    good = True
    for bench, point, measure in points(engine, plan, cuda=cuda):
        if (elapsed := time.perf_counter() - started) > plan.variant_s:
            rows.write(bench, point, {"skipped": f"{elapsed:.0f} s of {plan.variant_s:g} s had passed"})
            continue
        begun = time.perf_counter()
        with _hiccups() as seen:
            try:
                fields = measure()
            except Exception:
                fields = {"error": _tail()}
                traceback.print_exc()
        fields |= seen
        try:
            engine.clear()
        except Exception:  # what was measured before is none the worse
            fields["error_after"] = _tail()
            traceback.print_exc()
        good &= not {"error", "error_after"} & fields.keys()
        rows.write(bench, point, fields | {"took_s": round(time.perf_counter() - begun, 2)})
    return good


@contextmanager
def _hiccups() -> Iterator[dict[str, Any]]:
    """What can hold up a step for seconds: Triton kernels compiled (or loaded), memory freed and asked for again."""
    import torch
    import triton

    seen: dict[str, Any] = {}
    before = triton.knobs.runtime.jit_post_compile_hook

    def retries() -> int:
        return torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0

    def record(*, fn: Any, **others: Any) -> Any:
        seen.setdefault("compiled", []).append(f"{fn.module}.{fn.name}")
        return None if before is None else before(fn=fn, **others)

    triton.knobs.runtime.jit_post_compile_hook, first = record, retries()
    try:
        yield seen
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
        if again := retries() - first:
            seen["allocations_retried"] = again


def _tail(lines: int = 12) -> str:
    return "\n".join(traceback.format_exc().splitlines()[-lines:])
