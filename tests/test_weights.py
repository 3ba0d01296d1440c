"""Checkpoint names: the released model's count, and every rename."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.quantised import SCHEMES
from torch import nn

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import checkpoint_shapes
from kimi_vllm.weights import WeightsError, _canonical, _check_shape, _target, load_weights

MODELS = Path(__file__).parents[1] / "configs" / "models"


@pytest.fixture(scope="module")
def released():
    return KimiGeometry.from_config(json.loads((MODELS / "48b-a3b" / "config.json").read_text()))


def test_the_released_checkpoint_has_20493_tensors(released):
    assert len(checkpoint_shapes(released)) == 20_493


def test_the_shipped_checkpoint_has_exactly_these_names_and_shapes():
    from safetensors import safe_open

    geometry = KimiGeometry.from_config(json.loads((MODELS / "recall" / "config.json").read_text()))
    with safe_open(MODELS / "recall" / "model.safetensors", "pt") as file:
        shapes = {_canonical(name, geometry): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    expected = checkpoint_shapes(geometry)
    assert shapes.keys() == expected.keys()
    assert all(squeezed(shape) == squeezed(expected[name]) for name, shape in shapes.items())


def squeezed(shape):
    return [size for size in shape if size != 1]


SMALL = {"hidden_size": 256, "intermediate_size": 512, "linear_num_heads": 8, "linear_head_dim": 64, "q_lora_rank": 128}


def other_shapes(tensor):
    """The tensor with each dimension in turn half as long, twice as long and longer by one."""
    for dim in range(tensor.dim()):
        size = tensor.shape[dim]
        yield from (tensor.repeat_interleave(2, dim), torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim))
        if size > 1:
            yield tensor.narrow(dim, 0, size // 2)


def test_every_tensor_is_refused_in_any_other_shape(released):
    """Loaders cut out their rank's part, so a tensor that is too large would load without a word."""
    geometry = replace(released, moe=replace(released.moe, num_experts=2), **SMALL)
    for name, (outputs, inputs) in checkpoint_shapes(geometry).items():
        tensor = torch.empty((outputs,) if inputs == 1 else (outputs, inputs), device="meta")
        _check_shape(name, tensor, geometry, None)
        for other in other_shapes(tensor):
            with pytest.raises(WeightsError, match=rf"^{name} .* does not fit: by config.json it is"):
                _check_shape(name, other, geometry, None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_part_of_a_quantised_weight_is_refused_in_any_other_shape(scheme, released):
    geometry = replace(released, **SMALL)
    quantise, config = SCHEMES[scheme]
    for layer in ("self_attn.o_proj", "block_sparse_moe.experts.7.w2", "block_sparse_moe.shared_experts.up_proj"):
        name = f"model.layers.5.{layer}"
        parts, _ = quantise(torch.randn(checkpoint_shapes(geometry)[f"{name}.weight"]))
        for suffix, tensor in parts.items():
            _check_shape(f"{name}.{suffix}", tensor, geometry, WeightFormat.of_checkpoint(config))
            for other in other_shapes(tensor):
                with pytest.raises(WeightsError, match=rf"{suffix} .* does not fit"):
                    _check_shape(f"{name}.{suffix}", other, geometry, WeightFormat.of_checkpoint(config))


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
    with pytest.raises(WeightsError, match=r"lm_head.weight \(bfloat16\) is not quantised, but .*lm_head is.*`ignore`"):
        load_weights(model, replace(released, moe=None), [("lm_head.weight", torch.zeros(4, 4, dtype=torch.bfloat16))])


def test_a_kernel_that_fails_while_a_tensor_is_loaded_is_not_called_a_wrong_shape(monkeypatch, released):
    """A layer is quantised when its last tensor has come, so the error is raised where tensors are loaded."""

    def loader(parameter, tensor):
        raise RuntimeError("no such operator")

    model = nn.Module()
    model.register_parameter("lm_head", nn.Parameter(torch.zeros(4, 4)))
    model.lm_head.weight_loader = loader
    monkeypatch.setattr("kimi_vllm.weights._target", lambda *_: ("lm_head", {}))
    tiny = replace(released, moe=None, vocab_size=4, hidden_size=4)
    with pytest.raises(WeightsError) as raised:
        load_weights(model, tiny, [("lm_head.weight", torch.zeros(4, 4))])
    assert str(raised.value).endswith("was not loaded into parameter lm_head (4, 4): RuntimeError('no such operator')")
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("groups", [[0, 0, 1, 1], [1, 0, 1, 0]], ids=["in-order", "reordered"])
def test_gptq_groups_that_follow_one_another_are_not_needed(groups, released):
    named = [("model.layers.0.self_attn.o_proj.g_idx", torch.tensor(groups, dtype=torch.int32))]
    arguments = nn.Module(), replace(released, moe=None), named
    if groups == sorted(groups):
        assert load_weights(*arguments)[0] == set()
    else:
        with pytest.raises(WeightsError, match=r"belong nowhere: .*o_proj.g_idx"):
            load_weights(*arguments)
