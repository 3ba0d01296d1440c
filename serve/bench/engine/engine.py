"""A vLLM engine in this process, stepped at its core: no tokenizer, no front end, the same for every variant."""

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

from kimi_vllm.options import KimiOptions
from serve.bench.engine import workers
from serve.bench.engine.plan import OURS, Plan
from serve.bench.engine.synthetic import adopt_context
from serve.common.engine import Engine

FOREVER = 1 << 20


class WrongModel(RuntimeError):  # noqa: N818  # it is the model that is wrong, not the program
    """Another implementation serves than the one that is to be measured."""


class BenchEngine(Engine):
    """One variant's engine, and the requests in it.

    Attributes:
        facts: what the engine chose by itself, for the rows.
        drafts: tokens drafted for a request at each step.
        state_itemsize: bytes of an element of KDA's recurrent state.
        seen_steps: kind and seconds of the steps that answered the engine's first requests.
        paces: whether the scheduler limits the prompt tokens of a step in which others decode.
        in_process: whether the worker is in this process; with several GPUs each has a process of its own.
        held: requests that are not over.
    """

    def __init__(self, plan: Plan, provider: str, *, cuda: bool) -> None:
        options: dict[str, Any] = {
            "load_format": plan.load_format,
            "max_model_len": plan.model_len,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.batched_tokens,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "enforce_eager": not cuda,
            "disable_log_stats": True,
            "seed": 0,
        }
        started = time.perf_counter()
        super().__init__(plan.model, **(options | plan.engine))
        ready_s = time.perf_counter() - started
        self.config: Any = self.llm.llm_engine.vllm_config
        self.in_process = self.config.parallel_config.world_size == 1
        served = self.on_workers(workers.describe)[0]
        if served["model_class"].startswith("kimi_vllm") != provider.startswith(OURS):
            raise WrongModel(
                f"{provider} was to be measured, but {served['model_class']} serves. `kimi-vllm doctor` says why."
            )
        drawn = self.on_workers(workers.draw_weights)[0] if plan.load_format == "dummy" else {}
        self.state_itemsize = int(served["state_itemsize"])
        filled = self.make_noise()
        self.drafts = int(self.config.num_speculative_tokens)
        self.paces = hasattr(self.scheduler, "_short_step")
        self.max_running = int(self.scheduler.max_num_running_reqs)
        self.max_model_len = int(self.config.model_config.max_model_len)
        self.facts = {
            **served,
            "ready_s": round(ready_s, 1),
            "tensor_parallel_size": self.config.parallel_config.tensor_parallel_size,
            "quantization": self.config.model_config.quantization,
            "max_num_seqs": self.max_running,
            "max_num_batched_tokens": self.config.scheduler_config.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "block_size": self.config.cache_config.block_size,
            "num_pages": self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
            "async_scheduling": bool(self.config.scheduler_config.async_scheduling),
            "cudagraph_mode": str(self.config.compilation_config.cudagraph_mode),
            "dtype": str(self.config.model_config.dtype),
            "weights_drawn": drawn,
            "noise_bytes": filled,
            "additional_config": str(self.config.additional_config),
            "host_gib": KimiOptions.of(self.config).host_memory_gib,
            "session_dir": bool(KimiOptions.of(self.config).session_dir),
            "session_prefix_tokens": KimiOptions.of(self.config).session_prefix_tokens,
        }
        self.seen_steps: list[tuple[str, float]] = []
        self._names = itertools.count()
        self.held: set[str] = set()
        rng = random.Random(0)
        vocabulary = plan.geometry().vocab_size
        self._tokens = [rng.randrange(3, vocabulary) for _ in range(self.max_model_len + 4096)]
        self._rng = rng

    def add(self, prompt: int, max_tokens: int) -> str:
        """Queue a request with a prompt of so many random tokens, to be computed; return its id."""
        return self.add_tokens(self.tokens(prompt), max_tokens)

    def tokens(self, count: int) -> list[int]:
        """So many random tokens."""
        start = self._rng.randrange(4096)
        return self._tokens[start : start + count]

    def distinct_tokens(self, number: int, count: int) -> list[int]:
        """So many tokens, of which no prefix is one of another number's, up to 4,096."""
        return self._tokens[number : number + count]

    def add_tokens(self, prompt: list[int], max_tokens: int, **sessions: str) -> str:
        """Queue a request with this prompt, which saves or loads a session; return its id."""
        request = self._request(prompt, max_tokens, sessions)
        self.core.add_request(request)
        return self._hold(request)

    def add_decoding(self, context: int, growth: int) -> str | None:
        """Queue a request whose next step decodes its first token after `context` made-up ones; None if full.

        It stops after more than `growth` tokens; so many are sure to fit.
        """
        prompt = min(context, self.max_model_len - growth - 1)
        request = self._request(self.tokens(prompt), min(FOREVER, self.max_model_len - prompt))
        if not adopt_context(self.scheduler, request, growth, others=len(self.held)):
            return None
        self.core.add_request(request)
        return self._hold(request)

    def fill(self, context: int, most: int, growth: int) -> list[str]:
        """Queue decoding requests until `most` or as many as fit are there; return their ids."""
        added: list[str] = []
        while len(added) < min(most, self.max_running):
            name = self.add_decoding(context, growth)
            if name is None:
                break
            added.append(name)
        return added

    def make_noise(self) -> int:
        """Fill the memory of all contexts with noise; return the bytes filled.

        Pages that vLLM's own model takes are cleared when a request gets them, so this is called again then.
        """
        return int(self.on_workers(workers.make_noise)[0])

    def on_workers(self, function: Callable[..., Any]) -> list[Any]:
        """Call a function of `serving.workers` in every worker; return what each said."""
        return list(self.core.model_executor.collective_rpc(function))

    def step(self) -> tuple[float, dict[str, int]]:
        """One step of the core; the time at which its tokens were there, and how many each request got."""
        outputs, executed = self.core.step_fn()
        self.core.post_step(model_executed=executed)
        now = time.perf_counter()
        if not executed and self.scheduler.has_requests():
            time.sleep(0.001)  # as vLLM's process does, for threads that load what requests wait for
        got: dict[str, int] = {}
        for group in (outputs or {}).values():
            for output in group.outputs:
                if output.new_token_ids:
                    got[output.request_id] = len(output.new_token_ids)
                if output.finish_reason is not None:
                    self.held.discard(output.request_id)
        return now, got

    def finish(self) -> None:
        """Step until no request is left."""
        while self.held:
            self.step()

    def kinds_of_steps(self) -> list[tuple[str, float]]:
        """Step until no request is left; of each step its kind, in powers of two, and the seconds until it was done."""
        done: list[tuple[str, float]] = []
        update = self.scheduler.update_from_output

        def noted(scheduled: Any, output: Any) -> Any:
            # Called with what was scheduled for just this output, also where two steps are in flight.
            updated = update(scheduled, output)
            if scheduled.total_num_scheduled_tokens:
                done.append((_kind(scheduled), time.perf_counter()))
            return updated

        self.scheduler.update_from_output = noted
        started = time.perf_counter()
        try:
            self.finish()
        finally:
            self.scheduler.update_from_output = update
        times = [started, *(when for _, when in done)]
        return [(kind, after - before) for (kind, after), before in zip(done, times, strict=False)]

    def clear(self) -> None:
        """Abort all requests, and step until the worker has heard of it.

        Raises:
            RuntimeError: pages are still in use.
        """
        self.core.abort_requests(list(self.held))
        self.held.clear()
        for _ in range(20):
            if not self.scheduler.has_requests() and not getattr(self.core, "batch_queue", None):
                break
            self.step()
        pool = self.scheduler.kv_cache_manager.block_pool
        if (used := pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) > 0:
            raise RuntimeError(f"{used} pages are still in use after all requests were aborted.")

    def _request(self, prompt: list[int], max_tokens: int, sessions: dict[str, str] | None = None) -> Any:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        request = EngineCoreRequest(
            request_id=f"bench-{next(self._names)}",
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                stop_token_ids=[],
                extra_args={"kv_transfer_params": sessions} if sessions else None,
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return self.core.preprocess_add_request(request)[0]

    def _hold(self, request: Any) -> str:
        self.held.add(request.request_id)
        return str(request.request_id)


def _kind(output: Any) -> str:
    counts = output.num_scheduled_tokens.values()
    decodes = sum(count == 1 for count in counts)
    prompts = sum(counts) - decodes
    return f"{1 << (prompts - 1).bit_length() if prompts else 0}+{1 << (decodes - 1).bit_length() if decodes else 0}"
