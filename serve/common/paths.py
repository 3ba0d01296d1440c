"""Where the repository keeps its checkpoints and results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
RECALL = MODELS / "recall"
LARGE = MODELS / "48b-a3b"
SYNTHETIC = MODELS / "synthetic"
RESULTS = ROOT / "serve" / "bench" / "results"
