"""The shape of a model, read from either form of config.json; what is not served is refused by key.

The hub's form (moonshotai/Kimi-Linear-48B-A3B-Instruct) lists layers in ``linear_attn_config``, counted from 1;
transformers' `KimiLinearConfig.save_pretrained` writes ``layer_types`` and ``mlp_layer_types``. Kimi-K3 shares the
``model_type`` and adds fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

SUPPORTED_HEAD_DIMS = (64, 128)
MAX_CONV_WIDTH = 8
_COLUMNS, _QUANTISED_COLUMNS = 16, 128
LARGEST = 2**20
"""Upper bound of all numbers in config.json: a list of more layers would fill memory."""

GEOMETRY_ATTRIBUTE = "kimi_geometry"
"""Attribute of the Hugging Face config in which the geometry travels to vLLM's worker processes."""

_UNSERVED = {
    "mla_use_output_gate": (None, False),
    "attn_res_block_size": (None,),
    "routed_expert_hidden_size": (None,),
    "latent_moe_use_norm": (None, False),
    "activation_situ_beta": (None,),
    "activation_situ_linear_beta": (None,),
    "attention_bias": (None, False),
    "rope_scaling": (None,),
    "linear_attn_config.use_full_rank_gate": (None, False),
    "linear_attn_config.gate_lower_bound": (None,),
}
"""Fields of Kimi-K3 and other relatives, and their values that mean "not used"."""

_FIXED = {
    "hidden_act": ("silu",),
    "moe_router_activation_func": ("sigmoid",),
    "moe_layer_freq": (1,),
    "num_expert_group": (1, None),
    "topk_group": (1, None),
    "num_nextn_predict_layers": (0, None),
    "topk_method": ("noaux_tc", None),
    "mla_use_nope": (True,),
    "tie_word_embeddings": (False, None),
}
"""Fields with a single served value. `mla_use_nope` false would mean a rotated MLA."""


_A_SIZE = Field(strict=True, ge=1, le=LARGEST, description=f"an integer from 1 to {LARGEST}")
_Size: TypeAlias = Annotated[int, _A_SIZE]
_Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=LARGEST, description=f"an integer from 0 to {LARGEST}")]
_Positive: TypeAlias = Annotated[
    float,
    Field(strict=True, allow_inf_nan=False, gt=0, le=LARGEST, description=f"a positive number, at most {LARGEST}"),
]


_Built = TypeVar("_Built", "MoEGeometry", "KimiGeometry")
_LINEAR_KEYS = {"linear_head_dim": "linear_head_dim", "conv_width": "linear_conv_kernel_dim"}
_LINEAR_KEYS_HUB = {
    "linear_num_heads": "linear_attn_config.num_heads",
    "linear_head_dim": "linear_attn_config.head_dim",
    "conv_width": "linear_attn_config.short_conv_kernel_size",
}


class GeometryError(ValueError):
    """A config.json that is wrong, incomplete, or of a model that is not served. Names the key."""


@dataclass(frozen=True, slots=True)
class MoEGeometry:
    """The mixture of experts: sigmoid router, bias for selection only, top-k, scaling, shared experts."""

    num_experts: _Size
    num_experts_per_token: _Size
    num_shared_experts: _Count
    intermediate_size: _Size
    renormalize: Annotated[bool, Field(strict=True, description="true or false")]
    routed_scaling_factor: _Positive


@dataclass(frozen=True, slots=True)
class KimiGeometry:
    """All sizes of a Kimi Linear model. Layers are counted from 0.

    Attributes:
        kda: Per layer, True for Kimi Delta Attention, False for MLA.
        sparse: Per layer, True for MoE, False for a dense MLP.
        linear_num_heads, linear_head_dim: Heads of a KDA layer and their size K == V.
        conv_width: Taps of the short convolution on q, k and v.
        kv_lora_rank, qk_rope_head_dim: The two parts of an MLA latent; the second is not rotated (NoPE).
        moe: None if every layer is dense.
    """

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    rms_norm_eps: _Positive
    kda: tuple[bool, ...]
    sparse: tuple[bool, ...]
    linear_num_heads: _Size
    linear_head_dim: _Size
    conv_width: Annotated[int, Field(strict=True, ge=2, le=MAX_CONV_WIDTH, description=f"2..{MAX_CONV_WIDTH}")]
    num_attention_heads: _Size
    q_lora_rank: Annotated[int | None, _A_SIZE]
    kv_lora_rank: _Size
    qk_nope_head_dim: _Size
    qk_rope_head_dim: _Size
    v_head_dim: _Size
    moe: MoEGeometry | None

    @property
    def num_layers(self) -> int:
        """Decoder layers of either kind."""
        return len(self.kda)

    @property
    def qk_head_dim(self) -> int:
        """Size of one MLA query or key head; the softmax scale is its inverse square root."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements an MLA layer caches per token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which a Hugging Face config can carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KimiGeometry":
        """The inverse of `to_dict`."""
        return cls(**values)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "KimiGeometry":
        """Read config.json, given as a mapping, in the hub's or in transformers' form.

        Raises:
            GeometryError: A key is missing, of the wrong type, out of range, in contradiction to another, or of a model
                that is not served. The message starts with the key.
        """
        if not isinstance(config, Mapping):
            raise GeometryError(f"config.json: expected an object, not {type(config).__name__}.")
        _mapping(config, "linear_attn_config")
        _refuse_unserved(config)
        num_layers = _integer(config, "num_hidden_layers", 1, LARGEST)
        kda = _kda_layers(config, num_layers)
        sparse = _sparse_layers(config, num_layers)
        keys = _LINEAR_KEYS_HUB if config.get("linear_attn_config") is not None else _LINEAR_KEYS
        geometry = _build(cls, config, keys, kda=kda, sparse=sparse, moe=_moe(config) if any(sparse) else None)
        if geometry.linear_head_dim not in SUPPORTED_HEAD_DIMS:
            raise GeometryError(
                f"{keys['linear_head_dim']}={geometry.linear_head_dim}: KDA heads of size 64 and 128 are served."
            )
        return geometry


def geometry_of(model_config: "ModelConfig") -> KimiGeometry:
    """The geometry that our config hook attached to vLLM's configuration of the model.

    Raises:
        GeometryError: The hook did not run: the plugin is only half registered.
    """
    values = getattr(model_config.hf_config, GEOMETRY_ATTRIBUTE, None)
    if values is None:
        raise GeometryError(
            "kimi-vllm's config hook did not run. Is the plugin listed in VLLM_PLUGINS? Run `kimi-vllm doctor`."
        )
    return KimiGeometry.from_dict(values)


def input_filling(heads: int, *, quantised: bool) -> int:
    """Columns of zeros behind b in KDA's input projection, which has `heads` columns for b on this worker.

    Rows must start at multiples of 16 bytes, and matrix products need multiples of 16 columns: in bfloat16 to be fast,
    in FP8 to work. Of quantised weights, AMX packs int8 in columns of 32, Marlin needs multiples of 64, and blocks that
    share a scale are 128 wide and may not hold two tensors of the checkpoint.
    """
    return -heads % (_QUANTISED_COLUMNS if quantised else _COLUMNS)


def stages_of(geometry: KimiGeometry, vllm_config: "VllmConfig") -> list[range]:
    """The layers of each pipeline stage."""
    from vllm.distributed.utils import get_pp_indices

    stages = vllm_config.parallel_config.pipeline_parallel_size
    return [range(*get_pp_indices(geometry.num_layers, stage, stages)) for stage in range(stages)]


def _refuse_unserved(config: Mapping[str, Any]) -> None:
    for key, unused in _UNSERVED.items():
        value = _lookup(config, key)
        if not _is_one_of(value, unused):
            raise GeometryError(
                f"{key}={value!r}: this field belongs to another model (Kimi-K3) and kimi-vllm does not serve it. "
                "KIMI_VLLM_DISABLE=1 leaves the model to vLLM's own implementation."
            )
    for key, served in _FIXED.items():
        if key in config and not _is_one_of(config[key], served):
            raise GeometryError(f"{key}={config[key]!r}: Kimi Linear is served with {key}={served[0]!r} only.")


def _lookup(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _kda_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if (linear := _mapping(config, "linear_attn_config")) is not None:
        return _from_one_based(linear, num_layers)
    return _choices(config, "layer_types", num_layers, "linear_attention", "full_attention")


def _from_one_based(linear: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    kinds: list[bool | None] = [None] * num_layers
    for key, is_kda in (("kda_layers", True), ("full_attn_layers", False)):
        numbers = linear.get(key)
        if not isinstance(numbers, Sequence) or isinstance(numbers, str):
            raise GeometryError(f"linear_attn_config.{key}: missing, or not a list of layer numbers from 1.")
        for number in numbers:
            if not _is_integer(number, 1, num_layers):
                raise GeometryError(
                    f"linear_attn_config.{key}: layer {number!r} is not in 1..num_hidden_layers={num_layers}."
                )
            if kinds[number - 1] is not None:
                raise GeometryError(f"linear_attn_config.{key}: layer {number} is listed twice.")
            kinds[number - 1] = is_kda
    if None in kinds:
        raise GeometryError(
            f"linear_attn_config: layer {kinds.index(None) + 1} is neither in kda_layers nor in full_attn_layers."
        )
    return tuple(bool(kind) for kind in kinds)


def _sparse_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if config.get("mlp_layer_types") is not None:
        return _choices(config, "mlp_layer_types", num_layers, "sparse", "dense")
    if _is_one_of(config.get("num_experts"), (None, 0)):
        return (False,) * num_layers
    num_dense = _integer(config, "first_k_dense_replace", 0, num_layers)
    return tuple(index >= num_dense for index in range(num_layers))


def _moe(config: Mapping[str, Any]) -> MoEGeometry:
    keys = {"intermediate_size": "moe_intermediate_size", "renormalize": "moe_renormalize"}
    default = {} if "moe_renormalize" in config else {"renormalize": True}
    moe = _build(MoEGeometry, config, keys, **default)
    if moe.num_experts_per_token > moe.num_experts:
        raise GeometryError(
            f"num_experts_per_token={moe.num_experts_per_token}: more than num_experts={moe.num_experts}."
        )
    return moe


def _build(cls: type[_Built], config: Mapping[str, Any], keys: Mapping[str, str], **known: Any) -> _Built:
    """An instance of `cls` from config.json; `keys` are those that are not named as their field."""
    written = {field.name: keys.get(field.name, field.name) for field in fields(cls) if field.name not in known}
    try:
        return cls(**known, **{name: _lookup(config, key) for name, key in written.items()})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        name, value = str(error["loc"][0]), error["input"]
        if value is None:
            raise GeometryError(f"{written[name]}: missing from config.json.") from None
        expected = cls.__pydantic_fields__[name].description  # type: ignore[attr-defined]
        raise GeometryError(f"{written[name]}={value!r}: expected {expected}.") from None


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    # By type as well: to Python True is 1, and 0 is False.
    return any(type(value) is type(one) and value == one for one in known)


def _is_integer(value: Any, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise GeometryError(f"{key}={value!r}: expected an object.")
    return value


def _integer(config: Mapping[str, Any], key: str, minimum: int, maximum: int) -> int:
    value = config.get(key)
    if value is None:
        raise GeometryError(f"{key}: missing from config.json.")
    if not _is_integer(value, minimum, maximum):
        raise GeometryError(f"{key}={value!r}: expected an integer from {minimum} to {maximum}.")
    return int(value)


def _choices(config: Mapping[str, Any], key: str, length: int, first: str, other: str) -> tuple[bool, ...]:
    """Per layer, whether a list in config.json has the first of its two words."""
    value = config.get(key)
    if value is None:
        raise GeometryError(f"{key}: missing from config.json (and linear_attn_config is missing too).")
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
        raise GeometryError(f"{key}: expected a list of num_hidden_layers={length} entries.")
    for index, kind in enumerate(value):
        if kind not in (first, other):
            raise GeometryError(f"{key}[{index}]={kind!r}: expected {first!r} or {other!r}.")
    return tuple(kind == first for kind in value)
