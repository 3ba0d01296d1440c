"""On a GPU: quantised weights say what transformers says with them dequantised, and weigh what was planned."""

import random
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_random, to_hub_layout
from support.cuda import SMOOTH, distributions, relative_error
from support.engine import RECALL, engine, random_prompts
from support.quantised import SCHEMES, quantise

from kimi_vllm.config_hook import planned_costs
from kimi_vllm.quantization import ONLINE

sys.path.insert(0, str(Path(__file__).parents[2] / "serve" / "demo"))
from recall_task import held_out_prompt

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

# Heads of the 48B model, and sizes that quantised kernels take: inputs in 128s, outputs in 64s.
GEOMETRY = SMOOTH | {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "linear_num_heads": 32,
    "linear_head_dim": 128,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "layer_types": "KKMK",
    "mlp_layer_types": "dsss",
}
LENGTHS = [1, 4, 65, 321]
# Activations are rounded to FP8 too where weights are; a latent of FP8 is rounded once more.
TOLERANCE = {"fp8": 0.08, "four bits": 0.03, "latents": 0.08}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random checkpoint of bfloat16 numbers, in the hub's layout."""
    folder = tmp_path_factory.mktemp("quantised")
    return to_hub_layout(make_random(folder / "random", GEOMETRY, dtype=torch.bfloat16), folder / "hub")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """By scheme: the checkpoint to serve, and transformers' model of the same weights; made once."""
    from support.oracle import Oracle

    folder, known = tmp_path_factory.mktemp("schemes"), {}

    def make(scheme):
        if scheme not in known:
            checkpoint, plain = quantise(source, folder, scheme) if scheme in SCHEMES else (source, source)
            known[scheme] = checkpoint, Oracle(plain)
        return known[scheme]

    return make


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *ONLINE])
def test_logits_equal_transformers_with_dequantised_weights(scheme, cache_dtype, made):
    from vllm import SamplingParams, TokensPrompt

    checkpoint, oracle = made(scheme)
    vocab_size = oracle.model.config.vocab_size
    prompts = random_prompts(LENGTHS, vocab_size)
    half = "float16" if scheme in ("gptq", "awq") else "bfloat16"
    options = {"dtype": half, "enforce_eager": False, "max_logprobs": vocab_size, "max_num_batched_tokens": 128}
    if scheme in ONLINE:
        options["quantization"] = scheme
    parameters = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, logprobs=vocab_size, prompt_logprobs=vocab_size, detokenize=False
    )
    with engine(checkpoint, kv_cache_dtype=cache_dtype, **options) as running:
        assert running.llm.llm_engine.vllm_config.model_config.quantization is not None
        outputs = running.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], parameters, use_tqdm=False
        )
        running.check_idle()
        loaded = sum(parameter.nbytes for parameter in running.model.parameters())
        planned = planned_costs(running.llm.llm_engine.vllm_config).weights
    bound = TOLERANCE["fp8" if "fp8" in scheme else "four bits"] + TOLERANCE["latents"] * (cache_dtype == "fp8")
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        error = relative_error(distributions(output, vocab_size), oracle.logprobs(tokens)[:-1])
        assert error <= bound, f"{len(prompt)} tokens: {error:.1e}"
    assert planned == pytest.approx(loaded, rel=0.02)


@pytest.mark.parametrize("scheme", [name for name in ONLINE if name.startswith("fp8")])
def test_recall_in_fp8(scheme):
    from vllm import SamplingParams

    rng = random.Random(8)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(200)]
    options = {"dtype": "bfloat16", "quantization": scheme, "enforce_eager": False, "max_num_seqs": 32}
    with engine(RECALL, skip_tokenizer_init=False, **options) as running:
        parameters = SamplingParams(temperature=0, max_tokens=8)
        outputs = running.llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
    right = [output.outputs[0].text.strip() == answer for output, (_, answer) in zip(outputs, asked, strict=True)]
    assert sum(right) >= 0.99 * len(right)
