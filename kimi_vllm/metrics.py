"""The state cache on vLLM's ``/metrics``.

The engine's process counts (`cache/scheduler.py`) and sends its numbers along with vLLM's own statistics. This logger,
which vLLM finds by the entry point ``vllm.stat_logger_plugins``, turns them into Prometheus metrics in the process that
answers ``/metrics``, so they work with several API servers as vLLM's do. vLLM makes one whatever it serves while
kimi-vllm is installed; it shows nothing for models that are not ours. Numbers only: no prompt, no token, no request.
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
_SLOT_KINDS = {"slots_live": "live", "slots_checkpoint": "checkpoint", "slots_free": "free", "slots_host": "host"}
_COUNTERS = {
    "hit_tokens": "Prompt tokens that a request resumed after, from a kept state.",
    "miss_tokens": "Prompt tokens that had to be computed.",
    "evictions": "Checkpoints given up because a slot was needed.",
    "swaps_out": "States copied to host memory.",
    "swaps_in": "States copied back from host memory.",
    "swap_bytes": "Bytes copied to and from host memory, on a worker of the stage with the most KDA layers.",
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
        slots = Gauge(
            f"{PREFIX}slots",
            "KDA state slots by what they hold: live requests, idle checkpoints, nothing; and states in host memory.",
            (*_LABELS, "kind"),
            multiprocess_mode="mostrecent",
        )
        counters = {name: Counter(f"{PREFIX}{name}", text, _LABELS) for name, text in _COUNTERS.items()}
        hits = Histogram(
            f"{PREFIX}hit_length_tokens",
            "Tokens of a request's prompt that were resumed after, 0 for none.",
            _LABELS,
            buckets=_HIT_BUCKETS,
        )
        self._slots = {
            (engine, name): slots.labels(self._model, str(engine), kind)
            for engine in engine_indexes
            for name, kind in _SLOT_KINDS.items()
        }
        self._counters = {
            (engine, name): counter.labels(self._model, str(engine))
            for engine in engine_indexes
            for name, counter in counters.items()
        }
        self._hits = {engine: hits.labels(self._model, str(engine)) for engine in engine_indexes}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Add what one step reported."""
        if not self._active or scheduler_stats is None:
            return
        for key, value in scheduler_stats.running_lora_adapters.items():
            name = key.removeprefix(STATS)
            if (engine_idx, name) in self._slots:
                self._slots[engine_idx, name].set(value)
            elif (engine_idx, name) in self._counters:
                self._counters[engine_idx, name].inc(value)
            elif name.startswith("hit_length:"):
                for _ in range(value):
                    self._hits[engine_idx].observe(int(name.removeprefix("hit_length:")))

    def log_engine_initialized(self) -> None:
        """Nothing to say at start: the table of slots is the config hook's."""
