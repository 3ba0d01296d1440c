"""Which steps are run before a GPU worker is ready, so that no request waits for a compiler."""

from collections.abc import Iterator

_NEIGHBOURS_BELOW = 64


def step_sizes(max_num_tokens: int) -> list[int]:
    """Token counts that between them meet every variant of every kernel a step of up to `max_num_tokens` can need.

    vLLM chooses launch parameters by token count, with thresholds, or rows of a tuned table, at powers of two and at
    three times powers of two. Triton compiles a kernel once more for counts that 16 does not divide, and a small count
    is padded in two ways, so the neighbours of each size are steps of their own.
    """
    sizes = {max_num_tokens, max_num_tokens - 1}
    for size in _grid(max_num_tokens):
        sizes |= {size - 1, size}
        if size < _NEIGHBOURS_BELOW:
            sizes.add(size + 1)
    return sorted(size for size in sizes if 1 <= size <= max_num_tokens)


def _grid(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        yield size + size // 2
        size *= 2
