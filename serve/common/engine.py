"""Real vLLM engines, several per process, and a look inside them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "disable_log_stats": True,
    "seed": 0,
}
"""For tiny checkpoints."""

SMALL_ON_GPU: dict[str, Any] = {
    # Room for several, and nothing that others in the same memory could disturb by measuring.
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**30,
    # Half a minute of compiling for each geometry, most of it for steps that are not made.
    "kernel_config": {"enable_jit_warmup": False},
}


class Engine:
    """A vLLM engine in this process, its scheduler and its state slots within reach.

    Attributes:
        llm: vLLM's front.
        core: The engine core that steps.
        num_preemptions: how often a request lost its memory so far.
    """

    def __init__(self, checkpoint: Path | str, **options: Any) -> None:
        """Start an engine; options are those of vLLM's `LLM`."""
        from vllm import LLM

        self.llm = LLM(str(checkpoint), **options)
        self.core: Any = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.num_preemptions = 0
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.num_preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    @property
    def worker(self) -> Any:
        """The worker, where there is one; several have processes of their own."""
        return self.core.model_executor.driver_worker.worker

    @property
    def model(self) -> Any:
        """The model as constructed by vLLM."""
        return self.worker.model_runner.get_model()

    @property
    def manager(self) -> Any:
        """The KDA state manager in the scheduler."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return next(manager for manager in managers if type(manager).__name__ == "KDAStateManager")

    @property
    def slots(self) -> Any:
        """The slot allocator behind it."""
        return self.manager.block_pool.slots

    @property
    def counts(self) -> Any:
        """Evictions and swaps so far."""
        return self.manager.block_pool.counts

    @property
    def pool(self) -> Any:
        """The worker's states."""
        return self.model.model.state_home.pool

    def check_idle(self) -> None:
        """No request is left, so no block may be in use and none may be lost."""
        self.scheduler.check_memory()
        assert self.slots.num_live == 0, f"{self.slots.num_live} slots leaked"
        pool = self.scheduler.arena
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pages leaked"
        assert not self.manager.req_to_blocks


E = TypeVar("E", bound=Engine)


@contextmanager
def engine(checkpoint: Path, **options: Any) -> Iterator[Engine]:
    """A small engine that is shut down again, so that the next one finds a clean process."""
    with engines(Engine, checkpoint, {"": options}) as started:
        yield started[""]


@contextmanager
def engines(kind: type[E], checkpoint: Path, configurations: Mapping[Any, Mapping[str, Any]]) -> Iterator[dict[Any, E]]:
    """Several small engines at once, by name. They share vLLM's process groups, so they go together."""
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    small = SMALL | (SMALL_ON_GPU if torch.cuda.is_available() else {})
    started: dict[Any, E] = {}
    try:
        for name, options in configurations.items():
            started[name] = kind(checkpoint, **(small | options))
        yield started
    finally:
        for running in started.values():
            running.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        # The graphs in it are gone, and torch 2.11 fails where the next engine's name a pool without graphs.
        type(current_platform)._global_graph_pool = None
