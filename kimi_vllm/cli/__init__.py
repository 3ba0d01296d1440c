"""The command `kimi-vllm`: `doctor`, `plan`, `inspect-state`, `sessions`. Each has its options, data and report."""

from kimi_vllm.cli.main import app, main

__all__ = ["app", "main"]
