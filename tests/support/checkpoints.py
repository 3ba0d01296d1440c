"""Small random checkpoints in both forms of config.json that exist."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from serve.common.paths import RECALL

GEOMETRIES: dict[str, dict[str, Any]] = {
    # Other head counts and sizes than the shipped checkpoint, and two shared experts.
    "wide-heads": {
        "linear_num_heads": 3,
        "linear_head_dim": 128,
        "num_attention_heads": 5,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_shared_experts": 2,
        "layer_types": "KKKMKKKM",
        "mlp_layer_types": "dsssssss",
    },
    # No expert anywhere, and a query projection of low rank.
    "dense": {
        "linear_num_heads": 4,
        "linear_head_dim": 64,
        "num_attention_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "q_lora_rank": 48,
        "layer_types": "KKMKKM",
        "mlp_layer_types": "dddddd",
    },
    # MLA first, KDA last, neighbours of the same kind; a conv of width 3.
    "odd-pattern": {
        "linear_num_heads": 1,
        "linear_head_dim": 64,
        "linear_conv_kernel_dim": 3,
        "num_attention_heads": 2,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "layer_types": "MMKMKKK",
        "mlp_layer_types": "dssssss",
    },
    # Dense layers between sparse ones, which only transformers' form can say.
    "mixed-mlp": {
        "linear_num_heads": 2,
        "linear_head_dim": 64,
        "num_attention_heads": 3,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "layer_types": "KKMK",
        "mlp_layer_types": "sdsd",
    },
}
"""Keyword arguments of transformers' `KimiLinearConfig`; layer kinds are spelled as one letter each."""

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
_LETTERS = {"K": "linear_attention", "M": "full_attention", "s": "sparse", "d": "dense"}


def make_transformers_layout(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a random checkpoint as transformers' `save_pretrained` does."""
    return make_random(folder, GEOMETRIES[name], seed)


def make_random(folder: Path, geometry: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """As `make_transformers_layout`, of any geometry, with parameters that are numbers of `dtype` kept in float32."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    values = _COMMON | geometry
    for key in ("layer_types", "mlp_layer_types"):
        values[key] = [_LETTERS[letter] for letter in values[key]]
    values["num_hidden_layers"] = len(values["layer_types"])
    values["num_key_value_heads"] = values["num_attention_heads"]
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(KimiLinearConfig(**values)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "e_score_correction_bias" in parameter_name:
                parameter.uniform_(-0.2, 0.2)
            elif "norm" in parameter_name:
                parameter.uniform_(0.6, 1.4)
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                buffer.uniform_(-0.2, 0.2)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.to(dtype))
    model.save_pretrained(folder)
    return folder


def to_hub_layout(source: Path, folder: Path) -> Path:
    """Rewrite a checkpoint the way moonshotai's are: names of the dense MLP, ``linear_attn_config``, 1-D ``A_log``."""
    config = json.loads((source / "config.json").read_text())
    kinds = config.pop("layer_types")
    dense = [kind == "dense" for kind in config.pop("mlp_layer_types")]
    first_sparse = dense.index(False) if False in dense else len(dense)
    if any(dense[first_sparse:]):
        raise ValueError("the hub's form cannot say that a dense layer follows a sparse one")
    config["first_k_dense_replace"] = first_sparse
    if first_sparse == len(dense):
        config["num_experts"] = None
    config["linear_attn_config"] = {
        "num_heads": config.pop("linear_num_heads"),
        "head_dim": config.pop("linear_head_dim"),
        "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
        "kda_layers": [number for number, kind in enumerate(kinds, 1) if kind == "linear_attention"],
        "full_attn_layers": [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"],
    }
    config |= {"mla_use_nope": True, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1}
    tensors = load_file(source / "model.safetensors")
    renamed = {hub_name(name): tensor for name, tensor in tensors.items()}
    renamed = {name: tensor.reshape(-1) if name.endswith("A_log") else tensor for name, tensor in renamed.items()}
    return write_checkpoint(folder, config, renamed, tokenizer_from=source)


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], tokenizer_from: Path | None = None
) -> Path:
    """Write config.json and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if tokenizer_from is not None:
        for file in tokenizer_from.glob("*token*"):
            shutil.copy(file, folder / file.name)
    return folder


def hub_name(name: str) -> str:
    """The hub's name of a tensor that transformers has written."""
    return re.sub(r"block_sparse_moe\.((?:gate|up|down)_proj\.)", r"mlp.\1", name)


SICK_TOKEN = 99
"""A token whose embedding is infinite in `make_sick_checkpoint`: what has read it has no finite state afterwards."""


def make_sick_checkpoint(folder: Path) -> Path:
    """Write the recall checkpoint with one infinite embedding."""
    shutil.copytree(RECALL, folder)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][SICK_TOKEN] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
