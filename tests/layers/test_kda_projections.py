"""A KDA layer's two merged products: loaded tensor by tensor they are the eight linears of the checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as vllm_linear

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.layers import kda
from kimi_vllm.weights import WeightsError, load_weights, packed_modules_mapping

RECALL = Path(__file__).parents[2] / "configs" / "models" / "recall"
GEOMETRY = replace(KimiGeometry.from_config(json.loads((RECALL / "config.json").read_text())), moe=None)
PREFIX = "model.layers.0.self_attn."
HIDDEN, D = 48, 64


class Rank:
    """The projections of one rank, at the place the loader expects them, and the rank they believe to be on."""

    def __init__(self, monkeypatch, heads, rank=0, ranks=1):
        for module in (kda, vllm_linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
        layer = nn.Module()
        self.geometry = replace(GEOMETRY, hidden_size=HIDDEN, linear_num_heads=heads, linear_head_dim=D)
        self.in_proj = layer.in_proj = kda.InputLinear(HIDDEN, heads, D, None, PREFIX + "in_proj")
        self.fg_b_proj = layer.fg_b_proj = kda.BatchedLowRank(D, heads // ranks * D)
        # As anything might be in memory that was never written.
        self.in_proj.weight.data.fill_(torch.nan)
        self.fg_b_proj.weight.data.fill_(torch.nan)
        self.model = nn.Module()
        self.model.model = nn.Module()
        self.model.model.layers = nn.ModuleList([nn.Module()])
        self.model.model.layers[0].self_attn = layer

    def load(self, tensors):
        named = [(f"{PREFIX}{name}", tensor) for name, tensor in tensors.items()]
        return load_weights(self.model, self.geometry, named)[0]


def checkpoint(heads):
    wide = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (heads * D, HIDDEN))
    low = dict.fromkeys(("f_a_proj", "g_a_proj"), (D, HIDDEN)) | dict.fromkeys(("f_b_proj", "g_b_proj"), (heads * D, D))
    shapes = wide | low | {"b_proj": (heads, HIDDEN)}
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("heads", "ranks"), [(1, 1), (2, 2), (6, 2), (32, 1), (32, 2), (32, 8)])
def test_merged_products_equal_separate_linears(heads, ranks, monkeypatch):
    torch.manual_seed(heads)
    tensors, x = checkpoint(heads), torch.randn(5, HIDDEN)

    def alone(name, inputs=x):
        return linear(inputs, tensors[f"{name}.weight"])

    whole = {name: alone(name) for name in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")}
    gates = [alone("f_b_proj", whole["f_a_proj"]), alone("g_b_proj", whole["g_a_proj"])]
    for rank in range(ranks):
        built = Rank(monkeypatch, heads, rank, ranks)
        assert built.load(tensors) == {f"{PREFIX}in_proj.weight", f"{PREFIX}fg_b_proj.weight"}
        projected = linear(x, built.in_proj.weight)
        assert projected.shape[1] % 16 == 0
        qkv, low_rank, beta, filling = projected.split(built.in_proj.splits, dim=-1)

        def of_rank(tensor, rank=rank):
            return tensor.chunk(ranks, dim=-1)[rank]

        expected = torch.cat([of_rank(whole[name]) for name in ("q_proj", "k_proj", "v_proj")], dim=-1)
        torch.testing.assert_close(qkv, expected)
        torch.testing.assert_close(beta, of_rank(whole["b_proj"]))
        assert not filling.any()
        both = built.fg_b_proj(low_rank)
        assert both.is_contiguous()
        for ours, theirs in zip(both, gates, strict=True):
            torch.testing.assert_close(ours, of_rank(theirs), rtol=1e-5, atol=1e-4)


def test_scales_of_quantised_checkpoints_find_their_columns(monkeypatch):
    heads, ranks = 4, 2
    names = ("q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj")
    outputs = [heads * D] * 3 + [D] * 2 + [heads]
    for rank in range(ranks):
        built = Rank(monkeypatch, heads, rank, ranks)
        loader = built.in_proj.weight_loader_v2
        width = len(built.in_proj.weight)
        per_channel = parameter.ChannelQuantScaleParameter(
            data=torch.full((width, 1), torch.nan), output_dim=0, weight_loader=loader
        )
        per_tensor = parameter.PerTensorScaleParameter(data=torch.full((6,), torch.nan), weight_loader=loader)
        built.in_proj.register_parameter("weight_scale", per_channel)
        built.in_proj.register_parameter("input_scale", per_tensor)
        scales = {
            f"{name}.weight_scale": torch.full((n, 1), 1.0 + i)
            for i, (name, n) in enumerate(zip(names, outputs, strict=True))
        }
        scales |= {f"{name}.input_scale": torch.tensor(1.0 + i) for i, name in enumerate(names)}
        built.load(scales)
        columns = [heads * D // ranks] * 3 + [D] * 2 + [heads // ranks, built.in_proj.splits[-1]]
        expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0])
        assert per_channel[:, 0].equal(expected.repeat_interleave(torch.tensor(columns)))
        assert per_tensor.equal(expected[:-1])


def test_the_second_product_reads_the_first_in_place(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "bmm", lambda inputs, weight: seen.append((inputs, weight)))
    layer, projected = kda.BatchedLowRank(D, 3 * D), torch.randn(7, 5 * D)
    layer(projected[:, 2 * D : 4 * D])
    [(inputs, weight)] = seen
    assert inputs.data_ptr() == projected[:, 2 * D :].data_ptr()
    assert inputs.stride() == (D, 5 * D, 1)
    assert weight.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_tensors_with_more_rows_are_refused_before_a_rank_takes_its_part(rank, ranks, monkeypatch):
    built = Rank(monkeypatch, 2, rank, ranks)
    for name, tensor in checkpoint(2).items():
        with pytest.raises(WeightsError, match=rf"{name} \(.*\) does not fit: by config.json it is"):
            built.load({name: torch.cat([tensor, tensor])})
    assert built.in_proj.weight.isnan().all()
    assert built.fg_b_proj.weight.isnan().all()


def test_a_low_rank_tensor_of_the_wrong_shape_is_named(monkeypatch):
    built = Rank(monkeypatch, heads=2)
    with pytest.raises(WeightsError, match=r"self_attn.g_b_proj.weight \(129, 64\) does not fit: .*\(128, 64\)"):
        built.load({"g_b_proj.weight": torch.zeros(129, D)})
    with pytest.raises(WeightsError, match=r"belong nowhere: .*self_attn.f_b_proj.bias"):
        built.load({"f_b_proj.bias": torch.zeros(128)})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("f_b_proj.weight", torch.zeros(2 * D, D, dtype=torch.float8_e4m3fn)),
        ("f_b_proj.weight", torch.zeros(2 * D, D, dtype=torch.int8)),
        ("g_b_proj.weight_scale", torch.ones(2 * D, 1)),
        ("f_b_proj.qweight", torch.zeros(D // 8, 2 * D, dtype=torch.int32)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype)[6:],
)
def test_quantised_low_rank_projections_are_refused_with_the_remedy(name, tensor, monkeypatch):
    built = Rank(monkeypatch, heads=2)
    with pytest.raises(WeightsError, match=rf"{name} \(\w+\): quantised f_b_proj and g_b_proj are not .*`ignore`"):
        built.load({name: tensor})


@pytest.mark.parametrize("kept", ["b_proj", "f_a_proj"])
def test_parts_that_are_quantised_differently_are_refused_by_name(kept, monkeypatch):
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    for module in (kda, vllm_linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    config = Fp8Config(ignored_layers=[f"{PREFIX}{kept}"])
    config.packed_modules_mapping = packed_modules_mapping
    refused = r"in_proj: Detected some but not all shards.* are one product here, "
    with pytest.raises(ValueError, match=refused):
        kda.InputLinear(HIDDEN, 2, D, config, PREFIX + "in_proj")
