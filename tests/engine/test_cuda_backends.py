"""On a GPU: each of vLLM's attention backends reads pages from the one memory, whatever states have left there."""

import pytest
import torch
from support.checkpoints import make_random
from support.cuda import HEADS_OF_48B, distributions, relative_error
from support.engine import engine, poison_blocks, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

TOLERANCE = {"auto": 2e-2, "fp8": 7e-2}
MEMORY, LATENT = 42 * 2**20, 576  # bytes, of six states; elements of a token
LENGTHS = [1, 4, 63, 64, 65, 129, 321, 640]


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    from support.oracle import Oracle

    checkpoint = make_random(tmp_path_factory.mktemp("backends") / "random", HEADS_OF_48B, dtype=torch.bfloat16)
    return checkpoint, Oracle(checkpoint)


@pytest.mark.parametrize(
    ("backend", "cache_dtype", "block_size"),
    [
        ("FLASH_ATTN_MLA", "auto", 64),
        ("FLASH_ATTN_MLA", "auto", 128),
        ("FLASHMLA", "auto", 64),
        ("FLASHMLA", "fp8", 64),
        ("TRITON_MLA", "auto", 64),
        ("TRITON_MLA", "fp8", 128),
    ],
)
def test_nan_of_other_owners_is_never_seen(backend, cache_dtype, block_size, smooth, record_property):
    """All memory is NaN at first, and so is every block that is given back, among few that change hands often."""
    from vllm import SamplingParams, TokensPrompt

    record_property("covers", "FP8 latents" if cache_dtype == "fp8" else "bfloat16")
    checkpoint, oracle = smooth
    vocab_size = oracle.model.config.vocab_size
    options = {
        "dtype": "bfloat16",
        "enforce_eager": False,
        "attention_backend": backend,
        "kv_cache_dtype": cache_dtype,
        "block_size": block_size,
        "enable_prefix_caching": True,
        "max_logprobs": vocab_size,
        "max_num_batched_tokens": 200,
        "num_gpu_blocks_override": MEMORY // (block_size * LATENT * (1 if cache_dtype == "fp8" else 2)),
    }
    parameters = SamplingParams(
        temperature=0, max_tokens=70, ignore_eos=True, logprobs=vocab_size, prompt_logprobs=vocab_size, detokenize=False
    )
    with engine(checkpoint, **options) as running:
        poison_blocks(running.pool, range(len(running.pool.memory)))
        for seed in range(2):
            prompts = random_prompts(LENGTHS, vocab_size, seed=seed)
            inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
            outputs = running.llm.generate(inputs, parameters, use_tqdm=False)
            running.check_idle()
            for prompt, output in zip(prompts, outputs, strict=True):
                tokens = [*prompt, *output.outputs[0].token_ids]
                error = relative_error(distributions(output, vocab_size), oracle.logprobs(tokens)[:-1])
                assert error <= TOLERANCE[cache_dtype], f"{len(prompt)} tokens: {error:.1e}"
        assert running.watch.spoiled > 200
