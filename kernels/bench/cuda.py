"""The CUDA kernels beside what vLLM's own layer and flash-linear-attention launch for the same step.

Every provider is verified against the float64 spec (of a long prefill the first 8192 tokens), then timed as CUDA-graph
replays of steps that together touch far more memory than the second-level cache holds: decode steps on slots of their
own, prefill steps on inputs of their own. The time is that of one step of one layer, projections left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.bench import gpu, peers
from kimi_vllm.kernels.bench.common import Row, WrongResult
from kimi_vllm.kernels.cuda import decode, prefill

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = ((64,), (128,), (256,), (512,), (2048,), (8192,), (32768,), (65536,))
MIXES = ((512,) * 16, (4000, 1, 17, 900, 64, 2000, 333, 877), (16,) * 64)
OURS, IN_TREE, FLA = "kimi-vllm", "in-tree", "fla"
FLAGGED = "kimi-vllm, flagged"
"""Ours with a flag per slot for states that are not finite, as the engine's guard runs it: a case of its own."""
POSITION = 100
COLD_BYTES = 256 << 20
"""Memory that the steps of one graph touch: four times the cache of an H200."""
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
        arguments = _arguments(N, sets * N + 1, H, D, DTYPES[state])
        order = (torch.randperm(sets * N, device="cuda") + 1).to(torch.int32)
        slots = [part.contiguous() for part in order.split(N)]
        position = torch.full((N,), POSITION, device="cuda")
        expected = _expected_decode(arguments, slots[0], position)
        moved += _activation_bytes(N, H, D) + 4 * N * 3 * H * D * arguments["conv_pool"].element_size()
        out = torch.full((N, H * D), float("nan"), dtype=torch.bfloat16, device="cuda")
        for name, check, step in _decode_providers(arguments, position, slots[0], out, with_peers and state == "fp32"):
            check(slots[0])
            _require(f"{name} decode N={N} H={H} {state}", out, expected)
            steps = [partial(step, slots[i % sets]) for i in range(max(sets, 20))]
            times = gpu.measure_graph(steps)
            yield _row("decode", name, {"N": N, "H": H, "D": D}, state, times, moved)
        del arguments
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
        index = _prefill_index(lengths)
        sequences = peers.FlaPrefill.sequences_of(index["cu_seqlens"])
        expected: Tensor | None = None
        for name in providers:
            steps, out = [], torch.full((T, H * D), float("nan"), dtype=torch.bfloat16, device="cuda")
            for seed in range(sets):
                arguments = _arguments(T, N + 1, H, D, torch.float32, seed)
                if expected is None:
                    expected = _expected_prefill(arguments, lengths)
                check, step = _prefill_steps(name, arguments, index, sequences, out)
                if seed == 0:
                    check()
                    part = out[: expected.shape[0], : expected.shape[1]]
                    _require(f"{name} prefill {lengths[:8]} H={H}", part, expected)
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
        words = " ".join(f"{name}{value}" for name, value in row.case.items())
        cases.setdefault((row.bench, words, row.dtype["state"]), {})[row.provider] = row
    title = f"{env['gpu']}, torch {env['torch']}, triton {env['triton']}, commit {env['commit']}; "
    title += f"copy {env['copy_gbps']:.0f} GB/s, in place {env['in_place_gbps']:.0f} GB/s; median µs per layer"
    table = Table(title=title)
    for column in ("bench", "case", "state", OURS, IN_TREE, "", FLA, "", "GB/s", "% of copy", "floor"):
        table.add_column(column, justify="left" if column in ("bench", "case", "state") else "right", no_wrap=True)
    for (bench, words, state), found in cases.items():
        ours = found[OURS]
        cells = [bench, words, state, f"{ours.p50_us:,.1f}"]
        for peer in (IN_TREE, FLA):
            theirs = found.get(peer)
            ratio = [] if theirs is None else [f"{theirs.p50_us:,.1f}", f"{theirs.p50_us / ours.p50_us:.2f}x"]
            cells += ratio or ["", ""]
        floor = (ours.moved_bytes or 0) / env["copy_gbps"] / 1e3
        table.add_row(*cells, f"{ours.rate_gbps:,.0f}", f"{100 * floor / ours.p50_us:.0f}", f"{floor:,.1f}")
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


def _arguments(T: int, num_slots: int, H: int, D: int, state: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Return one layer's step in bfloat16, its activations columns of one projection, as the layer has them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    width = H * D
    filling = -H % 16 + 16
    projected = random(T, 5 * width + H + filling).bfloat16()
    qkv, gate, out_gate, beta, _ = projected.split([3 * width, width, width, H, filling], dim=1)
    return {
        "qkv": qkv,
        "gate": gate,
        "beta": beta,
        "out_gate": out_gate,
        "conv_weight": random(4, 3 * width) * 0.5,
        "A_log": (torch.rand(H, generator=generator, device="cuda") * 15 + 1).log(),
        "dt_bias": random(width) - 4,
        "norm_weight": 1 + 0.1 * random(D),
        "norm_eps": 1e-5,
        "conv_pool": random(num_slots, 4, 3 * width).bfloat16(),
        "state_pool": 0.1 * random(num_slots, H, D, D).to(state),
    }


def _decode_providers(
    arguments: dict[str, Any], position: Tensor, first: Tensor, out: Tensor, with_peers: bool
) -> Iterator[tuple[str, SlotStep, SlotStep]]:
    """Yield each provider's name, its step to verify, and its step to time; both take the rows' slots."""
    missing = missing_peers() if with_peers else {IN_TREE: "", FLA: ""}
    # Peers copy the pools when they are made, before our kernels change them.
    in_tree = None if IN_TREE in missing else peers.InTreeDecode(arguments, POSITION)
    flash = None if FLA in missing else peers.FlaDecode(arguments, POSITION, first)

    flags = torch.zeros(len(arguments["state_pool"]), dtype=torch.int32, device="cuda")
    before = arguments["state_pool"][first.long()]

    def ours(slots: Tensor, nonfinite: Tensor | None = None) -> None:
        decode.kda_decode(
            **arguments, read_slot=slots, write_slot=slots, position=position, out=out, nonfinite=nonfinite
        )

    yield OURS, ours, ours
    if in_tree is not None:
        step = partial(in_tree.step, out=out)
        yield IN_TREE, step, step
    if flash is not None:
        # fla allocates its own output: only the step that is verified copies it.
        yield FLA, partial(flash.step, out=out), flash.step
    flagged = partial(ours, nonfinite=flags)

    def flagged_once(slots: Tensor) -> None:
        arguments["state_pool"][slots.long()] = before  # ours was timed on it
        flagged(slots)

    yield FLAGGED, flagged_once, flagged


def missing_peers() -> dict[str, str]:
    """Return why a peer cannot run here, by its name; empty where both can."""
    reasons = {IN_TREE: peers.unavailable(peers.InTreePrefill), FLA: peers.unavailable(peers.FlaPrefill)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _prefill_peer(name: str) -> Any:
    return {IN_TREE: peers.InTreePrefill, FLA: peers.FlaPrefill}[name]


def _prefill_steps(
    name: str, arguments: dict[str, Any], index: dict[str, Any], sequences: dict[str, Tensor], out: Tensor
) -> tuple[Step, Step]:
    """Return a provider's step twice: to verify, and to time."""
    if name in (OURS, FLAGGED):
        flags = torch.zeros(len(arguments["state_pool"]), dtype=torch.int32, device="cuda")
        step = partial(prefill.kda_prefill, **arguments, **index, out=out, nonfinite=flags if name == FLAGGED else None)
        return step, step
    peer = _prefill_peer(name)
    if name == IN_TREE:
        step = partial(peer(arguments, index["cu_seqlens"], index["slot_table"][:, 0], index["context_len"]).step, out)
        return step, step
    flash = peer(arguments, sequences)
    # fla allocates its own output: only the step that is verified copies it.
    return partial(flash.step, out), flash.step


def _prefill_index(lengths: tuple[int, ...]) -> dict[str, Any]:
    N = len(lengths)
    return {
        "cu_seqlens": torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32),
        "context_len": torch.zeros(N, dtype=torch.int32, device="cuda"),
        "slot_table": torch.arange(1, N + 1, dtype=torch.int32, device="cuda")[:, None],
        "block_size": 1 << 20,
    }


def _double(arguments: dict[str, Any], num_heads: int | None = None) -> dict[str, Any]:
    """Return a copy in float64, of the first heads only if so asked: the spec walks token by token."""
    H = arguments["state_pool"].shape[1]
    copy = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if num_heads is None or num_heads >= H:
        return copy
    for name, parts in {"qkv": 3, "conv_weight": 3, "conv_pool": 3, "gate": 1, "out_gate": 1, "dt_bias": 1}.items():
        copy[name] = copy[name].unflatten(-1, (parts, H, -1))[..., :num_heads, :].flatten(-3)
    for name in ("beta", "A_log"):
        copy[name] = copy[name][..., :num_heads]
    copy["state_pool"] = copy["state_pool"][:, :num_heads]
    return copy


def _expected_decode(arguments: dict[str, Any], slots: Tensor, position: Tensor) -> Tensor:
    copy = _double(arguments | {name: arguments[name][slots.long()] for name in ("conv_pool", "state_pool")})
    for name in ("conv_pool", "state_pool"):
        copy[name] = torch.cat([torch.zeros_like(copy[name][:1]), copy[name]])
    index = torch.arange(1, len(slots) + 1, dtype=torch.int32, device="cuda")
    out = torch.empty(arguments["gate"].shape, dtype=torch.float64, device="cuda")
    reference.kda_decode(**copy, read_slot=index, write_slot=index, position=position, out=out)
    return out


def _expected_prefill(arguments: dict[str, Any], lengths: tuple[int, ...]) -> Tensor:
    """Return the output of the first heads and tokens; only a sequence alone may be cut off."""
    if len(lengths) == 1 and lengths[0] > VERIFIED:
        lengths = (VERIFIED,)
        cut = {name: arguments[name][:VERIFIED] for name in ("qkv", "gate", "beta", "out_gate")}
        arguments = arguments | cut
    copy = _double(arguments, num_heads=2)
    out = torch.empty(copy["gate"].shape, dtype=torch.float64, device="cuda")
    reference.kda_prefill(**copy, **_prefill_index(lengths), out=out)
    return out


def _require(name: str, out: Tensor, expected: Tensor) -> None:
    error = float((out.double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise WrongResult(f"{name}: error {error:.1e} against the spec, at most {TOLERANCE:.0e} allowed")


def _activation_bytes(T: int, H: int, D: int) -> int:
    """Read qkv, gate, output gate and beta, write the output; two bytes each."""
    return 2 * T * H * (6 * D + 1)


def _row(bench: str, name: str, case: dict[str, int], state: str, times: tuple[float, float, float], moved: int) -> Row:
    if name == FLAGGED:
        bench, name = f"{bench}-flagged", OURS
    return Row(bench, name, case, {"act": "bf16", "state": state}, *times, moved_bytes=moved)
