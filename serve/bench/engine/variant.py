"""One variant, from the start of its engine to its last row; runs in a process of its own."""

import time
import traceback
from pathlib import Path

from serve.bench.engine.clocks import Clocks
from serve.bench.engine.plan import IN_TREE, Plan
from serve.bench.engine.rows import Rows, environment


def run_variant(plan: Plan, provider: str, path: Path) -> bool:
    """Measure all points of a plan with one engine, a row each; whether there was no error.

    A point that fails leaves a row with the error, and the next one starts with a clean engine.
    """
    import torch

    from serve.bench.engine import workers
    from serve.bench.engine.engine import BenchEngine
    from serve.bench.engine.measure import points

    started, cuda = time.perf_counter(), torch.cuda.is_available()
    rows = Rows(path, provider)
    case = {"model": Path(plan.model).name}
    if provider == IN_TREE and not cuda:
        rows.write("engine", case, {"skipped": "vLLM's own Kimi Linear does not start on CPUs"})
        return True
    rows.write("header", case, {"env": environment(), "plan": plan.model_dump() | case})
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
        engine.on_workers(workers.watch)
        with Clocks(cuda=cuda) as clocks:
            try:
                fields = measure()
            except Exception:
                fields = {"error": _tail()}
                traceback.print_exc()
        fields |= clocks.fields
        try:
            fields |= engine.on_workers(workers.hiccups)[0]
            engine.clear()
        except Exception:  # what was measured before is none the worse
            fields["error_after"] = _tail()
            traceback.print_exc()
        good &= not {"error", "error_after"} & fields.keys()
        rows.write(bench, point, fields | {"took_s": round(time.perf_counter() - begun, 2)})
    return good


def _tail(lines: int = 12) -> str:
    return "\n".join(traceback.format_exc().splitlines()[-lines:])
