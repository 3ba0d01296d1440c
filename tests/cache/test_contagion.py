"""One sick state harms no healthy request, whatever is aborted, preempted, swapped, reset or in flight meanwhile."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import vllm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.arrivals import Arrival, bursts, rounds
from support.drafter import Drafter
from support.hash_worker import Glitch
from support.hashes import NONSENSE, answer
from support.schedules import DRAFTING, MODES, ROOMY, SCARCE

from kimi_vllm.cache import contagion, scheduler
from kimi_vllm.cache.contagion import Access, Step, spread
from serve.bench.cache import replay

# Each of 42, so 1,176; fewer where `make compat` repeats them on another release's sources.
CASES = 28 if any(Path(vllm.__file__).parent.glob("_C*.so")) else 8


def access(read, *written, reads=(), writes=(), preemptions=0):
    return Access(read, written, lambda: (set(reads), set(writes)), preemptions)


def test_a_sick_slot_is_followed_through_reads_copies_and_writes():
    steps = [
        Step([(1, [7, 8])], {"sick": access(0, 1, 2), "sound": access(0, 3)}),
        # Slot 2 goes to the host and is written anew by a request that read slot 3; slot 1 is resumed from.
        Step([(2, 20)], {"sound": access(3, 2), "heir": access(1, 4)}),
        # What was on the host comes back into slot 5, slot 20 is stored anew, and the heir goes on.
        Step([(20, 5), (3, 20)], {"heir": access(4, 4, 6, preemptions=1), "late": access(5, 7)}),
    ]
    found = spread({1, 2}, steps)
    assert (found.origins, found.victims) == ({"sick": 0}, {"heir": 1, "late": 0})
    assert found.slots == {1, 4, 5, 6, 7}
    assert [step.blameless for step in steps] == [set(), {"heir"}, {"heir", "late"}]


def test_a_slot_that_gets_other_blocks_is_no_longer_sick():
    steps = [Step([], {"sick": access(0, 1, 2)}), Step([(1, [4, 5]), (2, 1), (2, [6, 7])], {})]
    assert spread({1, 2}, steps).slots == {1}


def test_sick_pages_are_followed_to_the_host_and_back():
    steps = [
        Step([], {"sick": access(0, 1, writes=[10, 11]), "sound": access(0, 2, writes=[12])}),
        Step([([10, 11, 12], [30, 31, 32])], {"other": access(2, 3, writes=[10])}),
        # 30 is loaded, 31 is overwritten by a page that is not sick, and what lay at 32 never was.
        Step([([30], [15]), ([12], [31])], {"heir": access(2, 4, reads=[15], writes=[16])}),
    ]
    found = spread({1}, steps)
    assert found.victims.keys() == {"heir"}
    assert found.pages == {11, 15, 16, 30}


def test_sick_pages_are_followed_too():
    """A prefix hit takes a state and pages, and another request may have written the pages."""
    steps = [
        Step(
            [],
            {
                "sick": access(0, 1, writes=[10, 11]),
                "sound": access(0, 2, writes=[12]),
                "at once": access(2, 3, reads=[10], writes=[13]),
                "after it": access(2, 4, reads=[13]),
            },
        ),
        Step([], {"mixed": access(2, 5, reads=[11], writes=[14]), "fine": access(2, 6, reads=[12], writes=[10])}),
    ]
    found = spread({1, 3}, steps)
    assert found.origins.keys() == {"sick"}
    assert found.victims.keys() == {"at once", "after it", "mixed"}
    assert (found.slots, found.pages) == ({1, 3, 4, 5}, {11, 13, 14})


def test_a_step_s_report_blames_nobody_who_is_known_to_have_read_a_sick_state():
    steps = [Step([], {"sick": access(0, 1)}), Step([], {"heir": access(1, 2), "sick": access(1, 1)})]
    spread({1}, steps)
    found = spread({1, 2}, [steps[1], Step([], {"other": access(2, 3)})])
    assert (found.origins.keys(), found.victims.keys()) == (set(), {"heir", "sick", "other"})
    assert found.slots == {1, 2, 3}


tokens = st.integers(0, 320) | st.integers(-12, -1)  # those below zero count from the end of the answer
sicknesses = st.dictionaries(st.integers(0, 3), st.tuples(tokens, st.booleans()), min_size=1, max_size=2)


def run_cases(make_server, on_nonfinite, cases=CASES, **options):
    """Play random schedules in which one or two requests fall ill; what was seen."""
    seen = Counter()

    @settings(
        max_examples=cases, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], **options
    )
    @given(
        rounds=st.tuples(bursts, bursts) | rounds,
        sicknesses=sicknesses,
        resets=st.frozensets(st.integers(1, 15), max_size=1),
        pages_end=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def play(rounds, sicknesses, resets, pages_end, seed):
        server = make_server(seed=seed)
        server.worker.pages_end = pages_end
        for number, schedule in enumerate(rounds):
            # In the second round the same names are healthy.
            server.worker.glitches = {} if number else glitches(schedule, sicknesses)
            server.play(schedule, resets)
            server.check_idle()
            server.check_healthy()
            for index, arrival in enumerate(schedule):
                check(server, str(index), arrival, on_nonfinite)
            seen["sick"] += sum(glitch.counted for glitch in server.worker.glitches.values())
        seen.update(cases=1, quarantined=server.scheduler._counts["quarantined"], **server.seen)

    play()
    return seen


def glitches(schedule, sicknesses):
    found = {}
    for index, (token, always) in sicknesses.items():
        if index < len(schedule):
            arrival = schedule[index]
            found[str(index)] = Glitch(token % (len(arrival.prompt) + arrival.max_tokens), always)
    return found


def check(server, name, arrival: Arrival, on_nonfinite):
    ours, reason = server.answers[name], server.reasons.get(name)
    glitch = server.worker.glitches.get(name)
    assert NONSENSE not in ours, f"{name} was told what a sick state says"
    assert ours == answer(arrival.prompt, len(ours))
    if reason == "error":
        assert glitch is not None, f"{name} failed, and was never sick"
        assert glitch.counted, f"{name} failed, and was never sick"
        assert on_nonfinite == "abort" or glitch.always, f"{name} could have been computed again"
    elif reason is not None:
        assert len(ours) == arrival.max_tokens
    else:
        assert arrival.abort_after is not None


# A few with drafts: in `test_schedules.py` the scheduler is held against every slot and page that such steps touch.
PLAIN = [(mode, name) for mode in MODES for name in SCARCE | ROOMY]
WITH_DRAFTS = list(zip(DRAFTING, ("few-blocks", "few-slots", "few-blocks"), strict=True))


@pytest.mark.parametrize("on_nonfinite", ["abort", "resume"])
@pytest.mark.parametrize(("mode", "name"), PLAIN + WITH_DRAFTS)
def test_no_healthy_request_fails_because_of_a_sick_one(name, mode, on_nonfinite):
    seen = run_cases(partial((MODES | DRAFTING)[mode].server, name, on_nonfinite), on_nonfinite)
    assert seen["cases"] >= CASES
    wanted = {"sick", "quarantined", "aborts", "hits", "resets"}
    assert {path for path in wanted if not seen[path]} == set(), seen


@pytest.mark.parametrize("on_nonfinite", ["abort", "resume"])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("mode", DRAFTING)
def test_a_draft_makes_its_request_sick_if_it_counts(mode, right, on_nonfinite):
    server = DRAFTING[mode].server("room", on_nonfinite)
    drafts = DRAFTING[mode].drafts
    server.worker.drafter = Drafter(drafts, least=drafts, luck=[int(right)])
    arrival = Arrival((), 10, 20, 0, None, 0)
    glitch = server.worker.glitches["0"] = Glitch(15, always=False)  # it is first computed as a draft
    server.play([arrival])
    server.check_healthy()
    assert (glitch.happened, glitch.counted) == (True, right)
    assert server.scheduler._counts["quarantined"] == right
    whole = answer(arrival.prompt, 20)
    assert server.answers["0"] == whole[: 20 if not right or on_nonfinite == "resume" else len(server.answers["0"])]
    assert (server.reasons["0"] == "error") == (right and on_nonfinite == "abort")


def no_walk(reported, steps):
    return spread(reported, steps[:1])


def nothing_in_flight(reported, steps):
    found = spread(reported, steps)
    return contagion.Spread(found.origins, {}, set(reported), found.pages)


def states_only(reported, steps):
    found = spread(reported, steps)
    return contagion.Spread(found.origins, found.victims, found.slots, set())


def run_all(mode):
    for name in SCARCE | ROOMY:
        run_cases(partial((MODES | DRAFTING)[mode].server, name), "abort", cases=60, phases=[Phase.generate])


@pytest.mark.parametrize("mutation", [no_walk, nothing_in_flight, states_only])
def test_a_quarantine_that_forgets_something_is_caught(mutation, monkeypatch):
    monkeypatch.setattr(scheduler, "spread", mutation)
    with pytest.raises(AssertionError, match=r"is published, and sick|is sick|was never sick|was told|another prefix"):
        run_all("two-in-flight")


def mixed_hit(on_nonfinite):
    """Two requests with the same stem start at once and the long one falls ill; a third takes pages and a state.

    The state is the short one's, the pages are the long one's, for vLLM gives out the oldest of equal pages.
    """
    server = MODES["two-in-flight"].server("room", on_nonfinite)
    stem = [3 + (7 * i) % 90 for i in range(128)]
    prompts = {"sick": stem + [5] * 170, "short": stem + [6] * 2, "third": stem + [8] * 3}
    server.worker.glitches = {"sick": Glitch(20, always=True)}

    def add(name):
        server.answers[name] = []
        server.scheduler.add_request(replay.make_request(server.scheduler, name, prompts[name], 8))

    add("sick")
    add("short")
    server.turn()
    add("third")
    server.turn()
    while server.scheduler.has_requests() or server.in_flight:
        server.turn()
    assert server.seen["hits"]
    server.check_healthy()
    return {name: server.answers[name] == answer(prompts[name], 8) for name in prompts}


@pytest.mark.parametrize("on_nonfinite", ["abort", "resume"])
def test_a_hit_on_one_request_s_state_and_another_s_pages(on_nonfinite):
    # Computed again, the sick one resumes from the good state behind its sick token.
    assert mixed_hit(on_nonfinite) == {"sick": on_nonfinite == "resume", "short": True, "third": True}


def test_without_following_pages_that_hit_fails(monkeypatch):
    monkeypatch.setattr(contagion, "_infected", lambda *_: set())
    assert not mixed_hit("abort")["third"]
