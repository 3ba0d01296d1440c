"""What each thread runs on the CPU: take tasks from a shared counter until none is left.

So nothing else knows about threads, no result depends on their number, and a thread that starts late or is
descheduled delays nobody but itself.
"""
# mypy: disallow-untyped-defs=false
# Compiled functions have numba's types; an address, an index and a count would all be annotated "int".

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import cfunc
from numba.core import config

from kimi_vllm.kernels.cpu.decode import decode_task
from kimi_vllm.kernels.cpu.head import Field, parameter
from kimi_vllm.kernels.cpu.prefill import prefill_task
from kimi_vllm.kernels.cpu.simd import fetch_add
from kimi_vllm.kernels.cpu.verify import verify_task

DECODE, PREFILL, VERIFY = range(3)


def compile_worker(kind: int, D: int) -> int:
    """Return the address of a ``void(int64 parameters)`` that works until no task is left.

    Args:
        kind: `DECODE`, `PREFILL` or `VERIFY`.
        D: Channels of a head; one specialisation each.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return int(_compile(kind, D, digest.hexdigest()).address)


def _compile(kind: int, D: int, sources: str) -> Any:
    """Compile a worker, or take it from numba's cache.

    numba looks at the date of this file and at the values the worker closes over: `sources` stands for the
    others.
    """

    def kda_worker(params):
        _ = sources
        H, N = parameter(params, Field.H), parameter(params, Field.N)
        worker = fetch_add(params + 8 * Field.NEXT_WORKER, 1)
        scratch = parameter(params, Field.SCRATCH) + worker * parameter(params, Field.SCRATCH_STRIDE)
        num_tasks = N * H if kind == DECODE else (N + 1) * H
        while True:
            task = fetch_add(params + 8 * Field.NEXT_TASK, 1)
            if task >= num_tasks:
                break
            if kind == DECODE:
                decode_task(params, task // H, task % H, D, scratch)
            elif kind == VERIFY:
                verify_task(params, task // H, task % H, D, scratch)
            else:
                prefill_task(params, task // H, task % H, D, scratch)

    asked = config.CACHE_LOCATOR_CLASSES
    # Beside this file, numba's first choice, they would stay in site-packages when the plugin is uninstalled.
    config.CACHE_LOCATOR_CLASSES = asked or "UserProvidedCacheLocator,UserWideCacheLocator"
    try:
        return cfunc("void(int64)", cache=True)(kda_worker)
    except RuntimeError:  # numba found no folder it may write its cache to
        return cfunc("void(int64)")(kda_worker)
    finally:
        config.CACHE_LOCATOR_CLASSES = asked
