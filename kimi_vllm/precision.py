"""Dtypes that differ from the model's, on which the layers and the memory plan must agree.

beta, gate and decay are formed in float32 inside the kernels; A_log, dt_bias and conv weights are always float32.
"""

import torch


def conv_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the conv ring: it holds projections, so the model's dtype loses nothing. CPU kernels need fp32."""
    return torch.float32 if device_type == "cpu" else dtype


def router_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the router's weights: float32, as its logits.

    On CUDA there is a bfloat16 product with a float32 result, and checkpoints hold bfloat16: nothing is lost.
    """
    return dtype if device_type == "cuda" and dtype == torch.bfloat16 else torch.float32
