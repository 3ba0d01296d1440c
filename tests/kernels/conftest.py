"""Poisoned memory for the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
