"""Backends, argument checks, and the custom ops under torch.compile."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kda_case import Case, copy_of, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kimi_vllm.kernels import dispatch

OPS = torch.ops.kimi_vllm


def decode_arguments(case: Case) -> dict[str, Any]:
    """Return the arguments of a decode step of fresh sequences, one per token of the case."""
    slots = torch.arange(1, case.T + 1, dtype=torch.int32)
    return {
        **case.copy().tensors,
        "read_slot": torch.zeros_like(slots),
        "write_slot": slots,
        "position": torch.zeros(case.T, dtype=torch.int64),
        "out": case.tensors["qkv"].new_empty(case.T, case.H * case.D),
    }


def prefill_arguments(case: Case) -> dict[str, Any]:
    """Return the arguments of a prefill step of one sequence."""
    return {
        **case.copy().tensors,
        "cu_seqlens": torch.tensor([0, case.T], dtype=torch.int32),
        "context_len": torch.zeros(1, dtype=torch.int32),
        "slot_table": torch.tensor([[1]], dtype=torch.int32),
        "block_size": 512,
        "out": case.tensors["qkv"].new_empty(case.T, case.H * case.D),
    }


ARGUMENTS = {"kda_decode": decode_arguments, "kda_prefill": prefill_arguments}


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the same arguments in other memory, with their strides."""
    return {name: copy_of(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def clean(case: Case) -> Case:
    """Return the case without poison: torch's checkers compare tensors, and NaN is not equal to itself."""
    case.state_pool.zero_()
    case.conv_pool.zero_()
    return case


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_op_is_what_the_wrapper_calls(name: str) -> None:
    arguments = ARGUMENTS[name](Case(5))
    ours, op = clone(arguments), clone(arguments)
    getattr(dispatch, name)(**ours)
    getattr(OPS, name)(**op)
    assert torch.equal(ours["out"], op["out"])
    assert torch.equal(ours["state_pool"][1], op["state_pool"][1])


@pytest.mark.parametrize("flags", [False, True], ids=["", "flags"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str, flags: bool) -> None:
    arguments = ARGUMENTS[name](clean(Case(5)))
    arguments["out"].zero_()
    if flags:
        arguments["nonfinite"] = Case(5).flags()
    torch.library.opcheck(getattr(OPS, name).default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_torch_compile_sees_one_graph(name: str, backend: str) -> None:
    def layer(out: Tensor, **arguments: Any) -> Tensor:
        getattr(OPS, name)(**arguments, out=out)
        return out * 2

    arguments = ARGUMENTS[name](Case(5)) | {"nonfinite": torch.zeros(8, dtype=torch.int32)}
    arguments["qkv"][0] = float("nan")
    expected, compiled = clone(arguments), clone(arguments)
    with torch._dynamo.config.patch(disable=False):
        result = torch.compile(layer, backend=backend, fullgraph=True)(**compiled)
    assert same_bits(result, layer(**expected))
    assert compiled["nonfinite"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    for pool in ("state_pool", "conv_pool"):
        assert same_bits(compiled[pool][1, :1], expected[pool][1, :1])


@pytest.mark.parametrize("flags", [False, True], ids=["", "flags"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_tracing_allocates_nothing(name: str, flags: bool) -> None:
    case = Case(5)
    real = ARGUMENTS[name](case) | {"nonfinite": case.flags() if flags else None}
    arguments = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in real.items()}
    assert getattr(OPS, name)(**arguments) is None


@pytest.mark.parametrize("name", ARGUMENTS)
def test_tracing_for_cuda_needs_no_device(name: str) -> None:
    arguments = ARGUMENTS[name](Case(5))
    with FakeTensorMode():
        fake = {
            key: torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value
            for key, value in arguments.items()
        }
        assert getattr(OPS, name)(**fake) is None


def test_cuda_takes_states_of_two_bytes() -> None:
    assert dispatch.STATE_DTYPES["cuda"] == (torch.float32, torch.bfloat16, torch.float16)
    assert dispatch.STATE_DTYPES["cpu"] == (torch.float32,)


def test_importing_again_keeps_the_ops() -> None:
    before = OPS.kda_decode
    importlib.reload(dispatch)
    assert OPS.kda_decode is before
    test_the_op_is_what_the_wrapper_calls("kda_decode")


def test_backends_are_named_or_refused() -> None:
    assert dispatch.kernel_backend("cpu").startswith("numba")
    with pytest.raises(RuntimeError, match=r"'xpu'. Supported: cuda .* and cpu .*KIMI_VLLM_DISABLE=1"):
        dispatch.kernel_backend("xpu")


@pytest.fixture
def cuda_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine that looks as if it had an H100; backends found on it are forgotten afterwards."""
    dispatch.load_backend.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
    yield monkeypatch
    dispatch.load_backend.cache_clear()


def test_cuda_has_the_triton_kernels(cuda_device: pytest.MonkeyPatch) -> None:
    from kimi_vllm.kernels.cuda import decode, prefill

    backend = dispatch.load_backend("cuda")
    assert backend.name.startswith("triton 3")
    assert (backend.kda_decode, backend.kda_prefill) == (decode.kda_decode, prefill.kda_prefill)
    dispatch.prepare("cuda", 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((torch.cuda, "is_available", lambda: False), "need an NVIDIA device and found none"),
        ((torch.version, "hip", "6.4"), "need an NVIDIA device and found none"),
        ((torch.cuda, "get_device_capability", lambda: (8, 0)), r"9\.0 or newer; NVIDIA Something has 8\.0"),
        ((importlib.util, "find_spec", lambda name: None), "need Triton: pip install triton"),
    ],
    ids=["no-device", "amd", "too-old", "no-triton"],
)
def test_cuda_is_refused_with_what_is_missing(
    cuda_device: pytest.MonkeyPatch, change: tuple[Any, str, Any], message: str
) -> None:
    cuda_device.setattr(*change)
    with pytest.raises(RuntimeError, match=f"{message}.*KIMI_VLLM_DISABLE=1"):
        dispatch.kernel_backend("cuda")


def test_import_is_light_and_knows_nobody() -> None:
    code = (
        "import sys; import kimi_vllm.kernels.dispatch; import kimi_vllm.kernels.cpu.host;"
        "print([m for m in sys.modules if m.split('.')[0] in ('vllm', 'triton', 'jaxtyping', 'transformers')"
        " or m.startswith('kimi_vllm.') and not m.startswith('kimi_vllm.kernels')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "head-size": (
        {"state_pool": torch.zeros(8, 2, 96, 96)},
        r"96 value and 96 key channels; the kernels support \(64, 128\)",
    ),
    "unequal-heads": ({"state_pool": torch.zeros(8, 2, 128, 64)}, "128 value and 64 key"),
    "ring": (
        {"conv_pool": torch.zeros(8, 3, 384)},
        "ring of 3 columns; a convolution of width 4 needs at least 4",
    ),
    "conv-width": ({"conv_weight": torch.zeros(9, 384)}, "9 taps; the kernels support 2 to 8"),
    "conv-slots": ({"conv_pool": torch.zeros(7, 8, 384)}, r"conv_pool has shape \[7, 8, 384\]"),
    "conv-layout": ({"conv_weight": torch.zeros(384, 4).T}, "conv_weight has strides"),
    "qkv-columns": ({"qkv": torch.zeros(5, 385)}, r"qkv has shape \[5, 385\]; it must be \[5, 384\]"),
    "qkv-layout": ({"qkv": torch.zeros(384, 5).T}, "last dimension must be contiguous"),
    "qkv-dtype": ({"qkv": torch.zeros(5, 384, dtype=torch.float64)}, "qkv is torch.float64"),
    "gate-dtype": (
        {"gate": torch.zeros(5, 128, dtype=torch.bfloat16)},
        "gate is torch.bfloat16; it must be torch.f",
    ),
    "weights-dtype": ({"A_log": torch.zeros(2, dtype=torch.bfloat16)}, "A_log is torch.bfloat16"),
    "state-dtype": ({"state_pool": torch.zeros(8, 2, 64, 64, dtype=torch.bfloat16)}, "set state_dtype"),
    "conv-dtype": ({"conv_pool": torch.zeros(8, 8, 384, dtype=torch.float16)}, "set state_dtype"),
    "state-layout": ({"state_pool": torch.zeros(8, 2, 64, 128)[..., :64]}, "matrices must be contiguous"),
    "state-dims": ({"state_pool": torch.zeros(8, 2, 64)}, r"must be \[S, H, V, K\]"),
    "flags-dtype": ({"nonfinite": torch.zeros(8, dtype=torch.bool)}, "nonfinite is torch.bool"),
    "flags-slots": ({"nonfinite": torch.zeros(7, dtype=torch.int32)}, r"nonfinite has shape \[7\]; it must be \[8\]"),
    "out-rows": ({"out": torch.zeros(4, 128)}, r"out has shape \[4, 128\]"),
}
WRONG_DECODE = {
    "slots-dtype": ({"read_slot": torch.zeros(5, dtype=torch.int64)}, "read_slot is torch.int64"),
    "position-dtype": ({"position": torch.zeros(5, dtype=torch.int32)}, "position is torch.int32"),
    "slots-rows": ({"write_slot": torch.zeros(4, dtype=torch.int32)}, r"write_slot has shape \[4\]"),
}
WRONG_PREFILL = {
    "bounds": (
        {"cu_seqlens": torch.zeros(1, dtype=torch.int32)},
        r"cu_seqlens has shape \[1\]; it must be \[2\]",
    ),
    "table-dims": ({"slot_table": torch.zeros(1, dtype=torch.int32)}, r"slot_table has shape \(1,\)"),
    "table-dtype": ({"slot_table": torch.zeros(1, 1)}, "slot_table is torch.float32"),
    "block-size": ({"block_size": 0}, "block_size is 0"),
}


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_DECODE])
def test_wrong_decode_arguments_are_named(wrong: str) -> None:
    change, message = (WRONG | WRONG_DECODE)[wrong]
    with pytest.raises(ValueError, match=message):
        dispatch.kda_decode(**(decode_arguments(Case(5)) | change))


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_PREFILL])
def test_wrong_prefill_arguments_are_named(wrong: str) -> None:
    change, message = (WRONG | WRONG_PREFILL)[wrong]
    with pytest.raises(ValueError, match=message):
        dispatch.kda_prefill(**(prefill_arguments(Case(5)) | change))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_op_itself_refuses_what_would_corrupt_memory(name: str) -> None:
    arguments = ARGUMENTS[name](Case(5))
    with pytest.raises(ValueError, match="set state_dtype to float32"):
        getattr(OPS, name)(**(arguments | {"state_pool": arguments["state_pool"].double()}))
    with pytest.raises(ValueError, match="they must be equal"):
        getattr(OPS, name)(**(arguments | {"out": arguments["out"].double()}))
    with pytest.raises(ValueError, match="int32"):
        getattr(OPS, name)(**(arguments | {"nonfinite": torch.zeros(8, dtype=torch.int64)}))
    slots = "read_slot" if name == "kda_decode" else "slot_table"
    with pytest.raises(ValueError, match="int32"):
        getattr(OPS, name)(**(arguments | {slots: arguments[slots].long()}))


def test_prepare_leaves_nothing_to_compile(monkeypatch):
    from kimi_vllm.kernels.cpu import host

    dispatch.prepare("cpu", 64)

    def compile_worker(*args):
        raise AssertionError("compiled while serving")

    monkeypatch.setattr(host, "compile_worker", compile_worker)
    host._worker(True, 64)
    host._worker(False, 64)


def test_both_null_slots_are_one():
    from kimi_vllm.cache import slots
    from kimi_vllm.kernels import reference

    assert slots.NULL_SLOT == reference.NULL_SLOT == 0
