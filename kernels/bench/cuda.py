"""The CUDA kernels beside what vLLM's own layer and flash-linear-attention launch for the same step.

Every provider is verified against the float64 spec (of a long prefill the first 8192 tokens), then timed as CUDA-graph
replays of steps that together touch far more memory than the second-level cache holds: decode steps on slots of their
own, prefill steps on inputs of their own. The time is that of one step of one layer, projections left out.

Our slots lie as in an engine that serves the 48B model: the layer is one of twenty, and the blocks of a slot are in
random order among those of all slots. The peers have theirs side by side, as their own layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.kernels.bench import gpu, peers
from kimi_vllm.kernels.bench.common import Row, norm_error, require, show, words
from kimi_vllm.kernels.bench.layer import Layer, expected_decode, expected_prefill, fresh_rows, plain_rows, scattered
from kimi_vllm.kernels.contract import Pools, PrefillRows
from kimi_vllm.kernels.cuda import decode, prefill
from kimi_vllm.kernels.cut import Cut

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = ((64,), (128,), (256,), (512,), (2048,), (8192,), (32768,), (65536,))
MIXES = ((512,) * 16, (4000, 1, 17, 900, 64, 2000, 333, 877), (16,) * 64)
OURS, IN_TREE, FLA = "kimi-vllm", "in-tree", "fla"
FLAGGED = "kimi-vllm, flagged"
"""Ours with a flag per slot for states that are not finite, as the engine's guard runs it: a case of its own."""
POSITION = 100
COLD_BYTES = 256 << 20
"""Memory that the steps of one graph touch: four times the cache of an H200."""
BLOCK_BYTES = 516_096
"""A block of the 48B model: 64 tokens of seven MLA layers."""

LAYERS = 20
"""KDA layers of the 48B model."""

TOLERANCE = 1e-2
"""Root of the mean squared error over that of the answer, with bfloat16 activations."""

VERIFIED = 8192
"""Tokens of a prefill that are compared: later ones do not change what they get."""

Step = Callable[[], object]
SlotStep = Callable[[Tensor], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def decode_rows(H: int, D: int, state: str, with_peers: bool) -> Iterator[Row]:
    """Verify and time one decode step at every batch size.

    Raises:
        WrongResult: a provider disagrees with the spec.
    """
    for N in BATCHES:
        moved = 2 * N * H * D * D * DTYPES[state].itemsize
        sets = min(128, max(2, -(-COLD_BYTES // moved)))
        layer = _random_layer(N, sets * N, H, D, DTYPES[state])
        order = (torch.randperm(sets * N, device="cuda") + 1).to(torch.int32)
        slots = [part.contiguous() for part in order.split(N)]
        position = torch.full((N,), POSITION, device="cuda")
        expected = expected_decode(layer, slots[0], position)
        moved += _activation_bytes(N, H, D) + 4 * N * 3 * H * D * layer.pools.cut.conv_dtype.itemsize
        out = torch.full((N, H * D), float("nan"), dtype=torch.bfloat16, device="cuda")
        for name, check, step in _decode_providers(layer, position, slots[0], out, with_peers and state == "fp32"):
            check(slots[0])
            require(f"{name} decode N={N} H={H} {state}", norm_error(out, expected), TOLERANCE)
            steps = [partial(step, slots[i % sets]) for i in range(max(sets, 20))]
            times = gpu.measure_graph(steps)
            yield _row("decode", name, {"N": N, "H": H, "D": D}, state, times, moved)
        del layer
        torch.cuda.empty_cache()


def prefill_rows(H: int, D: int, with_peers: bool) -> Iterator[Row]:
    """Verify and time prefills of one sequence of every length, and of packed mixes; state in float32.

    Raises:
        WrongResult: a provider disagrees with the spec.
    """
    missing = missing_peers()
    for lengths in (*LENGTHS, *MIXES):
        T, N = sum(lengths), len(lengths)
        moved = _activation_bytes(T, H, D) + 2 * N * H * D * D * 4
        sets = min(24, max(1, -(-COLD_BYTES // moved)))
        providers = (OURS, FLAGGED, *(name for name in (IN_TREE, FLA) if with_peers and name not in missing))
        case = {"T": T, "N": N, "H": H, "D": D}
        rows = fresh_rows(lengths, "cuda")
        sequences = peers.FlaPrefill.sequences_of(rows.cu_seqlens)
        expected: Tensor | None = None
        for name in providers:
            steps, out = [], torch.full((T, H * D), float("nan"), dtype=torch.bfloat16, device="cuda")
            for seed in range(sets):
                layer = _random_layer(T, N, H, D, torch.float32, seed)
                if expected is None:
                    expected = _expected_prefill(layer, lengths)
                check, step = _prefill_steps(name, layer, rows, sequences, out)
                if seed == 0:
                    check()
                    part = out[: expected.shape[0], : expected.shape[1]]
                    require(f"{name} prefill {lengths[:8]} H={H}", norm_error(part, expected), TOLERANCE)
                steps.append(step)
            flush = gpu.flush_buffer() if sets == 1 else None
            times = gpu.measure_graph(steps, replays=15, flush=flush)
            yield _row("prefill", name, case, "fp32", times, moved)
            if T <= 8192 and name != FLAGGED:
                # With its launches, as a step outside of a graph has them.
                times = gpu.measure_eager(steps[0])
                yield _row("prefill-eager", name, case, "fp32", times, moved)
            del steps, check, step
            torch.cuda.empty_cache()


def report(rows: Sequence[Row], env: dict[str, Any]) -> None:
    """Print one line per case: ours, the peers, their ratio to ours, and how close ours is to the copy rate."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.bench, words(row.case), row.dtype["state"]), {})[row.provider] = row
    title = f"{env['gpu']}, torch {env['torch']}, triton {env['triton']}, commit {env['commit']}; "
    title += f"copy {env['copy_gbps']:.0f} GB/s, in place {env['in_place_gbps']:.0f} GB/s; median µs per layer"
    lines = []
    for (bench, case, state), found in cases.items():
        ours = found[OURS]
        cells = [bench, case, state, f"{ours.p50_us:,.1f}"]
        for peer in (IN_TREE, FLA):
            theirs = found.get(peer)
            ratio = [] if theirs is None else [f"{theirs.p50_us:,.1f}", f"{theirs.p50_us / ours.p50_us:.2f}x"]
            cells += ratio or ["", ""]
        floor = (ours.moved_bytes or 0) / env["copy_gbps"] / 1e3
        lines.append((*cells, f"{ours.rate_gbps:,.0f}", f"{100 * floor / ours.p50_us:.0f}", f"{floor:,.1f}"))
    columns = (OURS, IN_TREE, "", FLA, "", "GB/s", "% of copy", "floor")
    show(title, ("bench", "case", "state"), columns, lines, width=150)


def _random_layer(T: int, num_slots: int, H: int, D: int, state: torch.dtype, seed: int = 0) -> Layer:
    """Return one layer's step in bfloat16, with its null slot; its slots lie as in the engine."""
    dtypes = (torch.bfloat16, torch.bfloat16, state)
    layer = Layer.random(T, num_slots + 1, H, D, dtypes, ring=4, device="cuda", seed=seed)
    cut = Cut.fewest_blocks(LAYERS, H, D, 4, state, torch.bfloat16, BLOCK_BYTES)
    gap = cut.block_bytes - cut.units * cut.unit_bytes
    conv, states = layer.pools.dense()
    pools = scattered(conv, states, pieces=cut.pieces, units=cut.units, gap=gap, layer=LAYERS // 2, layers=LAYERS)
    return replace(layer, pools=pools)


def _decode_providers(
    layer: Layer, position: Tensor, first: Tensor, out: Tensor, with_peers: bool
) -> Iterator[tuple[str, SlotStep, SlotStep]]:
    """Yield each provider's name, its step to verify, and its step to time; both take the rows' slots."""
    missing = missing_peers() if with_peers else {IN_TREE: "", FLA: ""}
    # Peers copy the pools when they are made, before our kernels change them.
    in_tree = None if IN_TREE in missing else peers.InTreeDecode(layer, POSITION)
    flash = None if FLA in missing else peers.FlaDecode(layer, POSITION, first)

    x, weights, pools = layer.inputs
    guarded = _guarded(pools)
    before = {slot: pools.load(slot)[0] for slot in first.tolist()}

    def ours(slots: Tensor, pools: Pools = pools) -> None:
        decode.kda_decode(x, weights, pools, plain_rows(slots, position), out)

    yield OURS, ours, ours
    if in_tree is not None:
        step = partial(in_tree.step, out=out)
        yield IN_TREE, step, step
    if flash is not None:
        # fla allocates its own output: only the step that is verified copies it.
        yield FLA, partial(flash.step, out=out), flash.step
    flagged = partial(ours, pools=guarded)

    def flagged_once(slots: Tensor) -> None:
        for slot, state in before.items():
            pools.store(slot, state)  # ours was timed on it
        flagged(slots)

    yield FLAGGED, flagged_once, flagged


def missing_peers() -> dict[str, str]:
    """Return why a peer cannot run here, by its name; empty where both can."""
    reasons = {IN_TREE: peers.unavailable(peers.InTreePrefill), FLA: peers.unavailable(peers.FlaPrefill)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _guarded(pools: Pools) -> Pools:
    return replace(pools, nonfinite=torch.zeros(len(pools.pages), pools.cut.flags, dtype=torch.int32, device="cuda"))


def _prefill_steps(
    name: str, layer: Layer, rows: PrefillRows, sequences: dict[str, Tensor], out: Tensor
) -> tuple[Step, Step]:
    """Return a provider's step twice: to verify, and to time."""
    if name in (OURS, FLAGGED):
        pools = _guarded(layer.pools) if name == FLAGGED else layer.pools
        step = partial(prefill.kda_prefill, layer.x, layer.weights, pools, rows, out)
        return step, step
    if name == IN_TREE:
        peer = peers.InTreePrefill(layer, rows.cu_seqlens, rows.slot_table[:, 0], rows.context_len)
        step = partial(peer.step, out)
        return step, step
    flash = peers.FlaPrefill(layer, sequences)
    # fla allocates its own output: only the step that is verified copies it.
    return partial(flash.step, out), flash.step


def _expected_prefill(layer: Layer, lengths: tuple[int, ...]) -> Tensor:
    """Return the output of the first heads and tokens; only a sequence alone may be cut off."""
    if len(lengths) == 1 and lengths[0] > VERIFIED:
        lengths, layer = (VERIFIED,), replace(layer, x=layer.x.tokens(0, VERIFIED))
    return expected_prefill(layer, fresh_rows(lengths, "cuda"), num_heads=2)


def _activation_bytes(T: int, H: int, D: int) -> int:
    """Read qkv, gate, output gate and beta, write the output; two bytes each."""
    return 2 * T * H * (6 * D + 1)


def _row(bench: str, name: str, case: dict[str, int], state: str, times: tuple[float, float, float], moved: int) -> Row:
    if name == FLAGGED:
        bench, name = f"{bench}-flagged", OURS
    return Row(bench, name, case, {"act": "bf16", "state": state}, *times, moved_bytes=moved)
