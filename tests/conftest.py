"""How engines are started in tests, set before vLLM is imported anywhere; and which vLLM it is."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from serve.common.environment import ENGINE, UNCOMPILED

os.environ.update(ENGINE | UNCOMPILED)

if torch.cuda.is_available():
    # Tests import layers before they make an engine, see `kimi_vllm.graph_breaks`.
    os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    # Counting devices makes a fork unusable for CUDA where there is no NVML, and vLLM does not see it.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

if find_spec("beartype"):  # of the dev extra
    from jaxtyping import install_import_hook

    # Shapes in the annotations of the spec are enforced, whichever test imports it first.
    install_import_hook("kimi_vllm.kernels.reference", "beartype.beartype")

VLLM = Path(find_spec("vllm").origin).parent
COMPILED = any(VLLM.glob("_C*.so"))


def pytest_report_header():
    return f"vLLM {version('vllm')} in {VLLM}, {'with' if COMPILED else 'without'} compiled operators"


def pytest_collection_modifyitems(items):
    """`make compat` tests the sources of a release that is not built for CPUs; an engine needs what is compiled."""
    if not COMPILED:
        reason = f"vLLM {version('vllm')} is here as Python sources only, and an engine needs its compiled operators"
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--record FILE``: see `support.record`."""
    parser.addoption("--record", type=Path, help="merge what this run has covered into a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """Record, where that is asked."""
    if (path := config.getoption("--record")) is not None:
        from support.record import Recorder

        config.pluginmanager.register(Recorder(path))
