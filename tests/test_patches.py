"""The ledger of patches: each still needed, each still works."""

import inspect

from kimi_vllm import patches


def test_vllm_still_trips_over_llvmlite():
    """When this fails, the patch of llvmlite can go."""
    from vllm.triton_utils import dispatcher

    assert "vars(value).get" in inspect.getsource(dispatcher._rebind_kernels)


def test_llvmlite_survives_vllms_scan():
    import llvmlite.binding.ffi
    import numba  # noqa: F401  # loads the library handle

    patches.apply_all()
    assert vars(llvmlite.binding.ffi.lib).get("kernel") is None
    assert llvmlite.binding.ffi.lib.LLVMPY_GetVersionInfo() > 0
