"""Prefixes without a name: found again by their tokens, and saved where a later prompt gains from it."""

from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest

from kimi_vllm.cache import prefix_policy
from kimi_vllm.cache.prefix_files import PrefixFiles
from kimi_vllm.cache.prefix_policy import PrefixPolicy
from kimi_vllm.cache.session_folder import SessionError, check_name, file_of, is_prefix_name, salted, sessions


def put(folder, name, salt=None, ranks=1, missing=()):
    for rank in set(range(ranks)) - {*missing}:
        file_of(folder, name, salt, rank, ranks).write_bytes(bytes(10))


def files_of(folder, ranks=1, engine="a"):
    files = PrefixFiles(ranks, engine)
    files.look(sessions(folder))
    return files


def name_of(tokens, engine="a"):
    return PrefixFiles(1, engine).named(tokens, [len(tokens)])[len(tokens)]


def longest(files, tokens, tenant=""):
    there = files.there(tokens, tenant, 1, len(tokens))
    return there[max(there)] if there else None


@pytest.mark.parametrize("seed", range(20))
def test_what_is_there_is_found(seed, tmp_path):
    random = Random(seed)
    texts = [[random.randrange(2) for _ in range(40)] for _ in range(6)]
    there = {tuple(text[: random.randrange(1, 40)]) for text in texts for _ in range(3)}
    for tokens in there:
        put(tmp_path, name_of(tokens))
    for text in texts:
        least, most = sorted([random.randrange(1, 41), random.randrange(1, 41)])
        found = files_of(tmp_path).there(text, "", least, most)
        known = {count: name_of(text[:count]) for count in range(least, most + 1) if tuple(text[:count]) in there}
        assert found == known


def test_others_files_are_not_found(tmp_path):
    """Another tenant's, another engine's, one of other ranks, one that lacks a rank, and a named one."""
    tokens = list(range(70))
    name = name_of(tokens)
    put(tmp_path, "name")
    put(tmp_path, name, salt="x")
    put(tmp_path, name_of(tokens, engine="b"))
    put(tmp_path, name, ranks=2)
    put(tmp_path, name_of(tokens[:60]), ranks=3, missing=[1])
    assert longest(files_of(tmp_path), tokens) is None
    assert longest(files_of(tmp_path), tokens, salted("x")) == name
    assert longest(files_of(tmp_path, ranks=2), tokens) == name
    assert longest(files_of(tmp_path, ranks=3), tokens) is None
    assert longest(files_of(tmp_path, engine="b"), tokens) == name_of(tokens, engine="b")


def test_what_cannot_be_read_is_not_found_until_it_is_replaced(tmp_path):
    tokens = [1, 2, 3]
    put(tmp_path, name_of(tokens))
    files = files_of(tmp_path)
    files.forget(name_of(tokens), "")
    for _ in range(2):
        assert longest(files, tokens) is None
        files.look(sessions(tmp_path))
    # By another process, under another name first.
    put(tmp_path, "new")
    (tmp_path / "new.session").rename(file_of(tmp_path, name_of(tokens), None, 0, 1))
    files.look(sessions(tmp_path))
    assert longest(files, tokens) == name_of(tokens)
    files.forget(name_of(tokens), "")
    files.add(name_of(tokens), "")
    assert longest(files, tokens) == name_of(tokens)
    files.look([])
    assert longest(files, tokens) is None


def test_no_request_can_name_one():
    name = name_of([1, 2, 3])
    assert is_prefix_name(name)
    with pytest.raises(SessionError):
        check_name(name)


def test_they_are_deleted_before_what_has_a_name(tmp_path):
    put(tmp_path, "a")
    put(tmp_path, name_of([1]))
    put(tmp_path, "b")
    assert [one.is_prefix for one in sessions(tmp_path)] == [True, False, False]


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(prefix_policy, "time", clock)
    return clock


TEXT = list(range(300))


def request(name, tokens, junction=0, prompt=None, **more):
    values = {"cache_salt": None, "prompt_embeds": None, "resumable": False, "skip_reading_prefix_cache": False}
    values |= {
        "request_id": name,
        "all_token_ids": tokens,
        "num_tokens": len(tokens),
        "shared_prefix_boundary": junction,
    }
    return SimpleNamespace(**values | {"num_prompt_tokens": prompt or len(tokens)} | more)


def policy_of(folder, least=50):
    return PrefixPolicy(files_of(folder), least, Counter())


def chosen(policy, request, *kept):
    choice = policy.choose(request, lambda most: max([0, *(count for count in kept if count <= most)]))
    return None if choice is None else choice[1]


def test_of_a_token_that_was_not_computed_nothing_is_saved(tmp_path, clock):
    """The last one was sampled; another request, whose prompt goes on from it, has a state there."""
    assert chosen(policy_of(tmp_path), request("a", TEXT[:128], prompt=70), 64, 128) == 64


def test_what_is_deleted_as_soon_as_it_is_saved_is_not_saved_for_a_while(tmp_path, clock):
    policy = policy_of(tmp_path)
    for name, deleted, warned in (("a", False, False), ("b", True, True)):
        asked = request(name, [*TEXT[:64], *name.encode(), *TEXT])
        assert chosen(policy, asked, 128) == 128
        policy.saved(name, failed=False)
        put(tmp_path, name_of(asked.all_token_ids[:128]))
        assert policy.look(sessions(tmp_path), sessions(tmp_path)[:1] if deleted else []) == warned
        for path in tmp_path.iterdir():
            path.unlink()
    assert chosen(policy, request("c", TEXT), 64) is None
    clock.now = 61
    assert chosen(policy, request("c", TEXT), 64) == 64


def test_what_was_found_in_the_cache_is_saved_before_anything_else(tmp_path, clock):
    policy = policy_of(tmp_path)
    for name, count in (("a", 64), ("b", 128)):
        asked = request(name, TEXT, 128)
        assert policy.find(asked, 64) is None
        policy.find(asked, 0)  # again, as after it was preempted
        assert chosen(policy, asked, 64, 128, 256) == count
        policy.saved(name, failed=False)
        policy.ended(name)
    assert not policy._hits


def test_what_serves_a_prompt_again_is_saved_before_its_answer(tmp_path, clock):
    """The last token of a prompt must be computed to get the next."""
    policy = policy_of(tmp_path)
    assert chosen(policy, request("a", TEXT, prompt=128), 64, 128, 192) == 64
    policy.saved("a", failed=False)
    assert chosen(policy, request("b", TEXT, prompt=128), 64, 128, 192) == 192


def test_what_is_shared_is_saved_first_then_the_rest(tmp_path, clock):
    policy = policy_of(tmp_path)
    assert chosen(policy, request("a", TEXT, 128), 64, 128, 256) == 128
    policy.saved("a", failed=False)
    assert chosen(policy, request("b", TEXT, 128), 64, 128, 256) == 256
    policy.saved("b", failed=False)
    assert chosen(policy, request("c", TEXT, 128), 64, 128, 256) is None
    assert policy._counts == {"prefixes_saved": 2}


def test_what_adds_little_is_not_saved(tmp_path, clock):
    policy = policy_of(tmp_path)
    assert chosen(policy, request("a", TEXT[:49]), 49) is None
    assert chosen(policy, request("b", TEXT), 64) == 64
    policy.saved("b", failed=False)
    assert chosen(policy, request("c", TEXT), 64, 113) is None
    assert chosen(policy, request("d", TEXT), 64, 114) == 114
    assert chosen(policy_of(tmp_path, least=0), request("e", TEXT), 256) is None


def test_one_prefix_is_written_once_and_few_at_a_time(tmp_path, clock):
    policy = policy_of(tmp_path)
    assert chosen(policy, request("a", TEXT), 64) == 64
    assert chosen(policy, request("b", TEXT), 64) is None
    assert chosen(policy, request("c", TEXT[1:]), 64) == 64
    assert chosen(policy, request("d", TEXT[2:]), 64) is None
    assert policy._counts == {"prefixes_skipped": 1}
    assert [policy.leaves(name) for name in "abcd"] == [True, False, True, False]
    policy.saved("a", failed=False)
    assert chosen(policy, request("d", TEXT[2:]), 64) == 64


def test_after_a_failure_none_is_saved_for_a_while(tmp_path, clock):
    policy = policy_of(tmp_path)
    assert chosen(policy, request("a", TEXT), 64) == 64
    policy.saved("a", failed=True)
    clock.now = 59
    assert chosen(policy, request("b", TEXT), 64) is None
    clock.now = 61
    assert chosen(policy, request("b", TEXT), 64) == 64
    assert policy._counts == {"prefixes_failed": 1, "prefixes_skipped": 1}


def test_one_is_loaded_where_it_spares_enough(tmp_path, clock):
    put(tmp_path, name_of(TEXT[:128]))
    policy = policy_of(tmp_path)
    asked = request("a", TEXT)
    assert [policy.find(asked, computed) is None for computed in (0, 78, 79, 128)] == [False, False, True, True]
    assert policy.find(request("b", TEXT[:129]), 0) == name_of(TEXT[:128])
    assert policy.find(request("c", TEXT[:128]), 0) is None  # nothing would be left to compute
    assert policy.find(request("d", TEXT, cache_salt="x"), 0) is None
    assert policy.find(request("e", TEXT, prompt_embeds=[]), 0) is None
    assert policy.find(request("f", TEXT, resumable=True), 0) is None
    assert policy.find(request("g", TEXT, skip_reading_prefix_cache=True), 0) is None
    assert policy_of(tmp_path, least=0).find(request("h", TEXT), 0) is None


def test_what_a_request_has_found_it_finds_again_and_what_cannot_be_read_nobody_else(tmp_path, clock):
    put(tmp_path, name_of(TEXT[:128]))
    policy = policy_of(tmp_path)
    policy.find(request("a", TEXT), 0)
    policy.loaded("a", failed=True)
    assert policy.find(request("a", TEXT), 0) == policy.found("a") == name_of(TEXT[:128])
    assert policy.find(request("b", TEXT), 0) is None
    policy.ended("a")
    assert policy.found("a") is None
    assert policy._counts == {"prefixes_failed": 1}


def test_the_folder_is_looked_at_now_and_then(tmp_path, clock):
    policy = policy_of(tmp_path)
    assert [policy.due(), policy.due()] == [True, False]
    clock.now = 31
    put(tmp_path, name_of(TEXT[:128]))
    assert policy.due()
    policy.look(sessions(tmp_path), ())
    assert policy.find(request("a", TEXT), 0) == name_of(TEXT[:128])
    assert not policy_of(tmp_path, least=0).due()
