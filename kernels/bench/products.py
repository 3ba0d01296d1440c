"""Products of a few rows, and experts of a few tokens, beside cuBLAS and vLLM's fused experts: one layer's shapes.

Weights are of the 48B model, bfloat16; each step of a CUDA graph has weights, or experts, of its own, so that nothing
is warm. A product is verified against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.kernels.bench import gpu
from kimi_vllm.kernels.bench.common import Row, norm_error, require, show, words
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.skinny import skinny_linear
from kimi_vllm.kernels.cuda.skinny_experts import choose_experts, skinny_experts

SHAPES = {
    "router": (256, 2304),
    "kv_a": (576, 2304),
    "shared_up": (2048, 2304),
    "shared_down": (2304, 1024),
    "f_b": (8192, 128),
    "o_proj": (2304, 4096),
    "q": (6144, 2304),
    "in_proj": (12576, 2304),
    "dense_down": (2304, 9216),
    "dense_up": (18432, 2304),
    "lm_head": (163840, 2304),
}
"""Outputs and inputs of the linear layers of Kimi-Linear-48B."""

HIDDEN, EXPERTS, TOP_K = 2304, 256, 8
OURS, CUBLAS, VLLM = "kimi-vllm", "cublas", "vllm"
COLD_BYTES = 256 << 20
TOLERANCE = 1e-2


def linear_rows(rows: tuple[int, ...], search: bool) -> Iterator[Row]:
    """Verify and time linear layers.

    Args:
        rows: rows of the activations.
        search: try many launch parameters, not those of the table.

    Raises:
        WrongResult: a product is wrong.
    """
    for name, (outputs, inputs) in SHAPES.items():
        moved = 2 * outputs * inputs
        sets = min(128, -(-COLD_BYTES // moved))
        weights = [_normal(outputs, inputs, scale=inputs**-0.5) for _ in range(sets)]
        for M in rows:
            x, out = _normal(M, inputs), torch.empty(M, outputs, dtype=torch.bfloat16, device="cuda")
            case = {"M": M, "N": outputs, "K": inputs}
            steps = [partial(torch.mm, x, weights[i % sets].T, out=out) for i in range(max(sets, 20))]
            yield _row(name, CUBLAS, case, gpu.measure_graph(steps), moved)
            gold = x.double() @ weights[0].double().T
            found = launch.skinny(M, outputs, inputs)
            configs = _candidates() if search and M in launch.SKINNY_ROWS else [found] if found else []
            for config in configs:
                skinny_linear(x, weights[0], out, config)
                require(f"{name} M={M} {config}", norm_error(out, gold), TOLERANCE)
                steps = [partial(skinny_linear, x, weights[i % sets], out, config) for i in range(max(sets, 20))]
                yield _row(name, _name(config, search), case, gpu.measure_graph(steps, replays=10), moved)


def expert_rows(tokens: tuple[int, ...], search: bool, inner_sizes: tuple[int, ...]) -> Iterator[Row]:
    """Verify and time the experts of a layer, each token's drawn uniformly; vLLM's routing is in neither time.

    Raises:
        WrongResult: one of the two is wrong.
    """
    fused_experts = import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    for inner in inner_sizes:
        w13 = _normal(EXPERTS, 2 * inner, HIDDEN, scale=HIDDEN**-0.5)
        w2 = _normal(EXPERTS, HIDDEN, inner, scale=inner**-0.5)
        for M in tokens:
            x = _normal(M, HIDDEN)
            drawn = [_routing(M) for _ in range(24)]
            gold = _gold(x, w13, w2, *drawn[0])
            moved = 6 * inner * HIDDEN * round(sum(ids.unique().numel() for _, ids in drawn) / len(drawn))
            case = {"M": M, "N": inner, "K": HIDDEN}
            require(f"vLLM's experts M={M}", norm_error(fused_experts(x, w13, w2, *drawn[0]), gold), TOLERANCE)
            steps = [partial(fused_experts, x, w13, w2, *routing) for routing in drawn]
            yield _row("experts", VLLM, case, gpu.measure_graph(steps, replays=15), moved)
            found = launch.skinny_experts(M, HIDDEN, inner)
            configs: list[launch.SkinnyExperts] = [found] if found else []
            if search:
                middle = launch.Skinny(4, 512, 4)
                configs = [launch.SkinnyExperts(up, middle) for up in _candidates()]
                configs += [launch.SkinnyExperts(middle, down) for down in _candidates() if down != middle]
            for config in configs:
                require(
                    f"experts M={M} {config}",
                    norm_error(skinny_experts(x, w13, w2, *drawn[0], config), gold),
                    TOLERANCE,
                )
                steps = [partial(skinny_experts, x, w13, w2, *routing, config) for routing in drawn]
                name = f"{_name(config.up, search)} / {_name(config.down, search)}" if search else OURS
                yield _row("experts", name, case, gpu.measure_graph(steps, replays=10), moved)


def routing_rows(tokens: tuple[int, ...]) -> Iterator[Row]:
    """Verify and time how a token's experts are chosen.

    Raises:
        WrongResult: ours and vLLM's choose other experts, or weigh them otherwise.
    """
    ops = import_module("vllm._custom_ops")
    for M in tokens:
        logits, bias = torch.randn(M, EXPERTS, device="cuda"), torch.randn(EXPERTS, device="cuda") * 0.1
        theirs = partial(ops.grouped_topk, logits, 1, 1, TOP_K, True, 2.446, bias, 1)
        ours = partial(choose_experts, logits, bias, TOP_K, normalise=True, scaling=2.446)
        dense = [torch.zeros(M, EXPERTS, device="cuda").scatter(1, i.long(), w) for w, i in (theirs(), ours())]
        require(f"routing M={M}", norm_error(dense[1], dense[0]), TOLERANCE)
        case = {"M": M, "N": EXPERTS, "K": TOP_K}
        for name, step in ((VLLM, theirs), (OURS, ours)):
            yield _row("routing", name, case, gpu.measure_graph([step] * 50), 4 * EXPERTS * M)


def report(rows: list[Row], env: dict[str, Any]) -> None:
    """Print a line per case: the peer, the best of ours, and what reading the weights takes."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.bench, words(row.case)), []).append(row)
    lines = []
    for (bench, case), found in cases.items():
        peer = next(row for row in found if row.provider in (CUBLAS, VLLM))
        ours = sorted((row for row in found if row is not peer), key=lambda row: row.p50_us)
        floor = f"{(peer.moved_bytes or 0) / env['copy_gbps'] / 1e3:.1f}"
        cells = [f"{ours[0].p50_us:.1f}", f"{peer.p50_us / ours[0].p50_us:.2f}x"] if ours else ["", ""]
        lines.append((bench, case, ours[0].provider if ours else "", f"{peer.p50_us:.1f}", *cells, floor))
    title = f"{env['gpu']}, copy {env['copy_gbps']:.0f} GB/s; median µs, and the floor at the copy rate"
    show(title, ("product", "case", "launch"), ("peer", "ours", "", "floor"), lines, width=150)


def _candidates() -> list[launch.Skinny]:
    return [
        launch.Skinny(*some) for some in product((2, 4, 8), (256, 512, 1024), (2, 4, 8)) if some[0] * some[1] <= 4096
    ]


def _name(config: launch.Skinny, search: bool) -> str:
    return f"{config.rows} {config.step} {config.warps}" if search else OURS


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=scale)


def _routing(tokens: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K, dim=-1)
    return weights.contiguous(), ids.to(torch.int32).contiguous()


def _gold(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for token, (scales, experts) in enumerate(zip(weights.double(), ids.tolist(), strict=True)):
        for scale, expert in zip(scales, experts, strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            out[token] += scale * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


def _row(bench: str, provider: str, case: dict[str, int], times: tuple[float, float, float], moved: int) -> Row:
    return Row(bench, provider, case, {"act": "bf16"}, *times, moved_bytes=moved)
