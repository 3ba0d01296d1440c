"""Checkpoint names: the released model's count, and every rename."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.weights import WeightsError, _canonical, _target, checkpoint_names, load_weights

MODELS = Path(__file__).parents[1] / "configs" / "models"


@pytest.fixture(scope="module")
def released():
    return KimiGeometry.from_config(json.loads((MODELS / "48b-a3b" / "config.json").read_text()))


def test_the_released_checkpoint_has_20493_tensors(released):
    names = list(checkpoint_names(released))
    assert len(names) == len(set(names)) == 20_493


def test_the_shipped_checkpoint_has_exactly_these_names():
    from safetensors import safe_open

    geometry = KimiGeometry.from_config(json.loads((MODELS / "recall" / "config.json").read_text()))
    with safe_open(MODELS / "recall" / "model.safetensors", "pt") as file:
        assert {_canonical(name, geometry) for name in file.keys()} == set(checkpoint_names(geometry))  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "target", "arguments"),
    [
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.in_proj.weight", {"shard_id": 1}),
        ("model.layers.0.self_attn.v_conv1d.weight", "model.layers.0.self_attn.conv_weight", {"shard_id": 2}),
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight", {}),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight", {"shard_id": 1}),
        (
            "model.layers.1.block_sparse_moe.shared_experts.gate_proj.weight",
            "model.layers.1.block_sparse_moe.shared_experts.gate_up_proj.weight",
            {"shard_id": 0},
        ),
        (
            "model.layers.0.self_attn.q_proj.weight_scale",
            "model.layers.0.self_attn.in_proj.weight_scale",
            {"shard_id": 0},
        ),
        ("lm_head.weight", "lm_head.weight", {}),
    ],
)
def test_targets(name, target, arguments, released):
    assert _target(name, released, []) == (target, arguments)


def test_a_dense_mlp_written_by_transformers_is_renamed(released):
    assert _canonical("model.layers.0.block_sparse_moe.up_proj.weight", released) == "model.layers.0.mlp.up_proj.weight"
    sparse = "model.layers.1.block_sparse_moe.gate.weight"
    assert _canonical(sparse, released) == sparse


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_full_precision_tensor_for_a_quantised_parameter_is_refused_by_name(dtype, monkeypatch, released):
    """It would be rounded to eight bits and multiplied by a scale that was never loaded."""
    model = nn.Module()
    model.register_parameter("lm_head", nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False))
    monkeypatch.setattr("kimi_vllm.weights._target", lambda *_: ("lm_head", {}))
    with pytest.raises(WeightsError, match=r"lm_head.weight \(bfloat16\) is not quantised, and .*lm_head is.*`ignore`"):
        load_weights(model, replace(released, moe=None), [("lm_head.weight", torch.zeros(4, 4, dtype=torch.bfloat16))])


def test_a_kernel_that_fails_while_a_tensor_is_loaded_is_not_called_a_wrong_shape(monkeypatch, released):
    """A layer is quantised when its last tensor has come, so the error is raised where tensors are loaded."""

    def loader(parameter, tensor):
        raise RuntimeError("no such operator")

    model = nn.Module()
    model.register_parameter("lm_head", nn.Parameter(torch.zeros(4, 4)))
    model.lm_head.weight_loader = loader
    monkeypatch.setattr("kimi_vllm.weights._target", lambda *_: ("lm_head", {}))
    with pytest.raises(WeightsError) as raised:
        load_weights(model, replace(released, moe=None), [("lm_head.weight", torch.zeros(4, 4))])
    assert str(raised.value).endswith("was not loaded into parameter lm_head (4, 4): RuntimeError('no such operator')")
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("groups", [[0, 0, 1, 1], [1, 0, 1, 0]], ids=["in-order", "reordered"])
def test_gptq_groups_that_follow_one_another_are_not_needed(groups, released):
    named = [("model.layers.0.self_attn.o_proj.g_idx", torch.tensor(groups, dtype=torch.int32))]
    arguments = nn.Module(), replace(released, moe=None), named
    if groups == sorted(groups):
        assert load_weights(*arguments, check_missing=False) == set()
    else:
        with pytest.raises(WeightsError, match=r"belong nowhere: .*o_proj.g_idx"):
            load_weights(*arguments, check_missing=False)
