"""Checkpoints and the preflight: every engine test first makes sure that it tests this plugin and not vLLM's own."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import GEOMETRIES, make_sick_checkpoint, make_transformers_layout, to_hub_layout
from support.engine import RECALL, random_prompts
from support.oracle import Oracle
from support.sessions import LENGTHS, save


@pytest.fixture(scope="session", autouse=True)
def _our_class_is_resolved() -> None:
    # vLLM swallows errors of plugins and serves its own Kimi Linear instead.
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    registered = ModelRegistry.models["KimiLinearForCausalLM"]
    assert registered.module_name.startswith("kimi_vllm"), registered


@pytest.fixture(scope="session", autouse=True)
def _every_block_has_one_owner() -> Iterator[None]:
    """After every step of every engine, also of those in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIMI_VLLM_CHECK_MEMORY", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_searched_again(_our_class_is_resolved: None) -> Iterator[None]:
    """Do not go through all modules of vLLM and torch for every engine, which takes longer than to start it.

    vLLM collects garbage eight times in an engine's life, and would freeze an engine with the modules, and thaw
    everything at its end; and on a CPU each start looks everywhere for kernels to replace that are replaced already.
    """
    on_gpu = torch.cuda.is_available()
    worker = "gpu_worker" if on_gpu else "cpu_worker"
    for module in ("vllm.entrypoints.llm", f"vllm.v1.worker.{worker}", "vllm.v1.engine.core", "kimi_vllm.model"):
        import_module(module)
    collect = gc.collect
    collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        if not on_gpu:  # there the next engine needs the memory of the last
            patch.setattr(gc, "collect", lambda generation=2: 0)
            _collect_after(collect, patch)
            _replace_kernels_once(patch)
        yield


def _collect_after(collect: Callable[[], int], patch: pytest.MonkeyPatch) -> None:
    """Collect garbage once an engine: when it is gone."""
    from vllm import distributed

    cleanup = distributed.cleanup_dist_env_and_memory
    patch.setattr(distributed, "cleanup_dist_env_and_memory", lambda: (cleanup(), collect()))


def _replace_kernels_once(patch: pytest.MonkeyPatch) -> None:
    from vllm.triton_utils import dispatcher

    register = dispatcher.register_kernels

    def register_new(kernels: Mapping[str, Callable[..., Any]]) -> None:
        if not kernels.keys() <= dispatcher._registry.keys():
            register(kernels)

    patch.setattr(dispatcher, "register_kernels", register_new)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The shipped checkpoint and the random ones, each in both layouts, by (name, layout)."""
    from transformers import KimiLinearForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints")
    found = {("recall", "hub"): RECALL, ("recall", "transformers"): folder / "recall-transformers"}
    KimiLinearForCausalLM.from_pretrained(RECALL).save_pretrained(found["recall", "transformers"])
    for name, values in GEOMETRIES.items():
        found[name, "transformers"] = make_transformers_layout(folder / f"{name}-transformers", name)
        # A dense layer after a sparse one can be said in transformers' form only.
        if "sd" not in values["mlp_layer_types"]:
            found[name, "hub"] = to_hub_layout(found[name, "transformers"], folder / f"{name}-hub")
    return found


@pytest.fixture(scope="session")
def sick_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recall checkpoint with one token that makes states infinite."""
    return make_sick_checkpoint(tmp_path_factory.mktemp("sick") / "recall")


@pytest.fixture(scope="session")
def oracles(checkpoints: dict[tuple[str, str], Path]) -> dict[str, Oracle]:
    """Transformers' model for each checkpoint, loaded from its own layout."""
    return {name: Oracle(path) for (name, layout), path in checkpoints.items() if layout == "transformers"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of sessions, their names, and prompts that go on."""
    folder = tmp_path_factory.mktemp("sessions")
    names = [f"s{length}" for length in LENGTHS]
    return folder, names, save(folder, random_prompts(LENGTHS, 100), names)


@pytest.fixture
def log(caplog, monkeypatch):
    """What the plugin logs."""
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", caplog.handler not in logger.handlers)
    with caplog.at_level(logging.WARNING, logger="vllm.kimi_vllm"):
        yield caplog
