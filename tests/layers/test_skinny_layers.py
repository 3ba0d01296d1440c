"""What is compiled before the first request: every kernel that a decode step of few rows can ask for, each once.

And which experts our kernels take: those of layers that vLLM keeps as checkpoints lay them out, for few tokens.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase

from kimi_vllm.kernels.cuda import launch
from kimi_vllm.layers import skinny


class Linear(LinearBase):
    """A weight without vLLM's processes around it."""

    def __init__(self, outputs, inputs):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.bfloat16), requires_grad=False)


def test_each_kind_of_product_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(skinny, "product", lambda x, weight, dtype: made.append((x.shape[0], *weight.shape, dtype)))
    shapes = [(2304, 4096), (2304, 4096), (256, 2304), (2048, 2304)]
    skinny.warm_up(nn.ModuleList([nn.LayerNorm(4), *(Linear(*shape) for shape in shapes)]), torch.bfloat16)
    assert len(made) == len(set(made))
    assert {rows for rows, *_ in made} == set(launch.SKINNY_ROWS)
    # Two shapes with the same inputs and launch parameters are one kernel.
    assert sum(inputs == 2304 and rows == 1 for rows, _, inputs, _ in made) == 1


class Method(UnquantizedFusedMoEMethod):
    """vLLM's method without the processes around it."""

    def __init__(self, backend, all2all, bias):
        nn.Module.__init__(self)
        self.unquantized_backend = backend
        parallel = SimpleNamespace(use_all2all_kernels=all2all)
        self.moe = SimpleNamespace(has_bias=bias, moe_parallel_config=parallel)


def experts(
    *, backend=UnquantizedMoeBackend.TRITON, all2all=False, bias=False, activation=MoEActivation.SILU, mapped=False
):
    """A layer of three experts, two a token, 48 channels inside 96."""
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.quant_method = Method(backend, all2all, bias)
    layer.quant_method.__class__ = UnquantizedFusedMoEMethod
    layer.activation, layer.apply_router_weight_on_input, layer.top_k = activation, False, 2
    layer._expert_map = torch.zeros(3, dtype=torch.int32) if mapped else None
    layer.rocm_aiter_fmoe_enabled = False
    layer.w13_weight = nn.Parameter(torch.zeros(3, 96, 96, dtype=torch.bfloat16), requires_grad=False)
    layer.w2_weight = nn.Parameter(torch.zeros(3, 96, 48, dtype=torch.bfloat16), requires_grad=False)
    return layer


def test_experts_are_taken_over():
    layer = experts()
    skinny.install(nn.ModuleList([layer]))
    assert type(layer.quant_method) is skinny.SkinnyExpertsMethod


@pytest.mark.parametrize(
    "unlike",
    [
        {"backend": UnquantizedMoeBackend.FLASHINFER_CUTLASS},
        {"all2all": True},
        {"bias": True},
        {"activation": MoEActivation.GELU},
        {"mapped": True},
    ],
    ids=lambda unlike: next(iter(unlike)),
)
def test_other_experts_are_left_to_vllm(unlike):
    layer = experts(**unlike)
    skinny.install(nn.ModuleList([layer]))
    assert type(layer.quant_method) is UnquantizedFusedMoEMethod


def test_many_tokens_are_left_to_vllm(monkeypatch):
    layer = experts()
    skinny.install(nn.ModuleList([layer]))
    asked = []
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "apply", lambda self, *arguments: asked.append(arguments[1].shape))
    ids = torch.zeros(64, 2, dtype=torch.int32)
    layer.quant_method.apply(layer, torch.zeros(64, 96), ids.float(), ids, None, None)
    assert asked == [(64, 96)]


def router(groups=1, scoring="sigmoid", bias=True):
    """Of vLLM, for eight experts, two a token."""
    correction = torch.linspace(-1, 1, 8) if bias else None
    return GroupedTopKRouter(2, 8, groups, groups, True, scoring, 2.5, correction)


def runner(some):
    """What holds a router in a model."""
    layer = MoERunner.__new__(MoERunner)
    nn.Module.__init__(layer)
    layer.router = some
    return layer


def test_a_router_of_one_group_is_taken_over():
    layer = runner(router())
    skinny.install(nn.ModuleList([layer]))
    assert type(layer.router) is skinny.SkinnyRouter


@pytest.mark.parametrize("unlike", [{"groups": 2}, {"scoring": "softmax"}, {"bias": False}], ids=str)
def test_other_routers_are_left_to_vllm(unlike):
    layer = runner(router(**unlike))
    skinny.install(nn.ModuleList([layer]))
    assert type(layer.router) is GroupedTopKRouter


@pytest.mark.parametrize("logits", [torch.zeros(64, 8), torch.zeros(1, 8, dtype=torch.bfloat16)], ids=["many", "bf16"])
def test_other_logits_are_left_to_vllm(monkeypatch, logits):
    layer = runner(router())
    skinny.install(nn.ModuleList([layer]))
    asked = []
    monkeypatch.setattr(GroupedTopKRouter, "_compute_routing", lambda self, *arguments: asked.append(arguments[1]))
    layer.router._compute_routing(torch.zeros(1), logits, None)
    assert asked[0] is logits


def test_experts_are_compiled_once(monkeypatch):
    layers = [experts(), experts()]
    skinny.install(nn.ModuleList(layers))
    made = []
    monkeypatch.setattr(skinny.SkinnyExpertsMethod, "apply", lambda self, layer, x, *rest: made.append(len(x)))
    skinny.warm_up(nn.ModuleList(layers), torch.bfloat16)
    assert len(made) == 1
