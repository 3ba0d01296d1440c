"""Sessions on a GPU: copies on streams of their own, beside CUDA graphs and steps in flight."""

import threading

import pytest
import torch
from support.engine import RECALL, STATE_BLOCKS, check_cold, completion, engine, ngram, random_prompts
from support.sessions import ANSWER, LENGTHS, ask, check_stops, complete, counts, flip, near, options, parameters, save

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

GRAPHS = {"enforce_eager": False}
HOW = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 37},
    "not cached": {"enable_prefix_caching": False},
    "few blocks": {"num_gpu_blocks_override": 5 * STATE_BLOCKS + 5, "kimi": {"host_memory_gib": 0.1}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of sessions, their names, and prompts that go on."""
    folder = tmp_path_factory.mktemp("sessions")
    names = [f"s{length}" for length in LENGTHS]
    return folder, names, save(folder, random_prompts(LENGTHS, 100), names, **GRAPHS)


@pytest.mark.parametrize(("how", "runner"), [*((how, "1") for how in HOW), ("batched", "0"), ("few blocks", "0")])
def test_a_session_goes_on_in_another_engine(how, runner, saved, monkeypatch, record_property):
    record_property("covers", "sessions")
    folder, names, prompts = saved
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with engine(RECALL, **options(folder, **GRAPHS | HOW[how])) as running:
        assert running.scheduler.scheduler_config.async_scheduling
        done = ask(running, prompts, names, "load", max_tokens=150 if how == "few blocks" else 20)
        assert counts(running)["sessions_resumed"] >= len(names)
        assert counts(running)["sessions_missed"] == 0
        if how == "few blocks":
            assert running.num_preemptions
        else:
            assert [one.cached for one in done] == [length + ANSWER - 1 for length in LENGTHS]
        check_cold(running, done)


@pytest.mark.parametrize("drafts", [0, 3])
def test_prompts_begin_with_prefixes_that_nobody_named(drafts, tmp_path):
    kimi = {"session_prefix_tokens": 64, "session_gib": 1}
    more = GRAPHS | ({"speculative_config": ngram(drafts)} if drafts else {})
    documents = random_prompts([64, 100, 128, 129, 200, 300], 100, seed=3)
    nothing = [parameters(20)] * len(documents)
    with engine(RECALL, **options(tmp_path, kimi=kimi, **more)) as running:
        for document in documents:  # one by one, as two prefixes are written at a time
            complete(running, [[*document, 3, 4, 5]], nothing[:1])
        assert counts(running)["prefixes_saved"] == len(documents)
    with engine(RECALL, **options(tmp_path, kimi=kimi, **more)) as running:
        outputs = complete(running, [[*document, 5, 6] for document in documents], nothing)
        done = [completion(output) for output in outputs]
        assert [one.cached for one in done] == [len(document) // 64 * 64 for document in documents]
        assert counts(running)["prefixes_loaded"] == len(documents)
        assert counts(running)["prefixes_failed"] == 0
        check_cold(running, done)


def test_a_session_that_stopped_with_a_step_in_flight(tmp_path):
    """That step has computed the token that stopped it, and is copied from behind it."""
    with engine(RECALL, **options(tmp_path, **GRAPHS)) as running:
        check_stops(running)


def test_sessions_are_copied_while_others_decode_and_take_their_memory(tmp_path):
    """Slow copies, and requests that come and go meanwhile: nobody's blocks are given away before they are copied."""
    prompts = random_prompts(LENGTHS, 100)
    names = [f"s{length}" for length in LENGTHS]
    beside = random_prompts([50] * 24, 100, seed=9)
    with engine(RECALL, **options(tmp_path, **GRAPHS | {"num_gpu_blocks_override": 12 * STATE_BLOCKS + 60})) as running:
        sessions = running.scheduler.connector
        worker = _worker_of(running)
        slow = threading.Event()
        for copies in (worker._loads, worker._saves):
            each = copies.each

            def late(parts, copy, each=each):
                slow.wait(0.02)
                each(parts, copy)

            copies.each = late
        plain = running.complete(beside, max_tokens=30)
        sampling = [parameters(save=name) for name in names] + [parameters(30) for _ in beside]
        outputs = [completion(output) for output in complete(running, prompts + beside, sampling)]
        assert [one.tokens for one in outputs[len(names) :]] == [one.tokens for one in plain]
        running.llm.reset_prefix_cache()
        onward = [one.prompt + one.tokens + [7, 8] for one in outputs[: len(names)]]
        sampling = [parameters(20, load=name) for name in names] + [parameters(30) for _ in beside]
        done = [completion(output) for output in complete(running, onward + beside, sampling)]
        assert [one.tokens for one in done[len(names) :]] == [one.tokens for one in plain]
        assert sessions.counts["sessions_resumed"] >= len(names)
        assert sessions.counts["sessions_missed"] == sessions.counts["sessions_unsaved"] == 0
        check_cold(running, done[: len(names)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantization", [None, "fp8_per_tensor"])
def test_a_session_in_16_bits_and_fp8(dtype, quantization, tmp_path):
    """Rounding depends on the steps in which a prompt is computed, so answers are near each other, and not equal."""
    if quantization and dtype == "float16":
        pytest.skip("one of them is enough")
    prompts = random_prompts(LENGTHS, 100)
    names = [f"s{length}" for length in LENGTHS]
    more = GRAPHS | {"dtype": dtype, "quantization": quantization}
    onward = save(tmp_path, prompts, names, **more)
    with engine(RECALL, **options(tmp_path, **more)) as running:
        done = ask(running, onward, names, "load", max_tokens=8)
        assert counts(running)["sessions_resumed"] == len(names)
        cold = running.complete([one.prompt for one in done], skip_reading_prefix_cache=True)
        # Two tokens may be as likely.
        assert sum(map(near, done, cold)) >= len(done) - 1


def test_a_session_has_the_records_of_its_window(tmp_path):
    """Periodic prompts, which make drafts count; the model was not trained on them, and tells their tokens barely."""
    prompts = [prompt[:7] * 12 for prompt in random_prompts([7] * 6, 100, seed=5)]
    prompts = [prompt[: len(prompt) - number] for number, prompt in enumerate(prompts)]
    names = [f"d{number}" for number in range(len(prompts))]
    more = GRAPHS | {"speculative_config": ngram(3)}
    onward = save(tmp_path, prompts, names, **more)
    with engine(RECALL, **options(tmp_path, **more)) as running:
        done = ask(running, onward, names, "load", max_tokens=8)
        assert counts(running)["sessions_resumed"] == len(names), counts(running)
        cold = running.complete([one.prompt for one in done], skip_reading_prefix_cache=True)
        assert sum(map(near, done, cold)) >= len(done) - 1


def test_a_broken_part_is_a_miss(tmp_path, log):
    """Parts before it have been copied to blocks that the request then gives up."""
    prompts = random_prompts([300, 301], 100)
    onward = save(tmp_path, prompts, ["a", "b"], **GRAPHS)
    flip(tmp_path / "a.session", -5)
    with engine(RECALL, **options(tmp_path, **GRAPHS)) as running:
        done = ask(running, onward, ["a", "b"], "load")
        assert [bool(one.cached) for one in done] == [False, True]
        assert "Session a: its pages from block 0 are not what was written." in log.text
        check_cold(running, done)


@pytest.mark.parametrize("way", ["out", "in"])
def test_copies_wait_for_the_steps_before_them(way):
    """The GPU is still busy with what the copy must see, or must not disturb."""
    from kimi_vllm.cache.session_copies import Copies, behind_steps

    device = torch.device("cuda")
    copies, count = Copies(1, 2**20, device), 2**18
    memory = torch.zeros(count, device=device)
    seen = torch.zeros(count, device=device)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # cycles, a quarter of a second
    if way == "out":
        memory.fill_(1)
    else:
        seen.copy_(memory)
    step = behind_steps(device)

    def copy(name, buffer):
        room = buffer.room((count,), torch.float32)
        if way == "in":
            room.fill_(2)
        with buffer.after(step):
            if way == "out":
                room.copy_(memory, non_blocking=True)
            else:
                memory.copy_(room, non_blocking=True)
        if way == "out":
            assert room.eq(1).all()

    copies.each(["all"], copy)
    torch.cuda.synchronize()
    assert way == "out" or (seen.eq(0).all() and memory.eq(2).all())
    copies.shutdown()


def test_buffers_are_pinned_and_streams_their_own():
    from kimi_vllm.cache.session_copies import Copies, behind_steps

    device = torch.device("cuda")
    copies, seen = Copies(3, 2**20, device), []
    source = torch.arange(2**18, dtype=torch.float32, device=device)
    step = behind_steps(device)

    def copy(name, buffer):
        room = buffer.room((2**18,), torch.float32)
        assert room.is_pinned()
        with buffer.after(step):
            assert torch.cuda.current_stream() != torch.cuda.default_stream()
            room.copy_(source, non_blocking=True)
        seen.append(room.sum().item())

    copies.each(map(str, range(9)), copy)
    assert seen == [source.sum().item()] * 9
    copies.shutdown()


def _worker_of(running):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()
