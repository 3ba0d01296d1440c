"""On a GPU: quantised weights say what transformers says with them dequantised, and weigh what was planned."""

import random

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import hub_name, make_random
from support.cuda import HEADS_OF_48B, distributions, relative_error
from support.engine import RECALL, engine, random_prompts
from support.quantised import SCHEMES, quantise
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import LinearBase

from kimi_vllm.options import KimiOptions
from kimi_vllm.quantization import ONLINE
from kimi_vllm.sizing import planned_costs
from kimi_vllm.weights import packed_modules_mapping
from serve.demo.recall_task import held_out_prompt

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

# Sizes that quantised kernels take: inputs in 128s, outputs in 64s.
GEOMETRY = HEADS_OF_48B | {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256}
LENGTHS = [1, 4, 65, 321]
# Of logits. Where weights are FP8 activations are rounded to it too, in every layer, and online the weights are not
# those of transformers. A wrong scale of one tensor may hide in that: `check_linear_layers` is for those.
TOLERANCE = {"fp8": 0.2, "others": 0.03, "latents": 0.05}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random checkpoint of bfloat16 numbers, in transformers' layout."""
    return make_random(tmp_path_factory.mktemp("quantised") / "random", GEOMETRY, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """By scheme: the checkpoint to serve, transformers' model of it, and its weights dequantised; made once."""
    from support.oracle import Oracle

    folder, known = tmp_path_factory.mktemp("schemes"), {}

    def make(scheme):
        if scheme not in known:
            checkpoint, plain = quantise(source, folder, scheme) if scheme in SCHEMES else (source, source)
            weights = {hub_name(name): weight for name, weight in load_file(plain / "model.safetensors").items()}
            known[scheme] = checkpoint, Oracle(plain), weights
        return known[scheme]

    return make


# Of single weights, relative to the largest of their matrix: bfloat16's own, and online FP8's.
ROUNDING = {False: 2**-8, True: 2**-4}


def check_linear_layers(model, weights, rounding):
    """Every linear layer, given one input at a time, answers with its row of the dequantised weights."""
    seen = 0
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase) or isinstance(module, GateLinear):
            continue
        owner, _, leaf = name.rpartition(".")
        parts = packed_modules_mapping.get(leaf, [leaf])
        expected = torch.cat([weights[f"{owner}.{part}.weight"] for part in parts]).float()
        inputs = torch.eye(expected.shape[1], dtype=model.lm_head.weight.dtype, device="cuda")
        found = module(inputs)[0].T.float().cpu()
        assert not found[len(expected) :].any(), name
        assert (found[: len(expected)] - expected).abs().max() <= rounding * expected.abs().max(), name
        seen += 1
    assert seen == 18


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *ONLINE])
def test_logits_equal_transformers_with_dequantised_weights(scheme, cache_dtype, made, record_property):
    from vllm import SamplingParams, TokensPrompt

    if "int8" not in scheme:
        record_property("covers", "FP8" if "fp8" in scheme else "4 bits")
    if cache_dtype == "fp8":
        record_property("covers", "FP8 latents")
    checkpoint, oracle, weights = made(scheme)
    vocab_size = oracle.model.config.vocab_size
    prompts = random_prompts(LENGTHS, vocab_size)
    # FP8 latents are for bfloat16, and the kernels for GPTQ and AWQ take both.
    half = "float16" if scheme in ("gptq", "awq") and cache_dtype == "auto" else "bfloat16"
    options = {"dtype": half, "enforce_eager": False, "max_logprobs": vocab_size, "max_num_batched_tokens": 128}
    if scheme in ONLINE:
        options["quantization"] = scheme
    parameters = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, logprobs=vocab_size, prompt_logprobs=vocab_size, detokenize=False
    )
    with engine(checkpoint, kv_cache_dtype=cache_dtype, **options) as running:
        if cache_dtype == "auto":
            check_linear_layers(running.model, weights, rounding=ROUNDING[scheme in ONLINE])
        assert running.llm.llm_engine.vllm_config.model_config.quantization is not None
        outputs = running.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], parameters, use_tqdm=False
        )
        running.check_idle()
        loaded = sum(parameter.nbytes for parameter in running.model.parameters())
        [planned] = planned_costs(config := running.llm.llm_engine.vllm_config, KimiOptions.of(config))
    bound = TOLERANCE["fp8" if "fp8" in scheme else "others"] + TOLERANCE["latents"] * (cache_dtype == "fp8")
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        error = relative_error(distributions(output, vocab_size), oracle.logprobs(tokens)[:-1])
        assert error <= bound, f"{len(prompt)} tokens: {error:.1e}"
    assert planned.weights == pytest.approx(loaded, rel=0.02)


# Blocks of 128 do not fit the recall model, whose experts have 32 inputs.
@pytest.mark.parametrize("scheme", [name for name in ONLINE if name.startswith("fp8") and name != "fp8_per_block"])
def test_recall_in_fp8(scheme, record_property):
    from vllm import SamplingParams

    record_property("covers", "FP8")
    rng = random.Random(8)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(200)]
    options = {"dtype": "bfloat16", "quantization": scheme, "enforce_eager": False, "max_num_seqs": 32}
    with engine(RECALL, skip_tokenizer_init=False, **options) as running:
        parameters = SamplingParams(temperature=0, max_tokens=8)
        outputs = running.llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
    right = [output.outputs[0].text.strip() == answer for output, (_, answer) in zip(outputs, asked, strict=True)]
    assert sum(right) >= 0.99 * len(right)
