"""Kimi Delta Attention as a layer: projections, one kernel call for decode rows, one for prefill rows.

Equations: arXiv 2510.26692, Eq. 1 and 10; `kernels/reference.py` is their executable form.
"""

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.parameter import BlockQuantScaleParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

from kimi_vllm.cache.group import StateHome
from kimi_vllm.cache.metadata import KDAMetadata, most_prefills, rehearsal
from kimi_vllm.cache.window import window_of
from kimi_vllm.geometry import KimiGeometry, input_filling
from kimi_vllm.kernels import dispatch
from kimi_vllm.kernels.checks import check_decode, check_prefill, check_windows
from kimi_vllm.kernels.contract import Activations, Pools, Weights
from kimi_vllm.kernels.cuda import launch


class InputLinear(MergedColumnParallelLinear):
    """One product for everything that reads the layer's input: ``[T, hidden]`` to ``[T, q | k | v | f_a | g_a | b]``.

    q, k, v and b are those of the rank's heads; f_a and g_a are whole on every rank, and adjacent for
    `BatchedLowRank`. Zeros after b fill the row up. They are loaded with b: as a shard of their own nothing would load
    them, and vLLM takes a last shard whose FP8 scale was not loaded for a sign that the checkpoint has merged tensors.
    The class's name must contain "Linear": by that, compressed-tensors finds what it has quantised.

    Attributes:
        splits: columns of q, k and v, of f_a and g_a, of b, and of the filling.

    Raises:
        ValueError: a quantised checkpoint treats its parts differently.
    """

    def __init__(
        self, hidden: int, heads: int, head_dim: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        ranks = get_tensor_model_parallel_world_size()
        # Head sizes are multiples of 64, so that only b can leave a row uneven.
        local = heads // ranks
        filling = input_filling(local, quantised=quant_config is not None)
        self.splits = [3 * local * head_dim, 2 * head_dim, local, filling]
        qkv, whole = [heads * head_dim] * 3, [head_dim * ranks] * 2
        sizes = [*qkv, *whole, (local + filling) * ranks]
        try:
            super().__init__(hidden, sizes, bias=False, quant_config=quant_config, prefix=prefix)
        except ValueError as error:
            if quant_config is None:
                raise
            raise ValueError(
                f"{prefix}: {error} If it is about parts of a layer: q_proj, k_proj, v_proj, f_a_proj, g_a_proj and "
                "b_proj are one product here, so a quantised checkpoint has all of them quantised alike, or none."
            ) from error

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: int) -> None:
        """Load one tensor of the checkpoint; quantisation methods use this one or the next."""
        super().weight_loader(param, self._for_all_ranks(param, loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: int) -> None:
        """Load one tensor as `weight_loader` does."""
        super().weight_loader_v2(param, self._for_all_ranks(param, loaded_weight, loaded_shard_id), loaded_shard_id)

    def _for_all_ranks(self, parameter: nn.Parameter, loaded: Tensor, shard_id: int) -> Tensor:
        """What vLLM's loader, which takes one slice per rank, finds each rank's part in."""
        outputs = getattr(parameter, "output_dim", None)
        if outputs is None or shard_id in (0, 1, 2):  # one scale for the whole tensor, or q, k, v
            return loaded
        *_, local, filling = self.splits
        blocks = isinstance(parameter, BlockQuantScaleParameter)
        if shard_id in (3, 4) or blocks:  # f_a, g_a; or scales of blocks, of which all of b is one
            return torch.cat([loaded] * self.tp_size, outputs)
        by_rank = loaded.unflatten(outputs, (self.tp_size, -1))
        shape = list(by_rank.shape)
        # In proportion, because one element of a packed tensor holds several outputs.
        shape[outputs + 1] = shape[outputs + 1] * filling // local
        return torch.cat([by_rank, by_rank.new_zeros(shape)], outputs + 1).flatten(outputs, outputs + 1)


class BatchedLowRank(nn.Module):
    """The second factors of both gates, f_b and g_b, of one rank as one batched product. They are never quantised.

    Args:
        head_dim: D, the rank of both factors.
        local_width: H·D of this rank's heads.
    """

    def __init__(self, head_dim: int, local_width: int) -> None:
        super().__init__()
        # As in the checkpoint, outputs first: products of few rows read it from front to back.
        self.weight = nn.Parameter(torch.empty(2, local_width, head_dim), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": _load_low_rank})

    def forward(self, low_rank: Tensor) -> Tensor:
        """``[T, f_a | g_a]``, which may be columns of a wider tensor, to ``[2, T, H·D]``."""
        return torch.bmm(low_rank.unflatten(-1, (2, -1)).transpose(0, 1), self.weight.transpose(1, 2))


class KimiDeltaAttention(nn.Module):
    """One KDA layer of one tensor-parallel rank; heads, and with them the state, are split over ranks.

    Args:
        home: the slots, and the name of this step's metadata.
        prefix: name in the checkpoint, ``model.layers.{i}.self_attn``.
    """

    def __init__(self, geometry: KimiGeometry, vllm_config: VllmConfig, home: StateHome, prefix: str) -> None:
        super().__init__()
        heads, head_dim, hidden = geometry.linear_num_heads, geometry.linear_head_dim, geometry.hidden_size
        width = heads * head_dim
        ranks = get_tensor_model_parallel_world_size()
        local_heads = heads // ranks
        local_width = local_heads * head_dim
        quant_config = vllm_config.quant_config
        self.prefix = prefix
        self.in_proj = InputLinear(hidden, heads, head_dim, quant_config, f"{prefix}.in_proj")
        self.fg_b_proj = BatchedLowRank(head_dim, local_width)
        self.o_proj = RowParallelLinear(width, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj")
        # What forms the decay stays fp32 whatever the model's dtype: rounding it drifts with context length.
        self.A_log = _fp32_parameter(local_heads, loader=_load_heads)
        self.dt_bias = _fp32_parameter(local_width, loader=sharded_weight_loader(0))
        self.conv_weight = _fp32_parameter(geometry.conv_width, 3 * local_width, loader=_load_conv)
        self.o_norm = nn.Module()
        self.o_norm.weight = _fp32_parameter(head_dim)

        self.norm_eps = geometry.rms_norm_eps
        self.weights = self._kernel_weights()

        self.metadata_name = home.metadata_name
        self.home, self.layer = home, home.claim_layer()
        self.block_size = vllm_config.cache_config.block_size
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.backend = dispatch.load_backend(vllm_config.device_config.device.type)
        self.backend.prepare(head_dim, windows=bool(window_of(vllm_config)))
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def pools(self) -> Pools:
        """The layer's states, in the memory that vLLM has bound."""
        return self.home.pool.layers[self.layer]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix one step's tokens: ``[T, hidden]`` to ``[T, hidden]``, decodes first, then prefills."""
        projected, _ = self.in_proj(hidden_states)
        qkv, low_rank, beta, _ = projected.split(self.in_proj.splits, dim=-1)
        gate, out_gate = self.fg_b_proj(low_rank).unbind()
        out = torch.empty_like(out_gate)
        torch.ops.vllm.kimi_delta_attention(qkv, gate, beta, out_gate, out, self.prefix)
        mixed: Tensor = self.o_proj(out)[0]
        return mixed

    def advance(self, x: Activations, out: Tensor, step: KDAMetadata) -> None:
        """Run the kernels for one step.

        Args:
            x: the step's tokens.
            out: ``[T, H·D]``, written.
            step: which rows are decodes and prefills, and their slots.

        Mutates:
            The pool at the step's write slots and their flags, and `out`. Rows behind the step's tokens, which vLLM
            adds to reach the size of a captured graph, become zeros: what was in memory there could be NaN, and a
            router cannot choose experts by NaN.
        """
        decodes, end = step.num_decodes, step.num_tokens
        if end < out.shape[0]:
            out[end:].zero_()
        if step.decode is not None:
            self.backend.kda_decode(x.tokens(0, decodes), self.weights, self.pools, step.decode, out[:decodes])
        if step.windows is not None:
            self.backend.kda_verify(x.tokens(0, decodes), self.weights, self.pools, step.windows, out[:decodes])
        if step.prefill is not None:
            self.backend.kda_prefill(x.tokens(decodes, end), self.weights, self.pools, step.prefill, out[decodes:end])

    def _kernel_weights(self) -> Weights:
        norm_weight = self.o_norm.get_parameter("weight")
        return Weights(self.conv_weight, self.A_log, self.dt_bias, norm_weight, self.norm_eps)

    def rehearse(self, x: Activations, out: Tensor) -> None:
        """Take part in vLLM's profiling run: check once what all later steps bring alike, and on a GPU use the memory.

        Arguments as `advance`. The tokens belong to as many new sequences as can be, and to as many as can all be
        prefills: either step may take more memory. No state of theirs is kept.

        Raises:
            ValueError: the kernels do not take such tensors.
        """
        # Loaders that share or map weights build on the meta device and register other parameters afterwards. Reloading
        # keeps the parameters: graphs rely on their addresses too.
        self.weights = self._kernel_weights()
        tokens, window = out.shape[0], self.pools.cut.window
        for sequences in {min(tokens, self.max_num_seqs), most_prefills(tokens, self.max_num_seqs, window)}:
            step = rehearsal(tokens, sequences, self.block_size, out.device, window)
            if step.decode is not None:
                check_decode(x, self.weights, self.pools, step.decode, out)
            if step.windows is not None:
                check_windows(x, self.weights, self.pools, step.windows, out)
            if step.prefill is not None:
                check_prefill(x, self.weights, self.pools, step.prefill, out)
            if out.device.type != "cpu":
                self.advance(x, out, step)
        if out.device.type == "cpu":
            out.zero_()  # the loops need no memory beside their arguments

    def warm_up(self, max_num_tokens: int, dtype: torch.dtype) -> None:
        """Compile every kernel that a step of up to so many tokens in `dtype` can need. Touches no slot.

        Numbers of sequences are those where the launch table changes, and powers of two: Triton compiles a variant for
        arguments that 16 divides.
        """
        device, width = self.dt_bias.device, self.dt_bias.shape[0]
        most = min(self.max_num_seqs, max_num_tokens)
        sizes = launch.batch_sizes(self.pools.cut.H, most)
        counts = sorted({*sizes, *(2**power for power in range(most.bit_length()))})
        for sequences in counts:
            # The least that is a prefill; and the least whose sequences are not all run token by token.
            several = max(2, self.pools.cut.window + 1) * sequences
            for tokens in {sequences, several, max(several, launch.EXTEND_TOKENS + 1)}:
                if tokens > max_num_tokens:
                    continue
                # As the projections hand them over, down to the strides: kernels are compiled for both.
                projected = torch.zeros(tokens, sum(self.in_proj.splits), dtype=dtype, device=device)
                qkv, _, beta, _ = projected.split(self.in_proj.splits, dim=-1)
                gate, out_gate = torch.zeros(2, tokens, width, dtype=dtype, device=device)
                step = rehearsal(tokens, sequences, self.block_size, device, self.pools.cut.window)
                self.advance(Activations(qkv, gate, beta, out_gate), torch.empty_like(out_gate), step)


@eager_break_during_capture
def kimi_delta_attention(
    qkv: Tensor, gate: Tensor, beta: Tensor, out_gate: Tensor, out: Tensor, layer_name: str
) -> None:
    """KDA of one layer, as an opaque operator: a compiled graph holds neither the step's metadata nor the pool.

    Shapes are those of `Activations`; `out` is written.
    """
    context = get_forward_context()
    layer: KimiDeltaAttention = context.no_compile_layers[layer_name]
    x = Activations(qkv, gate, beta, out_gate)
    if context.attn_metadata is None:
        layer.rehearse(x, out)
    else:
        layer.advance(x, out, context.attn_metadata[layer.metadata_name])


def _kimi_delta_attention_fake(
    qkv: Tensor, gate: Tensor, beta: Tensor, out_gate: Tensor, out: Tensor, layer_name: str
) -> None:
    return


def _fp32_parameter(*shape: int, loader: object = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)
    if loader is not None:
        set_weight_attrs(parameter, {"weight_loader": loader})
    return parameter


# vLLM's reloading looks up a loader's first argument by the name `param`. Shapes have been checked, see `weights.py`.
def _load_heads(param: nn.Parameter, loaded: Tensor) -> None:
    """A_log is ``[H]`` in some checkpoints and ``[1, 1, H, 1]`` in others."""
    sharded_weight_loader(0)(param, loaded.reshape(-1))


def _load_conv(param: nn.Parameter, loaded: Tensor, shard_id: int) -> None:
    """One of q, k, v: ``[H·D, 1, W]`` in the checkpoint, a third of ``[W, 3·H·D]`` here."""
    width = param.shape[1] // 3
    taps = loaded.reshape(loaded.shape[0], -1).narrow(0, get_tensor_model_parallel_rank() * width, width)
    param.data[:, shard_id * width : (shard_id + 1) * width].copy_(taps.t())


def _load_low_rank(param: nn.Parameter, loaded: Tensor, shard_id: int) -> None:
    """f_b or g_b: ``[H·D, D]`` in the checkpoint, this rank's rows of it in one half of ``[2, H·D, D]`` here."""
    width = param.shape[1]
    param.data[shard_id].copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * width, width))


direct_register_custom_op(
    op_name="kimi_delta_attention",
    op_func=kimi_delta_attention,
    mutates_args=["out"],
    fake_impl=_kimi_delta_attention_fake,
)
