"""Poisoned memory for the kernel tests, and a faster interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def runnable(request: pytest.FixtureRequest) -> None:
    """Fail tests of the Triton kernels where there is nothing to run them: skipping would hide it."""
    if request.node.get_closest_marker("triton") is None:
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.node.get_closest_marker("gpu") is not None:
        assert torch.cuda.is_available(), "needs a CUDA device"
        assert not interpreted, "needs TRITON_INTERPRET unset"
    assert interpreted or torch.cuda.is_available(), "needs a CUDA device, or TRITON_INTERPRET=1 as `make unit` sets it"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let torch.empty return NaN, so that memory nobody wrote cannot pass for a result."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch() -> Iterator[None]:
    """Spare Triton's interpreter a third of its time.

    It replaces all functions of the language anew whenever a kernel calls a function, although they are replaced until
    the launch ends; which ones depends on nothing but the names that the function sees.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    patched: set[int] = set()
    launch, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        names = id(function.__globals__)
        if names in patched:
            return None  # of a function that a kernel calls: nobody restores what that patched
        patched.add(names)
        return patch_lang(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
