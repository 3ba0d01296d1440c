"""Options of vLLM that change what a step holds or how a prefix is found: answers stay right with all at once."""

import pytest
from support.engine import DRAFTS, RECALL, engine, random_prompts
from support.oracle import Oracle

pytestmark = pytest.mark.engine

OPTIONS = {
    "disable_cascade_attn": True,
    "disable_hybrid_kv_cache_manager": True,
    "enable_prompt_embeds": True,
    "hf_overrides": {"model_max_length": 2048},
    "kv_sharing_fast_prefill": True,
    "long_prefill_token_threshold": 20,
    "long_prefill_token_threshold_adaptive": True,
    "max_num_scheduled_tokens": 37,
    "prefill_schedule_interval": 2,
    "prefix_caching_hash_algo": "sha256_cbor",
    "scheduler_reserve_full_isl": False,
    "stream_interval": 3,
    "swa_bounded_replay": False,
    "use_fp64_gumbel": True,
    "watermark": 0.1,
    "worker_extension_cls": "support.engine.Completion",
}


def test_options_of_the_scheduler_all_at_once():
    from vllm import SamplingParams

    oracle = Oracle(RECALL)
    prompts = random_prompts([5, 70, 130, 300, 64], 100, seed=21)
    prompts.append(prompts[3][:150] + prompts[1])
    with engine(RECALL, **OPTIONS, enable_prefix_caching=True) as running:
        cold = running.complete(prompts)
        for completion in cold:
            oracle.check(completion)
        warm = running.complete(prompts)
        assert [completion.cached for completion in warm][:5] == [0, 64, 128, 256, 0]
        for again in warm:
            oracle.check(again)
        # The same prompt as vectors: a prefix of another kind, so nothing is cached, and the same answer.
        embedding = oracle.model.get_input_embeddings().weight.detach()
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False)
        for _ in range(2):
            [output] = running.llm.generate({"prompt_embeds": embedding[prompts[3]]}, sampling, use_tqdm=False)
            running.check_idle()
            assert list(output.outputs[0].token_ids) == cold[3].tokens


def test_short_steps_beside_decodes():
    oracle = Oracle(RECALL)
    prompts = random_prompts([5, 400, 130, 300], 100, seed=22)
    mixed = {"additional_config": {"kimi": {"mixed_step_tokens": 24}}}
    sizes = []
    with engine(RECALL, **mixed, max_num_batched_tokens=64, enable_prefix_caching=True) as running:
        schedule = running.scheduler.schedule

        def noted(*args, **kwargs):
            decodes = any(not request.is_prefill_chunk for request in running.scheduler.running)
            output = schedule(*args, **kwargs)
            sizes.append((decodes, sum(output.num_scheduled_tokens.values())))
            return output

        running.scheduler.schedule = noted
        for completion in running.complete(prompts, max_tokens=30):
            oracle.check(completion)
    assert max(size for decodes, size in sizes if not decodes) == 64
    beside = [size for decodes, size in sizes if decodes]
    assert max(beside) <= 24 + 3 * DRAFTS
    assert beside.count(max(beside)) > 20
