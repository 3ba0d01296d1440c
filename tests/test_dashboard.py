"""The dashboard and what is around it, as files; that a server has its metrics shows `tests/engine/test_metrics.py`."""

import re
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import yaml
from prometheus_client import CollectorRegistry, Counter
from support import dashboard

FOLDER = Path(__file__).parents[1] / "serve" / "dashboard"


def cells(panel):
    grid = panel["gridPos"]
    return {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}


def test_panels_have_a_place_each_and_say_what_they_show():
    panels = dashboard.load()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert not [(a["title"], b["title"]) for a, b in combinations(panels, 2) if cells(a) & cells(b)]
    assert all(
        panel["targets"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels if panel["type"] != "row"
    )


def test_queries_follow_the_chosen_model_and_balance():
    for expression in dashboard.expressions():
        assert 'model_name=~"$model"' in expression
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")


def test_every_metric_of_the_state_cache_is_shown():
    from kimi_vllm import metrics

    shown = " ".join(dashboard.metrics())
    names = {*metrics._GAUGES, "hit_length_tokens", *metrics._COUNTERS}
    assert not [name for name in names if f"kimi_state_{name}" not in shown]


def test_vllm_counts_drafts_as_the_panels_ask():
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    def samples(speculative_config):
        registry = CollectorRegistry()

        class Counters(SpecDecodingProm):
            _counter_cls = partial(Counter, registry=registry)

        Counters(speculative_config, ["model_name", "engine"], {0: ["recall", "0"]})
        return [sample for family in registry.collect() for sample in family.samples]

    assert samples(None) == []
    counted = samples(SimpleNamespace(num_speculative_tokens=3))
    asked = set(filter(dashboard.of_drafts, dashboard.metrics()))
    assert len(asked) == 4
    assert asked <= {sample.name for sample in counted}
    assert {sample.labels["position"] for sample in counted if "_per_pos_total" in sample.name} == {"0", "1", "2"}


def test_compose_file_mounts_files_that_exist_and_listens_here_only():
    compose = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service.get("volumes", []):
            if (source := volume.split(":")[0]).startswith("."):
                assert (FOLDER / source).exists()
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]) if "image" in service else service["build"]
    [job] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["kimi:8000"]}]
