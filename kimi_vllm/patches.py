"""A row per thing we change outside this package: what, why, and when it goes. Empty is the goal."""

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patch:
    """One change to somebody else's module.

    Attributes:
        target: what is changed.
        why: what breaks without it.
        remove_when: what must be true upstream.
        apply: makes the change; may run more than once.
    """

    target: str
    why: str
    remove_when: str
    apply: Callable[[], None]


def _give_llvmlite_a_dict() -> None:
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


PATCHES = (
    Patch(
        target="llvmlite.binding.ffi.lib",
        why=(
            "vLLM's CPU worker reads __dict__ of all objects of all modules (triton_utils.dispatcher._rebind_kernels). "
            "llvmlite's library handle answers any attribute, that one too, with a function, so a second engine in a "
            "process that has used numba fails with \"'_lib_fn_wrapper' object has no attribute 'get'\"."
        ),
        remove_when="vLLM's _rebind_kernels no longer calls vars() on objects that only pretend to have a __dict__",
        apply=_give_llvmlite_a_dict,
    ),
)


def apply_all() -> None:
    """Make every change in `PATCHES`."""
    for patch in PATCHES:
        patch.apply()
