"""The steps run before an engine is ready meet every variant of vLLM's fused experts that a later step can need."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from kimi_vllm.cache.warm_up import logprob_columns, sampled_rows, step_sizes

OURS = Path(__file__).parents[2] / "kimi_vllm" / "moe_configs"
EXPERTS, HIDDEN, TOP_K = 256, 2304, 8


def variants(config: dict[str, int], tokens: int, num_experts: int = EXPERTS, top_k: int = TOP_K) -> tuple[Any, ...]:
    """What Triton compiles anew for: launch parameters, and whether 16 divides the kernel's two counts of rows.

    The second count is that of `moe_align_block_size`, cut short where there are fewer tokens than rows in a block.
    """
    chosen, rows = tokens * top_k, config["BLOCK_SIZE_M"]
    padded = chosen + num_experts * (rows - 1)
    if chosen < num_experts:
        padded = min(chosen * rows, padded)
    if tokens < rows:
        padded = min(padded, chosen * rows)
    return *sorted(config.items()), chosen % 16 == 0, padded % 16 == 0


def chosen_config(table: dict[int, dict[str, int]] | None, dtype: str | None, block: list[int] | None, tokens: int):
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    if table is None:
        return get_default_config(tokens, EXPERTS, 1024, HIDDEN, TOP_K, dtype, block)
    return table[min(table, key=lambda row: abs(row - tokens))]


def tables() -> dict[str, tuple[dict[int, dict[str, int]] | None, str | None, list[int] | None]]:
    from vllm.model_executor.layers.fused_moe import fused_moe

    found: dict[str, Any] = {
        "default": (None, None, None),
        "default fp8": (None, "fp8_w8a8", None),
        "default fp8 in blocks": (None, "fp8_w8a8", [128, 128]),
    }
    theirs = Path(fused_moe.__file__).parent / "configs"
    # Tables of other models and cards have other rows; those of any 256 experts on Hopper stand for what may come.
    for path in [*OURS.glob("*.json"), *theirs.glob(f"E={EXPERTS},*device_name=NVIDIA_H[12]00*.json")]:
        rows = {int(row): config for row, config in json.loads(path.read_text()).items() if row.isdigit()}
        found[path.stem] = rows, None, None
    return found


@pytest.mark.parametrize("name", tables())
@pytest.mark.parametrize("most", [8192, 2048, 16384])
def test_every_launch_of_the_experts_is_met(name: str, most: int) -> None:
    table, dtype, block = tables()[name]
    warm = {variants(chosen_config(table, dtype, block, tokens), tokens) for tokens in step_sizes(most, EXPERTS, TOP_K)}
    met = {variants(chosen_config(table, dtype, block, tokens), tokens) for tokens in range(1, most + 1)}
    assert met <= warm


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (8, 1), (60, 4), (64, 6), (72, 8)])
@pytest.mark.parametrize("most", [300, 2048])
def test_every_launch_of_other_numbers_of_experts_is_met(num_experts: int, top_k: int, most: int) -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    def launch(tokens: int) -> tuple[Any, ...]:
        config = get_default_config(tokens, num_experts, 64, 128, top_k, None, None)
        return variants(config, tokens, num_experts, top_k)

    warm = {launch(tokens) for tokens in step_sizes(most, num_experts, top_k)}
    assert {launch(tokens) for tokens in range(1, most + 1)} <= warm


@pytest.mark.parametrize("experts", [(256, 8), (8, 2), (0, 0)])
@pytest.mark.parametrize("most", [1, 2, 17, 97, 300, 8192])
def test_sizes_are_steps_the_scheduler_can_make(most: int, experts: tuple[int, int]) -> None:
    sizes = step_sizes(most, *experts)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert len(sizes) < 80


@pytest.mark.parametrize("most", [0, 1, 5, 20, 30, 1000, 5000, -1])
def test_every_width_of_logprobs_is_met(most: int) -> None:
    from vllm.v1.worker.gpu.sample.logprob import _MAX_TOPK_BLOCK

    def variant(columns: int) -> tuple[int, bool, bool]:
        return min(1 << (columns - 1).bit_length(), _MAX_TOPK_BLOCK), columns == 1, columns % 16 == 0

    vocab_size = 8000
    warm = logprob_columns(most, vocab_size)
    largest = 1 + (vocab_size if most < 0 else most)
    assert max(warm) <= largest
    assert {variant(columns) for columns in range(1, largest + 1)} == {variant(columns) for columns in warm}


@pytest.mark.parametrize("most", [1, 2, 7, 20, 33, 40, 64, 65, 100, 256, 1024])
@pytest.mark.parametrize("processors", [78, 114, 132, 148])
@pytest.mark.parametrize("vocab_size", [100, 163_840])
def test_every_variant_of_top_k_and_top_p_is_met(most: int, processors: int, vocab_size: int) -> None:
    from vllm.v1.sample.ops.topk_topp_triton import _SPLIT_MAX_BATCH, _topp_split_count

    sized = "vocab_size" in inspect.signature(_topp_split_count).parameters  # vLLM asks since 0.33

    def variant(rows: int) -> tuple[int, bool]:
        parts = _topp_split_count(rows, *([vocab_size] if sized else []), processors)
        return parts if rows <= _SPLIT_MAX_BATCH else 0, rows == 1

    warm = sampled_rows(most)
    assert 1 <= min(warm) <= max(warm) <= most
    assert {variant(rows) for rows in range(1, most + 1)} == {variant(rows) for rows in warm}
