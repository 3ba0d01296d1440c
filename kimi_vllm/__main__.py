"""`python -m kimi_vllm` is the command `kimi-vllm`."""

from kimi_vllm.cli import main

main()
