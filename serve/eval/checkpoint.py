"""The models of the synthetic tasks: configuration, untrained weights, tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import KimiLinearConfig, KimiLinearForCausalLM, PreTrainedTokenizerFast

from serve.demo import recall_checkpoint
from serve.eval.tasks import BOS, PAD, Task

# The report's size: two KDA layers of two heads of 128. The plugin serves models with at least one MLA layer, and
# this one comes first, where it cannot solve a task: it sees tokens without their neighbours or positions (NoPE,
# no convolution before it), so it can count tokens but not link a key to the value beside it.
HUB_CONFIG: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "bos_token_id": BOS,
    "dtype": "float32",
    "eos_token_id": None,
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.04,
    "intermediate_size": 256,
    "kv_lora_rank": 48,
    "linear_attn_config": {
        "full_attn_layers": [1],
        "head_dim": 128,
        "kda_layers": [2, 3],
        "num_heads": 2,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "pad_token_id": PAD,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "v_head_dim": 32,
}

# The needle's model reads a million tokens on a CPU. Only MLA takes time that grows with the square of the context, so
# its MLA layer is as small as one can be: one head of 16.
OF_TASK: dict[str, dict[str, Any]] = {
    "needle": {
        "kv_lora_rank": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
}

HEADS_OF_48B: dict[str, Any] = {
    "kv_lora_rank": 512,
    "linear_attn_config": HUB_CONFIG["linear_attn_config"] | {"num_heads": 32},
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""The attention of the 48B model, for GPUs: the kernels that serve it serve this."""


def hub_config(task: Task, heads_of_48b: bool = False) -> dict[str, Any]:
    """config.json of a task's model."""
    heads = HEADS_OF_48B if heads_of_48b else OF_TASK.get(task.name, {})
    return dict(sorted((HUB_CONFIG | heads | {"vocab_size": len(task.vocabulary)}).items()))


def build_model(task: Task, start_from: Path | None = None, heads_of_48b: bool = False) -> KimiLinearForCausalLM:
    """An untrained model, initialised by transformers (its `dt_bias` included) from torch's seed.

    Args:
        task: whose vocabulary it speaks.
        start_from: a checkpoint; parameters of the same name and shape are taken from it.
        heads_of_48b: see `HEADS_OF_48B`.
    """
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(hub_config(task, heads_of_48b)))
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "conv1d"):
            layer.self_attn.conv1d.reset_parameters()  # see recall_checkpoint.build_model
    if start_from is not None:
        own = model.state_dict()
        trained = KimiLinearForCausalLM.from_pretrained(start_from, dtype=torch.float32).state_dict()
        model.load_state_dict(
            {name: trained[name] if trained[name].shape == tensor.shape else tensor for name, tensor in own.items()}
        )
    return model


def build_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One token per word; a text is a sequence's words, `<bos>` included, with spaces between them."""
    ids = {word: i for i, word in enumerate(task.vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=task.vocabulary[PAD]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=task.vocabulary[BOS],
        pad_token=task.vocabulary[PAD],
        clean_up_tokenization_spaces=False,
        model_max_length=HUB_CONFIG["model_max_length"],
        padding_side="left",
    )


def save(model: KimiLinearForCausalLM, task: Task, out: Path, heads_of_48b: bool = False) -> None:
    """Write weights, configuration and tokenizer in the hub's layout.

    Args:
        model: on any device.
        task: whose vocabulary it speaks.
        out: folder, made if it is missing.
        heads_of_48b: as it was built.
    """
    recall_checkpoint.save_as_hub(model, out, hub_config(task, heads_of_48b), build_tokenizer(task))
