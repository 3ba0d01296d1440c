"""Which dtype is kept for what does not follow the model's: the layers and the memory plan must agree on it.

beta, gate and decay are formed in float32 inside the kernels, and A_log, dt_bias and conv weights are float32 always.
"""

import torch


def conv_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Of the conv ring. It holds projections as they are, so the model's dtype loses nothing. CPU kernels want fp32."""
    return torch.float32 if device_type == "cpu" else dtype


def router_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Of the router's weights. Logits are float32, and so are the weights where no product of two bytes yields them.

    On CUDA a bfloat16 product with a float32 result exists, and checkpoints hold bfloat16: nothing is lost.
    """
    return dtype if device_type == "cuda" and dtype == torch.bfloat16 else torch.float32
