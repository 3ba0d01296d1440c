"""What the kernels refuse, by the checks of a layer's first step or by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kda_case import Case, decode_rows, prefill_rows

from kimi_vllm import geometry
from kimi_vllm.cache import slots
from kimi_vllm.kernels import checks, contract
from kimi_vllm.kernels.cut import Cut
from kimi_vllm.kernels.dispatch import load_backend

CUT = Case(1).pools.cut


def cut(**changes: Any) -> Cut:
    """Return the cut of `arguments` with other values."""
    return replace(CUT, **changes)


def arguments(operation: str) -> dict[str, Any]:
    """Return the arguments of a step of fresh sequences: five decodes, or a prefill of five tokens."""
    case = Case(5)
    rows = decode_rows([0] * 5, [1, 2, 3, 4, 5], [0] * 5) if operation == "decode" else prefill_rows([5], [0], [[1]])
    out = case.x.qkv.new_empty(5, case.H * case.D)
    return {"x": case.x, "weights": case.weights, "pools": case.pools, "rows": rows, "out": out}


def changed(operation: str, name: str, value: Any) -> dict[str, Any]:
    """Return them with another value for one name, such as ``pools.memory``."""
    step = arguments(operation)
    record, _, attribute = name.partition(".")
    return step | {record: replace(step[record], **{attribute: value}) if attribute else value}


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Return zeros: page tables, unless another dtype is given."""
    return torch.zeros(shape, dtype=dtype)


WRONG = {
    "head-size": ("pools.cut", cut(D=96), r"heads have 96 channels; the kernels support \(64, 128\)"),
    "ring": ("pools.cut", cut(R=3, pieces=1), "ring has 3 columns; a convolution of width 4 needs at least 4"),
    "state-dtype": (
        "pools.cut",
        cut(state_dtype=torch.bfloat16),
        "state is torch.bfloat16; .* on cpu: set state_dtype",
    ),
    "conv-dtype": ("pools.cut", cut(conv_dtype=torch.float16), "ring is torch.float16; .* on cpu: set state_dtype"),
    "pieces-3": ("pools.cut", cut(pieces=3), "in 3 pieces; it must be a power of two that divides 24, at most 64"),
    "pieces-16": ("pools.cut", cut(pieces=16), "in 16 pieces; it must be a power of two that divides 24, at most 64"),
    "pieces-128": ("pools.cut", cut(R=128, pieces=128), "in 128 pieces; .* that divides 384, at most 64"),
    "no-pieces": ("pools.cut", cut(pieces=0), "in 0 pieces"),
    "block-alignment": (
        "pools.cut",
        cut(block_bytes=CUT.block_bytes + 8),
        f"{CUT.block_bytes + 8} bytes; both .* by 16",
    ),
    "block-without-unit": ("pools.cut", cut(block_bytes=4096), f"4096 bytes; it must hold a unit of {CUT.unit_bytes}"),
    "block-size-of-memory": ("pools.cut", cut(block_bytes=CUT.block_bytes + 16), r"pools.memory has shape \[35, \d+\]"),
    "memory-dtype": (
        "pools.memory",
        zeros(35, CUT.block_bytes, dtype=torch.int8),
        "memory is torch.int8; .* torch.uint8",
    ),
    "memory-dims": ("pools.memory", zeros(35 * CUT.block_bytes, dtype=torch.uint8), r"pools.memory has shape \[\d+\]"),
    "memory-layout": (
        "pools.memory",
        zeros(35, 2 * CUT.block_bytes, dtype=torch.uint8)[:, : CUT.block_bytes],
        "strides",
    ),
    "pages-columns": ("pools.pages", zeros(8, 2), r"pages has shape \[8, 2\]; a layer needs units 4 to 7, 3 a block"),
    "pages-dims": ("pools.pages", zeros(8), r"pages has shape \[8\]; a layer needs units 4 to 7"),
    "pages-dtype": ("pools.pages", zeros(8, 4, dtype=torch.int64), "pages is torch.int64; it must be torch.int32"),
    "pages-layout": ("pools.pages", zeros(8, 8)[:, :4], "pages has strides"),
    "last-unit": ("pools.first_unit", 9, r"pages has shape \[8, 4\]; a layer needs units 9 to 12"),
    "first-unit": ("pools.first_unit", -1, "needs units -1 to 2"),
    "conv-width": ("weights.conv_weight", torch.zeros(9, 384), "9 taps; the kernels support 2 to 8"),
    "conv-layout": ("weights.conv_weight", torch.zeros(384, 4).T, "conv_weight has strides"),
    "qkv-columns": ("x.qkv", torch.zeros(5, 385), r"qkv has shape \[5, 385\]; it must be \[5, 384\]"),
    "qkv-layout": ("x.qkv", torch.zeros(384, 5).T, "last dimension must be contiguous"),
    "qkv-dtype": ("x.qkv", torch.zeros(5, 384, dtype=torch.float64), "qkv is torch.float64"),
    "gate-dtype": ("x.gate", torch.zeros(5, 128, dtype=torch.bfloat16), "gate is torch.bfloat16; it must be torch.f"),
    "weights-dtype": ("weights.A_log", torch.zeros(2, dtype=torch.bfloat16), "A_log is torch.bfloat16"),
    "flags-dtype": ("pools.nonfinite", torch.zeros(8, 1, dtype=torch.bool), "nonfinite is torch.bool"),
    "flags-slots": (
        "pools.nonfinite",
        torch.zeros(7, 1, dtype=torch.int32),
        r"nonfinite has shape \[7, 1\]; .* be \[8, 1\]",
    ),
    "out-rows": ("out", torch.zeros(4, 128), r"out has shape \[4, 128\]"),
}
WRONG_ROWS = {
    "decode": {
        "slots-dtype": ("rows.read_slot", torch.zeros(5, dtype=torch.int64), "read_slot is torch.int64"),
        "position-dtype": ("rows.position", torch.zeros(5, dtype=torch.int32), "position is torch.int32"),
        "slots-rows": ("rows.write_slot", torch.zeros(4, dtype=torch.int32), r"write_slot has shape \[4\]"),
    },
    "prefill": {
        "bounds": ("rows.cu_seqlens", torch.zeros(1, dtype=torch.int32), r"shape \[1\]; it must be \[2\]"),
        "table-dims": ("rows.slot_table", torch.zeros(1, dtype=torch.int32), r"slot_table has shape \[1\]"),
        "table-dtype": ("rows.slot_table", torch.zeros(1, 1), "slot_table is torch.float32"),
        "block-size": ("rows.block_size", 0, "block_size is 0"),
    },
}


@pytest.mark.parametrize(
    ("operation", "wrong"), [(name, wrong) for name, rows in WRONG_ROWS.items() for wrong in (*WRONG, *rows)]
)
def test_wrong_arguments_are_named(operation: str, wrong: str) -> None:
    name, value, message = (WRONG | WRONG_ROWS[operation])[wrong]
    with pytest.raises(ValueError, match=message):
        getattr(checks, f"check_{operation}")(**changed(operation, name, value))


@pytest.mark.parametrize("operation", WRONG_ROWS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pools.cut", cut(state_dtype=torch.bfloat16), "set state_dtype"),
        ("pools.cut", cut(conv_dtype=torch.bfloat16), "set state_dtype"),
        ("pools.pages", torch.zeros(8, 4, dtype=torch.int64), "pages is torch.int64"),
        ("pools.nonfinite", torch.zeros(8, 1, dtype=torch.int64), "int32"),
        ("x.gate", torch.zeros(5, 128, dtype=torch.bfloat16), "gate is torch.bfloat16"),
        ("out", torch.zeros(5, 128, dtype=torch.float64), "out is torch.float64"),
    ],
    ids=["state", "conv", "pages", "nonfinite", "gate", "out"],
)
def test_the_cpu_kernels_themselves_refuse_what_would_corrupt_memory(
    operation: str, name: str, value: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(load_backend("cpu"), f"kda_{operation}")(**changed(operation, name, value))


def test_cuda_takes_states_of_two_bytes() -> None:
    assert contract.STATE_DTYPES["cuda"] == (torch.float32, torch.bfloat16, torch.float16)
    assert contract.STATE_DTYPES["cpu"] == (torch.float32,)


def test_both_null_slots_are_one() -> None:
    assert slots.NULL_SLOT == contract.NULL_SLOT == 0


def test_config_json_is_refused_for_what_the_kernels_do_not_take() -> None:
    assert geometry.SUPPORTED_HEAD_DIMS == contract.HEAD_SIZES
    assert max(contract.CONV_WIDTHS) == geometry.MAX_CONV_WIDTH
