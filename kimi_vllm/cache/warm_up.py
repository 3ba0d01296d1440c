"""Which step sizes a GPU worker runs before it is ready, so that no request waits for a compiler."""

from collections.abc import Iterator

_NEIGHBOURS_BELOW = 64


def step_sizes(max_num_tokens: int, num_experts: int, top_k: int) -> list[int]:
    """Token counts that together need every kernel variant of steps of up to `max_num_tokens`.

    vLLM chooses launch parameters by token count, with thresholds at powers of two and three times powers of two.
    Triton compiles another variant for counts that 16 does not divide, and small counts are padded in two ways, so the
    neighbours of each size are included. The fused experts take two such counts, tokens times `top_k` and that number
    padded for `num_experts`; 16 may divide both, one or neither.

    Args:
        max_num_tokens: Most tokens of a step.
        num_experts, top_k: Routed experts of a layer, and how many of them a token uses. 0 for a dense model.
    """
    sizes = {max_num_tokens, max_num_tokens - 1}
    for size in _grid(max_num_tokens):
        sizes |= {size - 1, size}
        if size < _NEIGHBOURS_BELOW:
            sizes.add(size + 1)
        # One step for each way in which 16 divides the two counts: of 16 steps in a row, the last of its kind.
        chosen = {count: count * top_k for count in range(size - 15, size + 1)}
        sizes |= {*{(rows % 16 == 0, (rows - num_experts) % 16 == 0): count for count, rows in chosen.items()}.values()}
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


def sampled_rows(max_num_seqs: int) -> list[int]:
    """Batch sizes that together need every variant of vLLM's kernels for top-k and top-p, in ascending order.

    Up to 64 rows each row of logits is split among programs. The number of parts is a power of two that halves as rows
    double, and a compile-time constant. Larger batches use one program per row.
    """
    powers = {2**i for i in range(8)}
    return sorted({size for size in powers if size < max_num_seqs} | {min(max_num_seqs, 128)})


def _grid(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        yield size + size // 2
        size *= 2
