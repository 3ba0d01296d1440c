"""Maps checkpoint names to parameters, and lists the names that do not match.

Names are those of moonshotai/Kimi-Linear-48B-A3B. transformers' `save_pretrained` also writes dense MLPs under
``block_sparse_moe``, which is corrected here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import checkpoint_shapes

packed_modules_mapping = {
    "in_proj": ["q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Merged linear layers and their parts, for vLLM's lookups in quantisation configs."""

_KDA_STACKED = {name: ("in_proj", shard_id) for shard_id, name in enumerate(packed_modules_mapping["in_proj"])}
_KDA_STACKED |= {"f_b_proj": ("fg_b_proj", 0), "g_b_proj": ("fg_b_proj", 1)}
_MLP_STACKED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
_CONV_SHARDS = {"q_conv1d": 0, "k_conv1d": 1, "v_conv1d": 2}
_DENSE_UNDER_MOE = re.compile(r"(model\.layers\.(\d+)\.)block_sparse_moe\.((?:gate|up|down)_proj\..*)")
_LISTED = 8


class WeightsError(ValueError):
    """The checkpoint lacks tensors, or has unexpected ones or wrong shapes. Names them."""


def load_weights(
    model: nn.Module,
    geometry: KimiGeometry,
    weights: Iterable[tuple[str, Tensor]],
    *,
    quantization: WeightFormat | None = None,
) -> tuple[set[str], set[str]]:
    """Copy a checkpoint, or some tensors of one, into the model's parameters.

    vLLM's loaders cut this rank's part out of whatever they get, so the full shape of every tensor is checked first.

    Args:
        model: The model; its parameters are named as in `model.py`.
        weights: Names and tensors, in any order.
        quantization: How the checkpoint stores its linear layers. If unknown, only vLLM's loaders check shapes.

    Returns:
        Names of the parameters loaded, and of the tensors that came.

    Raises:
        WeightsError: Unexpected tensors, one whose shape does not fit, one that was not loaded (its shape, or a kernel
            that quantises it), or a quantised f_b_proj or g_b_proj.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    experts: list[tuple[str, str, int, str]] = []
    if geometry.moe is not None:
        experts = fused_moe_make_expert_params_mapping(model, "w1", "w2", "w3", geometry.moe.num_experts)
    elsewhere = _elsewhere(model)
    loaded: set[str] = set()
    seen: set[str] = set()
    unexpected: list[str] = []
    for name, tensor in _readable(weights):
        canonical = _canonical(name, geometry)
        seen.add(canonical)
        if canonical.startswith(elsewhere):
            continue
        target, arguments = _target(canonical, geometry, experts)
        _refuse_quantized_low_rank(name, tensor, target)
        if target not in parameters:
            if not _needless(name, tensor):
                unexpected.append(name)
            continue
        _refuse_unquantized(name, tensor, parameters[target], target)
        _check_shape(canonical, tensor, geometry, quantization)
        _load(parameters[target], tensor, name, target, arguments)
        loaded.add(target)
    if unexpected:
        raise WeightsError(f"the checkpoint has tensors that belong nowhere: {_listed(unexpected)}")
    return loaded, seen


def check_whole(model: nn.Module, geometry: KimiGeometry, seen: set[str], *, all_modules: bool) -> None:
    """Check that the given tensors of an unquantised checkpoint leave no module half loaded.

    Args:
        model: The model; its parameters are named as in `model.py`.
        seen: Names of the loaded tensors.
        all_modules: Whether every module needs its tensors, as after a first load, or only those with a tensor in
            `seen`: vLLM's reloading gives a module new memory as soon as one of its tensors arrives.

    Raises:
        WeightsError: Lists the missing tensors.
    """
    missing: list[str] = []
    for names in _by_module(model, geometry).values():
        if all_modules or not names.isdisjoint(seen):
            missing += names - seen
    if missing and all_modules:
        raise WeightsError(f"the checkpoint lacks tensors: {_listed(missing)}")
    if missing:
        raise WeightsError(
            f"the update of the weights lacks tensors: {_listed(missing)}. vLLM replaces a layer as a whole. Send them "
            "and call finish_weight_update again, or reload a whole checkpoint. Until then the weights cannot be used."
        )


def _by_module(model: nn.Module, geometry: KimiGeometry) -> dict[str, set[str]]:
    """Names of the checkpoint tensors that this rank needs, by module."""
    experts = next((module for module in model.modules() if isinstance(module, RoutedExperts)), None)
    local = None if experts is None or experts.expert_map is None else experts.expert_map.tolist()
    modules: dict[str, set[str]] = defaultdict(set)
    elsewhere = _elsewhere(model)
    # vLLM's adapter loads a classifier's head here unless it takes rows of lm_head instead.
    if hasattr(model, "score") and getattr(model.config, "classifier_from_token", None) is None:
        modules["score"].add("score.weight")
    for name in checkpoint_shapes(geometry):
        layer, is_expert, expert = name.partition(".experts.")
        if name.startswith(elsewhere) or (is_expert and local and local[int(expert.split(".")[0])] < 0):
            continue
        module, _, parameter = _target(name, geometry, [])[0].rpartition(".")
        # Parameters that vLLM's reloading never replaces are modules of their own here.
        modules[layer if is_expert else f"{module}.{parameter}" if parameter in SKIP_LOAD_TENSORS else module].add(name)
    return modules


def _needless(name: str, tensor: Tensor) -> bool:
    """Whether it is GPTQ's group index in ascending order, which vLLM's kernels assume."""
    return name.endswith(".g_idx") and bool((tensor.diff() >= 0).all())


def _readable(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from weights
    except SafetensorError as error:
        raise WeightsError(
            f"a safetensors file of the checkpoint is truncated or damaged ({error}). Compare its size with the "
            "original and copy or download it again."
        ) from error


def _canonical(name: str, geometry: KimiGeometry) -> str:
    found = _DENSE_UNDER_MOE.fullmatch(name)
    if found and int(found[2]) < geometry.num_layers and not geometry.sparse[int(found[2])]:
        return f"{found[1]}mlp.{found[3]}"
    return name


def _target(name: str, geometry: KimiGeometry, experts: list[tuple[str, str, int, str]]) -> tuple[str, dict[str, Any]]:
    """The parameter a tensor goes to, and the arguments of its loader."""
    parts = name.split(".")
    if ".experts." in name:
        for parameter, checkpoint, expert, shard in experts:
            if checkpoint in name:
                target = name.replace(checkpoint, parameter)
                return target, {"weight_name": target, "shard_id": shard, "expert_id": expert}
        return name, {}
    if len(parts) < 5 or parts[:2] != ["model", "layers"]:
        return name, {}
    module = parts[-2]
    if parts[3] == "self_attn":
        if module in _CONV_SHARDS:
            return ".".join([*parts[:-2], "conv_weight"]), {"shard_id": _CONV_SHARDS[module]}
        is_kda = int(parts[2]) < geometry.num_layers and geometry.kda[int(parts[2])]
        stacked = _KDA_STACKED if is_kda else {}
    else:
        stacked = _MLP_STACKED
    if module not in stacked:
        return name, {}
    merged, shard_id = stacked[module]
    return ".".join([*parts[:-2], merged, parts[-1]]), {"shard_id": shard_id}


def _load(parameter: nn.Parameter, tensor: Tensor, name: str, target: str, arguments: dict[str, Any]) -> None:
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    try:
        if "expert_id" in arguments:
            loader(parameter, tensor, **arguments)
        else:
            loader(parameter, tensor, *arguments.values())
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = tuple(tensor.shape)
        raise WeightsError(
            f"{name} {shape} was not loaded into parameter {target} {tuple(parameter.shape)}: {error!r}"
        ) from error


def _check_shape(name: str, tensor: Tensor, geometry: KimiGeometry, quantization: WeightFormat | None) -> None:
    shapes = checkpoint_shapes(geometry)
    full: tuple[int, ...] | None = shapes.get(name)
    layer, _, suffix = name.rpartition(".")
    if full is None and quantization is not None and (weight := shapes.get(f"{layer}.weight")):
        stored = quantization.stored(layer, "experts" if ".experts." in layer else "linear")
        if stored is not None:
            full = stored.part(suffix, *weight, tensor.element_size(), quantization.method)
    # Dimensions of size 1 vary: A_log is [H] or [1, 1, H, 1], a convolution [H·D, 1, W].
    if full is None or [size for size in tensor.shape if size != 1] == [size for size in full if size != 1]:
        return
    raise WeightsError(
        f"{name} {tuple(tensor.shape)} does not fit: by config.json it is {full}. Take the config.json that came with "
        "the checkpoint, or correct its sizes or its quantization_config; drop --hf-overrides that change them."
    )


def _refuse_unquantized(name: str, tensor: Tensor, parameter: nn.Parameter, target: str) -> None:
    # A copy would round the weights to eight bits, and leave the scales beside them uninitialised.
    if parameter.dtype.itemsize == 1 and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise WeightsError(
            f"{name} ({dtype}) is not quantised, but parameter {target} is by the checkpoint's quantization_config. "
            "Add the layer to its list of unquantised layers: `ignore`, `ignored_layers` or `modules_to_not_convert`."
        )


def _refuse_quantized_low_rank(name: str, tensor: Tensor, target: str) -> None:
    if ".fg_b_proj." not in target:
        return
    if target.endswith((".weight", ".bias")) and tensor.is_floating_point() and tensor.element_size() >= 2:
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    raise WeightsError(
        f"{name} ({dtype}): quantised f_b_proj and g_b_proj are not supported. Leave both out when quantising: for "
        "compressed-tensors add 're:.*self_attn.[fg]_b_proj' to `ignore`, for AWQ and FP8 name them in "
        "`modules_to_not_convert`. KIMI_VLLM_DISABLE=1 leaves the model to vLLM's own implementation."
    )


def _elsewhere(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of modules that this rank does not have: other pipeline stages', or an embedding model's lm_head.

    vLLM's `is_pp_missing_parameter` caches them by the model's address, which the next model of a process may reuse.
    """
    absent = (PPMissingLayer, StageMissingLayer)
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, absent))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more
