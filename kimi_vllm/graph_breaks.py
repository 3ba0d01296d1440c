"""Checks that CUDA graphs of mixed steps break at attention and KDA, as vLLM's settings say."""

from collections.abc import Callable

from vllm.compilation import breakable_cudagraph
from vllm.config import VllmConfig


def check_graph_breaks(vllm_config: VllmConfig, *operators: Callable[..., None]) -> None:
    """Refuse to run operators that a CUDA graph would capture although their work depends on the step.

    vLLM 0.32 decides when a module is imported whether its operators break graphs, and turns breaking on when it makes
    an engine's config. Operators of a module imported earlier in the same process do not break, and a replayed graph
    would repeat the step in which it was captured: wrong answers. vLLM 0.33 always breaks.

    Raises:
        RuntimeError: An operator was imported too early.
    """
    broken = breakable_cudagraph.is_breakable_cudagraph_enabled()
    if not broken or not vllm_config.compilation_config.cudagraph_mode.has_piecewise_cudagraphs():
        return
    for operator in operators:
        if operator.__code__.co_filename != breakable_cudagraph.__file__:
            raise RuntimeError(
                f"{operator.__module__} was imported before the engine's config was made, so this version of vLLM "
                "would replay CUDA graphs that hold another step's attention. Set VLLM_USE_BREAKABLE_CUDAGRAPH=1 in "
                "the environment, or import layers of vLLM and kimi_vllm after the engine is made."
            )
