"""Pipeline stages with different numbers of KDA layers: one group of states, one manager, all pages."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.utils import get_pp_indices

from kimi_vllm.cache.group import StateHome
from kimi_vllm.cache.manager import KDAStateManager
from kimi_vllm.cache.scheduler import KimiScheduler
from kimi_vllm.geometry import geometry_of
from serve.bench.cache.replay import Memory, attention_spec, build, configuration, make_request, step

OF_48B = tuple(layer not in (3, 7, 11, 15, 19, 23, 26) for layer in range(27))


def stage_specs(config, geometry, stage, stages, host_memory_gib):
    """What the worker of one stage tells the engine, by the code that runs there."""
    first, end = get_pp_indices(geometry.num_layers, stage, stages)
    options = {"kimi": {"host_memory_gib": host_memory_gib}}
    attention = SimpleNamespace(get_kv_cache_spec=lambda _: attention_spec(config, 64))
    worker = SimpleNamespace(
        num_speculative_tokens=0,
        device_config=SimpleNamespace(device=torch.device("cpu")),
        additional_config=options,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=stages),
        model_config=config.model_config,
        cache_config=config.cache_config,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    mla = [layer for layer in range(first, end) if not geometry.kda[layer]]
    home = StateHome(geometry, worker, stage, "model.layers")
    specs = {}
    for layer in mla:
        specs[f"model.layers.{layer}.self_attn.attn"] = attention_spec(config, 64)
        specs[f"model.layers.{layer}.kda_state"] = home.member(worker, layer, attention).get_kv_cache_spec(worker)
    assert len(home.pool.host) == specs[f"model.layers.{mla[0]}.kda_state"].num_host_blocks
    return specs


@pytest.mark.parametrize("host_memory_gib", [0, 0.01])
@pytest.mark.parametrize(("stages", "partition"), [(2, None), (3, None), (4, None), (2, "23,4")])
def test_stages_of_27_layers_are_scheduled_as_one(stages, partition, host_memory_gib, monkeypatch):
    config = configuration(Memory(concurrency=1, blocks=200, step_tokens=512, longest=1024), "value")
    if partition:
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
    geometry = replace(geometry_of(config.model_config), kda=OF_48B, sparse=(False,) * 27)
    specs = [stage_specs(config, geometry, stage, stages, host_memory_gib) for stage in range(stages)]
    scheduler = build(KimiScheduler, config, *specs)
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    [states] = [manager for manager in managers if isinstance(manager, KDAStateManager)]
    assert len(managers) == 2
    assert (states.block_pool.host.num_slots > 0) == (host_memory_gib > 0)

    hits = []
    for name in ("first", "again"):
        scheduler.add_request(make_request(scheduler, name, [3 + i % 80 for i in range(700)], 3))
        while scheduler.requests:
            hits += [new.num_computed_tokens for new in step(scheduler, {name: [5, 6, 7]}).scheduled_new_reqs]
    assert hits == [0, 640]
