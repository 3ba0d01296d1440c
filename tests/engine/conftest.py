"""Checkpoints and the preflight: every engine test first makes sure that it tests this plugin and not vLLM's own."""

import gc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.checkpoints import GEOMETRIES, make_sick_checkpoint, make_transformers_layout, to_hub_layout
from support.engine import RECALL
from support.oracle import Oracle


@pytest.fixture(scope="session", autouse=True)
def _our_class_is_resolved() -> None:
    # vLLM swallows errors of plugins and serves its own Kimi Linear instead.
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    registered = ModelRegistry.models["KimiLinearForCausalLM"]
    assert registered.module_name.startswith("kimi_vllm"), registered


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_searched_for_garbage(_our_class_is_resolved: None) -> Iterator[None]:
    """Collect garbage among what engines leave, and not among all modules of vLLM and torch as well.

    vLLM collects eight times in an engine's life, each half a second here. It would freeze an engine with the modules,
    and thaw everything at its end.
    """
    worker = "gpu_worker" if torch.cuda.is_available() else "cpu_worker"
    for module in ("vllm.entrypoints.llm", f"vllm.v1.worker.{worker}", "vllm.v1.engine.core", "kimi_vllm.model"):
        import_module(module)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


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
