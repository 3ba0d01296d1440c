"""What the benchmark does inside a worker: one in this process, or one process a GPU with tensor parallelism.

Each function takes vLLM's worker first, as `collective_rpc` calls it.
"""

from typing import Any

import torch

from serve.bench.engine.synthetic import fill_memory, randomise

_seen: dict[str, Any] = {}
"""What has held up a step of this worker since `watch` was called."""
_installed = False


def describe(worker: Any) -> dict[str, Any]:
    """The class that serves, blocks of a state, bytes of an element of its recurrent matrix and of all parameters."""
    model = worker.model_runner.get_model()
    home = getattr(getattr(model, "model", None), "state_home", None)
    return {
        "model_class": f"{type(model).__module__}.{type(model).__name__}",
        # vLLM's own model has no other state than one in float32.
        "state_blocks": 0 if home is None else home.pool.layout.blocks,
        "state_itemsize": 4 if home is None else home.pool.layout.cut.state_dtype.itemsize,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "memory_reserved": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
    }


def draw_weights(worker: Any) -> dict[str, int]:
    """See `randomise`."""
    return randomise(worker.model_runner.get_model())


def make_noise(worker: Any) -> int:
    """See `fill_memory`."""
    config, runner = worker.vllm_config, worker.model_runner
    context = config.compilation_config.static_forward_context
    return fill_memory(runner, context, config.model_config.dtype)


def adopt_states(worker: Any, context: int) -> None:
    """Take the noise in all of our slots for states after so many tokens."""
    if (home := getattr(getattr(worker.model_runner.get_model(), "model", None), "state_home", None)) is not None:
        home.pool.base.fill_(context)


def draft(worker: Any, share: float) -> None:
    """From now on draft random tokens, which are right with this probability.

    Raises:
        RuntimeError: Not with vLLM's synthetic rejection in its second model runner, which needs a GPU.
    """
    runner = worker.model_runner
    speculator = getattr(runner, "speculator", None)
    rates = runner.rejection_sampler.synthetic_conditional_rates
    if rates is None or speculator is None:
        raise RuntimeError('drafts are right to a set degree with "rejection_sample_method": "synthetic" on GPUs only')
    rates.fill_(share)
    random, vocabulary = torch.empty_like(speculator.drafts), worker.model_config.get_vocab_size()

    def propose(batch: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        return random.random_(3, vocabulary)[: batch.num_reqs]

    speculator.propose = propose


def watch(worker: Any) -> None:
    """Forget what was seen, and from now on note Triton kernels that are compiled, or loaded for the first time."""
    global _installed
    import triton

    _seen.clear()
    _seen["retries"] = _retries()
    if _installed:
        return
    before = triton.knobs.runtime.jit_post_compile_hook

    def record(*, fn: Any, **others: Any) -> Any:
        _seen.setdefault("compiled", []).append(f"{fn.module}.{fn.name}")
        return None if before is None else before(fn=fn, **others)

    triton.knobs.runtime.jit_post_compile_hook, _installed = record, True


def hiccups(worker: Any) -> dict[str, Any]:
    """What can hold up a step for seconds, seen since `watch`: kernels compiled, memory freed and asked for again."""
    found = {"compiled": list(_seen["compiled"])} if _seen.get("compiled") else {}
    again = _retries() - _seen.get("retries", 0)
    return found | ({"allocations_retried": again} if again else {})


def _retries() -> int:
    return int(torch.cuda.memory_stats()["num_alloc_retries"]) if torch.cuda.is_available() else 0
