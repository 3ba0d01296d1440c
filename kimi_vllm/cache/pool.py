"""The tensors of all slots, allocated with the model, so that vLLM counts them before it sizes its own pool."""

from typing import Any

import torch
from torch import Tensor

from kimi_vllm.cache.layout import SlotLayout


class StatePool:
    """All slots of one worker: ``state [S, L, H, V, K]`` and ``conv [S, L, R, 3·H·D]``.

    The slot comes first, so that it is one contiguous piece and copied at once; a layer's view has the slot stride of
    all layers. Nothing is ever cleared: a request's first step reads no slot.

    Args:
        layout: Shapes and dtypes of a slot.
        num_slots: Slots, the null slot included.
        device: Where the kernels run.
        num_host_slots: Slots in host memory, pinned unless the device is the CPU.

    Attributes:
        nonfinite: ``[S]`` int32, set by the kernels of all layers where they write a state that is not finite.
    """

    def __init__(self, layout: SlotLayout, num_slots: int, device: torch.device | str, num_host_slots: int = 0) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.num_host_slots = num_host_slots
        self.state = torch.zeros(num_slots, *layout.state_shape, dtype=layout.state_dtype, device=device)
        self.conv = torch.zeros(num_slots, *layout.conv_shape, dtype=layout.conv_dtype, device=device)
        self.nonfinite = torch.zeros(num_slots, dtype=torch.int32, device=device)
        at_host: dict[str, Any] = {"device": "cpu", "pin_memory": self.state.device.type != "cpu"}
        self.host_state = torch.empty(num_host_slots, *layout.state_shape, dtype=layout.state_dtype, **at_host)
        self.host_conv = torch.empty(num_host_slots, *layout.conv_shape, dtype=layout.conv_dtype, **at_host)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots on this worker."""
        return self.num_slots * self.layout.slot_bytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The pool of the `index`-th KDA layer of this stage: conv ``[S, R, 3·H·D]``, state ``[S, H, V, K]``."""
        return self.conv[:, index], self.state[:, index]

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another, in order with the steps; ids from `num_slots` on are host slots."""
        for pool, host in ((self.state, self.host_state), (self.conv, self.host_conv)):
            self._row(pool, host, target).copy_(self._row(pool, host, source), non_blocking=True)

    def _row(self, pool: Tensor, host: Tensor, slot: int) -> Tensor:
        return pool[slot] if slot < self.num_slots else host[slot - self.num_slots]
