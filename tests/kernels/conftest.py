"""Poisoned memory and checked shapes for the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes in the annotations of the spec are enforced while it is imported here for the first time.
with install_import_hook("kimi_vllm.kernels.reference", "beartype.beartype"):
    import kimi_vllm.kernels.reference  # noqa: F401


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
