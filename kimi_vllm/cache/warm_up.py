"""Which steps and products are run before a GPU worker is ready, so that no request waits for a compiler."""

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


def logprob_columns(max_logprobs: int, vocab_size: int) -> list[int]:
    """Column counts that between them meet every variant of vLLM's kernel for log-probabilities.

    A request's log-probabilities have a column for its own token and one for each of the most probable ones it asks
    for. The kernel reads them in blocks of a power of two, up to 1,024, and Triton compiles it once more for a count
    of one and for counts that 16 divides.

    Args:
        max_logprobs: vLLM's option, the most that a request may ask for; -1 allows the whole vocabulary.
        vocab_size: tokens.
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
