"""Contexts and weights that nobody computed, so that a step can be timed without minutes of prefill before it.

A decode step's time depends on how long the context is, not on what it says. So a request is given its pages and its
state slot as if all of its prompt but the last token had been computed, and that memory is filled with small noise.
vLLM's scheduler has a way in for such requests, made for KV caches that arrive over the network. Rows that were
measured so say ``"context": "synthetic"``.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

NOISE = 0.02
"""Standard deviation of made-up latents and states."""

_SCALE = 0.02


def adopt_context(scheduler: Any, request: Any, growth: int, *, others: int) -> bool:
    """Give a new request the memory of all of its prompt but one token, as if it had been computed.

    Args:
        scheduler: vLLM's, before it has heard of the request.
        growth: tokens by which this and every other request must still be able to grow.
        others: requests that hold memory already.

    Returns:
        Whether it fitted; if not, nothing was taken.
    """
    cache = scheduler.kv_cache_manager
    computed = request.num_tokens - 1
    if cache.allocate_slots(request, computed, has_scheduled_reqs=others > 0) is None:
        return False
    if cache.block_pool.get_num_free_blocks() < (others + 1) * _pages_of_growth(cache, computed, growth):
        cache.free(request)
        return False
    request.num_computed_tokens = computed
    return True


def _pages_of_growth(cache: Any, tokens: int, growth: int) -> int:
    # Our states do not grow. One of vLLM's own model is a page, whatever the length.
    sizes = [
        manager.block_size
        for manager in cache.coordinator.single_type_managers
        if manager.block_pool is cache.block_pool
    ]
    return sum(-(-(tokens + growth) // size) - -(-tokens // size) for size in sizes)


@torch.inference_mode()
def fill_memory(runner: Any, context: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> int:
    """Fill the KV cache, where the KDA states are too, with noise; return the bytes filled.

    States may be in float32. Noise in the model's dtype is noise to them
    too: the upper half of a float32 is a bfloat16.
    """
    filled = 0
    for storage in _storages(getattr(runner, "kv_caches", []), context):
        flat = torch.empty(0, dtype=dtype, device=storage.device)
        flat.set_(storage, 0, (storage.nbytes() // dtype.itemsize,))
        flat.normal_(0, NOISE, generator=torch.Generator(flat.device).manual_seed(seed))
        filled += storage.nbytes()
    return filled


def _storages(caches: Any, context: dict[str, Any]) -> Iterator[Any]:
    seen: set[int] = set()
    held = tree_leaves([caches, [getattr(layer, "kv_cache", None) for layer in context.values()]])
    for storage in (value.untyped_storage() for value in held if isinstance(value, Tensor)):
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage


@torch.inference_mode()
def randomise(model: nn.Module, seed: int = 0) -> dict[str, int]:
    """Draw weights like those of a freshly initialised model, in place; return how many tensors of each kind.

    ``--load-format dummy`` draws everything from ±0.001, norms and router biases too: every token then goes to the
    same experts, and a step reads a fraction of the weights that real text makes it read. Here routing is uniform.

    Both models' parameter names are understood. Copies that vLLM has made of weights (MLA's W_UK and W_UV) stay.
    """
    counts: dict[str, int] = {}
    generators: dict[torch.device, torch.Generator] = {}
    # A buffer of vLLM's model repeats its convolution's weights, and is not loaded with dummy weights.
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "conv1d" in n)]
    for name, parameter in tensors:
        if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            kind = "left alone"  # an empty one was packed into another form when the model was loaded
        else:
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            kind = _draw(name, parameter.data, generator)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _draw(name: str, weight: Tensor, generator: torch.Generator) -> str:
    module, _, leaf = name.rpartition(".")
    owner = module.rpartition(".")[2]
    if leaf == "A_log":
        weight.uniform_(1, 16, generator=generator).log_()
        return "A_log"
    if leaf == "dt_bias":
        weight.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        weight.add_(torch.log(-torch.expm1(-weight)))  # the inverse of softplus
        return "dt_bias"
    if "norm" in owner:
        weight.fill_(1)
        return "norm"
    if "scale" in leaf:
        # Of quantised weights, which are drawn from a standard normal distribution.
        weight.fill_(_SCALE)
        return "scale"
    if weight.itemsize == 1:
        # No generator draws eight-bit floats; one slice at a time, so that no second copy of all experts exists.
        for part in weight if weight.dim() > 2 else [weight]:
            part.copy_(torch.empty_like(part, dtype=torch.bfloat16).normal_(0, 1, generator=generator))
        return "quantised"
    if leaf == "e_score_correction_bias" or leaf.endswith("bias"):
        weight.zero_()
        return "bias"
    # Of a convolution, in either orientation, the taps are the few.
    fan_in = min(size for size in weight.shape if size > 1) if "conv" in name else weight.shape[-1]
    weight.normal_(0, fan_in**-0.5, generator=generator)
    return "convolution" if "conv" in name else "matrix"
