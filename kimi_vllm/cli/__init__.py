"""The command `kimi-vllm`: `doctor`, `plan`, `inspect-state`. Per command: its options, its data, its report."""

from kimi_vllm.cli.main import app, main

__all__ = ["app", "main"]
