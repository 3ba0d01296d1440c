"""The measurements, each a function from an engine to the fields of one row."""

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kimi_vllm.sizing import weight_format
from serve.bench.engine import routing, workers
from serve.bench.engine.again import again
from serve.bench.engine.engine import BenchEngine
from serve.bench.engine.floor import floor_ms, peak_tbps, step_bytes
from serve.bench.engine.plan import Plan
from serve.bench.engine.profile_steps import profile_kernels, summarise
from serve.bench.engine.resume import resume
from serve.bench.engine.step_clock import StepClock, percentile, summary_ms

Point = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]
"""What is measured, at which case, and how."""


def points(engine: BenchEngine, plan: Plan, *, cuda: bool) -> Iterator[Point]:
    """All points of a plan, those that matter most first; what an engine does once it is ready comes before all."""
    moe = plan.geometry().moe
    if "routing" in plan.measurements and moe is not None and cuda:
        share = moe.num_experts_per_token / moe.num_experts
        case = {"context": plan.contexts[0], "batch": plan.batch_cap}
        yield "routing", case, lambda: spread_routing(engine, plan, moe.num_experts, share)
    if "ready" in plan.measurements:
        for run in ("first", "second"):
            yield "ready", {"prompts": plan.ready_prompts, "run": run}, lambda: ready(engine, plan)
    if "tpot" in plan.measurements:
        for batch in ("1", "largest"):
            for context in plan.contexts:
                most = 1 if batch == "1" else min(plan.batch_cap, engine.max_running)
                case = {"context": context, "batch": batch}
                yield "tpot", case, lambda c=context, m=most: tpot(engine, plan, c, m, cuda=cuda)
    if "concurrency" in plan.measurements:
        for prompt in plan.prompts:
            yield "concurrency", {"prompt": prompt}, lambda p=prompt: concurrency(engine, p)
    if "mixed" in plan.measurements:
        case = {"decoders": plan.decoders, "context": plan.decoder_context, "prompt": plan.arrival}
        yield "mixed", case, lambda: mixed(engine, plan)
        for limit in plan.beside if engine.paces else ():
            yield "mixed", case | {"beside": limit}, lambda b=limit: mixed(engine, plan, b)
    if "prefill" in plan.measurements:
        for prompt in plan.prefills:
            yield "prefill", {"prompt": prompt}, lambda p=prompt: prefill(engine, plan, p, cuda=cuda)
    if "throughput" in plan.measurements:
        for requests, prompt, output in plan.loads:
            case = {"requests": requests, "prompt": prompt, "output": output}
            yield "throughput", case, lambda r=requests, p=prompt, o=output: throughput(engine, plan, r, p, o)
    if "resume" in plan.measurements and engine.facts["session_dir"]:
        for prompt in plan.resumed:
            yield "resume", {"prompt": prompt}, lambda p=prompt: resume(engine, plan, p)
    if "again" in plan.measurements and engine.config.cache_config.enable_prefix_caching:
        for count, prompt in plan.repeated:
            behind = {"host_gib": engine.facts["host_gib"], "disk": bool(engine.facts["session_prefix_tokens"])}
            case = {"prompts": count, "prompt": prompt} | behind
            yield "again", case, lambda c=count, p=prompt: again(engine, plan, c, p)
    if "drafts" in plan.measurements:
        for requests in plan.draft_requests:
            for share in plan.draft_shares if engine.drafts else (None,):
                case = {"requests": requests, "context": plan.draft_context, "drafts": engine.drafts, "right": share}
                yield "drafts", case, lambda r=requests, s=share: drafts(engine, plan, r, s)


def spread_routing(engine: BenchEngine, plan: Plan, experts: int, share: float) -> dict[str, Any]:
    """Balance the routers' biases, for all that follows; how many experts a layer reads before and after."""
    names = engine.fill(plan.contexts[0], min(plan.batch_cap, engine.max_running), len(routing.RATES) + 16)
    engine.step()
    engine.make_noise()
    engine.on_workers(routing.start)
    try:
        for rate in (0.0, 0.0, *routing.RATES, 0.0, 0.0, 0.0):
            engine.on_workers(partial(routing.balance, rate=rate))
            engine.step()
    finally:
        [read, *_] = engine.on_workers(routing.stop)  # of each step
    return {
        "context": "synthetic",
        "requests": len(names),
        "experts_read_before": read[0],
        "experts_read": read[-1],
        "experts_read_by_step": read,
        "experts_read_if_uniform": round(experts * (1 - (1 - share) ** len(names)), 2),
    }


def tpot(engine: BenchEngine, plan: Plan, context: int, most: int, *, cuda: bool) -> dict[str, Any]:
    """Time per output token with up to `most` requests of `context` tokens each, and where it goes."""
    names = engine.fill(context, most, plan.growth)
    if not names:
        return {"skipped": f"not even one request of {context} tokens fits"}
    if most > 1 and len(names) == 1:
        return {"skipped": "no second request fits, so this is batch 1"}
    preempted = engine.num_preemptions
    clock = _timed_steps(engine, plan)
    if len(clock.arrivals) < 2:
        return {"skipped": f"no two steps in {plan.budget_s:g} s"}
    seconds = summary_ms(clock.intervals())
    requests = len(engine.scheduler.running)
    full = sum(len(tokens) == requests for _, tokens in clock.arrivals)
    geometry, itemsize = plan.geometry(), engine.config.model_config.dtype.itemsize
    ranks = engine.config.parallel_config.tensor_parallel_size
    moved = step_bytes(
        geometry, requests, context, itemsize, engine.state_itemsize, ranks, weight_format(engine.config)
    )
    peak = plan.bandwidth_tbps or peak_tbps()
    fields: dict[str, Any] = {
        "context": "synthetic",
        "requests": requests,
        "tpot": seconds,
        "tokens_per_s": round(requests / seconds["p50_ms"] * 1e3, 1),
        "steps_with_all_requests": f"{full}/{len(clock.arrivals)}",
        "preemptions": engine.num_preemptions - preempted,
        "floor_ms": None if not peak else round(floor_ms(moved, peak), 4),
        "floor_bytes": {"weights": moved.weights, "kv": moved.kv, "state": moved.state},
    }
    return fields | {"profile": _profiled(engine, engine.step, plan.profiled, seconds["p50_ms"], cuda=cuda)}


def _profiled(
    engine: BenchEngine, step: Callable[[], object], times: int, wall_ms: float, *, cuda: bool
) -> dict[str, Any]:
    """Where the GPU's time goes in so many calls of `step`, each of which takes `wall_ms`; or why that is not known."""
    if not times:
        return {"skipped": "not asked for"}
    if not cuda:
        return {"skipped": "kernels are profiled on CUDA devices only"}
    if not engine.in_process:
        return {"skipped": "kernels are profiled with one GPU only"}
    try:
        return summarise(profile_kernels(step, times), times, wall_ms)
    except Exception as error:  # the times are measured; they must not be lost with the profile
        return {"error": repr(error)}


def _timed_steps(engine: BenchEngine, plan: Plan) -> StepClock:
    """Let requests that were added take their first step, warm up, and time steps; none if the first has no tokens."""
    first = StepClock()
    first.run(engine.step, 1, time.perf_counter() + plan.budget_s)
    if not first.arrivals:
        return first
    engine.make_noise()
    # Kernels may be compiled here, which is not to come out of the time for the steps themselves.
    StepClock().run(engine.step, plan.warmup, time.perf_counter() + 2 * plan.budget_s)
    clock = StepClock()
    clock.run(engine.step, plan.steps + 1, time.perf_counter() + plan.budget_s)
    return clock


def drafts(engine: BenchEngine, plan: Plan, requests: int, share: float | None) -> dict[str, Any]:
    """Tokens per second where each draft is random and, if those before it were, right with this probability."""
    if share is not None:
        engine.on_workers(partial(workers.draft, share=share))
    names = engine.fill(plan.draft_context, requests, plan.growth * (1 + engine.drafts))
    if len(names) < requests:
        return {"skipped": f"only {len(names)} requests fit"}
    engine.on_workers(partial(workers.adopt_states, context=plan.draft_context - 1))
    preempted = engine.num_preemptions
    clock = _timed_steps(engine, plan)
    if len(clock.arrivals) < 2:
        return {"skipped": f"no two steps in {plan.budget_s:g} s"}
    made = sum(sum(tokens.values()) for _, tokens in clock.arrivals[1:])
    seconds = clock.arrivals[-1][0] - clock.arrivals[0][0]
    return {
        "context": "synthetic",
        "step": summary_ms(clock.intervals()),
        "tokens_per_s": round(made / seconds, 1),
        "tokens_per_step": round(made / (len(clock.arrivals) - 1) / requests, 3),
        "preemptions": engine.num_preemptions - preempted,
    }


def concurrency(engine: BenchEngine, prompt: int) -> dict[str, Any]:
    """How many requests with such prompts the scheduler runs at once, none of them losing its memory again."""
    quiet_steps, growth = 8, 64
    preempted = engine.num_preemptions
    queued = len(engine.fill(prompt, engine.max_running, growth))
    quiet, running = 0, -1
    for _ in range(growth):
        engine.step()
        before = running
        running = len(engine.scheduler.running)
        quiet = quiet + 1 if running == before else 0
        if quiet == quiet_steps:
            break
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return {
        "context": "synthetic",
        "running": running,
        "queued": queued,
        "limited_by": "max_num_seqs" if running == engine.max_running else "memory",
        "max_num_seqs": engine.max_running,
        "free_pages": free,
        "preemptions": engine.num_preemptions - preempted,
    }


def mixed(engine: BenchEngine, plan: Plan, beside: int | None = None) -> dict[str, Any]:
    """What decoding requests feel of prompts that arrive, and how long those wait for their first token.

    `beside` limits the tokens of a step with prompts and decodes, from here on; None leaves the limit as it is.
    """
    if beside is not None:
        engine.scheduler._short_step = beside
    deadline = time.perf_counter() + 3 * plan.budget_s
    _first_token(engine, plan.arrival, deadline)  # compiles what a step of this shape needs
    engine.clear()
    preempted = engine.num_preemptions
    growth = 1024
    decoders = engine.fill(plan.decoder_context, plan.decoders, growth)
    quiet = StepClock()
    quiet.run(engine.step, plan.warmup, deadline)
    engine.make_noise()
    quiet.run(engine.step, plan.warmup, deadline)
    quiet = StepClock()
    quiet.run(engine.step, plan.steps, deadline)
    clock, started = StepClock(), time.perf_counter()
    due = [started + index * plan.every_s for index in range(plan.arrivals)]
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    while len(first) < plan.arrivals and time.perf_counter() < deadline:
        while due and due[0] <= time.perf_counter():
            # Time waits for nobody: a prompt that was due during a step has been waiting since then.
            asked[engine.add(plan.arrival, 1)] = due.pop(0)
        now, tokens = engine.step()
        if tokens:
            clock.arrivals.append((now, tokens))
        first |= {name: now - asked[name] for name in tokens.keys() & asked.keys()}
    return {
        "context": "synthetic for decoding requests, real for prompts",
        "running_decoders": len(decoders),
        "itl": summary_ms(clock.inter_token_latencies(decoders)),
        "itl_undisturbed": summary_ms(quiet.inter_token_latencies(decoders)),
        "ttft": summary_ms(list(first.values())),
        "arrived": len(asked),
        "answered": len(first),
        "every_s": plan.every_s,
        "seconds": round(time.perf_counter() - started, 3),
        "max_num_batched_tokens": engine.facts["max_num_batched_tokens"],
        "mixed_step_tokens": engine.scheduler._short_step if engine.paces else 0,
        "preemptions": engine.num_preemptions - preempted,
    }


def prefill(engine: BenchEngine, plan: Plan, prompt: int, *, cuda: bool) -> dict[str, Any]:
    """Time to the first token of one prompt, nothing else running; the first of two or more runs is discarded."""
    deadline = time.perf_counter() + plan.budget_s
    warmup = _first_token(engine, prompt, deadline)
    if warmup is None:
        return {"context": "real", "skipped": f"took longer than {plan.budget_s:g} s"}
    times: list[float] = []
    while len(times) < 3 and time.perf_counter() + (times or [warmup])[-1] < deadline:
        seconds = _first_token(engine, prompt, deadline)
        if seconds is None:
            break
        times.append(seconds)
    kept = times or [warmup]
    ttft = summary_ms(kept)
    return {
        "context": "real",
        "ttft": ttft,
        "tokens_per_s": round(prompt / ttft["p50_ms"] * 1e3, 1),
        "warmup_s": round(warmup, 4),
        "warmup_only": not times,
        "max_num_batched_tokens": engine.facts["max_num_batched_tokens"],
        "profile": _profiled(
            engine,
            lambda: _first_token(engine, prompt, float("inf")),
            int(bool(plan.profiled)),
            ttft["p50_ms"],
            cuda=cuda,
        ),
    }


def throughput(engine: BenchEngine, plan: Plan, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """Tokens read and written per second by requests that come at once; every prompt is computed."""
    preempted = engine.num_preemptions
    seconds = []
    for _ in range(1 + plan.repeats):
        started = time.perf_counter()
        for _ in range(requests):
            engine.add(prompt, output)
        engine.finish()
        seconds.append(time.perf_counter() - started)
    tokens = requests * (prompt + output)
    timed = seconds[1:] or seconds
    return {
        "context": "real",
        "seconds": [round(second, 3) for second in timed],
        "first_s": round(seconds[0], 3),
        "tokens_per_s": round(tokens / percentile(timed, 0.5), 1),
        "preemptions": engine.num_preemptions - preempted,
    }


def ready(engine: BenchEngine, plan: Plan) -> dict[str, Any]:
    """Prompts of mixed lengths, as an engine's first requests and once more: steps beside others of their kind.

    A step's kind is its number of new prompt tokens and of decoding requests, each to the next power of two. A kind
    that is rare has its like in the second run, so both runs count for its median.
    """
    rng = random.Random(0)
    longest = min(3000, engine.max_model_len - 65)
    for _ in range(plan.ready_prompts):
        engine.add(rng.randint(min(20, longest), longest), 64)
    started = time.perf_counter()
    steps = engine.kinds_of_steps()
    seconds = time.perf_counter() - started
    engine.seen_steps += steps
    slow = {}
    for kind in {kind for kind, _ in engine.seen_steps}:
        times = [time for other, time in engine.seen_steps if other == kind]
        if (ratio := max(times) / percentile(times, 0.5)) > 3:
            slow[kind] = round(ratio, 2)
    return {
        "context": "real",
        "seconds": round(seconds, 3),
        "steps": len(steps),
        "worst_step_s": round(max(time for _, time in steps), 4),
        "beyond_three_medians": slow,
    }


def _first_token(engine: BenchEngine, prompt: int, deadline: float) -> float | None:
    """Seconds until a new request has its first token, or None if that takes too long."""
    prompt = min(prompt, engine.max_model_len - 1)
    started = time.perf_counter()
    name = engine.add(prompt, 1)
    while True:
        now, tokens = engine.step()
        if name in tokens:
            return now - started
        if now > deadline:
            engine.clear()
            return None
