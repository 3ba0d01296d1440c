"""Which kernels serve a device, and what is said where none can."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kimi_vllm.kernels import dispatch


def test_backends_are_named_or_refused() -> None:
    assert dispatch.load_backend("cpu").name.startswith("numba")
    with pytest.raises(RuntimeError, match=r"'xpu'. Supported: cuda .* and cpu .*KIMI_VLLM_DISABLE=1"):
        dispatch.load_backend("xpu")


@pytest.fixture
def cuda_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine that looks as if it had an H100; backends found on it are forgotten afterwards."""
    dispatch.load_backend.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
    yield monkeypatch
    dispatch.load_backend.cache_clear()


def test_cuda_has_the_triton_kernels(cuda_device: pytest.MonkeyPatch) -> None:
    from kimi_vllm.kernels.cuda import decode, prefill

    backend = dispatch.load_backend("cuda")
    assert backend.name.startswith("triton 3")
    assert (backend.kda_decode, backend.kda_prefill) == (decode.kda_decode, prefill.kda_prefill)
    backend.prepare(128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((torch.cuda, "is_available", lambda: False), "need an NVIDIA device and found none"),
        ((torch.version, "hip", "6.4"), "need an NVIDIA device and found none"),
        ((torch.cuda, "get_device_capability", lambda: (8, 0)), r"9\.0 or newer; NVIDIA Something has 8\.0"),
        ((importlib.util, "find_spec", lambda name: None), "need Triton: pip install triton"),
    ],
    ids=["no-device", "amd", "too-old", "no-triton"],
)
def test_cuda_is_refused_with_what_is_missing(
    cuda_device: pytest.MonkeyPatch, change: tuple[Any, str, Any], message: str
) -> None:
    cuda_device.setattr(*change)
    with pytest.raises(RuntimeError, match=f"{message}.*KIMI_VLLM_DISABLE=1"):
        dispatch.load_backend("cuda")


def test_import_is_light_and_knows_nobody() -> None:
    code = (
        "import sys; import kimi_vllm.kernels.dispatch; import kimi_vllm.kernels.cpu.host;"
        "print([m for m in sys.modules if m.split('.')[0] in ('vllm', 'triton', 'jaxtyping', 'transformers')"
        " or m.startswith('kimi_vllm.') and not m.startswith('kimi_vllm.kernels')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_prepare_leaves_nothing_to_compile(monkeypatch):
    from kimi_vllm.kernels.cpu import host

    dispatch.load_backend("cpu").prepare(64)

    def compile_worker(*args):
        raise AssertionError("compiled while serving")

    monkeypatch.setattr(host, "compile_worker", compile_worker)
    host._worker(True, 64)
    host._worker(False, 64)
