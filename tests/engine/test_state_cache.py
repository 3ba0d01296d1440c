"""States inside a running engine: nobody reads a block that it does not own, and blocks keep vLLM's size."""

import json

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, engine, poison, poison_blocks, random_prompts

pytestmark = pytest.mark.engine


def test_nan_in_memory_that_nobody_owns_changes_nothing():
    prompts = random_prompts([1, 2, 5, 63, 64, 65, 130, 200], 100, seed=20)
    with engine(RECALL, enable_prefix_caching=True) as running:
        expected = [completion.tokens for completion in running.complete(prompts, max_tokens=16)]
        assert running.llm.reset_prefix_cache()
        assert not running.slots.slots()
        poison_blocks(running.pool, range(len(running.pool.memory)))
        again = running.complete(prompts, max_tokens=16)
    assert [completion.tokens for completion in again] == expected


def test_every_page_is_cleared_before_its_first_use():
    with engine(RECALL, enable_prefix_caching=True, max_num_batched_tokens=100) as running:
        execute, clear, cleared, seen = running.worker.execute_model, running.pool.clear, set(), set()
        [pages] = running.scheduler._page_managers

        def clearing(blocks):
            clear(blocks)
            cleared.update(blocks)

        def looking(output):
            result = execute(output)
            for name, table in pages.req_to_blocks.items():
                assert {block.block_id for block in table} <= cleared
                seen.update((name, index) for index in range(len(table)))
            return result

        running.worker.execute_model, running.pool.clear = looking, clearing
        running.complete(random_prompts([1, 63, 64, 65, 200], 100, seed=24), max_tokens=70)
    assert len(seen) >= 2 + 3 + 3 + 3 + 5


def test_nan_in_one_live_slot_stays_there():
    """A broken state breaks its own request and no other, before and after its slot is reused."""
    from vllm import SamplingParams, TokensPrompt

    prompts = random_prompts([40, 41, 42], 100, seed=21)
    parameters = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    with engine(RECALL) as running:
        expected = [completion.tokens for completion in running.complete(prompts, max_tokens=12)]
        core = running.llm.llm_engine
        for index, prompt in enumerate(prompts):
            core.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), parameters)
        core.step()
        owners = {name: table[-1].block_id for name, table in running.manager.req_to_blocks.items()}
        poison(running.pool, [slot for name, slot in owners.items() if name.startswith("1")])
        answers = {}
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
        assert [answers["0"], answers["2"]] == [expected[0], expected[2]]
        assert answers["1"] != expected[1]
        running.check_idle()
        again = [completion.tokens for completion in running.complete(prompts, max_tokens=12)]
    assert again == expected


def test_abort_returns_the_slots():
    from vllm import SamplingParams, TokensPrompt

    prompts = random_prompts([100, 200, 300, 50], 100, seed=22)
    parameters = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False)
    with engine(RECALL, enable_prefix_caching=True, max_num_batched_tokens=128) as running:
        core = running.llm.llm_engine
        for index, prompt in enumerate(prompts):
            core.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), parameters)
        for _ in range(4):
            core.step()
        core.abort_request([str(index) for index in range(len(prompts))])
        while core.has_unfinished_requests():
            core.step()
        core.step()
        running.check_idle()


def test_a_state_takes_blocks_and_leaves_their_size_alone(tmp_path, checkpoints):
    """Bytes and tokens of a block are those of the model's MLA layers alone; a state is some blocks more."""
    config = json.loads((checkpoints["odd-pattern", "transformers"] / "config.json").read_text())
    num_mla = config["layer_types"].count("full_attention")
    only_mla = config | {
        "layer_types": ["full_attention"] * num_mla,
        "mlp_layer_types": ["dense"] * num_mla,
        "num_hidden_layers": num_mla,
    }
    write_checkpoint(tmp_path / "mla", only_mla, {})
    seen = {}
    for name, path, load in [
        ("hybrid", checkpoints["odd-pattern", "transformers"], "auto"),
        ("mla", tmp_path / "mla", "dummy"),
    ]:
        with engine(path, load_format=load) as running:
            config = running.scheduler.kv_cache_config
            pool = running.scheduler.kv_cache_manager.block_pool
            block_size = running.scheduler.block_size
            states = running.pool.layout.blocks if name == "hybrid" else 0
            request_pages = _blocks_held_by_one_request(running) - states
            page_bytes = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
            seen[name] = (block_size, config.num_blocks, page_bytes, request_pages)
            assert pool.num_gpu_blocks == config.num_blocks
            metadata = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
            assert set(metadata) == {64}
            assert len(metadata) == (2 if name == "hybrid" else 1)
    assert seen["hybrid"] == seen["mla"]


def _blocks_held_by_one_request(running):
    from vllm import SamplingParams, TokensPrompt

    core = running.llm.llm_engine
    free = running.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    parameters = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    core.add_request("0", TokensPrompt(prompt_token_ids=random_prompts([200], 100)[0]), parameters)
    core.step()
    held = before - free()
    while core.has_unfinished_requests():
        core.step()
    return held


def test_one_metadata_build_per_step(monkeypatch):
    from kimi_vllm.cache.metadata import KDAMetadataBuilder

    builds = []
    build = KDAMetadataBuilder.build
    monkeypatch.setattr(KDAMetadataBuilder, "build", lambda *args, **kwargs: builds.append(1) or build(*args, **kwargs))
    with engine(RECALL) as running:
        builds.clear()
        running.complete(random_prompts([20], 100), max_tokens=10)
    assert len(builds) == 10


def test_decode_rows_never_take_the_prefill_path(monkeypatch):
    """While one request prefills in pieces, the other's single tokens go to the decode kernel in the same steps."""
    from kimi_vllm.layers.kda import KimiDeltaAttention

    steps = []
    advance = KimiDeltaAttention.advance

    def spy(self, *args):
        steps.append(args[-1])
        return advance(self, *args)

    monkeypatch.setattr(KimiDeltaAttention, "advance", spy)
    with engine(RECALL, max_num_batched_tokens=64) as running:
        running.complete(random_prompts([10, 400], 100), max_tokens=20)
    mixed = [step for step in steps if (step.decode or step.windows) and step.prefill]
    assert mixed
    assert all(len(step.decode.position) == step.num_decodes for step in mixed if step.decode)
    assert all((step.prefill.cu_seqlens.diff() > 1 + DRAFTS).all() for step in mixed)


def test_nan_in_free_pages_changes_nothing():
    """What an earlier owner left in a latent page is never seen, though its attention weight would only be 0 · NaN."""
    prompts = random_prompts([1, 5, 63, 64, 65, 130, 200], 100, seed=23)
    with engine(RECALL) as running:
        expected = [completion.tokens for completion in running.complete(prompts, max_tokens=16)]
        for layer in running.model.model.layers:
            if hasattr(layer.self_attn, "attn"):
                layer.self_attn.attn.kv_cache.fill_(float("nan"))
        again = running.complete(prompts, max_tokens=16)
    assert [completion.tokens for completion in again] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is given to vLLM whole")
def test_the_kv_cache_of_a_cpu_is_what_all_sequences_can_use(monkeypatch):
    """And not nearly all of the machine's memory, which vLLM would take and fill with zeros first."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    with engine(RECALL, max_num_seqs=4, max_model_len=500) as running:
        assert running.scheduler.kv_cache_config.num_blocks == 1 + 4 * (8 + STATE_BLOCKS)
        running.complete(random_prompts([480] * 4, 100), max_tokens=20)
        assert running.num_preemptions == 0
