"""Scales of quantised weights, in the one form that our kernels for a few rows take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scales:
    """What quantised weights ``[.., N, K]`` are multiplied by.

    Attributes:
        values: ``[.., 1 | N | ceil(N / block), 1 | ceil(K / block)]`` float32.
        block: outputs and inputs that share a scale; 0 if all inputs of an output do.
    """

    values: Tensor
    block: int = 0

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from the scale of an output, or of a block of them, to the next one's; the same for inputs."""
        row = 0 if self.values.shape[-2] == 1 else self.values.stride(-2)
        return row, self.values.stride(-1) if self.block else 0
