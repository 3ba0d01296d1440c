"""What must be equal for a state and pages to mean the same in another engine."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kimi_vllm.cache.layout import StateLayout
from kimi_vllm.cache.session_files import FORMAT
from kimi_vllm.geometry import geometry_of

_SAMPLE = 4096


def fingerprint_of(vllm_config: Any, layout: StateLayout, rank: int, size: int) -> dict[str, str]:
    """All but the weights and the tenant."""
    cut = layout.cut
    return {
        "format": FORMAT,
        "geometry": json.dumps(geometry_of(vllm_config.model_config).to_dict(), sort_keys=True),
        "dtype": str(vllm_config.model_config.dtype),
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "block_size": str(vllm_config.cache_config.block_size),
        "block_bytes": str(cut.block_bytes),
        "layers": str(layout.num_layers),
        "cut": f"{cut.H} heads of {cut.D} in {cut.pieces}, ring of {cut.R}, {cut.state_dtype}, {cut.conv_dtype}",
        "window": str(cut.window),
        "rank": f"{rank} of {size}",
    }


class LoadedWeights:
    """Digests of a checkpoint's tensors as they come, for CPUs: kernels there take weights out of the parameters.

    Attributes:
        digests: By name, of what was loaded last.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def note(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass them on."""
        for name, tensor in weights:
            self.digests[name] = _digest(tensor)
            yield name, tensor


def weights_digest(model: nn.Module, loaded: LoadedWeights | None = None) -> str:
    """Of all weights on this rank, and of those that were loaded: the exact sum of each tensor's bits, and a sample.

    The sum does not depend on devices or threads, and reads the weights once. This tells models apart that were
    trained differently; it is no protection from somebody who makes a model for the purpose.
    """
    named = {f"{name} here": _digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return hashlib.sha256(json.dumps(named | (loaded.digests if loaded else {}), sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        bits = _bits(tensor.detach())
        sample = bits[:: max(1, bits.numel() // _SAMPLE)]
        state.update(f"{int(bits.sum(dtype=torch.int64))} ".encode())
        state.update(sample.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    same = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(same).flatten()
