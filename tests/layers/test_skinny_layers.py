"""What is compiled before the first request: every kernel that a decode step of few rows can ask for, each once.

And which experts our kernels take: those of layers that vLLM keeps as checkpoints lay them out, for few tokens.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import (
    CutlassFp8BlockScaledMMKernel,
    CutlassFP8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.marlin import MarlinFP8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from kimi_vllm.kernels.cuda import launch, skinny_experts
from kimi_vllm.layers import fp8_weights, skinny


class Linear(LinearBase):
    """A weight without vLLM's processes around it."""

    def __init__(self, outputs, inputs):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.bfloat16), requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()


def test_each_kind_of_product_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(
        skinny, "product", lambda x, weight, dtype, scales: made.append((x.shape[0], *weight.shape, dtype))
    )
    shapes = [(2304, 4096), (2304, 4096), (256, 2304), (2048, 2304)]
    skinny.warm_up(nn.ModuleList([nn.LayerNorm(4), *(Linear(*shape) for shape in shapes)]), torch.bfloat16)
    assert len(made) == len(set(made))
    assert {rows for rows, *_ in made} == set(launch.SKINNY_ROWS)
    # Two shapes with the same inputs and launch parameters are one kernel.
    assert sum(inputs == 2304 and rows == 1 for rows, _, inputs, _ in made) == 1


class Method(UnquantizedFusedMoEMethod):
    """vLLM's method without the processes around it."""

    def __init__(self, backend, parallel, bias):
        nn.Module.__init__(self)
        self.unquantized_backend = backend
        self.moe = SimpleNamespace(has_bias=bias, moe_parallel_config=parallel)


ONE_DEVICE = FusedMoEParallelConfig.make_no_parallel()
REPLICAS = dataclasses.replace(ONE_DEVICE, tp_size=2, dp_size=2)
REPLICAS_WITH_EP = dataclasses.replace(ONE_DEVICE, ep_size=2, dp_size=2, use_ep=True)


def experts(
    *,
    backend=UnquantizedMoeBackend.TRITON,
    parallel=ONE_DEVICE,
    bias=False,
    activation=MoEActivation.SILU,
    mapped=False,
):
    """A layer of three experts, two a token, 48 channels inside 96."""
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.quant_method = Method(backend, parallel, bias)
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
    assert type(layer.quant_method) is skinny.skinny_experts_method(UnquantizedFusedMoEMethod)


@pytest.mark.parametrize(
    "unlike",
    [
        {"backend": UnquantizedMoeBackend.FLASHINFER_CUTLASS},
        {"parallel": REPLICAS},
        {"parallel": REPLICAS_WITH_EP},
        {"bias": True},
        {"activation": MoEActivation.GELU},
        {"mapped": True},
    ],
    ids=["backend", "replicas", "replicas with EP", "bias", "activation", "mapped"],
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


@pytest.mark.parametrize(
    "logits", [torch.zeros(8192, 8), torch.zeros(1, 8, dtype=torch.bfloat16)], ids=["many", "bf16"]
)
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
    monkeypatch.setattr(
        skinny.skinny_experts_method(UnquantizedFusedMoEMethod),
        "apply",
        lambda self, layer, x, *rest: made.append(len(x)),
    )
    skinny.warm_up(nn.ModuleList(layers), torch.bfloat16)
    assert len(made) == 1


class Fp8Experts(nn.Module):
    """What vLLM's methods for FP8 experts are to ours."""

    def __init__(self, backend, scales, block=None):
        super().__init__()
        self.fp8_backend = backend
        self.moe = SimpleNamespace(has_bias=False, moe_parallel_config=ONE_DEVICE)
        self.moe_quant_config = SimpleNamespace(w1_scale=scales[0], w2_scale=scales[1], block_shape=block)


def fp8_experts(backend=Fp8MoeBackend.TRITON, scales=((3,), (3,)), block=None, dtype=torch.float32):
    layer = experts()
    layer.w13_weight.data = layer.w13_weight.data.to(torch.float8_e4m3fn)
    layer.w2_weight.data = layer.w2_weight.data.to(torch.float8_e4m3fn)
    layer.quant_method = Fp8Experts(backend, [torch.ones(shape, dtype=dtype) for shape in scales], block)
    return layer


@pytest.mark.parametrize(
    ("scales", "block", "strides"),
    [
        (((3,), (3,)), None, ((0, 0), (0, 0))),
        (((3, 1), (3, 1)), None, ((0, 0), (0, 0))),
        (((3, 96, 1), (3, 96, 1)), None, ((1, 0), (1, 0))),
        (((3, 96), (3, 96)), None, ((1, 0), (1, 0))),
        (((3, 2, 2), (3, 2, 1)), [64, 64], None),  # 48 channels inside: a block would hold gates and ups
        (((3, 96 // 32, 3), (3, 3, 2)), [32, 32], None),
        (((3, 7, 1), (3, 96, 1)), None, None),
    ],
    ids=str,
)
def test_scales_of_experts_are_known_by_their_shapes(scales, block, strides):
    found = fp8_weights.expert_scales(fp8_experts(scales=scales, block=block))
    assert (found and tuple(each.strides for each in found)) == strides


def test_a_method_keeps_its_name_which_vllms_loaders_of_experts_ask_for():
    layer = fp8_experts()
    skinny.install(nn.ModuleList([layer]))
    assert layer.quant_method.__class__.__name__ == "Fp8Experts"


def test_fp8_experts_are_taken_over():
    layer = fp8_experts()
    skinny.install(nn.ModuleList([layer, experts()]))
    assert type(layer.quant_method) is skinny.skinny_experts_method(Fp8Experts)
    skinny.install(nn.ModuleList([layer]))  # as after an update of weights
    assert type(layer.quant_method) is skinny.skinny_experts_method(Fp8Experts)


@pytest.mark.parametrize(
    "unlike", [{"backend": Fp8MoeBackend.FLASHINFER_CUTLASS}, {"dtype": torch.float8_e8m0fnu}], ids=str
)
def test_fp8_experts_that_lie_otherwise_are_left_to_vllm(unlike):
    layer = fp8_experts(**unlike)
    skinny.install(nn.ModuleList([layer]))
    assert type(layer.quant_method) is Fp8Experts


def fp8_linear(kernel, scale, *, block=None, transposed=True, size=(48, 96), padded=0):
    """A layer of 48 outputs and 96 inputs after vLLM's processing."""
    layer = Linear(*size)
    stored = torch.zeros(48 + padded, 96).to(torch.float8_e4m3fn)
    layer.weight.data = stored.t() if transposed else stored
    layer.logical_widths, layer.input_size = [16, 32], 96
    layer.weight_scale, layer.weight_block_size = torch.ones(scale), block
    layer.quant_method = SimpleNamespace(fp8_linear=kernel.__new__(kernel))
    return layer


@pytest.mark.parametrize("scale", [(), (1,), (48,), (48, 1)], ids=str)
def test_fp8_weights_are_found_as_rows_of_outputs(scale):
    weight, scales = fp8_weights.linear_weights(fp8_linear(CutlassFP8ScaledMMLinearKernel, scale))
    assert weight.shape == (48, 96)
    assert weight.is_contiguous()
    assert scales.values.shape in ((1, 1), (48, 1))


def test_fp8_weights_in_blocks_are_found():
    kernel = CutlassFp8BlockScaledMMKernel
    weight, scales = fp8_weights.linear_weights(fp8_linear(kernel, (2, 3), block=[32, 32], transposed=False))
    assert weight.shape == (48, 96)
    assert (scales.block, scales.strides) == (32, (3, 1))


def test_scales_of_blocks_go_by_either_name():
    layer = fp8_linear(CutlassFp8BlockScaledMMKernel, (2, 3), block=[32, 32], transposed=False)
    layer.weight_scale_inv = layer.weight_scale
    del layer.weight_scale
    assert fp8_weights.linear_weights(layer)[1].block == 32


def test_a_kernel_is_found_in_a_scheme_too():
    layer = fp8_linear(CutlassFP8ScaledMMLinearKernel, (48, 1))
    layer.scheme, layer.quant_method = layer.quant_method, SimpleNamespace()  # as compressed-tensors has it
    assert fp8_weights.linear_weights(layer)[0].shape == (48, 96)


@pytest.mark.parametrize(
    "layer",
    [
        fp8_linear(MarlinFP8ScaledMMLinearKernel, (1,)),
        fp8_linear(CutlassFP8ScaledMMLinearKernel, (1,), padded=16),
        fp8_linear(CutlassFP8ScaledMMLinearKernel, (2,)),
        fp8_linear(CutlassFp8BlockScaledMMKernel, (2, 3), block=[32, 64], transposed=False),
        fp8_linear(CutlassFp8BlockScaledMMKernel, (3, 12), block=[16, 8], transposed=False),
    ],
    ids=["repacked", "padded", "scales of parts", "oblong blocks", "small blocks"],
)
def test_other_fp8_weights_are_left_to_vllm(layer):
    assert fp8_weights.linear_weights(layer) is None


@pytest.mark.parametrize(
    ("context", "found"),
    [
        (None, None),
        (SimpleNamespace(is_padding=None, dp_metadata=None), None),
        (SimpleNamespace(is_padding=torch.tensor([False, True, True]), dp_metadata=None), [False, True]),
        (SimpleNamespace(is_padding=torch.tensor([False]), dp_metadata=None), None),
        (SimpleNamespace(is_padding=torch.tensor([False, True]), dp_metadata="of two ranks"), None),
    ],
    ids=["none", "no padding", "padded", "shorter", "several ranks"],
)
def test_padding_is_what_vllm_says_of_the_step(monkeypatch, context, found):
    monkeypatch.setattr(skinny, "is_forward_context_available", lambda: context is not None)
    monkeypatch.setattr(skinny, "get_forward_context", lambda: context)
    padding = skinny._padding(2)
    assert (padding if padding is None else padding.tolist()) == found


class Mixture(nn.Module):
    """A layer as `KimiMoE` is one: a runner of routed experts, and a shared expert of two products."""

    def __init__(self, shared=(96, 96, 48), scaling=1.0):
        super().__init__()
        self.experts = runner(router())
        self.experts.routed_experts = experts()
        self.experts.routed_scaling_factor = scaling
        self.experts._maybe_reduce_final_output = lambda out, size, output_is_reduced: out + 1
        hidden, up, inner = shared
        self.up, self.down = Linear(up, hidden), Linear(hidden, inner)
        skinny.install(self)

    def few_rows(self, x, logits):
        return skinny.mixture(self.experts, (self.up, self.down), x, logits)


def test_padding_is_not_read_where_vllm_does_not_write_it(monkeypatch):
    # vLLM's second model runner sets all of it when it captures, and then leaves it so.
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    monkeypatch.setattr(skinny, "is_forward_context_available", lambda: True)
    context = SimpleNamespace(is_padding=torch.ones(2, dtype=torch.bool), dp_metadata=None)
    monkeypatch.setattr(skinny, "get_forward_context", lambda: context)
    assert skinny._padding(2) is None


@pytest.fixture
def called(monkeypatch):
    """Calls of our kernels, which give zeros."""
    calls = []

    def kernels(x, *arguments):
        calls.append((x, *arguments))
        return torch.zeros_like(x)

    monkeypatch.setattr(skinny, "product", lambda *arguments: None)
    monkeypatch.setattr(skinny_experts, "skinny_experts", kernels)
    monkeypatch.setattr(
        skinny_experts, "choose_experts", lambda logits, *_, **named: (logits[:, :2], logits[:, :2].int())
    )
    return calls


def test_all_experts_of_a_few_rows_are_one_call(called):
    layer, x = Mixture(), torch.zeros(2, 96)
    out = layer.few_rows(x, torch.zeros(2, 8))
    assert torch.equal(out, torch.ones(2, 96))  # reduced as vLLM's runner would
    ((given, w13, _, _, ids, config, scales, shared),) = called
    assert given is x
    assert w13 is layer.experts.routed_experts.w13_weight
    assert (shared.w13, shared.w2) == (layer.up.weight, layer.down.weight)
    assert (ids.shape, config, scales) == ((2, 2), launch.skinny_experts(2, 96, 48), None)


@pytest.mark.parametrize(
    ("unlike", "tokens"),
    [({"shared": (96, 192, 96)}, 1), ({"scaling": 2.5}, 1), ({}, 64)],
    ids=["a larger shared expert", "scaled outside of the router", "many tokens"],
)
def test_other_mixtures_are_left_to_vllm(called, unlike, tokens):
    assert Mixture(**unlike).few_rows(torch.zeros(tokens, 96), torch.zeros(tokens, 8)) is None
    assert not called


@pytest.mark.parametrize("weight", [torch.zeros(3, 2, 96, 24), object()], ids=["four dimensions", "no tensor"])
def test_experts_in_forms_of_vllms_own_are_not_looked_at(called, weight):
    layer = Mixture()
    method = layer.experts.routed_experts.quant_method
    method.__class__ = UnquantizedFusedMoEMethod
    del layer.experts.routed_experts.w2_weight
    layer.experts.routed_experts.w2_weight = weight
    skinny.warm_up(layer, torch.bfloat16)
    assert layer.few_rows(torch.zeros(2, 96), torch.zeros(2, 8)) is None
    assert not called


def test_with_another_router_only_routed_experts_are_compiled(called):
    layer = Mixture()
    layer.experts.router = SimpleNamespace()  # without biases, as vLLM's that simulates routing
    skinny.warm_up(layer, torch.bfloat16)
    assert [len(arguments) for arguments in called] == [7]


def test_a_mixture_s_routed_experts_are_not_compiled_besides_unless_its_shared_one_is_unlike(called):
    few = sum(launch.skinny_experts(tokens, 96, 48) is not None for tokens in launch.SKINNY_ROWS)
    skinny.warm_up(nn.ModuleList([Mixture(), Mixture(shared=(96, 192, 96))]), torch.bfloat16)
    # With and without a shared expert; without it all launch parameters are the same.
    assert [len(arguments) for arguments in called] == [8] * few + [7]
