"""Sessions under vLLM's scheduler, with a worker of hashes: steps in flight, drafts, stops, preemptions, failures."""

import copy
import errno
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from support.arrivals import BLOCK
from support.drafter import Drafter
from support.hashes import answer
from support.schedules import DRAFTING, MODES, Server, _configuration
from support.session_files import write_parts
from support.session_worker import SessionHashWorker
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kimi_vllm.cache import prefix_policy
from kimi_vllm.cache.session_files import TOKENS
from kimi_vllm.cache.session_folder import Session
from kimi_vllm.cache.window import window_of
from kimi_vllm.config_hook import _keep_sessions
from serve.bench.cache import replay


def server_of(mode, memory, folder, seed=0, **kimi):
    """A server that keeps sessions."""
    config = copy.copy(_configuration(mode, memory, "abort"))
    config.additional_config = {"kimi": config.additional_config["kimi"] | {"session_dir": str(folder)} | kimi}
    _keep_sessions(config)
    server = Server(memory, config, Drafter(mode.drafts, seed))
    worker = SessionHashWorker(
        server.manager.kv_cache_group_id,
        BLOCK,
        window_of(config),
        fresh_last=not server.scheduler.use_v2_model_runner,
    )
    worker.drafter, worker.folder, worker.random = Drafter(mode.drafts, seed), folder, Random(seed)
    server.worker = worker
    if mode.drafts:
        server.scheduler._drafting = None
    return server


def ask(server, name, prompt, most, stop=None, **wanted):
    """Send a request that wants something of sessions; `stop` is a token that ends it."""
    parameters = SamplingParams(
        temperature=0, max_tokens=most, stop_token_ids=[stop] if stop else [], extra_args={"kv_transfer_params": wanted}
    )
    hasher = replay.make_request(server.scheduler, name, prompt, most)._block_hasher
    request = Request(name, list(prompt), parameters, None, block_hasher=hasher)
    server.answers[name] = []
    server.scheduler.add_request(request)
    return request


def run(server):
    for _ in range(3000):
        if not (server.scheduler.has_requests() or server.in_flight):
            return
        server.turn()
        server.scheduler.check_memory()
    raise AssertionError("requests that never finish")


def expected(prompt, most, stop):
    whole = answer(prompt, most)
    return whole[: whole.index(stop) + 1] if stop in whole else whole


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memory", ["room", "blocks", "few-blocks", "lru-host-priority"])
@pytest.mark.parametrize("mode", MODES | DRAFTING)
def test_what_is_saved_is_exact_and_what_is_loaded_goes_on(mode, memory, seed, tmp_path):
    """Chats of several turns at once, each of which loads what the last has saved; some stop at a token.

    With steps in flight a step has then run past the answer's end, and the worker checks what is saved.
    """
    random = Random(seed)
    server = server_of((MODES | DRAFTING)[mode], memory, tmp_path, seed)
    assert server.scheduler.scheduler_config.async_scheduling == (MODES | DRAFTING)[mode].asynchronous
    server.worker.failing = 0.1 if seed == 2 else 0
    texts = {f"chat{number}": [random.randrange(3, 90) for _ in range(1 + 63 * number)] for number in range(4)}
    stopped = 0
    for turn in range(4):
        wanted = {}
        for chat, text in texts.items():
            whole = answer(text, 60)
            stop = random.choice([None, whole[random.randrange(60)]])
            most = random.choice([1, 2, 30, 60])
            wanted[f"{chat}-{turn}"] = expected(text, most, stop)
            stopped += len(wanted[f"{chat}-{turn}"]) < most
            asked = {"save": chat} if not turn else {"load": chat, "save": chat}
            ask(server, f"{chat}-{turn}", text, most, stop, **asked)
            texts[chat] = (
                text + wanted[f"{chat}-{turn}"] + [random.randrange(3, 90) for _ in range(random.choice([1, 2, 65]))]
            )
        run(server)
        assert {name: server.answers[name] for name in wanted} == wanted
    server.check_idle()
    counts = server.scheduler.connector.counts
    assert stopped
    assert counts["sessions_saved"] + counts["sessions_unsaved"] == 16
    assert counts["sessions_resumed"] >= 6  # others are in the prefix cache
    if not server.worker.failing:
        # With drafts and steps in flight, an answer that ends where no boundary is kept may have no state.
        beyond = mode in DRAFTING and DRAFTING[mode].asynchronous
        assert counts["sessions_unsaved"] <= beyond * (2 if memory == "room" else 5), counts
        assert beyond or not counts["sessions_missed"]


@pytest.mark.parametrize("blocks", [7, 9])
@pytest.mark.parametrize("mode", MODES | DRAFTING)
def test_a_preempted_request_loads_again_and_shows_where_its_state_is(mode, blocks, tmp_path):
    """In a memory without a second state it takes its slot along, out of the entry that workers look at."""
    server = server_of((MODES | DRAFTING)[mode], "blocks", tmp_path)
    text = [3 + 7 * i % 80 for i in range(90)]
    ask(server, "first", text, 30, save="chat")
    run(server)
    text += [*answer(text, 30), *range(5, 45)]
    server.scheduler.reset_prefix_cache()
    server.scheduler.arena.get_new_blocks(server.scheduler.arena.get_num_free_blocks() - blocks)
    ask(server, "second", text, 9, load="chat")
    for _ in range(50):
        server.turn()
        if server.answers["second"]:
            break
    shown = Counter()
    show = server.scheduler._show_slot

    def counted(name, block_ids, num_computed):
        before = list(block_ids[server.manager.kv_cache_group_id])
        show(name, block_ids, num_computed)
        shown["moved" if before != block_ids[server.manager.kv_cache_group_id] else "there"] += bool(num_computed)

    server.scheduler._show_slot = counted
    server.scheduler._restart(server.scheduler.requests["second"])
    for _ in range(50):
        server.turn()
    assert server.answers["second"] == answer(text, 9)
    assert server.scheduler.connector.counts["sessions_resumed"] == 2
    assert shown == {"moved": 1}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("memory", ["room", "blocks", "few-blocks", "host-pages"])
@pytest.mark.parametrize("mode", MODES | DRAFTING)
def test_prefixes_that_nobody_named_are_exact_too(mode, memory, seed, tmp_path, monkeypatch):
    """Questions about documents, and chats that go on; then the same from a server that has only the files."""
    monkeypatch.setattr(prefix_policy, "_REST_S", 0)
    random = Random(seed)
    documents = [[random.randrange(3, 90) for _ in range(length)] for length in (64, 130, 200)]
    asked = [
        documents[number % 3] + [random.randrange(3, 90) for _ in range(random.choice([1, 30, 90]))]
        for number in range(15)
    ]
    kept, loaded = {}, 0
    for life in range(2):
        server = server_of((MODES | DRAFTING)[mode], memory, tmp_path, seed, session_prefix_tokens=64, session_gib=1)
        server.worker.failing = 0.2 * seed
        server.worker.sessions = kept
        for first in range(0, len(asked), 5):
            for number, prompt in enumerate(asked[first : first + 5], first):
                ask(server, f"{life}-{number}", prompt, 9 + number)
            run(server)
            for number, prompt in enumerate(asked[first : first + 5], first):
                assert server.answers[f"{life}-{number}"] == answer(prompt, 9 + number)
                if not life:
                    asked[number] = prompt + answer(prompt, 9 + number) + [7, 8, 9]
        server.check_idle()
        counts = server.scheduler.connector.counts
        server.scheduler.connector.shutdown()
        assert not server.scheduler.connector.held
        loaded = counts["prefixes_loaded"]
    if memory != "few-blocks" and not server.worker.failing:  # where hardly a state outlives its request
        assert loaded >= 3, counts


def left_over(server):
    """What the scheduler's half still has of requests."""
    connector = server.scheduler.connector
    policy = connector._prefixes
    return [*connector.held, *connector._matched, *connector._missed, *policy._hits, *policy._found, *policy._leaving]


@pytest.mark.parametrize("mode", MODES | DRAFTING)
def test_of_a_token_that_was_only_sampled_no_page_is_saved(mode, tmp_path):
    """Another request, whose prompt goes on from it, has published a state behind it."""
    server = server_of((MODES | DRAFTING)[mode], "room", tmp_path, session_prefix_tokens=100, session_gib=1)
    text = [3 + 7 * i % 80 for i in range(70)]
    ask(server, "next", [*text, *answer(text, 58), 5, 6, 7], 200)
    for _ in range(6):
        server.turn()
    ask(server, "again", text, 58)  # ends at 128 tokens, of which the worker has computed 127
    run(server)
    assert server.answers["again"] == answer(text, 58)
    assert left_over(server) == []


@pytest.mark.parametrize("mode", MODES)
def test_one_loads_a_prefix_for_all_that_begin_with_it(mode, tmp_path):
    text = [3 + 7 * i % 80 for i in range(150)]
    kept = {}
    for life in range(2):
        server = server_of(MODES[mode], "room", tmp_path, session_prefix_tokens=64, session_gib=1)
        server.worker.sessions = kept
        for number in range(4 * life + 1):
            ask(server, str(number), [*text, 5 + number], 5)
        run(server)
        for number in range(4 * life + 1):
            assert server.answers[str(number)] == answer([*text, 5 + number], 5)
        assert left_over(server) == []
    assert server.scheduler.connector.counts["prefixes_loaded"] == 1
    assert server.seen["hits"] == 5


@pytest.mark.parametrize("tokens", [0, 100, 200, "unreadable", "gone"])
def test_a_file_that_is_not_what_its_name_says_is_computed(tokens, tmp_path, monkeypatch):
    """And not looked at again until it is replaced, which the request does."""
    monkeypatch.setattr(prefix_policy, "_LOOK_EVERY_S", float("inf"))  # in a thread, at any time
    text = [3 + 7 * i % 80 for i in range(300)]
    mode = MODES["step-by-step"]
    server = server_of(mode, "room", tmp_path, session_prefix_tokens=100, session_gib=1)
    ask(server, "first", text[:130], 2)
    run(server)
    server.scheduler.connector.shutdown()
    [path] = tmp_path.iterdir()
    if isinstance(tokens, int):
        write_parts(path, {TOKENS: torch.tensor(text[:tokens], dtype=torch.int64)}, {})
    server = server_of(mode, "room", tmp_path, session_prefix_tokens=100, session_gib=1)
    if tokens == "gone":
        path.unlink()
    is_file = Path.is_file
    with monkeypatch.context() as patch:
        if tokens == "unreadable":

            def fail(self):
                if self.suffix == ".session":
                    raise OSError(errno.ESTALE, "Stale file handle")
                return is_file(self)

            patch.setattr(Path, "is_file", fail)
        ask(server, "second", text, 2)
        for _ in range(3):
            server.turn()
            server.scheduler.connector._tidy()
        run(server)
    assert server.answers["second"] == answer(text, 2)
    counts = server.scheduler.connector.counts
    assert counts["prefixes_failed"] == 1
    assert counts["prefixes_saved"] == 1  # of more tokens
    assert left_over(server) == []


def test_in_a_folder_that_cannot_be_written_prefixes_are_found(tmp_path, monkeypatch):
    text = [3 + 7 * i % 80 for i in range(150)]
    server = server_of(MODES["step-by-step"], "room", tmp_path, session_prefix_tokens=64, session_gib=1)
    ask(server, "first", text, 2)
    run(server)
    server.scheduler.connector.shutdown()
    kept = server.worker.sessions

    def fail(self):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Session, "delete", fail)
    server = server_of(MODES["step-by-step"], "room", tmp_path, session_prefix_tokens=64, session_gib=1e-9)
    server.worker.sessions = kept
    ask(server, "second", [*text, 4, 5], 2)
    run(server)
    assert server.answers["second"] == answer([*text, 4, 5], 2)
    assert server.scheduler.connector.counts["prefixes_loaded"] == 1
