"""config.json in both forms, and errors that name the key."""

import json
from pathlib import Path

import pytest

from kimi_vllm.geometry import GeometryError, KimiGeometry

MODELS = Path(__file__).parents[1] / "configs" / "models"
HUB = json.loads((MODELS / "48b-a3b" / "config.json").read_text())


def changed(**changes):
    config = json.loads(json.dumps(HUB))
    for dotted, value in changes.items():
        *path, key = dotted.split("__")
        target = config
        for part in path:
            target = target[part]
        if value is ...:
            target.pop(key)
        else:
            target[key] = value
    return config


def test_the_48b_geometry():
    geometry = KimiGeometry.from_config(HUB)
    assert geometry.num_layers == 27
    assert [index for index, kda in enumerate(geometry.kda) if not kda] == [3, 7, 11, 15, 19, 23, 26]
    assert geometry.sparse == (False,) + (True,) * 26
    assert (geometry.qk_head_dim, geometry.latent_dim) == (192, 576)
    assert geometry.moe.routed_scaling_factor == 2.446


def test_both_forms_give_the_same_geometry():
    from transformers import KimiLinearConfig

    written = KimiLinearConfig(**HUB).to_dict()
    assert "linear_attn_config" not in written or written["linear_attn_config"]
    written.pop("linear_attn_config", None)
    assert KimiGeometry.from_config(written) == KimiGeometry.from_config(HUB)


def test_it_survives_the_trip_to_a_worker():
    geometry = KimiGeometry.from_config(HUB)
    assert KimiGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_a_model_without_experts():
    geometry = KimiGeometry.from_config(changed(num_experts=None, first_k_dense_replace=...))
    assert geometry.moe is None
    assert not any(geometry.sparse)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_shipped_configs_parse(path):
    KimiGeometry.from_config(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_attention_heads",
        "rms_norm_eps",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_experts_per_token",
        "moe_intermediate_size",
        "routed_scaling_factor",
        "num_shared_experts",
        "first_k_dense_replace",
        "linear_attn_config__kda_layers",
        "linear_attn_config__full_attn_layers",
        "linear_attn_config__num_heads",
        "linear_attn_config__head_dim",
        "linear_attn_config__short_conv_kernel_size",
    ],
)
def test_a_missing_key_is_named(key):
    with pytest.raises(GeometryError, match=rf"^{key.replace('__', '.')}: missing"):
        KimiGeometry.from_config(changed(**{key: ...}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act='gelu': Kimi Linear is served with hidden_act='silu'"),
        ("moe_router_activation_func", "softmax", "moe_router_activation_func='softmax'"),
        ("mla_use_nope", False, "mla_use_nope=False"),
        ("num_expert_group", 8, "num_expert_group=8"),
        ("hidden_size", "2304", "hidden_size='2304': expected an integer"),
        ("hidden_size", 0, "hidden_size=0: expected an integer of at least 1"),
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0: expected a positive number"),
        ("num_experts_per_token", 300, "num_experts_per_token=300: more than num_experts=256"),
        ("linear_attn_config__head_dim", 96, r"linear_attn_config.head_dim=96: KDA heads of size 64 and 128"),
        ("linear_attn_config__short_conv_kernel_size", 1, r"linear_attn_config.short_conv_kernel_size=1"),
        ("linear_attn_config__kda_layers", [1, 2], r"linear_attn_config: layer 3 is neither"),
        (
            "linear_attn_config__kda_layers",
            [0, 1],
            r"linear_attn_config.kda_layers: layer 0 is not in 1..num_hidden",
        ),
        (
            "linear_attn_config__full_attn_layers",
            [1, 4],
            r"linear_attn_config.full_attn_layers: layer 1 is listed twice",
        ),
        # Kimi-K3 shares the model type.
        ("attn_res_block_size", 4, "attn_res_block_size=4: this field belongs to another model"),
        ("mla_use_output_gate", True, "mla_use_output_gate=True"),
        ("routed_expert_hidden_size", 512, "routed_expert_hidden_size=512"),
        ("linear_attn_config__use_full_rank_gate", True, r"linear_attn_config.use_full_rank_gate=True"),
        ("linear_attn_config__gate_lower_bound", -5.0, r"linear_attn_config.gate_lower_bound=-5.0"),
    ],
)
def test_a_wrong_value_is_named(key, value, message):
    with pytest.raises(GeometryError, match=message):
        KimiGeometry.from_config(changed(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "layer_types: expected a list of num_hidden_layers=27"),
        ({"layer_types": ["linear_attention"] * 26 + ["sliding"]}, r"layer_types\[26\]='sliding'"),
        ({"mlp_layer_types": ["dense"] * 26 + ["moe"]}, r"mlp_layer_types\[26\]='moe'"),
        ({"layer_types": None}, "layer_types: missing"),
        ({"linear_num_heads": None}, "linear_num_heads: missing"),
    ],
)
def test_transformers_form_errors(changes, message):
    config = changed(linear_attn_config=...) | {
        "layer_types": ["linear_attention"] * 27, "mlp_layer_types": ["dense"] * 27,
        "linear_num_heads": 4, "linear_head_dim": 64, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    with pytest.raises(GeometryError, match=message):
        KimiGeometry.from_config(config | changes)
