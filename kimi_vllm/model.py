"""Kimi Linear for vLLM: embedding, blocks, logits.

Layers are Kimi Delta Attention (state in our slots) or MLA (latents in vLLM's pages), as `geometry.py` says;
`weights.py` maps checkpoint names to parameters.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.mla_attention import unified_mla_attention_with_output
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from kimi_vllm import patches
from kimi_vllm.cache.fingerprint import LoadedWeights
from kimi_vllm.cache.group import StateHome
from kimi_vllm.geometry import KimiGeometry, geometry_of, stages_of
from kimi_vllm.graph_breaks import check_graph_breaks
from kimi_vllm.layers import skinny
from kimi_vllm.layers.ffn import KimiMLP, KimiMoE
from kimi_vllm.layers.kda import KimiDeltaAttention, kimi_delta_attention
from kimi_vllm.layers.mla import KimiMLA
from kimi_vllm.layers.mla_latent import LatentAttention
from kimi_vllm.options import KimiOptions
from kimi_vllm.quantization import QuantizationError, WeightFormat, as_written
from kimi_vllm.weights import check_whole, load_weights, packed_modules_mapping


class KimiDecoderLayer(nn.Module):
    """Norm, KDA or MLA, norm, MLP or MoE; the residual is passed beside."""

    def __init__(self, geometry: KimiGeometry, vllm_config: VllmConfig, home: StateHome | None, prefix: str) -> None:
        super().__init__()
        index = extract_layer_index(prefix)
        attention = f"{prefix}.self_attn"
        self.self_attn: nn.Module
        if geometry.kda[index]:
            assert home is not None  # the config hook refuses stages without MLA
            self.self_attn = KimiDeltaAttention(geometry, vllm_config, home, attention)
        else:
            self.self_attn = KimiMLA(geometry, vllm_config, attention)
            if home is not None:
                self.state_group = home.member(vllm_config, index, self.self_attn.attn)
        self.is_sparse = geometry.sparse[index]
        if self.is_sparse and geometry.moe is not None:
            self.block_sparse_moe = KimiMoE(geometry, geometry.moe, vllm_config, f"{prefix}.block_sparse_moe")
        else:
            self.mlp = KimiMLP(geometry.hidden_size, geometry.intermediate_size, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(geometry.hidden_size, eps=geometry.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(geometry.hidden_size, eps=geometry.rms_norm_eps)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states ``[T, hidden]`` and the residual stream, to the same two."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        feed_forward = self.block_sparse_moe if self.is_sparse else self.mlp
        return feed_forward(hidden_states), residual


@support_torch_compile
class KimiLinearModel(nn.Module):
    """The decoder of one pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        geometry = geometry_of(vllm_config.model_config)
        _check_parallel(geometry, get_tensor_model_parallel_world_size())
        pipeline = get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(geometry.vocab_size, geometry.hidden_size, prefix=f"{prefix}.embed_tokens")
            if pipeline.is_first_rank
            else PPMissingLayer()
        )
        self.state_home = home = _state_home(geometry, vllm_config, f"{prefix}.layers")
        self.start_layer, self.end_layer, self.layers = make_layers(
            geometry.num_layers,
            lambda prefix: KimiDecoderLayer(geometry, vllm_config, home, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(geometry.hidden_size, eps=geometry.rms_norm_eps) if pipeline.is_last_rank else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], geometry.hidden_size
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Token ids ``[T]`` (or embeddings ``[T, hidden]``) to hidden states. Positions are unused: no RoPE."""
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in self.layers[self.start_layer : self.end_layer]:
            hidden_states, residual = layer(hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class KimiLinearForCausalLM(nn.Module, SupportsPP):
    """What vLLM resolves `KimiLinearForCausalLM` to when this plugin is active."""

    packed_modules_mapping = packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if current_platform.is_cpu():
            patches.apply_all()  # the config hook may have run in another process
        else:
            check_graph_breaks(vllm_config, kimi_delta_attention, unified_mla_attention_with_output)
        self.config = vllm_config.model_config.hf_config  # read by vLLM's adapters for embeddings and classification
        self.geometry = geometry_of(vllm_config.model_config)
        self.dtype = vllm_config.model_config.dtype
        self.loaded = False
        self.updated: set[str] = set()
        self.renamed = as_written(vars(self.config)) is not None
        self.quantization = _known_format(vars(self.config))
        self.skinny = skinny.serves(vllm_config)
        keeps_sessions = KimiOptions.of(vllm_config).session_dir is not None
        self.noted = LoadedWeights() if keeps_sessions and current_platform.is_cpu() else None
        self.model = KimiLinearModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.geometry.vocab_size,
                self.geometry.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(self.geometry.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, hidden]``."""
        embeddings: Tensor = self.model.embed_tokens(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """See `KimiLinearModel.forward`."""
        output: Tensor | IntermediateTensors = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return output

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[N, hidden]`` to ``[N, vocab]``."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def warm_up_kernels(self, max_num_tokens: int) -> None:
        """Compile the KDA and skinny kernels for steps of up to `max_num_tokens`, before the first request."""
        if self.skinny:
            skinny.warm_up(self, self.dtype)
        if (layer := next((m for m in self.modules() if isinstance(m, KimiDeltaAttention)), None)) is not None:
            layer.warm_up(max_num_tokens, self.dtype)  # the layers are alike

    def process_weights_after_loading(self) -> None:
        """Called by vLLM after the first load, also of dummy weights."""
        self.loaded = True
        if self.skinny:
            skinny.install(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint: at first all of it, later any part; see `kimi_vllm.weights.load_weights`.

        Quantised checkpoints rename tensors, so whether they are complete is left to vLLM's own check.
        """
        weights = weights if self.noted is None else self.noted.note(weights)
        loaded, seen = load_weights(self, self.geometry, weights, quantization=self.quantization)
        if self.loaded:
            self.updated |= seen
        elif not self.renamed:
            check_whole(self, self.geometry, seen, all_modules=True)
        self._forget_projections()
        return loaded

    def finish_update(self) -> None:
        """Call after every change of weights.

        Raises:
            WeightsError: The tensors since the last call leave a module half loaded, see `check_whole`.
        """
        if not self.renamed:
            check_whole(self, self.geometry, self.updated, all_modules=False)
        self.updated.clear()
        self._forget_projections()

    def _forget_projections(self) -> None:
        for module in self.modules():
            if isinstance(module, LatentAttention):
                module.forget_projections()


def _known_format(config: Mapping[str, Any]) -> WeightFormat | None:
    try:
        return WeightFormat.of_config(config)
    except QuantizationError:
        return None  # vLLM may still load it; then only its loaders check shapes


def _state_home(geometry: KimiGeometry, vllm_config: VllmConfig, prefix: str) -> StateHome | None:
    rank = get_pp_group().rank_in_group
    kinds = {geometry.kda[layer] for layer in stages_of(geometry, vllm_config)[rank]}
    return StateHome(geometry, vllm_config, rank, prefix) if len(kinds) == 2 else None


def _check_parallel(geometry: KimiGeometry, tensor_parallel: int) -> None:
    if geometry.num_attention_heads % tensor_parallel:
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel}: the model's {geometry.num_attention_heads} attention heads do "
            "not divide by it."
        )
