"""Benchmarks of the state cache: traces replayed through vLLM's scheduler, and what our part of a step costs."""
