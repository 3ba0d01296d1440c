"""What several tests share: random checkpoints, engines, and the oracle nobody here wrote."""
