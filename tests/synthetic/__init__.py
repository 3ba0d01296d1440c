"""The synthetic tasks of the Kimi Linear report: generators, training."""
