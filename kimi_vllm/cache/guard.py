"""Which slots the last step left with NaN or infinity.

The kernels set a flag per slot in the launch that writes it. The flags are copied to the host behind the step's own
work and read when its tokens are read, so nothing waits for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from kimi_vllm.cache.exchange import Sick


def take_flags(flags: Tensor) -> Callable[[], list[Sick]]:
    """Take the flags of the step that has just been launched, and clear them for the next one.

    Args:
        flags: ``[S, F]`` int32 on the device, set by the kernels.

    Returns:
        A function that returns the sick slots, and of each the first token that is not finite. On a GPU call it when
        the step's tokens have reached the host: the flags were sent before them.
    """
    if get_tensor_model_parallel_world_size() > 1:
        # A rank sees its own heads only, and only the first rank reports.
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    if flags.device.type == "cpu":
        if not flags.any():
            return list
        taken = flags.clone()
    else:
        taken = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
        taken.copy_(flags, non_blocking=True)
    flags.zero_()
    return lambda: _first_tokens(taken)


def _first_tokens(flags: Tensor) -> list[Sick]:
    if not flags.any():
        return []
    slots = flags.any(1).nonzero()[:, 0]
    return list(zip(slots.tolist(), flags[slots].ne(0).int().argmax(1).tolist(), strict=True))
