"""Latent attention by itself: tiles of any size, ragged batches and dirty pages give what dense attention gives."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kimi_vllm.layers import mla_latent
from kimi_vllm.layers.mla_latent import LatentAttention, RunningSoftmax
from kimi_vllm.layers.mla_latent_metadata import MAX_GRAPH_ELEMENTS, DeviceDecodes, LatentMetadataBuilder

HEADS, RANK, NOPE, ROPE, VALUE, BLOCK = 3, 20, 12, 4, 8, 16


class Layer(LatentAttention):
    """The layer without a model around it."""

    def __init__(self, num_blocks):
        torch.nn.Module.__init__(self)
        self.num_heads, self.rank, self.nope, self.value = HEADS, RANK, NOPE, VALUE
        self.latent_dim, self.scale = RANK + ROPE, (NOPE + ROPE) ** -0.5
        self.weight = torch.randn(HEADS * (NOPE + VALUE), RANK)
        self._kv_b_proj = [lambda latents: (latents @ self.weight.T, None)]
        self._expand = None
        self.kv_cache = torch.full((num_blocks, 1, BLOCK, RANK + ROPE), torch.nan)


def dense(layer, query, latents):
    """Plain attention of the last queries over all latents."""
    num_queries, length = len(query), len(latents)
    expanded = (latents[:, :RANK] @ layer.weight.T).view(length, HEADS, NOPE + VALUE)
    keys = torch.cat([expanded[..., :NOPE], latents[:, None, RANK:].expand(-1, HEADS, -1)], -1)
    scores = torch.einsum("nhd,thd->hnt", query.view(num_queries, HEADS, -1), keys) * layer.scale
    seen = torch.arange(length) <= torch.arange(length - num_queries, length)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnt,thd->nhd", weights, expanded[..., NOPE:]).reshape(num_queries, -1)


def run(layer, query_lens, seq_lens, latents, query, out, device="cpu", window=1):
    """One step of requests whose pages are dealt out in a mixed-up order."""
    per_request = [-(-length // BLOCK) for length in seq_lens]
    order = torch.randperm(sum(per_request), generator=torch.Generator().manual_seed(1)) + 1
    tables = torch.zeros(len(seq_lens), max(per_request) + 2, dtype=torch.int32)
    for row, pages in enumerate(order.split(per_request)):
        tables[row, : len(pages)] = pages
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    slots = []
    for row, (new, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        for position in range(length):
            page, offset = tables[row, position // BLOCK].item(), position % BLOCK
            if position < length - new:
                if offset == 0:
                    layer.kv_cache[page] = 0
                layer.kv_cache[page, 0, offset] = latents[row][position]
            else:
                slots.append(page * BLOCK + offset)
    builder = object.__new__(LatentMetadataBuilder)
    builder.kv_cache_spec = type("Spec", (), {"block_size": BLOCK})
    builder.reorder_batch_threshold = window
    builder.device = torch.device(device)  # decides how a step is told; the tensors are on the CPU
    step = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            num_reqs=len(seq_lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            block_table_tensor=tables,
            slot_mapping=torch.tensor(slots),
        ),
    )
    new = torch.cat(
        [latents[row][length - count :] for row, (count, length) in enumerate(zip(query_lens, seq_lens, strict=True))]
    )
    layer.attend(query, new, out, step)


@pytest.mark.parametrize("width", [1, 4])
def test_decodes_and_windows_in_shapes_that_a_graph_can_hold(width):
    torch.manual_seed(0)
    seq_lens = [4, 18, 160, 34]  # the second and the last window begin a page
    layer = Layer(20)
    latents = [torch.randn(length, RANK + ROPE) for length in seq_lens]
    tokens = 4 * width
    query = torch.randn(tokens + 2, HEADS * (NOPE + ROPE))
    out = torch.full((tokens + 2, HEADS * VALUE), torch.nan)
    run(layer, [width] * 4, seq_lens, latents, query, out, device="cuda", window=width)
    for row in range(4):
        own = slice(row * width, (row + 1) * width)
        torch.testing.assert_close(out[own], dense(layer, query[own], latents[row]))
    assert (out[tokens:] == 0).all()


@pytest.mark.parametrize(("drafts", "graphs"), [(0, "UNIFORM_SINGLE_TOKEN_DECODE"), (3, "UNIFORM_BATCH"), (4, "NEVER")])
def test_graphs_are_of_windows_unless_their_scores_are_too_large(drafts, graphs):
    heads = 16
    longest = MAX_GRAPH_ELEMENTS // (heads * 4)  # scores of four tokens; latents are smaller
    config = SimpleNamespace(
        num_speculative_tokens=drafts,
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        model_config=SimpleNamespace(max_model_len=longest, get_num_attention_heads=lambda parallel: heads),
    )
    spec = SimpleNamespace(head_size=RANK + ROPE)
    assert LatentMetadataBuilder.get_cudagraph_support(config, spec) == AttentionCGSupport[graphs]


def test_windows_of_unequal_length_are_not_for_a_graph():
    torch.manual_seed(0)
    seq_lens, query_lens = [40, 17, 160], [4, 1, 4]
    layer = Layer(20)
    latents = [torch.randn(length, RANK + ROPE) for length in seq_lens]
    query = torch.randn(9, HEADS * (NOPE + ROPE))
    out = torch.full((9, HEADS * VALUE), torch.nan)
    run(layer, query_lens, seq_lens, latents, query, out, device="cuda", window=4)
    for own, row in ((slice(4), 0), (slice(4, 5), 1), (slice(5, 9), 2)):
        torch.testing.assert_close(out[own], dense(layer, query[own], latents[row]))


def test_padded_rows_of_a_graph_write_to_the_null_page_and_give_zeros():
    layer = Layer(4)
    layer.kv_cache.zero_()
    tables = torch.tensor([[2, 0], [0, 0]], dtype=torch.int32)
    step = DeviceDecodes(tables, torch.tensor([3, 0], dtype=torch.int32), torch.tensor([2 * BLOCK + 2, -1]))
    out = torch.full((2, HEADS * VALUE), torch.nan)
    layer.attend(torch.randn(2, HEADS * (NOPE + ROPE)), torch.full((2, RANK + ROPE), 5.0), out, step)
    assert layer.kv_cache.flatten(1).ne(0).any(1).tolist() == [True, False, True, False]
    assert out[0].ne(0).all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "plain"])
@pytest.mark.parametrize("tile", [1, 5000, 1 << 22], ids=["one-block", "few-blocks", "whole"])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        ([1, 1, 1, 1], [1, 17, 160, 33]),
        ([1, 70, 2, 33], [40, 70, 50, 133]),
        ([64, 130], [64, 400]),
        ([4, 1, 3, 2, 4], [40, 17, 160, 2, 33]),
        ([1, 4, 33, 2], [160, 35, 133, 40]),
    ],
    ids=["decodes", "mixed", "prefills", "windows", "windows-mixed"],
)
def test_equals_dense_attention_over_dirty_pages(query_lens, seq_lens, tile, flash, monkeypatch, request):
    monkeypatch.setattr(mla_latent, "TILE_ELEMENTS", tile)
    if not flash:  # as on GPUs
        monkeypatch.setattr(mla_latent, "FLASH_DEVICES", ())
    torch.manual_seed(0)
    layer = Layer(sum(-(-length // BLOCK) for length in seq_lens) + 3)
    latents = [torch.randn(length, RANK + ROPE) for length in seq_lens]
    num_tokens, padding = sum(query_lens), 2
    query = torch.randn(num_tokens + padding, HEADS * (NOPE + ROPE))
    out = torch.full((num_tokens + padding, HEADS * VALUE), torch.nan)
    run(layer, query_lens, seq_lens, latents, query, out, window=4 if "windows" in request.node.callspec.id else 1)
    first = 0
    for row, count in enumerate(query_lens):
        expected = dense(layer, query[first : first + count], latents[row])
        torch.testing.assert_close(out[first : first + count], expected, rtol=1e-4, atol=1e-5)
        first += count
    assert (out[num_tokens:] == 0).all()


def test_running_softmax_equals_softmax():
    torch.manual_seed(0)
    scores, values = torch.randn(2, 3, 50) * 20, torch.randn(2, 50, 7)
    running = RunningSoftmax((2, 3), 7)
    for first in range(0, 50, 13):
        running.add(scores[..., first : first + 13], values[:, first : first + 13])
    torch.testing.assert_close(running.result(), scores.softmax(-1) @ values)
