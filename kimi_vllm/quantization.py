"""How a quantised model's linear layers are stored: which of them are quantised, and the bytes of each.

Read from config.json's ``quantization_config`` or from vLLM's online options (``--quantization fp8``), without vLLM, so
that the engine and `kimi-vllm plan` size the same model by the same rule.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

Scope = Literal["linear", "experts"]
Strategy = Literal["tensor", "channel", "group", "block"]

BLOCK = 128
"""Outputs and inputs of the weight blocks that share a scale in block-wise FP8."""


class QuantizationError(ValueError):
    """A quantisation whose weights cannot be sized. Names the method and what to set instead."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How the elements of one weight matrix are kept.

    Attributes:
        bits: Bits per element.
        strategy: Elements that share a scale: all, an output's, a group of an output's, or a block.
        group: Inputs per group, and with blocks ``(outputs, inputs)``.
        scale_bytes: Bytes per scale.
        zero_bits: Bits per zero point, one beside each scale; 0 for symmetric formats.
    """

    bits: int
    strategy: Strategy = "tensor"
    group: tuple[int, int] = (1, 1)
    scale_bytes: int = 4
    zero_bits: int = 0

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of an ``[outputs, inputs]`` weight with its scales and zero points."""
        scales = {
            "tensor": 1,
            "channel": outputs,
            "group": outputs * -(-inputs // self.group[1]),
            "block": -(-outputs // self.group[0]) * -(-inputs // self.group[1]),
        }[self.strategy]
        return outputs * inputs * self.bits // 8 + scales * self.scale_bytes + scales * self.zero_bits // 8


FP8_PER_TENSOR = Stored(8)
FP8_PER_CHANNEL = Stored(8, "channel")
FP8_PER_BLOCK = Stored(8, "block", (BLOCK, BLOCK))

_ONLINE: dict[str, dict[Scope, Stored]] = {
    "fp8": {"linear": FP8_PER_TENSOR, "experts": FP8_PER_TENSOR},
    "fp8_per_tensor": {"linear": FP8_PER_TENSOR, "experts": FP8_PER_TENSOR},
    "fp8_per_channel": {"linear": FP8_PER_CHANNEL, "experts": FP8_PER_CHANNEL},
    "fp8_per_block": {"linear": FP8_PER_BLOCK, "experts": FP8_PER_BLOCK},
    "int8_per_channel_weight_only": {"experts": Stored(8, "channel")},
}
ONLINE = tuple(_ONLINE)
"""Values of ``--quantization`` that quantise 16-bit weights while they are loaded."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """A group of layers that are stored alike; no targets means all."""

    stored: Mapping[Scope, Stored]
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightFormat:
    """The quantisation of a model.

    Attributes:
        method: Name of the quantisation, for messages.
        rules: The first rule whose targets match a layer decides.
        ignored: Names or patterns of layers that stay as they are.
    """

    method: str
    rules: tuple[_Rule, ...]
    ignored: tuple[str, ...] = field(default=())

    @classmethod
    def online(cls, method: str, ignored: Sequence[str] = ()) -> Self:
        """Weights that vLLM quantises while it loads them.

        Raises:
            QuantizationError: The method is none of `ONLINE`.
        """
        if method not in _ONLINE:
            raise _unknown(method)
        return cls(method, (_Rule(_ONLINE[method]),), tuple(ignored))

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """A checkpoint's ``quantization_config``.

        Raises:
            QuantizationError: The method is unknown, or its config lacks what sizes are computed from.
        """
        method = str(config.get("quant_method"))
        read = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq}.get(method)
        if read is None:
            raise _unknown(method)
        try:
            rules, ignored = read(config)
        except (KeyError, TypeError, ValueError) as error:
            raise QuantizationError(f"quantization_config of method {method}: {error!r} in {dict(config)}.") from error
        return cls(method, tuple(rules), tuple(ignored))

    def stored(self, name: str, scope: Scope) -> Stored | None:
        """How the layer of this name in the checkpoint is stored; None if in the model's dtype."""
        if any(_matches(pattern, name) for pattern in self.ignored):
            return None
        for rule in self.rules:
            if not rule.targets or any(_matches(target, name) for target in rule.targets):
                return rule.stored.get(scope)
        return None


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a layer: by regular expression, wildcard, or whole components of its name."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _everywhere(stored: Stored, targets: Sequence[str] = ()) -> _Rule:
    return _Rule({"linear": stored, "experts": stored}, tuple(targets))


def _fp8(config: Mapping[str, Any]) -> tuple[list[_Rule], Sequence[str]]:
    block = config.get("weight_block_size")
    stored = FP8_PER_TENSOR if block is None else Stored(8, "block", (int(block[0]), int(block[1])))
    return [_everywhere(stored)], config.get("ignored_layers") or config.get("modules_to_not_convert") or ()


def _compressed_tensors(config: Mapping[str, Any]) -> tuple[list[_Rule], Sequence[str]]:
    rules = []
    for group in config["config_groups"].values():
        weights = group["weights"]
        bits, strategy = int(weights["num_bits"]), weights.get("strategy", "tensor")
        packed = (weights.get("type") == "int" and bits < 8) or "pack" in str(group.get("format", config.get("format")))
        shape = weights.get("block_structure") or (1, weights.get("group_size") or 1)
        stored = Stored(
            bits,
            strategy,
            (int(shape[0]), int(shape[1])),
            # Packed integers have scales of the activations' dtype, eight-bit numbers float32.
            scale_bytes=2 if packed else 4,
            zero_bits=0 if weights.get("symmetric", True) else bits,
        )
        # "Linear" is a class, and all that can be quantised here are of it.
        targets = [target for target in group["targets"] if target != "Linear"]
        rules.append(_everywhere(stored, () if "Linear" in group["targets"] else targets))
    return rules, config.get("ignore") or ()


def _awq(config: Mapping[str, Any]) -> tuple[list[_Rule], Sequence[str]]:
    bits = int(config.get("bits") or config["w_bit"])
    stored = _grouped(bits, int(config.get("group_size") or config["q_group_size"]))
    return [_everywhere(stored)], config.get("modules_to_not_convert") or ()


def _gptq(config: Mapping[str, Any]) -> tuple[list[_Rule], Sequence[str]]:
    stored = _grouped(int(config["bits"]), int(config["group_size"]))
    excluded = [key for key in config.get("dynamic") or {} if key.startswith("-:")]
    return [_everywhere(stored)], [f"re:{key.removeprefix('-:')}" for key in excluded]


def _grouped(bits: int, group_size: int) -> Stored:
    if group_size < 1:  # one group per output
        return Stored(bits, "channel", scale_bytes=2, zero_bits=bits)
    return Stored(bits, "group", (1, group_size), scale_bytes=2, zero_bits=bits)


def _unknown(method: str) -> QuantizationError:
    return QuantizationError(
        f"quantisation {method}: the size of its weights is unknown. Known are --quantization {', '.join(ONLINE)} and "
        "checkpoints of fp8, compressed-tensors, awq and gptq. For others set both kimi.state_slots and "
        "--kv-cache-memory-bytes."
    )
