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


class Recorder(dict):
    """A mapping that notes which of its keys somebody asks for."""

    def __init__(self, values, asked, prefix=""):
        super().__init__(values)
        self.asked, self.prefix = asked, prefix

    def get(self, key, default=None):
        self.asked.add(self.prefix + key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(self.prefix + key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(self.prefix + key)
        return super().__getitem__(key)


TRANSFORMERS = {key: value for key, value in HUB.items() if key != "linear_attn_config"} | {
    "layer_types": [
        "linear_attention" if number in HUB["linear_attn_config"]["kda_layers"] else "full_attention"
        for number in range(1, HUB["num_hidden_layers"] + 1)
    ],
    "mlp_layer_types": ["dense"] + ["sparse"] * (HUB["num_hidden_layers"] - 1),
    "linear_num_heads": 32, "linear_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
ODD = [
    *("", "x", "8", [], [1], [[1]], [None], ["sparse"], {}, {"a": 1}, None, True, False, 0, 0.0, -1, 1.0, 1.5),
    *(2**21, 2**70, 2**1100, float("inf"), float("-inf"), float("nan")),
]
OFF_IF_NULL = (
    "attn_res_block_size routed_expert_hidden_size activation_situ_beta activation_situ_linear_beta rope_scaling "
    "linear_attn_config.gate_lower_bound num_expert_group topk_group topk_method q_lora_rank mlp_layer_types"
)
OFF_IF_FALSE = (
    "mla_use_output_gate latent_moe_use_norm attention_bias tie_word_embeddings linear_attn_config.use_full_rank_gate"
)
MEANT = {
    **dict.fromkeys(OFF_IF_NULL.split(), (None,)),
    **dict.fromkeys(OFF_IF_FALSE.split(), (None, False)),
    **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor"), (1.0, 1.5)),
    **dict.fromkeys(("num_shared_experts", "first_k_dense_replace"), (0,)),
    "mla_use_nope": (True,),
    "num_nextn_predict_layers": (None, 0),
    "moe_renormalize": (True, False),
}
"""Values of `ODD` that a key may have. All others must be refused, by the key's name."""


@pytest.mark.parametrize(
    ("written", "also_meant"),
    [(HUB, {"num_experts": [None, 0]}), (TRANSFORMERS, {"linear_attn_config": [None]})],
    ids=["hub", "transformers"],
)
def test_every_key_with_a_value_of_every_wrong_kind(written, also_meant):
    asked = set()
    nested = {
        key: Recorder(value, asked, f"{key}.") if isinstance(value, dict) else value for key, value in written.items()
    }
    KimiGeometry.from_config(Recorder(nested, asked))
    assert len(asked) > 35
    wrong = []
    for key in sorted(asked):
        for value in ODD:
            config = json.loads(json.dumps(written))
            *path, last = key.split(".")
            target = config
            for part in path:
                target = target.setdefault(part, {})
            target[last] = value
            known = (MEANT | also_meant).get(key, [])
            meant = any(type(value) is type(one) and value == one for one in known)
            try:
                KimiGeometry.from_config(config)
                outcome = "accepted"
            except GeometryError as error:
                outcome = "refused" if last in str(error) else str(error)
            except Exception as error:
                outcome = repr(error)
            if outcome != ("accepted" if meant else "refused"):
                wrong.append(f"{key}={value!r}: {outcome}"[:150])
    assert wrong == []


def test_a_config_that_is_no_object():
    with pytest.raises(GeometryError, match=r"config\.json: expected an object, not list"):
        KimiGeometry.from_config([])


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
        ("hidden_size", 0, "hidden_size=0: expected an integer from 1 to 1048576"),
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
