"""Threads that copy the parts of a session between memory and a file, each through host memory of its own.

On a GPU that memory is pinned, and each thread has a stream of its own beside the steps'. Nothing of a session is in
host memory but what is being copied.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

Copy = Callable[[str, "Buffer"], None]
"""Copies the part of this name through this memory."""


class Buffer:
    """Host memory of one thread.

    Args:
        size: Its bytes.
        device: Where states are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        pinned = device.type != "cpu"
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._stream = torch.cuda.Stream(device) if pinned else None

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The beginning of the memory as a tensor, contiguous; what is in it is left from other parts."""
        return self._memory[: shape_bytes(shape, dtype)].view(dtype).view(shape)

    @contextmanager
    def after(self, step: torch.cuda.Event | None) -> Iterator[None]:
        """Order what is launched here behind what `behind_steps` marked; at the end it is done."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if step is not None:
                self._stream.wait_event(step)
            yield
        self._stream.synchronize()


class Copies:
    """So many threads and buffers.

    Args:
        threads: Parts that are copied at once.
        size: Bytes of the largest part.
        device: Where states are.
    """

    def __init__(self, threads: int, size: int, device: torch.device) -> None:
        self._threads = ThreadPoolExecutor(threads, "session-copy")
        self._buffers: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(threads):
            self._buffers.put(Buffer(size, device))

    def each(self, names: Iterable[str], copy: Copy) -> None:
        """Copy all parts, until one fails; an error is raised when no thread is at work any more."""
        futures = [self._threads.submit(self._one, name, copy) for name in names]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        done, _ = wait(futures)
        for future in done:
            if not future.cancelled():
                future.result()

    def shutdown(self) -> None:
        """End the threads, which must be idle."""
        self._threads.shutdown()

    def _one(self, name: str, copy: Copy) -> None:
        buffer = self._buffers.get()
        try:
            copy(name, buffer)
        finally:
            self._buffers.put(buffer)


def behind_steps(device: torch.device) -> torch.cuda.Event | None:
    """Mark what this thread's stream has been given so far; None where steps are over when their calls return."""
    if device.type == "cpu":
        return None
    step = torch.cuda.Event()
    step.record(torch.cuda.current_stream(device))
    return step


def shape_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
