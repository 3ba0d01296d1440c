"""Whether vLLM can use the installed NCCL. If not, it turns its own communicator off without a message."""

REMEDY = "Install NCCL 2.29.7 or newer and set VLLM_NCCL_SO_PATH to its libnccl.so.2"
"""What to do."""


def why_unusable() -> str:
    """Return why vLLM's NCCL communicator cannot work here; empty if it can.

    vLLM 0.32 and 0.33 need ``ncclCommSuspend`` and ``ncclCommResume``, which NCCL has since 2.29.7.
    ``VLLM_NCCL_SO_PATH`` names another library than the one that torch brought.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    try:
        NCCLLibrary().ncclGetVersion()
    except (OSError, AttributeError) as error:
        return str(error)
    return ""
