"""kimi-vllm: a vLLM plugin that serves Kimi Linear with KDA state and KV cache in one memory."""

import logging
import os

ARCHITECTURE = "KimiLinearForCausalLM"
MODEL_CLASS = "kimi_vllm.model:KimiLinearForCausalLM"

# A child of vLLM's logger, so that its handlers, level and format apply.
logger = logging.getLogger("vllm.kimi_vllm")


def register() -> None:
    """Register the model class with vLLM, which calls this in every process, possibly more than once.

    Imports nothing heavy: the model class is named by a string. Outside the supported range of vLLM the in-tree model
    stays, with one warning. ``KIMI_VLLM_DISABLE=1`` leaves vLLM untouched.

    Raises:
        RuntimeError: Registration failed and ``KIMI_VLLM_STRICT=1`` is set.
    """
    if os.environ.get("KIMI_VLLM_DISABLE") == "1":
        return
    problem = _register()
    if problem is None:
        return
    if os.environ.get("KIMI_VLLM_STRICT") == "1":
        raise RuntimeError(problem)
    logger.warning("%s vLLM's own Kimi Linear serves instead. Run `kimi-vllm doctor` for details.", problem)


def _register() -> str | None:
    """Register, or return why that failed."""
    from kimi_vllm._vllm import SUPPORTED_VLLM, installed_vllm

    found = installed_vllm()
    if found is None:
        return "kimi-vllm found no installed vLLM (pip install 'kimi-vllm[cpu]' or 'kimi-vllm[cuda]')."
    distribution, release = found
    if not SUPPORTED_VLLM.contains(release, prereleases=True):
        return (
            f"kimi-vllm supports vLLM {SUPPORTED_VLLM}; {distribution} {release} is installed "
            f"(pip install '{distribution}{SUPPORTED_VLLM}')."
        )
    try:
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from kimi_vllm.config_hook import KimiLinearConfigHook
    except ImportError as error:
        return f"kimi-vllm could not import a part of {distribution} {release}: {error}."
    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    MODELS_CONFIG_MAP[ARCHITECTURE] = KimiLinearConfigHook
    return None
