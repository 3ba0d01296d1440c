"""What the scheduler counts, as Prometheus metrics; a real server's are in `tests/engine/test_metrics.py`."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from kimi_vllm import ARCHITECTURE
from kimi_vllm.cache.exchange import STATS
from kimi_vllm.metrics import StateCacheMetrics

GAUGES = [("slots", kind) for kind in ("live", "checkpoint", "host")] + [
    ("blocks", kind) for kind in ("clean", "loose", "kept", "page", "state")
]
GAUGES += [("host_blocks", kind) for kind in ("clean", "page", "state")]


@pytest.fixture
def record():
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]), served_model_name="kimi")
    metrics = StateCacheMetrics(SimpleNamespace(model_config=model), [0, 1])

    def record(engine, **numbers):
        stats = SimpleNamespace(running_lora_adapters={STATS + name: value for name, value in numbers.items()})
        metrics.record(stats, None, engine_idx=engine)

    return record


def value(name, engine="0", **labels):
    return REGISTRY.get_sample_value(f"kimi_state_{name}", {"model_name": "kimi", "engine": engine, **labels})


@pytest.mark.parametrize(("name", "kind"), GAUGES)
def test_a_gauge_is_the_last_number_of_its_engine(record, name, kind):
    record(0, **{f"{name}_{kind}": 7})
    record(0, **{f"{name}_{kind}": 5})
    record(1, **{f"{name}_{kind}": 2})
    assert (value(name, kind=kind), value(name, "1", kind=kind)) == (5, 2)
    others = [value(other, kind=its) for other, its in GAUGES if (other, its) != (name, kind)]
    assert others == [0] * (len(GAUGES) - 1)


@pytest.mark.parametrize("name", ["evictions", "page_evictions", "value_lost", "swap_bytes"])
def test_a_counter_adds_up(record, name):
    record(0, **{name: 7})
    record(0, **{name: 5})
    assert value(f"{name}_total") == 12
    assert value(f"{name}_total", "1") == 0


def test_what_has_no_metric_is_left_out(record):
    record(0, unheard_of=3)
    assert value("unheard_of_total") is None
