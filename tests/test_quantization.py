"""Bytes of quantised weights, against tensors that quantisers write; and which layers a config's lists leave alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantised import SCHEMES

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.quantization import FP8_PER_CHANNEL, ONLINE, QuantizationError, Stored, WeightFormat
from kimi_vllm.weight_bytes import num_parameters, weight_bytes, weights

GEOMETRY = KimiGeometry.from_config(
    json.loads((Path(__file__).parents[1] / "configs" / "models" / "48b-a3b" / "config.json").read_text())
)
KDA, EXPERT = "model.layers.5.self_attn.q_proj", "model.layers.5.block_sparse_moe.experts.0.w1"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(256, 512), (32, 256)])
def test_bytes_are_those_of_the_tensors_in_a_checkpoint(scheme: str, outputs: int, inputs: int) -> None:
    quantiser, config = SCHEMES[scheme]
    tensors, dequantised = quantiser(torch.randn(outputs, inputs))
    assert dequantised.shape == (outputs, inputs)
    stored = WeightFormat.of_checkpoint(config).stored(KDA, "linear")
    assert stored is not None
    written = sum(tensor.nbytes for name, tensor in tensors.items() if name not in ("weight_shape", "g_idx"))
    # A symmetric format may come with zero points that nobody keeps.
    assert stored.nbytes(outputs, inputs) == pytest.approx(written, rel=0.01)


def test_fp8_of_the_48b_model() -> None:
    """All but embeddings, head, router, low-rank second factors and norms is one byte; a scale a matrix is nothing."""
    kept = sum(w.count * w.outputs * w.inputs for w in weights(GEOMETRY, 1, 1) if w.kind not in ("linear", "experts"))
    full = weight_bytes(GEOMETRY, 2, 2, 1, 1)
    for method in ("fp8", "fp8_per_tensor"):
        assert full - weight_bytes(GEOMETRY, 2, 2, 1, 1, WeightFormat.online(method)) == pytest.approx(
            num_parameters(GEOMETRY) - kept, rel=0.001
        )
    by_channel, by_block = (
        weight_bytes(GEOMETRY, 2, 2, 1, 1, WeightFormat.online(f"fp8_per_{kind}")) for kind in ("channel", "block")
    )
    assert by_block < by_channel
    only_experts = weight_bytes(GEOMETRY, 2, 2, 1, 1, WeightFormat.online("int8_per_channel_weight_only"))
    assert full - only_experts == pytest.approx(26 * 256 * 3 * 1024 * 2304, rel=0.01)


def test_two_ranks_split_quantised_weights_too() -> None:
    one, two = (weight_bytes(GEOMETRY, 2, 2, ranks, ranks, WeightFormat.online("fp8")) for ranks in (1, 2))
    assert one / 2 < two < 0.51 * one


EXACT = [(["model.layers.5.self_attn.q_proj"], KDA, True), (["model.layers.5"], KDA, False), (["q_proj"], KDA, False)]
EXPERTS = "model.layers.5.block_sparse_moe.experts"
LISTS: dict[str, list[tuple[list[str], str, bool]]] = {
    "fp8": [*EXACT, ([EXPERT], EXPERT, True), ([f"{EXPERTS}.3.w2"], EXPERT, True), (["re:.*q_proj"], KDA, False)],
    "compressed-tensors": [
        *EXACT,
        (["re:.*self_attn.*"], KDA, True),
        (["re:self_attn"], KDA, False),
        (["re:.*experts.*"], EXPERT, True),
        (["lm_head", "re:.*gate$"], EXPERT, False),
        (["*q_proj"], KDA, False),
    ],
    "awq": [
        (["self_attn"], KDA, True),
        (["attn"], KDA, True),
        (["experts"], EXPERT, True),
        (["shared"], EXPERT, False),
    ],
    "online": [*EXACT, (["*.experts*"], EXPERT, True), (["re:.*q_proj"], KDA, True), (["*q_proj"], KDA, True)],
}


@pytest.mark.parametrize(("method", "ignored", "name", "kept"), [(m, *case) for m in LISTS for case in LISTS[m]])
def test_lists_of_layers_are_read_as_vllm_reads_them(method: str, ignored: list[str], name: str, kept: bool) -> None:
    group = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}
    configs: dict[str, dict[str, Any]] = {
        "fp8": {"activation_scheme": "dynamic", "modules_to_not_convert": ignored},
        "compressed-tensors": {"config_groups": group, "ignore": ignored},
        "awq": {"bits": 4, "group_size": 128, "modules_to_not_convert": ignored},
    }
    made = (
        WeightFormat.online("fp8", ignored)
        if method == "online"
        else WeightFormat.of_checkpoint({"quant_method": method} | configs[method])
    )
    assert (made.stored(name, "experts" if "experts" in name else "linear") is None) == kept


@pytest.mark.parametrize("first", ["attention", "rest"])
def test_groups_of_compressed_tensors_have_formats_of_their_own(first: str) -> None:
    """A layer's name decides before its class, whatever the order."""
    channel = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    group = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    groups = {
        "attention": {"targets": ["re:.*self_attn.*"], "weights": channel},
        "rest": {"targets": ["Linear"], "weights": group},
    }
    groups = {first: groups[first]} | groups
    config = {"quant_method": "compressed_tensors", "config_groups": groups, "ignore": ["lm_head"]}
    made = WeightFormat.of_checkpoint(config)
    assert made.stored(KDA, "linear") == FP8_PER_CHANNEL
    assert made.stored(EXPERT, "experts") == Stored(4, "group", (1, 32), scale_bytes=2, zero_bits=4)


def test_gptq_has_other_bits_for_some_layers_and_none_for_others() -> None:
    dynamic = {r"+:.*experts.*": {"bits": 8}, r"-:.*kv_b_proj": {}}
    config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": dynamic}
    made = WeightFormat.of_checkpoint(config)
    expert, linear = made.stored(EXPERT, "experts"), made.stored(KDA, "linear")
    assert (expert and expert.bits, linear and linear.bits) == (8, 4)
    assert made.stored("model.layers.3.self_attn.kv_b_proj", "linear") is None
    some = WeightFormat.of_checkpoint(config | {"modules_in_block_to_quantize": [["self_attn.o_proj"]]})
    assert some.stored(KDA, "linear") is None
    assert some.stored("model.layers.5.self_attn.o_proj", "linear") == linear


def test_blocks_and_floats_of_four_bits_as_llm_compressor_writes_them() -> None:
    def stored(weights: dict[str, Any]) -> Stored | None:
        groups = {"g": {"targets": ["Linear"], "weights": weights}}
        return WeightFormat.of_checkpoint({"quant_method": "compressed-tensors", "config_groups": groups}).stored(
            KDA, "linear"
        )

    block = {"num_bits": 8, "type": "float", "strategy": "block"}
    for structure in ([128, 128], "128x128"):
        assert stored(block | {"block_structure": structure}) == Stored(8, "block", (128, 128))
    nvfp4 = stored({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16})
    assert nvfp4 is not None
    assert nvfp4.nbytes(64, 64) == 64 * 64 // 2 + 64 * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "modelopt"}, r"quantisation modelopt: the size .* is unknown.*checkpoints of fp8, compr"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": [], "weights": None}}},
            r"method compressed-tensors: TypeError",
        ),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["re:("]},
            r"method fp8: .*missing \), unterminated",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"quantization_config of method gptq: KeyError\('group_size'\)"),
        ({"quant_method": "compressed-tensors"}, r"method compressed-tensors: KeyError\('config_groups'\)"),
    ],
)
def test_what_cannot_be_sized_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        WeightFormat.of_checkpoint(config)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(QuantizationError, match=r"quantisation mxfp4: .*" + ONLINE[0]):
        WeightFormat.online("mxfp4")
