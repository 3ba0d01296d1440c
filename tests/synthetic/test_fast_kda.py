"""The recurrence that trains is transformers' own, and the ablations take away what they say."""

import pytest
import torch
import torch.nn.functional as F

from serve.common.training import switched_off
from serve.eval import checkpoint, fast_kda
from serve.eval.fast_kda import MIN_LOG_DECAY, chunk_kda, modeling
from serve.eval.tasks import TASKS
from serve.eval.training import forward


def inputs(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gates from none to the limit, equal keys next to each other, strong writes: what is hard to invert."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, gate = (torch.randn(2, length, 2, 64, generator=generator) for _ in range(4))
    key[:, length // 3 : length // 2] = key[:, length // 3 : length // 3 + 1]
    return {
        "query": query,
        "key": key,
        "value": value,
        "g": (MIN_LOG_DECAY * torch.rand(2, length, 2, 64, generator=generator) ** 8) * (gate > -1),
        "beta": torch.rand(2, length, 2, generator=generator) ** 0.2,
    }


@pytest.mark.parametrize("length", [1, 31, 32, 100])
def test_output_and_gradients_are_those_of_transformers(length: int) -> None:
    results = []
    for function in (modeling.chunk_kimi_delta_attention, chunk_kda):
        tensors = {name: tensor.requires_grad_() for name, tensor in inputs(length).items()}
        output, _ = function(**tensors, chunk_size=16, use_qk_l2norm_in_kernel=True)
        output.square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in tensors.values())])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-6


def test_a_gate_beyond_the_limit_is_the_limit() -> None:
    tensors = inputs(64)
    beyond = tensors | {"g": torch.where(tensors["g"] < -2, -50.0, tensors["g"])}
    limited = tensors | {"g": torch.where(tensors["g"] < -2, MIN_LOG_DECAY, tensors["g"])}
    assert (beyond["g"] < MIN_LOG_DECAY).any()
    assert torch.equal(chunk_kda(**beyond)[0], chunk_kda(**limited)[0])


def test_reset_state_forgets_what_came_before_and_nothing_else() -> None:
    tensors = inputs(96)
    options = {"chunk_size": 16, "use_qk_l2norm_in_kernel": True}
    original = modeling.chunk_kimi_delta_attention
    whole = original(**tensors, **options)[0]
    with fast_kda.state_reset_every(40):
        query, key, value = (tensors.pop(name) for name in ("query", "key", "value"))
        reset = modeling.chunk_kimi_delta_attention(query, key, value, **tensors, **options)[0]
    assert modeling.chunk_kimi_delta_attention is original
    assert torch.allclose(reset[:, :40], whole[:, :40], atol=1e-6)
    assert not torch.allclose(reset[:, 40:], whole[:, 40:], atol=1e-2)
    tail, _ = original(
        query[:, 80:], key[:, 80:], value[:, 80:], **{k: v[:, 80:] for k, v in tensors.items()}, **options
    )
    assert torch.allclose(reset[:, 80:], tail, atol=1e-6)


def test_inverse_of_a_unit_lower_triangle() -> None:
    lower = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).tril(-1)
    product = (lower + torch.eye(32)) @ fast_kda._unit_lower_inverse(lower)
    assert torch.allclose(product, torch.eye(32).expand(3, 32, 32), atol=1e-4)
    assert F.relu(product.triu(1)).max() < 1e-4


def test_layers_are_dropped_in_training_only_and_for_whole_sequences() -> None:
    torch.manual_seed(0)
    model = checkpoint.build_model(TASKS["needle"])
    tokens = torch.randint(len(TASKS["needle"].vocabulary), (24, 6))
    whole = forward(model, tokens).detach()
    with switched_off(model, "full_attention"):
        without = forward(model, tokens).detach()
    assert not torch.allclose(whole, without, atol=1e-4)
    fast_kda.drop(model, "full_attention", 0.5)
    logits = forward(model, tokens).detach()
    dropped = [torch.allclose(row, bare, atol=1e-5) for row, bare in zip(logits, without, strict=True)]
    kept = [torch.allclose(row, full, atol=1e-5) for row, full in zip(logits, whole, strict=True)]
    assert 0 < sum(dropped) < len(tokens)
    assert [not gone for gone in dropped] == kept
    with torch.no_grad():
        assert torch.allclose(forward(model, tokens), whole, atol=1e-5)
