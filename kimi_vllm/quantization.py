"""How a quantised model's linear layers are stored: which are quantised, and the bytes of each.

Read from config.json's ``quantization_config`` or from ``--quantization``, without vLLM, so that the engine and
`kimi-vllm plan` agree.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, Self, get_args

Scope = Literal["linear", "experts"]
Strategy = Literal["tensor", "channel", "group", "block"]

BLOCK = 128
"""Outputs and inputs of the weight blocks that share a scale in block-wise FP8."""


class QuantizationError(ValueError):
    """A quantisation whose weights cannot be sized. Names the method, and the known ones."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How the elements of one weight matrix are stored.

    Attributes:
        bits: Bits per element.
        strategy: What shares a scale: all elements, those of an output, a group of an output's, or a block.
        group: Outputs and inputs per group or block.
        scale_bytes: Bytes per scale.
        zero_bits: Bits per zero point, one per scale; 0 for symmetric formats.
    """

    bits: int
    strategy: Strategy = "tensor"
    group: tuple[int, int] = (1, 1)
    scale_bytes: int = 4
    zero_bits: int = 0

    def scales(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Rows and columns of the scales of an ``[outputs, inputs]`` weight."""
        rows, columns = {
            "tensor": (outputs, inputs),
            "channel": (1, inputs),
            "group": (1, self.group[1]),
            "block": self.group,
        }[self.strategy]
        return -(-outputs // rows), -(-inputs // columns)

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of an ``[outputs, inputs]`` weight with its scales and zero points."""
        scales = prod(self.scales(outputs, inputs))
        return outputs * inputs * self.bits // 8 + scales * self.scale_bytes + scales * self.zero_bits // 8

    def part(self, suffix: str, outputs: int, inputs: int, itemsize: int, method: str) -> tuple[int, ...] | None:
        """Shape of one of a checkpoint's tensors for an ``[outputs, inputs]`` weight; None if there is none so named.

        Args:
            suffix: The tensor's name behind the layer's.
            outputs, inputs: Shape of the whole weight.
            itemsize: Bytes per element of the tensor, which may pack several elements of the weight.
            method: Name of the quantisation.
        """
        rows, columns = self.scales(outputs, inputs)

        def packed(count: int) -> int:
            return count * self.bits // (8 * itemsize)

        if method in ("awq", "gptq"):
            weight = (inputs, packed(outputs)) if method == "awq" else (packed(inputs), outputs)
            return {
                "qweight": weight, "qzeros": (columns, packed(rows)), "scales": (columns, rows), "g_idx": (inputs,)
            }.get(suffix)  # fmt: skip
        if suffix.endswith(("input_scale", "global_scale", "input_zero_point")):
            return ()
        return {
            "weight_packed": (outputs, packed(inputs)), "weight_shape": (2,), "weight_g_idx": (inputs,),
            "weight_scale": (rows, columns), "weight_scale_inv": (rows, columns),
            "weight_zero_point": (packed(rows), columns),
        }.get(suffix)  # fmt: skip


FP8_PER_TENSOR = Stored(8)
FP8_PER_CHANNEL = Stored(8, "channel")
FP8_PER_BLOCK = Stored(8, "block", (BLOCK, BLOCK))

_FORMATS = {"fp8_per_tensor": FP8_PER_TENSOR, "fp8_per_channel": FP8_PER_CHANNEL, "fp8_per_block": FP8_PER_BLOCK}
_SPECS = {"int8_per_channel_static": Stored(8, "channel")}
_SPECS |= {f"{name}_static": stored for name, stored in _FORMATS.items()}
"""By vLLM's names for linear layers and experts in ``--quantization-config``."""

_ONLINE: dict[str, tuple[str | None, str]] = {name: (f"{name}_static", f"{name}_static") for name in _FORMATS}
_ONLINE = {
    "fp8": _ONLINE["fp8_per_tensor"],
    **_ONLINE,
    "int8_per_channel_weight_only": (None, "int8_per_channel_static"),
}
ONLINE = tuple(_ONLINE)
"""Values of ``--quantization`` that quantise 16-bit weights at load time."""

Match = Literal["exact", "substring", "pattern", "glob"]
"""How vLLM matches a config's list with layer names: AWQ by substring, FP8 exactly, compressed-tensors exactly or by
regular expression, online quantisation also by wildcards."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Layers that are stored alike; no targets means all."""

    stored: Mapping[Scope, Stored]
    targets: tuple[str, ...] = ()
    match: Match = "pattern"


@dataclass(frozen=True)
class WeightFormat:
    """The quantisation of a model.

    Attributes:
        method: Name of the quantisation, for messages.
        rules: The first rule whose targets match a layer decides.
        ignored: Names or patterns of layers that stay as they are.
        match: How names are compared with `ignored`.
    """

    method: str
    rules: tuple[_Rule, ...]
    ignored: tuple[str, ...] = ()
    match: Match = "pattern"

    @classmethod
    def online(cls, method: str, ignored: Sequence[str] = ()) -> Self:
        """The format of a value of ``--quantization``, which quantises at load time.

        Raises:
            QuantizationError: The method is none of `ONLINE`.
        """
        if method not in _ONLINE:
            raise _unknown(method)
        return cls.of_specs(method, *_ONLINE[method], ignored)

    @classmethod
    def of_specs(cls, method: str, linear: str | None, experts: str | None, ignored: Sequence[str] = ()) -> Self:
        """The format with vLLM's names for linear layers and experts; None leaves them unquantised.

        Raises:
            QuantizationError: One of the names is unknown.
        """
        scopes: dict[Scope, str | None] = {"linear": linear, "experts": experts}
        named = {scope: name for scope, name in scopes.items() if name is not None}
        for name in named.values():
            if name not in _SPECS:
                raise _unknown(name)
        rule = _Rule({scope: _SPECS[name] for scope, name in named.items()})
        return cls(method, (rule,), tuple(ignored), "glob")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The format that a config.json declares; None if it declares none.

        Raises:
            QuantizationError: See `of_checkpoint`.
        """
        written = as_written(config)
        return None if written is None else cls.of_checkpoint(written)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """The format of a checkpoint's ``quantization_config``.

        Raises:
            QuantizationError: The method is unknown, or its config lacks what sizes are computed from.
        """
        method = str(config.get("quant_method")).lower().replace("compressed_tensors", "compressed-tensors")
        reader = _READERS.get(method)
        if reader is None:
            raise _unknown(method)
        read, match = reader
        try:
            rules, ignored = read(config)
            for pattern in [*ignored, *(target for rule in rules for target in rule.targets)]:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
            raise QuantizationError(f"quantization_config of method {method}: {error!r} in {dict(config)}.") from error
        # A layer's own name takes precedence over its class.
        return cls(method, tuple(sorted(rules, key=lambda rule: not rule.targets)), tuple(ignored), match)

    def stored(self, name: str, scope: Scope) -> Stored | None:
        """How the layer with this checkpoint name is stored; None if in the model's dtype."""
        if any(_matches(pattern, name, self.match) for pattern in self.ignored):
            return None
        for rule in self.rules:
            if not rule.targets or any(_matches(target, name, rule.match) for target in rule.targets):
                return rule.stored.get(scope)
        return None


def as_written(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a config.json, under either of its names."""
    return config.get("quantization_config") or config.get("compression_config")


def _matches(pattern: str, name: str, match: Match) -> bool:
    # vLLM asks for a layer's experts together, and compressed-tensors for each of them.
    together = re.sub(r"\.experts\..*", ".experts", name)
    if match == "substring":
        return pattern in together
    if match == "exact":
        return pattern == name or (together != name and together in pattern)
    if pattern.startswith("re:"):
        return any(re.match(pattern.removeprefix("re:"), each) is not None for each in (name, together))
    return pattern in (name, together) or (match == "glob" and fnmatchcase(together, pattern))


def _everywhere(stored: Stored, targets: Sequence[str] = (), match: Match = "pattern") -> _Rule:
    return _Rule({"linear": stored, "experts": stored}, tuple(targets), match)


_STRATEGIES: dict[str, Strategy] = {each: each for each in get_args(Strategy)} | {"tensor_group": "group"}

Read = tuple[list[_Rule], Sequence[str]]


def _fp8(config: Mapping[str, Any]) -> Read:
    block = config.get("weight_block_size")
    stored = FP8_PER_TENSOR if block is None else Stored(8, "block", (int(block[0]), int(block[1])))
    return [_everywhere(stored)], config.get("ignored_layers") or config.get("modules_to_not_convert") or ()


def _compressed_tensors(config: Mapping[str, Any]) -> Read:
    rules = []
    for group in config["config_groups"].values():
        weights = group["weights"]
        bits, strategy = int(weights["num_bits"]), weights.get("strategy") or "tensor"
        shape = weights.get("block_structure") or (1, weights.get("group_size") or 1)
        if isinstance(shape, str):
            shape = shape.split("x")
        packed = (weights.get("type") == "int" and bits < 8) or "pack" in str(group.get("format", config.get("format")))
        # Packed integers have scales of two bytes, four-bit floats of one, eight-bit numbers of four.
        scale_bytes = 1 if strategy == "tensor_group" else 2 if packed else 4
        stored = Stored(
            bits,
            _STRATEGIES[strategy],
            (int(shape[0]), max(1, int(shape[1]))),
            scale_bytes,
            zero_bits=0 if weights.get("symmetric", True) else bits,
        )
        # "Linear" is the class of all layers that can be quantised here.
        rules.append(_everywhere(stored, () if "Linear" in group["targets"] else group["targets"]))
    return rules, config.get("ignore") or ()


def _awq(config: Mapping[str, Any]) -> Read:
    bits = int(config.get("bits") or config["w_bit"])
    stored = _grouped(bits, int(config.get("group_size") or config["q_group_size"]))
    return [_everywhere(stored)], config.get("modules_to_not_convert") or ()


def _gptq(config: Mapping[str, Any]) -> Read:
    bits, group_size = int(config["bits"]), int(config["group_size"])
    rules, excluded = [], []
    for key, other in (config.get("dynamic") or {}).items():
        if key.startswith("-:"):
            excluded.append(f"re:{key.removeprefix('-:')}")
            continue
        stored = _grouped(int(other.get("bits", bits)), int(other.get("group_size", group_size)))
        rules.append(_everywhere(stored, [f"re:{key.removeprefix('+:')}"]))
    blocks = config.get("modules_in_block_to_quantize") or []
    named = [name for block in blocks for name in ([block] if isinstance(block, str) else block)]
    rules.append(_everywhere(_grouped(bits, group_size), [rf"re:.*\.{re.escape(name)}$" for name in named]))
    return rules, excluded


_READERS: dict[str, tuple[Callable[[Mapping[str, Any]], Read], Match]] = {
    "fp8": (_fp8, "exact"),
    "compressed-tensors": (_compressed_tensors, "pattern"),
    "awq": (_awq, "substring"),
    "gptq": (_gptq, "pattern"),
}


def _grouped(bits: int, group_size: int) -> Stored:
    if group_size < 1:  # one group per output
        return Stored(bits, "channel", scale_bytes=2, zero_bits=bits)
    return Stored(bits, "group", (1, group_size), scale_bytes=2, zero_bits=bits)


def _unknown(method: str) -> QuantizationError:
    return QuantizationError(
        f"quantisation {method}: the size of its weights is unknown. Known: --quantization {', '.join(ONLINE)}; "
        f"checkpoints of {', '.join(_READERS)}."
    )
