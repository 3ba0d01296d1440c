"""A token of which no latent can be made harms nobody, and is seen itself."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kimi_vllm.layers.mla import KimiMLA

RANK, ROPE = 4, 2


def layer(drafts):
    """The projections are identities, and attention is a sum over all tokens up to each."""
    made = KimiMLA.__new__(KimiMLA)
    nn.Module.__init__(made)
    made.geometry = SimpleNamespace(
        q_lora_rank=None, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, v_head_dim=RANK, qk_head_dim=RANK + ROPE
    )
    made.local_heads, made._drafts = 1, drafts
    made.q_proj = made.kv_a_proj_with_mqa = made.o_proj = lambda x: (x, None)
    made.kv_a_layernorm = lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    made.attn = lambda query, kv, key, output_shape: torch.tril(torch.ones(len(kv), len(kv))) @ kv
    return made


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sick_draft_is_sick_alone(value):
    torch.manual_seed(0)
    hidden = torch.randn(5, RANK + ROPE)
    healthy = layer(False)(hidden)
    hidden[3, 1] = value
    out = layer(True)(hidden)
    torch.testing.assert_close(out[:3], healthy[:3])
    assert out[3].isnan().all()
    assert not layer(False)(hidden)[:3].isfinite().all(), "it is multiplied by 0"
