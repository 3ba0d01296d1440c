"""A sparse layer on the GPU: compiled by several processes, timed by one."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import override_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import run_cutlass_moe_fp8
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

from serve.bench.moe.space import Config, Experts, variants

Run = Callable[[Config], list[torch.Tensor]]


class Layer:
    """Random weights of one layer, or of its first few experts, and calls of it."""

    def __init__(self, experts: Experts, stored: int | None = None) -> None:
        self.experts, self.stored, self.generator = experts, stored or experts.number, torch.Generator("cuda")
        self.generator.manual_seed(0)
        hidden, inner = experts.hidden, experts.intermediate
        self.w13 = self._normal(self.stored, 2 * inner, hidden, scale=hidden**-0.5)
        self.w2 = self._normal(self.stored, hidden, inner, scale=inner**-0.5)
        self.quantised: dict[str, Any] = {}
        if experts.fp8:
            (self.w13, up), (self.w2, down) = _in_fp8(self.w13), _in_fp8(self.w2)
            self.quantised = {"quant_config": fp8_w8a8_moe_quant_config(up, down)}

    def _normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        filled = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return filled.normal_(std=scale, generator=self.generator)

    def drawn(self, tokens: int, routings: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Activations ``[tokens, hidden]``, and weights and ids of their experts, once per routing."""
        self.generator.manual_seed(tokens)
        hidden = self._normal(tokens, self.experts.hidden)
        drawn = []
        for _ in range(routings):
            scores = torch.rand(tokens, self.stored, device="cuda", generator=self.generator)
            weights, ids = scores.topk(self.experts.per_token, dim=-1)  # distinct experts, all equally likely
            drawn.append((torch.softmax(weights, -1).contiguous(), ids.to(torch.int32).contiguous()))
        return hidden, drawn

    def cutlass_calls(self, tokens: int, routings: int) -> Run:
        """As `calls`, with the grouped products of CUTLASS that vLLM has for FP8; a configuration changes nothing."""
        hidden, drawn = self.drawn(tokens, routings)
        number, inner, width = self.experts.number, self.experts.intermediate, self.experts.hidden
        up, down = self.quantised["quant_config"].w1_scale, self.quantised["quant_config"].w2_scale
        rows = tokens * self.experts.per_token
        first = hidden.new_empty(rows, max(2 * inner, width))
        second = hidden.new_empty(rows, max(inner, width))
        strides = {
            size: torch.full((number,), size, device="cuda", dtype=torch.int64) for size in (width, inner, 2 * inner)
        }

        def run(config: Config) -> list[torch.Tensor]:
            outputs = []
            for weights, ids in drawn:
                quantised, scale = ops.scaled_fp8_quant(hidden)
                output = torch.empty_like(hidden)
                run_cutlass_moe_fp8(
                    *(output, quantised, self.w13, self.w2, ids, MoEActivation.SILU, number, None),
                    *(up, down, scale, None),
                    *(strides[width], strides[inner], strides[2 * inner], strides[width]),
                    *(first, second, None, hidden.dtype),
                    per_act_token=False,
                    per_out_ch=False,
                    use_batched_format=False,
                    topk_weights=weights,
                    permute_scratch=None,
                )
                outputs.append(output)
            return outputs

        return run

    def calls(self, tokens: int, routings: int) -> Run:
        """A function that runs the layer once per routing, all with its configuration, and returns the outputs."""
        hidden, drawn = self.drawn(tokens, routings)

        def run(config: Config) -> list[torch.Tensor]:
            with override_config(dict(config)):
                return [
                    fused_experts(
                        *(hidden, self.w13, self.w2, weights, ids),
                        global_num_experts=self.experts.number,
                        **self.quantised,
                    )
                    for weights, ids in drawn
                ]

        return run


def _in_fp8(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights of experts in FP8, and the scale of each expert."""
    most = torch.finfo(torch.float8_e4m3fn).max
    scales = weights.abs().amax(dim=(1, 2)).float() / most
    stored = torch.empty_like(weights, dtype=torch.float8_e4m3fn)
    for one, part, scale in zip(stored, weights, scales, strict=True):  # no second copy of all experts in float32
        one.copy_(part / scale)
    return stored, scales


_layer: Layer | None = None
"""Of a compiling process."""


def _compile(task: tuple[Experts, Config, list[int]]) -> str | None:
    global _layer
    experts, config, tokens = task
    try:
        _layer = _layer or Layer(experts, stored=experts.per_token)  # strides are the same as with all experts
        for count in tokens:
            _layer.calls(count, 1)(config)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__}: {error}"
    return None


def compile_all(experts: Experts, plan: dict[int, list[Config]], workers: int, limit_s: float) -> tuple[int, list[str]]:
    """Fill Triton's cache, before this process touches CUDA. What fails or comes late is compiled when its turn comes.

    Args:
        plan: configurations per number of tokens.
        workers: processes. They are forked, so none imports vLLM again.
        limit_s: seconds after which the others are stopped.

    Returns:
        Number of distinct configurations, and what went wrong.
    """
    of = variants(experts, list(plan))
    work: dict[tuple[tuple[str, int], ...], set[int]] = {}
    for tokens, configs in sorted(plan.items(), reverse=True):  # large tiles take longest, so they start first
        for config in configs:
            work.setdefault(tuple(sorted(config.items())), set()).add(of[tokens])
    tasks = [(experts, dict(config), sorted(counts)) for config, counts in work.items()]
    failures: list[str] = []
    deadline = time.monotonic() + limit_s
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        results = pool.imap_unordered(_compile, tasks)
        for done in range(len(tasks)):
            try:
                failure = results.next(timeout=max(0.1, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                failures.append(f"{len(tasks) - done} configurations took longer than {limit_s:.0f} s")
                break
            if failure:
                failures.append(failure)
    return len(tasks), failures


def repetitions(run: Run, config: Config, routings: int, budget_us: float) -> Iterator[float]:
    """Microseconds per call, again and again: each of one replay of a CUDA graph, or of more if it is short.

    Args:
        run: A call from `Layer.calls`.
        routings: calls that `run` makes.
        budget_us: time on the GPU after which it ends, with one repetition at least.
    """
    run(config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(config)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replayed_us(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    spent = replayed_us(1)  # uploads the graph
    replays = max(1, round(500 / spent))
    while True:
        elapsed = replayed_us(replays)
        yield elapsed / replays / routings
        spent += elapsed
        if spent > budget_us:
            return


def median_us(run: Run, config: Config, routings: int, worst_us: float, budget_us: float) -> float:
    """Median of the repetitions; the first alone if it is already above `worst_us`."""
    times: list[float] = []
    for elapsed in repetitions(run, config, routings, budget_us):
        times.append(elapsed)
        if times[0] > worst_us:
            break
    return statistics.median(times)


def difference(run: Run, config: Config, reference: list[torch.Tensor]) -> float:
    """Largest relative difference, in norm, of an output from that of the reference; infinite if not finite."""
    worst = 0.0
    for output, expected in zip(run(config), reference, strict=True):
        relative = float((output.float() - expected.float()).norm() / expected.float().norm())
        worst = max(worst, relative if relative == relative else float("inf"))  # a NaN equals nothing
    return worst
