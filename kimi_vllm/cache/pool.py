"""All states of one worker, in the memory of vLLM's KV cache."""

from collections.abc import Iterable, Iterator, Sequence
from weakref import finalize

import torch
from torch import Tensor
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

from kimi_vllm.cache.exchange import Operation
from kimi_vllm.cache.layout import StateLayout, num_slots
from kimi_vllm.kernels.contract import Pools


class StatePool:
    """The page table of all slots, and each KDA layer's view of the memory behind it. It owns no memory of states.

    Slots are never cleared: a request's first step reads none. Pages are, see `exchange.NEW_PAGES`.

    Args:
        layout: How a state lies in blocks.
        state_blocks: Blocks of a slot; more than the layout's where another pipeline stage needs more.
        device: Where the kernels run.
        num_host_blocks: Blocks in host memory, pinned unless the device is the CPU.

    Attributes:
        memory: ``[B, block_bytes]`` uint8: vLLM's blocks. One that nobody uses until `bind`.
        host: The same in host memory; their ids go on where those of `memory` end.
        pages: ``[S, P]`` int32; the blocks of each slot. Row 0 is the null slot's.
        nonfinite: ``[S, F]`` int32, set by the kernels of all layers where a state or an output is not finite.
        base: ``[S]`` int64, with speculative decoding: the state in a slot is that after so many tokens of its
            sequence, and its records are of those that follow. Whoever reads it folds as many as count.
        layers: Arguments for the kernels of each KDA layer of the stage, in order.
    """

    memory: Tensor
    pages: Tensor
    nonfinite: Tensor
    base: Tensor
    layers: list[Pools]

    def __init__(
        self, layout: StateLayout, state_blocks: int, device: torch.device | str, num_host_blocks: int = 0
    ) -> None:
        self.layout, self.state_blocks, self.device = layout, state_blocks, torch.device(device)
        on_gpu = self.device.type != "cpu"
        # vLLM builds models where tensors are the device's unless they say so.
        self.host = torch.empty((num_host_blocks, layout.block_bytes), dtype=torch.uint8, device="cpu")
        self._host_pages: dict[int, list[int]] = {}
        num_slots = num_host_blocks // state_blocks
        self._host_base = torch.empty(num_slots, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        if on_gpu and num_host_blocks:
            try:
                pin_tensor(self.host)
            except RuntimeError as error:
                raise RuntimeError(
                    f"kimi.host_memory_gib: {self.host.nbytes} bytes cannot be pinned: {error}"
                ) from error
            unpin = torch.cuda.cudart().cudaHostUnregister
            finalize(self, unpin, self.host.data_ptr())
        self.release()

    @property
    def num_slots(self) -> int:
        """Slot ids, the null slot included; known when memory is bound."""
        return len(self.pages)

    def bind(self, view: Tensor) -> None:
        """Keep states in the memory behind an MLA layer's cache.

        Args:
            view: What vLLM gives the layer, ``[B, ...]``; its blocks are `block_bytes` apart.

        Raises:
            ValueError: Blocks lie otherwise.
        """
        stride = view.stride(0) * view.element_size()
        if stride != self.layout.block_bytes:
            raise ValueError(
                f"vLLM's KV cache has blocks {stride} bytes apart, and KDA states were laid out in blocks of "
                f"{self.layout.block_bytes} bytes, the latents of all MLA layers side by side. "
                "Use --kv-cache-dtype auto."
            )
        every = torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())
        num_blocks = view.shape[0]
        self._take(every[: num_blocks * stride].view(num_blocks, stride), num_slots(num_blocks, self.state_blocks))

    def release(self) -> None:
        """Let go of vLLM's memory, as after its profiling. Steps without slots can still run."""
        self._take(torch.zeros(1, self.layout.block_bytes, dtype=torch.uint8, device=self.device), 1)

    def _take(self, memory: Tensor, slots: int) -> None:
        self.memory = memory
        self.pages = torch.zeros(slots, self.state_blocks, dtype=torch.int32, device=self.device)
        cut = self.layout.cut
        self.nonfinite = torch.zeros(slots, cut.flags, dtype=torch.int32, device=self.device)
        self.base = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.layers = [
            Pools(self.memory, self.pages, cut, layer * cut.H * cut.pieces, self.nonfinite)
            for layer in range(self.layout.num_layers)
        ]

    @property
    def used(self) -> int:
        """Bytes of a slot's block in which units are; behind them nothing is defined."""
        return self.layout.cut.units * self.layout.cut.unit_bytes

    def blocks(self, slot: int) -> Tensor:
        """The blocks of a slot, in order: ``[layout.blocks]`` int64."""
        return self.pages[slot, : self.layout.blocks].long()

    def gather(self, blocks: Tensor, width: int) -> Tensor:
        """The first `width` bytes of these blocks, copied: ``[n, width]`` uint8."""
        return self.memory.view(torch.int64)[blocks, : width // 8].view(torch.uint8)

    def scatter(self, blocks: Tensor, rows: Tensor) -> None:
        """The inverse of `gather`."""
        words = rows.view(torch.int64)
        self.memory.view(torch.int64)[blocks, : words.shape[1]] = words

    def apply(self, operations: Iterable[Operation]) -> None:
        """Do what the scheduler planned before a step, in order with the steps on the device.

        Args:
            operations: See `exchange.OPERATIONS`.
        """
        given: dict[int, list[int]] = {}
        for source, target in operations:
            if isinstance(source, int) and isinstance(target, list):
                (given if source < self.num_slots else self._host_pages)[source] = target
                continue
            if isinstance(source, int) and isinstance(target, int):
                if source in given or target in given:
                    self._give(given)
                    given = {}
                self._copy(source, target)
            elif isinstance(source, list) and isinstance(target, list):
                for one, other in zip(source, target, strict=True):
                    self.block(other).copy_(self.block(one), non_blocking=True)
        self._give(given)

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros, in order with the steps on the device."""
        if not blocks:
            return
        ids = torch.tensor(blocks, dtype=torch.int64, pin_memory=self.device.type != "cpu")
        self.memory.view(torch.int64).index_fill_(0, ids.to(self.device, non_blocking=True), 0)

    def _give(self, given: dict[int, list[int]]) -> None:
        if not given:
            return
        pinned = self.device.type != "cpu"
        rows = torch.tensor([[slot, *blocks] for slot, blocks in given.items()], dtype=torch.int32, pin_memory=pinned)
        rows = rows.to(self.device, non_blocking=True)
        self.pages.index_copy_(0, rows[:, 0].long(), rows[:, 1:])

    def _copy(self, source: int, target: int) -> None:
        base, before = self._base(source)
        kept, after = self._base(target)
        if self.layout.cut.window:
            kept[after : after + 1].copy_(base[before : before + 1], non_blocking=True)
        # Gathered on the device, where which blocks these are is known; host memory is copied from and to as it lies.
        if source < self.num_slots:
            state = self.gather(self.blocks(source), self.layout.block_bytes)
        else:
            state = torch.empty((self.layout.blocks, self.layout.block_bytes), dtype=torch.uint8, device=self.device)
            for part, rows in self._on_host(source):
                state[part].copy_(self.host[rows], non_blocking=True)
        if target < self.num_slots:
            self.scatter(self.blocks(target), state)
        else:
            for part, rows in self._on_host(target):
                self.host[rows].copy_(state[part], non_blocking=True)

    def _on_host(self, slot: int) -> Iterator[tuple[slice, slice]]:
        """Where a host slot's state lies: parts of it that are side by side, and their rows of `host`."""
        rows = [block - len(self.memory) for block in self._host_pages[slot][: self.layout.blocks]]
        first = 0
        for last in range(1, len(rows) + 1):
            if last == len(rows) or rows[last] != rows[last - 1] + 1:
                yield slice(first, last), slice(rows[first], rows[first] + last - first)
                first = last

    def block(self, block: int) -> Tensor:
        """A block on the device or in host memory."""
        return self.memory[block] if block < len(self.memory) else self.host[block - len(self.memory)]

    def _base(self, slot: int) -> tuple[Tensor, int]:
        """Where the base of a slot is kept, on the device or on the host, and at which index."""
        return (self._host_base, slot - self.num_slots) if slot >= self.num_slots else (self.base, slot)
