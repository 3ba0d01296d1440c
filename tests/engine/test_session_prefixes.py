"""Prefixes that no request has named: what one engine left, prompts of another begin with."""

import random

import pytest
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, check_cold, completion, engine, ngram, random_prompts
from support.limits import largest_file
from support.sessions import complete, counts, flip, options, parameters

pytestmark = pytest.mark.engine

BLOCK = 64
KIMI = {"session_prefix_tokens": BLOCK, "session_gib": 1}
DOCUMENTS = random_prompts([64, 127, 128, 129, 200, 300], 100, seed=3)
TAIL = random.Random(8)


def more(prompts):
    return [[*prompt, *(TAIL.randrange(3, 100) for _ in range(TAIL.choice((1, 2, 70))))] for prompt in prompts]


def ask(running, prompts, max_tokens=8, salt=None):
    """Complete prompts that name nothing."""
    return [completion(output) for output in complete(running, prompts, [parameters(max_tokens)] * len(prompts), salt)]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder with prefixes of two questions on each document, and prompts that go on from an answer or a document."""
    folder = tmp_path_factory.mktemp("left")
    with engine(RECALL, **options(folder, kimi=KIMI)) as running:
        first = [one for document in DOCUMENTS for one in ask(running, more([document]), 70)]
        second = [one for document in DOCUMENTS for one in ask(running, more([document]))]
        assert counts(running)["prefixes_saved"] >= 2 * len(DOCUMENTS) - 3
        assert not counts(running)["prefixes_failed"]
        check_cold(running, [*first, *second])
    assert all(path.name.startswith("+") for path in folder.iterdir())
    return folder, more([one.prompt + one.tokens for one in first]) + more(DOCUMENTS)


HOW = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": {"max_num_batched_tokens": 37},
    "few blocks": {"num_gpu_blocks_override": 5 * STATE_BLOCKS + 8},
    "host memory": {"num_gpu_blocks_override": 5 * STATE_BLOCKS + 8, "kimi": {"host_memory_gib": 0.1}},
}


@pytest.mark.parametrize("how", HOW)
def test_prompts_begin_with_what_another_engine_left(left, how):
    folder, prompts = left
    given = HOW[how]
    # What it leaves itself is what is there already, or too little.
    kimi = KIMI | {"session_prefix_tokens": 63} | given.get("kimi", {})
    with engine(RECALL, **options(folder, **given | {"kimi": kimi})) as running:
        done = ask(running, prompts)
        assert counts(running)["prefixes_loaded"] >= len(DOCUMENTS)
        assert not counts(running)["prefixes_failed"]
        # Each document begins with a boundary that was saved; where it is shared, at its own last one.
        least = [len(document) // BLOCK * BLOCK for document in DOCUMENTS]
        assert all(one.cached >= count for one, count in zip(done[len(DOCUMENTS) :], least, strict=True))
        check_cold(running, done)


@pytest.mark.skipif(DRAFTS > 0, reason="the same")
def test_with_drafts(tmp_path):
    kimi = KIMI | {"least_drafts_accepted": 0}
    prompts = [prompt[:7] * 20 for prompt in random_prompts([7] * 5, 100, seed=5)]
    with engine(RECALL, **options(tmp_path, kimi=kimi, speculative_config=ngram(3))) as running:
        first = [one for prompt in prompts for one in ask(running, [prompt], 20)]
        check_cold(running, first)
        running.llm.reset_prefix_cache()
        done = ask(running, more([one.prompt + one.tokens for one in first]), 20)
        assert counts(running)["prefixes_loaded"] == len(prompts)
        assert all(one.cached >= 128 for one in done)
        check_cold(running, done)


def test_what_is_broken_is_computed_and_replaced_and_what_has_a_name_stays(tmp_path, log):
    [prompt, other] = random_prompts([140, 150], 100)
    with engine(RECALL, **options(tmp_path, kimi=KIMI)) as running:
        complete(running, [other], [parameters(8, save="named")])
        [cold] = ask(running, [prompt])
        [path] = tmp_path.glob("+*.session")
        flip(path, -5)
        running.llm.reset_prefix_cache()
        [computed] = ask(running, [prompt])
        assert (computed.cached, counts(running)["prefixes_failed"]) == (0, 1)
        assert sum(path.stem in line for line in log.messages) == 1, log.messages
        assert counts(running)["prefixes_saved"] == 2
        for salt, cached in (("tenant", 0), (None, 128)):
            running.llm.reset_prefix_cache()
            [again] = ask(running, [prompt], salt=salt)
            assert again.cached == cached
            check_cold(running, [again])
        assert cold.tokens == computed.tokens == again.tokens
        assert counts(running)["prefixes_loaded"] == 1
        # Nothing that a request names is a prefix's file.
        [answer] = complete(running, [[*prompt, 7]], [parameters(2, load=path.stem)])
        assert "this is no name of a session" in answer.kv_transfer_params["error"]
        for kept in tmp_path.glob("+*.session"):
            kept.unlink()
        running.llm.reset_prefix_cache()
        [gone] = ask(running, [prompt])
        assert gone.cached == 0
        check_cold(running, [gone])


def test_on_a_full_disk_requests_are_served_and_after_one_none_is_tried(tmp_path, log):
    with engine(RECALL, **options(tmp_path, kimi=KIMI)) as running, largest_file(10_000):
        done = ask(running, random_prompts([140, 150, 160], 100), 2)
        done += ask(running, random_prompts([170], 100), 2)
        assert counts(running)["prefixes_saved"] == 0
        assert 1 <= counts(running)["prefixes_failed"] <= 2
        assert [*tmp_path.iterdir()] == []
        assert sum("it cannot be written" in line for line in log.messages) <= 2
        check_cold(running, done)


def test_beyond_the_limit_prefixes_go_before_names(tmp_path):
    prompts = random_prompts([140, 150, 160, 170, 180], 100)
    with engine(RECALL, **options(tmp_path, kimi=KIMI)) as running:
        complete(running, prompts[:1], [parameters(8, save="named")])
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
    with engine(RECALL, **options(tmp_path, kimi=KIMI | {"session_gib": 2.5 * size / 2**30})) as running:
        for prompt in prompts[1:]:
            ask(running, [prompt], 2)
        running.scheduler.connector.shutdown()
        assert counts(running)["prefixes_saved"] == 4
        names = [path.name for path in tmp_path.iterdir()]
        assert "named.session" in names
        assert len(names) == 2
