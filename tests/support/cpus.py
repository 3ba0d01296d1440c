"""CPUs with AMX or AVX-512 as vLLM's linear layers meet them, on any machine: what products demand, computed in torch.

Demands are those of vLLM's csrc/cpu/sgl-kernels: `gemm.cpp` packs weights in blocks of 32 outputs, `gemm_int8.cpp`
quantises activations by row. Experts are left to the machine there is: theirs have a layout that only AMX reads.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

BLOCK_N, TILE_N, TILE_K = 32, 16, 32
COMPENSATION_BYTES = 4
"""An int8 row has a 32-bit sum of its weights behind it."""


@dataclass
class EmulatedAMX:
    """What was packed, as (outputs, inputs), by dtype; and rows multiplied."""

    packed: list[tuple[torch.dtype, int, int]] = field(default_factory=list)
    products: list[torch.dtype] = field(default_factory=list)

    def shapes(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Weights of one dtype that were packed."""
        return [(outputs, inputs) for packed, outputs, inputs in self.packed if packed == dtype]

    def convert_weight_packed(self, weight: Tensor) -> Tensor:
        """Check as the kernel does, and keep the weight as it is."""
        outputs, inputs = weight.shape
        small = outputs < TILE_N and weight.dtype != torch.int8  # becomes float32, whatever its size
        _demand(small or outputs % TILE_N == 0, f"invalid weight out features {outputs}")
        _demand(small or inputs % TILE_K == 0, f"invalid weight input features {inputs}")
        _demand(weight.dtype != torch.int8 or outputs % BLOCK_N == 0, "Expected N == BLOCK_N to be true")
        self.packed.append((weight.dtype, outputs, inputs))
        if weight.dtype == torch.int8:
            return torch.cat([weight, weight.new_zeros(outputs, COMPENSATION_BYTES)], 1)
        return weight.float() if small else weight.clone()

    def weight_packed_linear(self, out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, is_vnni: bool) -> None:
        """A product of unquantised weights."""
        assert is_vnni
        self.products.append(packed.dtype)
        out.copy_(linear(x.float(), packed.float(), bias))

    def int8_scaled_mm_with_quant(
        self, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype, is_vnni: bool
    ) -> Tensor:
        """A product of int8 weights and of activations that are quantised here, by row and symmetrically."""
        assert is_vnni
        # The kernel's second half has code for bfloat16 only, and says "scalar path not implemented!" for the others.
        _demand(x.dtype == torch.bfloat16, "int8_scaled_mm_with_quant: expect A to be bfloat16")
        _demand(out_dtype == x.dtype, "int8_scaled_mm_with_quant: expect A has same dtype with out_dtype.")
        _demand(packed.shape[1] == x.shape[1] + COMPENSATION_BYTES, "Expected mat2.size(1) == K + sizeof(int32_t)")
        _demand(scales.dtype == torch.float32, "int8_scaled_mm_with_quant: expect scales to be float32.")
        _demand(scales.numel() == len(packed), "Expected scales2.numel() == N")
        self.products.append(packed.dtype)
        row_scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-7) / 127
        rounded = (x.float() / row_scale).round()
        product = linear(rounded, packed[:, :-COMPENSATION_BYTES].float()) * row_scale * scales.flatten()
        return (product if bias is None else product + bias).to(out_dtype)


def emulate_amx(monkeypatch: pytest.MonkeyPatch) -> EmulatedAMX:
    """Let vLLM believe that this machine has AMX, and answer its linear layers' calls."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    _keep_kernels(monkeypatch)
    emulated = EmulatedAMX()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)
    monkeypatch.setattr(cpu_moe.X86CPUUnquantizedExperts, "_supports_current_device", staticmethod(lambda: False))
    for op in ("convert_weight_packed", "weight_packed_linear", "int8_scaled_mm_with_quant"):
        monkeypatch.setattr(torch.ops._C, op, getattr(emulated, op), raising=False)
    return emulated


def emulate_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM believe that this machine has AVX-512, if it has not, and multiply 4-bit weights."""
    if torch.cpu._is_avx512_supported():
        return
    _keep_kernels(monkeypatch)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.ops._C, "cpu_gemm_wna16", cpu_gemm_wna16, raising=False)


def cpu_gemm_wna16(
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """The product of 4-bit weights in blocks of 16 outputs, ``[N / 16, K · 2]`` integers, as `cpu_wna16.cpp` has it."""
    nibbles = torch.arange(pack_factor) * 4
    blocks, inputs, outputs = len(packed), x.shape[1], 16 * len(packed)
    _demand(x.dtype in (torch.bfloat16, torch.float16) and x.dtype == scales.dtype, '"cpu_gemm_wna16" not implemented')
    _demand((pack_factor, isa_hint) == (8, "vec") and inputs % 32 == 0 and outputs % 32 == 0, "Expected a_k_size % 32")
    values = (packed.view(blocks, inputs, 2, 1) >> nibbles & 15).view(blocks, inputs, 16)
    weight = values.transpose(0, 1).reshape(inputs, outputs)
    groups = len(scales)
    zero = 8 if zeros is None else (zeros[..., None] >> nibbles & 15).view(groups, 1, outputs)
    grouped = (weight.view(groups, -1, outputs) - zero).float() * scales.float()[:, None]
    out.copy_(linear(x.float(), grouped.view(inputs, outputs).T, bias))


def _keep_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the library for the instruction sets that there really are, and no other from now on."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    monkeypatch.setattr(type(current_platform), "import_kernels", classmethod(lambda cls: None))


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)
