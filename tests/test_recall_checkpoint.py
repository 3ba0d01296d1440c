"""The shipped checkpoint: the hub's layout, and answers that are right."""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, KimiLinearForCausalLM, PreTrainedTokenizerBase

from serve.demo import recall_task

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "models" / "recall"
PROMPT, ANSWER = "a=7 k=2 m=5 ? k →", "2"


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return KimiLinearForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def weight_names() -> set[str]:
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_weights_are_small() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000


def test_config_has_the_layout_of_the_hub(config: dict) -> None:
    linear = config["linear_attn_config"]
    assert linear["kda_layers"] == [1, 2, 3, 5, 6, 7]
    assert linear["full_attn_layers"] == [4, 8]
    assert {"num_heads", "head_dim", "short_conv_kernel_size"} <= linear.keys()
    assert config["architectures"] == ["KimiLinearForCausalLM"]
    assert config["model_type"] == "kimi_linear"
    assert config["mla_use_nope"] is True
    assert config["q_lora_rank"] is None
    assert config["moe_router_activation_func"] == "sigmoid"
    assert config["num_nextn_predict_layers"] == 0
    assert config["dtype"] == "float32"
    # What only transformers writes; a reader of the hub's layout must do without.
    assert not {"layer_types", "mlp_layer_types", "linear_num_heads", "num_local_experts"} & config.keys()


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.self_attn.A_log",
        "model.layers.0.self_attn.q_conv1d.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
        "model.layers.1.block_sparse_moe.experts.7.w2.weight",
        "model.layers.1.block_sparse_moe.shared_experts.up_proj.weight",
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
    ],
)
def test_weights_have_the_names_of_the_hub(weight_names: set[str], name: str) -> None:
    assert name in weight_names


def test_transformers_finds_every_weight() -> None:
    _, report = KimiLinearForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


@pytest.mark.parametrize("text", [PROMPT, "any ASCII text: {x} [y] <z>\n\tnext line", "a…b·c"])
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_strange_character_is_unknown(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("é").input_ids == [tokenizer.bos_token_id, tokenizer.unk_token_id]


def test_ids_agree_with_the_config(tokenizer: PreTrainedTokenizerBase, config: dict) -> None:
    assert len(tokenizer) == config["vocab_size"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == config[name]


def test_a_chat_is_the_completion_with_a_space(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == f"<bos>{PROMPT} "
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(f"{PROMPT} ").input_ids


def test_a_long_chat_renders_as_it_was_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "system", "content": "a=7 k=2"},
        {"role": "user", "content": "? k →"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "m=a ? m →"},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos>a=7 k=2 ? k → 2<eos> m=a ? m → "


@pytest.mark.parametrize(
    ("text", "completion"),
    [
        (PROMPT, f" {ANSWER}<eos>"),
        (f"{PROMPT} ", f"{ANSWER}<eos>"),
        ("a=7 k=2 a=4 ? a →", " 4<eos>"),
        ("a=7 k=2 m=a ? m →", " 7<eos>"),
        ("a=7 k=2 ? k → 2<eos> m=a ? m → ", "7<eos>"),
    ],
)
def test_generation_answers_and_stops(
    model: KimiLinearForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, completion: str
) -> None:
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8)
    assert tokenizer.decode(out[0, ids.input_ids.shape[1] :]) == completion


@torch.no_grad()
def test_recall_of_unseen_prompts(model: KimiLinearForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each token of the answer is the likeliest after those before it: so greedy decoding writes it."""
    rng = random.Random("unseen")
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for i in range(200):
        prompt, answer = recall_task.held_out_prompt(rng, num_pairs=2 + i % 15)
        assert recall_task.is_held_out(prompt)
        ids = tokenizer(f"{prompt} {answer}<eos>").input_ids
        by_length[len(ids)].append(ids)
    right = 0
    for rows in map(torch.tensor, by_length.values()):
        # Shorter chunks than the default give the same logits, and the CPU path sooner.
        best = model(rows, chunk_size=16, use_cache=False).logits[:, -4:-1].argmax(-1)
        right += int((best == rows[:, -3:]).all(-1).sum())
    assert right >= 198
