"""Which step sizes a GPU worker runs before it is ready, so that no request waits for a compiler."""

from collections.abc import Iterator

_NEIGHBOURS_BELOW = 64


def step_sizes(max_num_tokens: int) -> list[int]:
    """Token counts that together need every kernel variant of steps of up to `max_num_tokens`.

    vLLM chooses launch parameters by token count, with thresholds at powers of two and three times powers of two.
    Triton compiles another variant for counts that 16 does not divide, and small counts are padded in two ways, so the
    neighbours of each size are included.
    """
    sizes = {max_num_tokens, max_num_tokens - 1}
    for size in _grid(max_num_tokens):
        sizes |= {size - 1, size}
        if size < _NEIGHBOURS_BELOW:
            sizes.add(size + 1)
    return sorted(size for size in sizes if 1 <= size <= max_num_tokens)


def logprob_columns(max_logprobs: int, vocab_size: int) -> list[int]:
    """Column counts that together need every variant of vLLM's kernel for log-probabilities.

    There is a column for the sampled token and one for each of the most probable tokens asked for. The kernel reads
    columns in blocks of a power of two, up to 1,024, and Triton compiles other variants for 1 and for multiples of 16.

    Args:
        max_logprobs: vLLM's option; -1 allows the whole vocabulary.
        vocab_size: Tokens of the vocabulary.
    """
    most = 1 + (vocab_size if max_logprobs < 0 else min(max_logprobs, vocab_size))
    blocks = [2**i for i in range(11)]
    counts = {count for block in blocks for count in (block // 2 + 1, min(block, block // 2 + 16))}
    return sorted(count for count in counts if count <= most)


def _grid(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        yield size + size // 2
        size *= 2
