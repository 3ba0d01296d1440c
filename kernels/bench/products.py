"""Products of a few rows, and experts of a few tokens, beside cuBLAS and vLLM's own: one layer's shapes.

Weights are of the 48B model, bfloat16 or FP8 with a scale per tensor; each step of a CUDA graph has weights, or
experts, of its own, so that nothing is warm. A product is verified against float64 before it is timed.
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
from kimi_vllm.kernels.cuda.scales import Scales
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

UNQUANTISED = ("router", "f_b", "lm_head")
"""Those that ``--quantization fp8`` leaves in bfloat16."""

HIDDEN, EXPERTS, TOP_K = 2304, 256, 8
OURS, CUBLAS, VLLM = "kimi-vllm", "cublas", "vllm"
COLD_BYTES = 256 << 20
TOLERANCE = 1e-2
FP8_TOLERANCE = 5e-2
"""vLLM's, which rounds activations to FP8 as well."""


def linear_rows(rows: tuple[int, ...], search: bool, fp8: bool) -> Iterator[Row]:
    """Verify and time linear layers.

    Args:
        rows: rows of the activations.
        search: try many launch parameters, not those of the table.
        fp8: weights in FP8, beside vLLM's product and the quantisation of activations before it.

    Raises:
        WrongResult: a product is wrong.
    """
    for name, (outputs, inputs) in SHAPES.items():
        if fp8 and name in UNQUANTISED:
            continue
        weights = [_weights(outputs, inputs, fp8=fp8)]
        sets = min(128, -(-COLD_BYTES // weights[0][0].nbytes))
        weights += [_weights(outputs, inputs, fp8=fp8) for _ in range(sets - 1)]
        moved = weights[0][0].nbytes
        for M in rows:
            x, out = _normal(M, inputs), torch.empty(M, outputs, dtype=torch.bfloat16, device="cuda")
            case, count = {"M": M, "N": outputs, "K": inputs}, max(sets, 20)
            gold = x.double() @ _meant(*weights[0]).T
            theirs = [partial(_vllm_fp8 if fp8 else _cublas, x, *weights[i % sets], out) for i in range(count)]
            require(f"the peer's {name} M={M}", norm_error(theirs[0](), gold), FP8_TOLERANCE if fp8 else TOLERANCE)
            yield _row(name, VLLM if fp8 else CUBLAS, case, gpu.measure_graph(theirs), moved, fp8)
            found = launch.skinny(M, outputs, inputs, fp8)
            configs = _candidates(M, fp8) if search and M in launch.SKINNY_ROWS else [found] if found else []
            for config in configs:
                ours = [partial(_ours, x, *weights[i % sets], out, config) for i in range(count)]
                require(f"{name} M={M} {config}", norm_error(ours[0](), gold), TOLERANCE)
                yield _row(name, _name(config, search), case, gpu.measure_graph(ours, replays=10), moved, fp8)


def expert_rows(tokens: tuple[int, ...], search: bool, inner_sizes: tuple[int, ...], fp8: bool) -> Iterator[Row]:
    """Verify and time the experts of a layer, each token's drawn uniformly; vLLM's routing is in neither time.

    Raises:
        WrongResult: one of the two is wrong.
    """
    fused_experts = import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    quantised = import_module("vllm.model_executor.layers.fused_moe.config").fp8_w8a8_moe_quant_config
    for inner in inner_sizes:
        w13, up = _weights(EXPERTS, 2 * inner, HIDDEN, fp8=fp8)
        w2, down = _weights(EXPERTS, HIDDEN, inner, fp8=fp8)
        scales = (up, down) if up and down else None
        named = {"quant_config": quantised(*(each.values.flatten() for each in scales))} if scales else {}
        for M in tokens:
            x = _normal(M, HIDDEN)
            drawn = [_routing(M) for _ in range(24)]
            gold = _gold(x, (w13, up), (w2, down), *drawn[0])
            read = round(sum(ids.unique().numel() for _, ids in drawn) / len(drawn))
            moved = 3 * w13.itemsize * inner * HIDDEN * read
            case = {"M": M, "N": inner, "K": HIDDEN}
            theirs = [partial(fused_experts, x, w13, w2, *routing, **named) for routing in drawn]
            require(f"vLLM's experts M={M}", norm_error(theirs[0](), gold), FP8_TOLERANCE if fp8 else TOLERANCE)
            yield _row("experts", VLLM, case, gpu.measure_graph(theirs, replays=15), moved, fp8)
            found = launch.skinny_experts(M, HIDDEN, inner, fp8)
            configs: list[launch.SkinnyExperts] = [found] if found else []
            if search:
                middle = launch.Skinny(4, 512, 4)
                configs = [launch.SkinnyExperts(up, middle) for up in _candidates(1, fp8)]
                configs += [launch.SkinnyExperts(middle, down) for down in _candidates(1, fp8) if down != middle]
            for config in configs:
                ours = [partial(skinny_experts, x, w13, w2, *routing, config, scales) for routing in drawn]
                require(f"experts M={M} {config}", norm_error(ours[0](), gold), TOLERANCE)
                name = f"{_name(config.up, search)} / {_name(config.down, search)}" if search else OURS
                yield _row("experts", name, case, gpu.measure_graph(ours, replays=10), moved, fp8)


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


def _cublas(x: Tensor, weight: Tensor, _: Scales | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight.T, out=out)


def _vllm_fp8(x: Tensor, weight: Tensor, scales: Scales | None, out: Tensor) -> Tensor:
    assert scales is not None
    ops = import_module("vllm._custom_ops")
    rounded, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    product: Tensor = ops.cutlass_scaled_mm(
        rounded, weight.T, scale_a=scale, scale_b=scales.values.flatten(), out_dtype=out.dtype
    )
    return product


def _ours(x: Tensor, weight: Tensor, scales: Scales | None, out: Tensor, config: launch.Skinny) -> Tensor:
    return skinny_linear(x, weight, out, config, scales)


def _weights(*shape: int, fp8: bool) -> tuple[Tensor, Scales | None]:
    plain = _normal(*shape, scale=shape[-1] ** -0.5)
    if not fp8:
        return plain, None
    scales = plain.abs().amax(dim=(-2, -1), keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    stored = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    for one, part, scale in zip(
        stored.view(-1, *shape[-2:]), plain.view(-1, *shape[-2:]), scales.flatten(), strict=True
    ):
        one.copy_(part / scale)
    return stored, Scales(scales)


def _meant(weight: Tensor, scales: Scales | None, expert: int | None = None) -> Tensor:
    values = None if scales is None else scales.values
    if expert is not None:
        weight, values = weight[expert], None if values is None else values[expert]
    return weight.double() if values is None else weight.double() * values.double()


def _candidates(M: int, fp8: bool) -> list[launch.Skinny]:
    steps = (512, 1024, 2048) if fp8 else (256, 512, 1024)
    some = (launch.Skinny(*each) for each in product((2, 4, 8), steps, (2, 4, 8)))
    # A thread has at most 64 sums.
    return [each for each in some if M * each.rows * each.step <= 2048 * each.warps and each.rows * each.step <= 8192]


def _name(config: launch.Skinny, search: bool) -> str:
    return f"{config.rows} {config.step} {config.warps}" if search else OURS


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=scale)


def _routing(tokens: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K, dim=-1)
    return weights.contiguous(), ids.to(torch.int32).contiguous()


def _gold(
    x: Tensor, up: tuple[Tensor, Scales | None], down: tuple[Tensor, Scales | None], weights: Tensor, ids: Tensor
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for token, (scales, experts) in enumerate(zip(weights.double(), ids.tolist(), strict=True)):
        for scale, expert in zip(scales, experts, strict=True):
            gates, ups = (_meant(*up, expert) @ x[token].double()).chunk(2)
            out[token] += scale * (_meant(*down, expert) @ (torch.nn.functional.silu(gates) * ups))
    return out


def _row(
    bench: str,
    provider: str,
    case: dict[str, int],
    times: tuple[float, float, float],
    moved: int,
    fp8: bool = False,
) -> Row:
    dtypes = {"act": "bf16", "weight": "fp8"} if fp8 else {"act": "bf16"}
    return Row(bench, provider, case, dtypes, *times, moved_bytes=moved)
