"""A window of drafts beside a plain decode step of as many rows, and beside what vLLM's own layer launches for it.

Set up as in `cuda.py`. The window that is timed folds as many records as there are, which is the most that it can do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.bench import gpu, peers
from kimi_vllm.kernels.bench.common import Row, norm_error, require, show, words
from kimi_vllm.kernels.bench.cuda import BLOCK_BYTES, COLD_BYTES, DTYPES, IN_TREE, LAYERS, OURS, POSITION, TOLERANCE
from kimi_vllm.kernels.bench.layer import Layer, plain_rows, scattered
from kimi_vllm.kernels.contract import PrefillRows, WindowRows
from kimi_vllm.kernels.cuda import decode, launch, verify
from kimi_vllm.kernels.cut import Cut

PLAIN = "one token"
"""Our decode step in slots without records."""


CONFIGS = [
    launch.Windows(*values)
    for values in ((64, 64, 4, 168), (64, 32, 4), (64, 32, 4, 128), (32, 64, 4, 128), (128, 32, 8), (64, 64, 8, 128))
]
"""Launch parameters that a search tries."""


def window_rows(
    H: int, D: int, drafts: int, state: str, batches: Sequence[int], with_peer: bool, search: bool = False
) -> Iterator[Row]:
    """Verify and time one step of windows at some batch sizes; with `search` by all `CONFIGS`, no peer.

    Raises:
        WrongResult: a provider disagrees with the spec.
    """
    T = drafts + 1
    for N in batches:
        moved = 2 * N * H * D * D * DTYPES[state].itemsize
        sets = min(128, max(2, -(-COLD_BYTES // moved)))
        case = {"N": N, "T": T, "H": H, "D": D}
        order = (torch.randperm(sets * N, device="cuda") + 1).to(torch.int32)
        slots = [part.contiguous() for part in order.split(N)]
        dtypes = {"act": "bf16", "state": state}

        plain = _layer(N, sets * N, H, D, state, 0)
        position, one = torch.full((N,), POSITION, device="cuda"), torch.empty(N, H * D, device="cuda").bfloat16()
        steps = [
            partial(decode.kda_decode, *plain.inputs, plain_rows(slots[i % sets], position), one)
            for i in range(max(sets, 20))
        ]
        yield Row("windows", PLAIN, case, dtypes, *gpu.measure_graph(steps), moved_bytes=moved)
        del plain, steps
        torch.cuda.empty_cache()

        layer = _layer(N * T, sets * N, H, D, state, T)
        expected = _expected(layer, slots[0], T)
        out = torch.full((N * T, H * D), float("nan"), dtype=torch.bfloat16, device="cuda")
        peer = peers.InTreeWindows(layer, POSITION, T) if with_peer and state == "fp32" and not search else None
        for each in reversed(slots):  # so that there are records to fold; the first slots last, whose output counts
            verify.kda_verify(*layer.inputs, _rows(each, T, 0), out)
        require(f"{OURS} windows N={N}", norm_error(out, expected), TOLERANCE)
        rows = [_rows(each, T, T) for each in slots]
        for config in CONFIGS if search else [None]:
            run = partial(verify.kda_verify, config=config)
            steps = [partial(run, *layer.inputs, rows[i % sets], out) for i in range(max(sets, 20))]
            name = (
                OURS
                if config is None
                else f"{config.rows} x {config.columns}, {config.warps} warps, {config.registers or 'any'}"
            )
            yield Row("windows", name, case, dtypes, *gpu.measure_graph(steps), moved_bytes=moved)
        if peer is not None:
            tables = [peer.rows(each) for each in slots]
            peer.step(tables[0], out)
            require(f"{IN_TREE} windows N={N}", norm_error(out, expected), TOLERANCE)
            steps = [partial(peer.step, tables[i % sets], out) for i in range(max(sets, 20))]
            yield Row("windows", IN_TREE, case, dtypes, *gpu.measure_graph(steps), moved_bytes=moved)
        del layer, peer, steps
        torch.cuda.empty_cache()


def report(rows: Sequence[Row], env: dict[str, Any]) -> None:
    """Print one line per case: ours, and its ratios to a step of one token and to vLLM's layer."""
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((words(row.case), row.dtype["state"]), {})[row.provider] = row.p50_us
    lines = []
    for (case, state), found in cases.items():
        if OURS not in found:  # it was wrong, and nothing after it was timed; or launch parameters are searched
            lines += [[case, state, f"{time:,.1f}", name] for name, time in found.items()]
            continue
        cells = [case, state, f"{found[OURS]:,.1f}"]
        for other in (PLAIN, IN_TREE):
            theirs = found.get(other)
            cells += ["", ""] if theirs is None else [f"{theirs:,.1f}", f"{found[OURS] / theirs:.2f}"]
        lines.append(cells)
    title = f"{env['gpu']}, torch {env['torch']}, triton {env['triton']}, commit {env['commit']}; median µs per layer"
    show(title, ("case", "state"), (OURS, PLAIN, "ours to it", IN_TREE, "ours to it"), lines, width=120)


def _layer(T: int, num_slots: int, H: int, D: int, state: str, window: int) -> Layer:
    """Return a layer whose slots lie as in the engine, with records of so many tokens."""
    ring, dtype = max(4, window + 2), DTYPES[state]
    cut = Cut.fewest_blocks(LAYERS, H, D, ring, dtype, torch.bfloat16, BLOCK_BYTES, window)
    layer = Layer.random(T, num_slots + 1, H, D, (torch.bfloat16, torch.bfloat16, dtype), ring=cut.R, device="cuda")
    conv, states = layer.pools.dense()
    options = {"pieces": cut.pieces, "units": cut.units, "gap": cut.block_bytes - cut.units * cut.unit_bytes}
    return replace(layer, pools=scattered(conv, states, layer=LAYERS // 2, layers=LAYERS, window=window, **options))


def _rows(slots: Tensor, window: int, fold: int) -> WindowRows:
    N = len(slots)
    cu_seqlens = (torch.arange(N + 1, device="cuda") * window).int()
    position = torch.full((N,), POSITION, device="cuda")
    folded = torch.full((N,), fold, dtype=torch.int32, device="cuda")
    return WindowRows(cu_seqlens, position, slots, slots, torch.zeros_like(slots), folded)


def _expected(layer: Layer, slots: Tensor, window: int) -> Tensor:
    """Return what windows on these slots must put out, in float64, without a record to fold."""
    N = len(slots)
    gold = layer.double(layer.pools.cut.H, slots.tolist())
    own = torch.arange(1, N + 1, dtype=torch.int32, device="cuda")
    context = torch.full((N,), POSITION, dtype=torch.int32, device="cuda")
    rows = PrefillRows((torch.arange(N + 1, device="cuda") * window).int(), context, own[:, None], 1 << 20)
    out = torch.empty(gold.x.gate.shape, dtype=torch.float64, device="cuda")
    reference.kda_prefill(*gold.inputs, rows, out)
    return out
