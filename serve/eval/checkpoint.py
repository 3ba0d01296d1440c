"""The models of the synthetic tasks: configuration, untrained weights, tokenizer.

What is trained anew has the shape of the model that is shipped for its task.

The report's size: two KDA layers of two heads of 128. The plugin serves models with at least one MLA layer, and this
one comes first, where it cannot solve a task: it sees tokens without their neighbours or positions (NoPE, no
convolution before it), so it can count tokens but not link a key to the value beside it. The needle's model reads a
million tokens on a CPU. Only MLA takes time that grows with the square of the context, so its MLA layer is as small as
one can be: one head of 16.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import KimiLinearForCausalLM, PreTrainedTokenizerFast

from serve.common.paths import SYNTHETIC
from serve.demo import recall_checkpoint
from serve.eval.tasks import BOS, PAD, Task

HEADS_OF_48B: dict[str, Any] = {
    "kv_lora_rank": 512,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""The attention of the 48B model, for GPUs: the kernels that serve it serve this."""


def hub_config(task: Task, heads_of_48b: bool = False) -> dict[str, Any]:
    """config.json of a task's model."""
    config: dict[str, Any] = json.loads((SYNTHETIC / task.name / "config.json").read_text())
    if heads_of_48b:
        config |= HEADS_OF_48B | {"linear_attn_config": config["linear_attn_config"] | {"num_heads": 32}}
    return config


def build_model(task: Task, start_from: Path | None = None, heads_of_48b: bool = False) -> KimiLinearForCausalLM:
    """An untrained model, or one with the parameters of `start_from` that have the same name and shape."""
    model = recall_checkpoint.build_model(hub_config(task, heads_of_48b))
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
        model_max_length=hub_config(task)["model_max_length"],
        padding_side="left",
    )


def save(model: KimiLinearForCausalLM, task: Task, out: Path, heads_of_48b: bool = False) -> None:
    """Write weights, configuration and tokenizer in the hub's layout."""
    recall_checkpoint.save_as_hub(model, out, hub_config(task, heads_of_48b), build_tokenizer(task))
