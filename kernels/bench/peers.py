"""What the CUDA kernels are timed against: a KDA layer's step as vLLM and flash-linear-attention run it.

Each peer takes the layer that our own kernels get, lays pools and weights out as its own layer does, and does
one step per call, in place, so that a step can be captured into a CUDA graph. The first step on a sequence
is the one to compare with the spec; later ones go on from the state it left, at an unchanged position.

`InTree*` repeats `KimiGatedDeltaNetAttention._forward` of vLLM 0.32.0 for Kimi-Linear-48B, launch by launch; the
projections around it are not part of any peer. In-tree rounds the output norm's weight to the model's dtype, and
keeps the recurrent state in float32 whatever ours is.

Neither package is imported before a peer is asked for: `unavailable` says why one cannot run here.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor

from kimi_vllm.kernels.bench.layer import Layer


def unavailable(peer: type[InTreeDecode | InTreeWindows | InTreePrefill | FlaDecode | FlaPrefill]) -> str | None:
    """Return why `peer` cannot run here, or None if its package imports with Triton enabled."""
    try:
        peer.load()
    except Exception as error:  # a half-installed package fails in more ways than ImportError
        return f"{type(error).__name__}: {error}"
    return None


def _load_vllm() -> SimpleNamespace:
    """Return vLLM's kernels; ImportError without vLLM, or if it runs without Triton."""
    if not import_module("vllm.triton_utils").HAS_TRITON:
        raise ImportError("vLLM runs without Triton here: it found no CUDA device, or is a CPU build")
    conv = import_module("vllm.model_executor.layers.mamba.ops.causal_conv1d")
    kda = import_module("vllm.models.kimi_k3.nvidia.ops.third_party.kda")
    gather = import_module("vllm.model_executor.layers.mamba.ops.gather_initial_states")
    return SimpleNamespace(
        causal_conv1d_fn=conv.causal_conv1d_fn,
        causal_conv1d_update=conv.causal_conv1d_update,
        compute_causal_conv1d_metadata=import_module("vllm.v1.attention.backends.utils").compute_causal_conv1d_metadata,
        gather_initial_states=gather.gather_initial_states,
        chunk_kda_with_fused_gate=kda.chunk_kda_with_fused_gate,
        fused_recurrent_kda=kda.fused_recurrent_kda,
        fused_recurrent_kda_packed_decode=kda.fused_recurrent_kda_packed_decode,
        rms_norm_gated=import_module("vllm.third_party.flash_linear_attention.ops.kda").rms_norm_gated,
    )


def _load_fla() -> SimpleNamespace:
    """Return fla's kernels; ImportError without fla."""
    conv = import_module("fla.modules.causal_conv1d")
    return SimpleNamespace(
        causal_conv1d=conv.causal_conv1d,
        causal_conv1d_update=conv.causal_conv1d_update,
        chunk_kda=import_module("fla.ops.kda").chunk_kda,
        fused_recurrent_kda_fwd=import_module("fla.ops.kda.fused_recurrent").fused_recurrent_kda_fwd,
        rms_norm_gated=import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated,
    )


class InTreeDecode:
    """vLLM's decode-only branch: conv update, packed recurrent decode, copy, gated norm; four launches.

    Attributes:
        conv_state: ``[S, W-1, 3·H·D]`` in the model's dtype, oldest token first.
        recurrent_state: ``[S, H, V, K]`` float32; a slot's stride is the page, its conv state in front.
    """

    load = staticmethod(_load_vllm)

    def __init__(self, layer: Layer, position: int) -> None:
        self.kernels = self.load()
        self.x = _in_tree_inputs(layer)
        ring, state = layer.pools.dense()
        slots = torch.arange(len(ring), device=self.x.qkv.device)
        history = _history(layer, ring, slots, torch.full_like(slots, position))
        self.conv_state, self.recurrent_state = _pages(history.to(self.x.qkv.dtype), state)

    def step(self, slots: Tensor, out: Tensor) -> None:
        """Advance the rows, whose sequences live in `slots` (int32 ``[N]``), by one token; `out` is ``[N, H·V]``."""
        x = self.x
        qkv = self.kernels.causal_conv1d_update(
            x.qkv,
            self.conv_state.transpose(-1, -2),
            x.conv_weight,
            None,
            activation="silu",
            conv_state_indices=slots,
            validate_data=True,
            out=torch.empty(x.qkv.shape, dtype=x.qkv.dtype, device=x.qkv.device),
        )
        o, _ = self.kernels.fused_recurrent_kda_packed_decode(
            qkv, **x.recurrence, dt_bias=x.dt_bias, initial_state=self.recurrent_state, state_indices=slots
        )
        _in_tree_epilogue(self.kernels, x, o, out)


class InTreePrefill:
    """vLLM's prefill-only branch: conv of q, k and v, gather of states, chunked KDA, scatter, copy, gated norm.

    What the layer finds in its metadata, or caches by the identity of `cu_seqlens` in the first layer of a
    step, is made once. Attributes as in `InTreeDecode`.

    Args:
        layer: Its activations have T rows.
        cu_seqlens: ``[N+1]`` int32, on the device.
        slots: ``[N]`` int32, the slot of each sequence, read and written.
        context_len: ``[N]`` int32, tokens before this step; 0 is a fresh sequence, whose slot is not read.
    """

    load = staticmethod(_load_vllm)

    def __init__(self, layer: Layer, cu_seqlens: Tensor, slots: Tensor, context_len: Tensor) -> None:
        self.kernels = self.load()
        self.x = _in_tree_inputs(layer)
        self.cu_seqlens, self.slots, self.has_initial_state = cu_seqlens, slots, context_len > 0
        ring, state = layer.pools.dense()
        history = torch.zeros_like(ring[:, : len(layer.weights.conv_weight) - 1])
        history[slots.long()] = _history(layer, ring, slots.long(), context_len.long())
        self.conv_state, self.recurrent_state = _pages(history.to(self.x.qkv.dtype), state)
        nums_dict, batch_ptr, token_chunk_offset_ptr = self.kernels.compute_causal_conv1d_metadata(
            cu_seqlens.cpu(), device=cu_seqlens.device
        )
        self.metadata = SimpleNamespace(
            nums_dict=nums_dict, batch_ptr=batch_ptr, token_chunk_offset_ptr=token_chunk_offset_ptr
        )

    def step(self, out: Tensor) -> None:
        """Run every sequence over its tokens; `out` is ``[T, H·V]``."""
        x = self.x
        H, D = x.out_gate.shape[1:]
        conv_states = self.conv_state.transpose(-1, -2).split(H * D, dim=-2)
        parts = zip(x.qkv.split(H * D, dim=-1), conv_states, x.conv_weight.split(H * D), strict=True)
        q, k, v = (self._conv(*part).unflatten(-1, (H, D))[None] for part in parts)
        initial_state = self.kernels.gather_initial_states(self.recurrent_state, self.slots, self.has_initial_state)
        o, final_state = self.kernels.chunk_kda_with_fused_gate(
            q,
            k,
            v,
            **x.recurrence,
            g_bias=x.dt_bias,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=self.cu_seqlens,
        )
        self.recurrent_state[self.slots] = final_state
        _in_tree_epilogue(self.kernels, x, o, out)

    def _conv(self, x: Tensor, conv_state: Tensor, weight: Tensor) -> Tensor:
        mixed: Tensor = self.kernels.causal_conv1d_fn(
            x.transpose(0, 1),
            weight,
            None,
            activation="silu",
            conv_states=conv_state,
            has_initial_state=self.has_initial_state,
            cache_indices=self.slots,
            query_start_loc=self.cu_seqlens,
            metadata=self.metadata,
        )
        return mixed.transpose(0, 1)


class InTreeWindows:
    """vLLM's branch for drafts only: conv update, recurrence with a state for each token, gated norm; three launches.

    Args:
        layer: Its activations have N windows of `window` tokens, before each of which there are `position`.

    Attributes:
        conv_state, recurrent_state: As in `InTreeDecode`, of slot s from row ``s·window`` on, one for each token.
    """

    load = staticmethod(_load_vllm)

    def __init__(self, layer: Layer, position: int, window: int) -> None:
        self.kernels = self.load()
        self.x, self.window = _in_tree_inputs(layer), window
        ring, state = layer.pools.dense()
        slots = torch.arange(len(ring), device=self.x.qkv.device)
        past = _history(layer, ring, slots, torch.full_like(slots, position)).to(self.x.qkv.dtype)
        past = torch.nn.functional.pad(past, (0, 0, 0, window - 1)).repeat_interleave(window, 0)
        self.conv_state, self.recurrent_state = _pages(past, state.repeat_interleave(window, 0))
        self.cu_seqlens = torch.arange(0, len(self.x.qkv) + 1, window, device=slots.device).int()
        self.accepted = torch.ones_like(self.cu_seqlens[1:])

    def rows(self, slots: Tensor) -> Tensor:
        """Return the rows ``[N, T]`` of the windows whose sequences live in `slots`."""
        return (slots[:, None] * self.window + torch.arange(self.window, device=slots.device)).int()

    def step(self, rows: Tensor, out: Tensor) -> None:
        """Run every window; `out` is ``[N·T, H·V]``."""
        x = self.x
        H, D = x.out_gate.shape[1:]
        qkv = self.kernels.causal_conv1d_update(
            x.qkv,
            self.conv_state.transpose(-1, -2),
            x.conv_weight,
            None,
            activation="silu",
            conv_state_indices=rows[:, 0],
            num_accepted_tokens=self.accepted,
            query_start_loc=self.cu_seqlens,
            max_query_len=self.window,
            validate_data=False,
            out=torch.empty(x.qkv.shape, dtype=x.qkv.dtype, device=x.qkv.device),
        )
        q, k, v = (part.unflatten(-1, (H, D))[None] for part in qkv.split(H * D, dim=-1))
        core = out.view(1, *x.out_gate.shape)
        self.kernels.fused_recurrent_kda(
            q=q,
            k=k,
            v=v,
            **x.recurrence,
            dt_bias=x.dt_bias,
            initial_state=self.recurrent_state,
            cu_seqlens=self.cu_seqlens,
            ssm_state_indices=rows,
            num_accepted_tokens=self.accepted,
            out=core,
        )
        core.copy_(_gated_norm(self.kernels, x, core))


class FlaDecode:
    """flash-linear-attention's decode: three conv updates, the recurrent kernel on states by slot, gated norm.

    Its conv update knows no slots: row n always advances conv cache n, which starts as the history of
    ``slots[n]``. Rotating over slots therefore finds the conv caches in L2, in this peer's favour.

    Attributes:
        state_pool: ``[S, H, V, K]`` float32.
        result: ``[N, 1, H, V]``, the last step's output, in memory of fla's own.
    """

    load = staticmethod(_load_fla)

    def __init__(self, layer: Layer, position: int, slots: Tensor) -> None:
        self.kernels = self.load()
        self.x = _fla_inputs(layer, rows_are_sequences=True)
        ring, state = layer.pools.dense()
        past = _history(layer, ring, slots.long(), torch.full_like(slots, position, dtype=torch.int64), extra=1)
        caches = past.to(self.x.q.dtype).transpose(1, 2).chunk(3, dim=1)
        self.conv_caches = [cache.contiguous() for cache in caches]
        self.state_pool = state.float()
        self.result = torch.empty_like(self.x.v)

    def step(self, slots: Tensor, out: Tensor | None = None) -> None:
        """Advance the rows by one token; `out`, if given, gets a copy of `result`: leave it out of a timing."""
        x = self.x
        heads = x.out_gate.shape[2:]
        q, k, v = (
            self.kernels.causal_conv1d_update(part, cache, weight=weight, activation="silu")[0].unflatten(-1, heads)
            for part, cache, weight in zip((x.q, x.k, x.v), self.conv_caches, x.conv_weights, strict=True)
        )
        o, _ = self.kernels.fused_recurrent_kda_fwd(
            q,
            k,
            v,
            **x.recurrence,
            initial_state=self.state_pool,
            inplace_final_state=True,
            state_v_first=True,
            ssm_state_indices=slots,
            out=torch.empty_like(v),
        )
        self.result = _gated_norm(self.kernels, x, o)
        if out is not None:
            out.copy_(self.result.view_as(out))


class FlaPrefill:
    """flash-linear-attention's prefill of fresh sequences: conv of q, k and v, `chunk_kda`, gated norm.

    Attributes:
        result: ``[1, T, H, V]``, the last step's output, in memory of fla's own.
        final_state: ``[N, H, K, V]`` float32 after it, K first as fla has it by default.
        conv_caches: Of q, k and v, ``[N, H·D, W]``.

    Args:
        sequences: `sequences_of`, the same object for all steps of a graph: fla plans its chunks on the host, once
            for each tensor it meets.
    """

    load = staticmethod(_load_fla)

    @staticmethod
    def sequences_of(cu_seqlens: Tensor) -> dict[str, Tensor]:
        """Return the bounds of the sequences, ``[N + 1]``, as fla takes them."""
        bounds = cu_seqlens.long()
        return {"cu_seqlens": bounds, "cu_seqlens_cpu": bounds.cpu()}

    def __init__(self, layer: Layer, sequences: dict[str, Tensor]) -> None:
        self.kernels = self.load()
        self.x = _fla_inputs(layer, rows_are_sequences=False)
        self.sequences = sequences
        self.result = torch.empty_like(self.x.v)
        self.final_state: Tensor | None = None
        self.conv_caches: list[Tensor] = []

    def step(self, out: Tensor | None = None) -> None:
        """Run every sequence over its tokens; `out`, if given, gets a copy of `result`: leave it out of a timing."""
        x, sequences = self.x, self.sequences
        convolved = [
            self.kernels.causal_conv1d(part, weight, activation="silu", output_final_state=True, **sequences)
            for part, weight in zip((x.q, x.k, x.v), x.conv_weights, strict=True)
        ]
        q, k, v = (mixed.unflatten(-1, x.out_gate.shape[2:]) for mixed, _ in convolved)
        self.conv_caches = [cache for _, cache in convolved]
        o, self.final_state = self.kernels.chunk_kda(q, k, v, **x.recurrence, output_final_state=True, **sequences)
        self.result = _gated_norm(self.kernels, x, o)
        if out is not None:
            out.copy_(self.result.view_as(out))


def _in_tree_inputs(layer: Layer) -> SimpleNamespace:
    """Lay activations and weights out as the layer has them: qkv and beta are slices of one projection."""
    T, H = layer.x.beta.shape
    D = len(layer.weights.norm_weight)
    projected = torch.cat([layer.x.qkv, layer.x.beta, layer.x.qkv.new_zeros(T, D)], dim=1)
    qkv, beta, _ = projected.split([3 * H * D, H, D], dim=-1)
    recurrence = {
        "raw_g": layer.x.gate.contiguous().view(1, T, H, D),
        "raw_beta": beta.unsqueeze(0),
        "A_log": layer.weights.A_log,
        "lower_bound": None,
    }
    return SimpleNamespace(
        qkv=qkv,
        recurrence=recurrence,
        out_gate=layer.x.out_gate.contiguous().view(T, H, D),
        conv_weight=layer.weights.conv_weight.t().contiguous(),
        dt_bias=layer.weights.dt_bias,
        norm_weight=layer.weights.norm_weight.to(qkv.dtype),
        norm_eps=layer.weights.norm_eps,
    )


def _in_tree_epilogue(kernels: SimpleNamespace, x: SimpleNamespace, o: Tensor, out: Tensor) -> None:
    """Copy the recurrence's output into the layer's buffer and normalise it there, as `_forward` ends."""
    core_attn_out = out.view(o.shape)
    core_attn_out[0, : o.shape[1]] = o[0]
    # The kernel works in place: torch sees that both are the same memory and launches nothing.
    core_attn_out.copy_(_gated_norm(kernels, x, core_attn_out))


def _gated_norm(kernels: SimpleNamespace, x: SimpleNamespace, o: Tensor) -> Tensor:
    normed: Tensor = kernels.rms_norm_gated(o, x.out_gate, x.norm_weight, None, "sigmoid", eps=x.norm_eps)
    return normed


def _fla_inputs(layer: Layer, *, rows_are_sequences: bool) -> SimpleNamespace:
    """Lay activations and weights out as fla's layer has them: three dense projections, ``[B, T, ...]``."""
    T, H = layer.x.beta.shape
    D = len(layer.weights.norm_weight)
    B, L = (T, 1) if rows_are_sequences else (1, T)
    q, k, v = (part.contiguous().view(B, L, H * D) for part in layer.x.qkv.chunk(3, dim=-1))
    recurrence = {
        "g": layer.x.gate.contiguous().view(B, L, H, D),
        "beta": layer.x.beta.contiguous().view(B, L, H),
        "A_log": layer.weights.A_log,
        "dt_bias": layer.weights.dt_bias,
        **dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True),
    }
    return SimpleNamespace(
        q=q,
        k=k,
        v=v,
        recurrence=recurrence,
        out_gate=layer.x.out_gate.contiguous().view(B, L, H, D),
        conv_weights=[weight.contiguous() for weight in layer.weights.conv_weight.t().chunk(3)],
        norm_weight=layer.weights.norm_weight,
        norm_eps=layer.weights.norm_eps,
    )


def _history(layer: Layer, ring: Tensor, slots: Tensor, position: Tensor, extra: int = 0) -> Tensor:
    """Return the last W-1+extra projections before each position, oldest first; zeros before token 0."""
    num_past = len(layer.weights.conv_weight) - 1 + extra
    past = position[:, None] + torch.arange(-num_past, 0, device=ring.device)
    history: Tensor = ring[slots[:, None], past % ring.shape[1]].masked_fill((past < 0)[..., None], 0)
    return history


def _pages(conv_state: Tensor, state_pool: Tensor) -> tuple[Tensor, Tensor]:
    """Return both states as views of one pool of pages: per slot the conv state, then the recurrent state."""
    S = len(state_pool)
    conv_bytes = conv_state[0].numel() * conv_state.element_size()
    state_bytes = state_pool[0].numel() * torch.float32.itemsize
    pages = torch.empty(S, conv_bytes + state_bytes, dtype=torch.uint8, device=state_pool.device)
    conv = pages[:, :conv_bytes].view(conv_state.dtype).unflatten(-1, conv_state.shape[1:])
    state = pages[:, conv_bytes:].view(torch.float32).unflatten(-1, state_pool.shape[1:])
    conv.copy_(conv_state)
    state.copy_(state_pool)
    return conv, state
