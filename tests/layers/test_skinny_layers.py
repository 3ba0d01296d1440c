"""What is compiled before the first request: every kernel that a decode step of few rows can ask for, each once."""

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from kimi_vllm.kernels import launch
from kimi_vllm.layers import skinny


class Linear(LinearBase):
    """A weight without vLLM's processes around it."""

    def __init__(self, outputs, inputs):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.bfloat16), requires_grad=False)


def test_each_kind_of_product_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(skinny, "product", lambda x, weight, dtype: made.append((x.shape[0], *weight.shape, dtype)))
    shapes = [(2304, 4096), (2304, 4096), (256, 2304), (2048, 2304)]
    skinny.warm_up(nn.ModuleList([nn.LayerNorm(4), *(Linear(*shape) for shape in shapes)]), torch.bfloat16)
    assert len(made) == len(set(made))
    assert {rows for rows, *_ in made} == set(launch.SKINNY_ROWS)
    # Two shapes with the same inputs and launch parameters are one kernel.
    assert sum(inputs == 2304 and rows == 1 for rows, _, inputs, _ in made) == 1
