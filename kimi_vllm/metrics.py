"""The state cache on vLLM's ``/metrics``.

`cache/scheduler.py` counts, and sends its numbers along with vLLM's own statistics. This logger, which vLLM finds by
the entry point ``vllm.stat_logger_plugins``, turns them into Prometheus metrics in the process that serves
``/metrics``, so they work with several API servers. For other models it shows nothing. Numbers only: no prompts.
"""

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from kimi_vllm import ARCHITECTURE
from kimi_vllm.cache.exchange import STATS

PREFIX = "kimi_state_"
_LABELS = ("model_name", "engine")
_HIT_BUCKETS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
_GAUGES = {
    "slots": "KDA states: of running requests, kept as checkpoints, and in host memory.",
    "blocks": "Blocks of memory: clean (hold nothing), loose (cached pages that no kept state needs), kept (cached "
    "pages that a kept state needs), page (in use), state (of requests, kept, or spare).",
    "host_blocks": "Blocks of host memory: clean, page (cached pages that a kept state needs), state.",
}
_KINDS = {
    "slots": ("live", "checkpoint", "host"),
    "blocks": ("clean", "loose", "kept", "page", "state"),
    "host_blocks": ("clean", "page", "state"),
}
_COUNTERS = {
    "hit_tokens": "Prompt tokens that were skipped because a request resumed from a checkpoint.",
    "miss_tokens": "Prompt tokens that were computed.",
    "evictions": "Checkpoints that were evicted to free their blocks.",
    "page_evictions": "Cached pages that were evicted to free their blocks; not those that went to host memory.",
    "value_lost": "Blocks of tokens to compute again, of all checkpoints that were given up.",
    "swaps_out": "States copied to host memory.",
    "swaps_in": "States copied back from host memory.",
    "page_swaps_out": "Pages copied to host memory.",
    "page_swaps_in": "Pages copied back from host memory.",
    "swap_bytes": "Bytes copied to and from host memory, on a worker of the first pipeline stage.",
    "sessions_resumed": "Requests that went on from a saved session.",
    "sessions_missed": "Requests that named a session and computed their prompt.",
    "sessions_saved": "Sessions that were saved.",
    "sessions_unsaved": "Sessions that could not be saved.",
    "sessions_deleted": "Sessions that were deleted to stay within `session_gib`.",
    "prefixes_loaded": "Requests that went on from a saved prefix that they did not name.",
    "prefixes_saved": "Prefixes that were saved without being named.",
    "prefixes_failed": "Prefixes that could not be saved, or not be loaded.",
    "prefixes_skipped": "Prefixes that were not saved: others were being written, or one could not be a minute ago.",
    "steps_without_drafts": "Steps that went without drafts because few had been accepted.",
    "quarantined": "Requests whose state became NaN or infinite.",
}


class StateCacheMetrics(AggregateStatLoggerBase):
    """Prometheus metrics of the KDA state cache, one set for all engines of a server."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        architectures = getattr(vllm_config.model_config.hf_config, "architectures", None) or ()
        self._active = ARCHITECTURE in architectures
        if not self._active:
            return
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith(PREFIX):
                REGISTRY.unregister(collector)
        self._model: Any = vllm_config.model_config.served_model_name
        hits = Histogram(
            f"{PREFIX}hit_length_tokens",
            "Prompt tokens per request that were skipped by resuming from a checkpoint, 0 for none.",
            _LABELS,
            buckets=_HIT_BUCKETS,
        )

        def by_engine(metric: Any, *more: str) -> dict[int, Any]:
            return {engine: metric.labels(self._model, str(engine), *more) for engine in engine_indexes}

        self._gauges: dict[str, dict[int, Any]] = {}
        for name, text in _GAUGES.items():
            gauge = Gauge(f"{PREFIX}{name}", text, (*_LABELS, "kind"), multiprocess_mode="mostrecent")
            self._gauges |= {f"{name}_{kind}": by_engine(gauge, kind) for kind in _KINDS[name]}
        self._counters = {
            name: by_engine(Counter(f"{PREFIX}{name}", text, _LABELS)) for name, text in _COUNTERS.items()
        }
        self._hits = by_engine(hits)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Add the numbers of one step."""
        if not self._active or scheduler_stats is None:
            return
        for key, value in scheduler_stats.running_lora_adapters.items():
            name = key.removeprefix(STATS)
            if name in self._gauges:
                self._gauges[name][engine_idx].set(value)
            elif name in self._counters:
                self._counters[name][engine_idx].inc(value)
            elif name.startswith("hit_length:"):
                for _ in range(value):
                    self._hits[engine_idx].observe(int(name.removeprefix("hit_length:")))

    def log_engine_initialized(self) -> None:
        """Log nothing: the config hook has logged the sizes."""
