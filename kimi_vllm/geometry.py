"""The shape of a model, read from either form of config.json; what is not served is refused by key.

The hub's form (moonshotai/Kimi-Linear-48B-A3B-Instruct) lists layers in ``linear_attn_config``, counted from 1;
transformers' `KimiLinearConfig.save_pretrained` writes ``layer_types`` and ``mlp_layer_types``. Kimi-K3 shares the
``model_type`` and adds fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

SUPPORTED_HEAD_DIMS = (64, 128)
MAX_CONV_WIDTH = 8
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


class GeometryError(ValueError):
    """A config.json that is wrong, incomplete, or of a model that is not served. Names the key."""


@dataclass(frozen=True, slots=True)
class MoEGeometry:
    """The mixture of experts: sigmoid router, bias for selection only, top-k, scaling, shared experts."""

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    intermediate_size: int
    renormalize: bool
    routed_scaling_factor: float


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

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    kda: tuple[bool, ...]
    sparse: tuple[bool, ...]
    linear_num_heads: int
    linear_head_dim: int
    conv_width: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
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
        fields = dict(values)
        moe = fields.pop("moe")
        fields["kda"], fields["sparse"] = tuple(fields["kda"]), tuple(fields["sparse"])
        return cls(**fields, moe=None if moe is None else MoEGeometry(**moe))

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
        num_layers = _integer(config, "num_hidden_layers")
        kda = _kda_layers(config, num_layers)
        sparse = _sparse_layers(config, num_layers)
        heads, head_dim, conv_width = _linear_sizes(config)
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=_integer(config, "hidden_size"),
            intermediate_size=_integer(config, "intermediate_size"),
            rms_norm_eps=_positive(config, "rms_norm_eps"),
            kda=kda,
            sparse=sparse,
            linear_num_heads=heads,
            linear_head_dim=head_dim,
            conv_width=conv_width,
            num_attention_heads=_integer(config, "num_attention_heads"),
            q_lora_rank=_optional_integer(config, "q_lora_rank"),
            kv_lora_rank=_integer(config, "kv_lora_rank"),
            qk_nope_head_dim=_integer(config, "qk_nope_head_dim"),
            qk_rope_head_dim=_integer(config, "qk_rope_head_dim"),
            v_head_dim=_integer(config, "v_head_dim"),
            moe=_moe(config) if any(sparse) else None,
        )


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
    types = _sequence(config, "layer_types", num_layers)
    for index, kind in enumerate(types):
        if kind not in ("linear_attention", "full_attention"):
            raise GeometryError(f"layer_types[{index}]={kind!r}: expected 'linear_attention' or 'full_attention'.")
    return tuple(kind == "linear_attention" for kind in types)


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


def _linear_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    if (linear := _mapping(config, "linear_attn_config")) is not None:
        source, keys = linear, ("num_heads", "head_dim", "short_conv_kernel_size")
        prefix = "linear_attn_config."
    else:
        source, keys = config, ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        prefix = ""
    heads, head_dim, conv_width = (_integer(source, key, prefix) for key in keys)
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise GeometryError(f"{prefix}{keys[1]}={head_dim}: KDA heads of size 64 and 128 are served.")
    if not 2 <= conv_width <= MAX_CONV_WIDTH:
        raise GeometryError(f"{prefix}{keys[2]}={conv_width}: expected 2..{MAX_CONV_WIDTH}.")
    return heads, head_dim, conv_width


def _sparse_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if config.get("mlp_layer_types") is not None:
        types = _sequence(config, "mlp_layer_types", num_layers)
        for index, kind in enumerate(types):
            if kind not in ("sparse", "dense"):
                raise GeometryError(f"mlp_layer_types[{index}]={kind!r}: expected 'sparse' or 'dense'.")
        return tuple(kind == "sparse" for kind in types)
    if _is_one_of(config.get("num_experts"), (None, 0)):
        return (False,) * num_layers
    num_dense = _integer(config, "first_k_dense_replace", minimum=0, maximum=num_layers)
    return tuple(index >= num_dense for index in range(num_layers))


def _moe(config: Mapping[str, Any]) -> MoEGeometry:
    num_experts = _integer(config, "num_experts")
    per_token = _integer(config, "num_experts_per_token")
    if per_token > num_experts:
        raise GeometryError(f"num_experts_per_token={per_token}: more than num_experts={num_experts}.")
    return MoEGeometry(
        num_experts=num_experts,
        num_experts_per_token=per_token,
        num_shared_experts=_integer(config, "num_shared_experts", minimum=0),
        intermediate_size=_integer(config, "moe_intermediate_size"),
        renormalize=_boolean(config, "moe_renormalize", default=True),
        routed_scaling_factor=_positive(config, "routed_scaling_factor"),
    )


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


def _present(config: Mapping[str, Any], key: str, prefix: str = "") -> Any:
    value = config.get(key)
    if value is None:
        raise GeometryError(f"{prefix}{key}: missing from config.json.")
    return value


def _integer(config: Mapping[str, Any], key: str, prefix: str = "", minimum: int = 1, maximum: int = LARGEST) -> int:
    value = _present(config, key, prefix)
    if not _is_integer(value, minimum, maximum):
        raise GeometryError(f"{prefix}{key}={value!r}: expected an integer from {minimum} to {maximum}.")
    return int(value)


def _optional_integer(config: Mapping[str, Any], key: str) -> int | None:
    return None if config.get(key) is None else _integer(config, key)


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = _present(config, key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise GeometryError(f"{key}={value!r}: expected a positive number, at most {LARGEST}.")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise GeometryError(f"{key}={value!r}: expected true or false.")
    return value


def _sequence(config: Mapping[str, Any], key: str, length: int) -> Sequence[Any]:
    value = config.get(key)
    if value is None:
        raise GeometryError(f"{key}: missing from config.json (and linear_attn_config is missing too).")
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
        raise GeometryError(f"{key}: expected a list of num_hidden_layers={length} entries.")
    return value
