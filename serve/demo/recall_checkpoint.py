"""The folder of the recall model: configuration and weights in the hub's layout, tokenizer, model card."""

import json
import re
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import KimiLinearConfig, KimiLinearForCausalLM, PreTrainedTokenizerFast

from serve.common.paths import RECALL
from serve.demo.recall_task import ARROW

CARD = Path(__file__).with_name("recall_card.md")
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " "
VOCABULARY = [PAD, BOS, EOS, UNK, *_PRINTABLE, "\n", "\t", ARROW, "…", "·"]

# A conversation is the completion format itself: turns joined by a space, answers closed by the end token.
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- message['content'] | trim -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}{{- ' ' -}}{%- endif -%}
{%- endfor -%}
"""

HUB_CONFIG: dict[str, Any] = json.loads((RECALL / "config.json").read_text())
"""The shipped model's: what is trained anew has the same shape."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `<bos>` in front, `<unk>` for what the vocabulary lacks."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, VOCABULARY.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=HUB_CONFIG["model_max_length"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(config: dict[str, Any] = HUB_CONFIG) -> KimiLinearForCausalLM:
    """An untrained model, initialised by transformers (its `dt_bias` included) from torch's seed."""
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(config))
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "conv1d"):
            # transformers draws the short convolutions like any linear layer. Four taps of that size leave
            # values far below the epsilon of the output norm, and learning starts slowly.
            layer.self_attn.conv1d.reset_parameters()
    return model


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_as_hub(
    model: KimiLinearForCausalLM, out: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write weights, the hub's configuration and the tokenizer into a folder, in the hub's layout."""
    model.save_pretrained(out)
    weights = out / "model.safetensors"
    # transformers writes the dense layer's MLP as `block_sparse_moe.gate_proj`; the hub has `mlp.gate_proj`.
    dense = re.compile(r"(layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj)\.")
    tensors = {dense.sub(r"\1.mlp.\2.", name): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)

    tokenizer.save_pretrained(out)
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    # The name transformers 5 writes is unknown to transformers 4; both know this one.
    _write_json(out / "tokenizer_config.json", tokenizer_config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(out / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(out / "generation_config.json", {"do_sample": False, **ids})


def save(model: KimiLinearForCausalLM, out: Path) -> None:
    """Write the recall model's weights, configuration and tokenizer into a folder."""
    save_as_hub(model, out, HUB_CONFIG, build_tokenizer())


@torch.no_grad()
def reload_difference(model: KimiLinearForCausalLM, folder: Path) -> float:
    """Largest difference of logits between a model and its saved copy, over random tokens."""
    copy = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, len(VOCABULARY), (2, 96), generator=torch.Generator().manual_seed(0))
    return (model(tokens).logits - copy(tokens).logits).abs().max().item()


def write_card(training: dict[str, Any], out: Path) -> None:
    """Write what was measured, training.json, and the model card, whose numbers come from it."""
    _write_json(out / "training.json", training)
    rows = "\n".join(f"| {name} | {100 * share:.1f} % |" for name, share in training["accuracy"].items())
    values = training | training["recipe"] | {"rows": rows}
    (out / "README.md").write_text(CARD.read_text().format_map(values))
