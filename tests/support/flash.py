"""vLLM's FlashAttention for MLA where there is no FlashAttention: enough of it to import what derives from it."""

import sys

import vllm.v1.attention.backends.fa_utils as fa_utils

MODULES = ("vllm.v1.attention.backends.mla.flashattn_mla", "kimi_vllm.layers.mla_flash")


def import_mla_flash(monkeypatch):
    """`kimi_vllm.layers.mla_flash`, over functions that vLLM has on GPUs only and that nobody here calls."""
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
        monkeypatch.setattr(fa_utils, name, None, raising=False)
    for module in MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    import kimi_vllm.layers.mla_flash as module

    return module
