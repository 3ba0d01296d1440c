"""Which slots the last step left with NaN or infinity.

The kernels set a flag per slot in the launch that writes it. The flags are copied to the host behind the step's own
work and read when its tokens are read, so nothing waits for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group


class StateGuard:
    """Collects the flags of one worker's pool, step by step.

    Args:
        flags: ``[S]`` int32 on the device, set by the kernels, cleared here.
    """

    def __init__(self, flags: Tensor) -> None:
        self._flags = flags

    def after_step(self) -> Callable[[], list[int]]:
        """Take the flags of the step that has just been launched, and clear them for the next one.

        Returns:
            A function that returns the sick slots. On a GPU call it when the step's tokens have reached the host: the
            flags were sent before them.
        """
        if get_tensor_model_parallel_world_size() > 1:
            # A rank sees its own heads only, and only the first rank reports.
            torch.distributed.all_reduce(
                self._flags, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group
            )
        if self._flags.device.type == "cpu":
            if not self._flags.any():
                return list
            taken = self._flags.clone()
        else:
            taken = torch.empty(self._flags.shape, dtype=self._flags.dtype, device="cpu", pin_memory=True)
            taken.copy_(self._flags, non_blocking=True)
        self._flags.zero_()
        return lambda: taken.nonzero()[:, 0].tolist()
