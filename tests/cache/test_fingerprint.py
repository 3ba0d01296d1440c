"""What tells one model's states from another's."""

import pytest
import torch
from torch import nn

from kimi_vllm.cache.fingerprint import LoadedWeights, weights_digest


def model(dtype=torch.float32, **changed):
    made = nn.Module()
    values = {"a": torch.arange(10000.0), "b": torch.ones(3, 5), "none": torch.empty(0)} | changed
    for name, value in values.items():
        made.register_parameter(name, nn.Parameter(value.to(dtype), requires_grad=False))
    made.register_buffer("bias", torch.zeros(4))
    return made


def test_equal_weights_have_equal_digests():
    assert weights_digest(model()) == weights_digest(model())
    turned = torch.arange(15.0).view(3, 5)
    # As it lies in memory does not count.
    assert weights_digest(model(b=turned)) == weights_digest(model(b=turned.t().contiguous().t()))


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.ones(5, 3)},
        {"b": torch.full((3, 5), 1 + 1e-6)},
        {"a": torch.arange(10000.0).index_fill(0, torch.tensor([7777]), 7778)},
        {"a": torch.arange(10000.0).flip(0)},
        {"more": torch.ones(1)},
        {"dtype": torch.bfloat16},
    ],
)
def test_other_weights_have_another(other):
    assert weights_digest(model(**other)) != weights_digest(model())


def test_a_buffer_counts():
    changed = model()
    changed.bias[2] = 1
    assert weights_digest(changed) != weights_digest(model())


def test_what_was_loaded_counts_where_kernels_have_taken_it_out():
    def loaded(**changed):
        found = LoadedWeights()
        weights = {"q": torch.arange(12.0), "k": torch.ones(2, 2)} | changed
        assert dict(found.note(weights.items())) == weights
        return weights_digest(model(), found)

    assert loaded() == loaded() != weights_digest(model())
    assert loaded(q=torch.arange(12.0) * 0.9) != loaded()
    assert loaded(k=torch.ones(2, 2, dtype=torch.bfloat16)) != loaded()
