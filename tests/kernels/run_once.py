"""Run every Triton kernel once on small shapes, for compute-sanitizer, which slows a program down a thousand times.

``compute-sanitizer --tool racecheck python tests/kernels/run_once.py``, likewise ``--tool memcheck``.
"""

from __future__ import annotations

import sys

import torch
from triton_case import triton_case

from kimi_vllm.kernels.cuda import launch


def main() -> None:
    """Decode, extend, windows and prefill in both forms: with history, a boundary inside the step, a row of padding."""
    for D, state_dtype in ((128, torch.float32), (128, torch.bfloat16), (64, torch.float16)):
        options = {"dtype": torch.bfloat16, "state_dtype": state_dtype, "filling": 15}
        case = triton_case(3, 1, D, **options)
        case.fill(1, 5)
        case.decode([1, 2, 0], [1, 0, 5], [5, 3, 0], nonfinite=case.flags())
        case = triton_case(4, 1, D, **options)
        case.fill(1, 62)
        case.prefill([4], [62], [[1, 2]], 64, nonfinite=case.flags())
        case = triton_case(8, 1, D, R=8, window=4, **options)
        case.fill(1, 61)
        case.verify([4, 3], [61, 0], [1, 0], [1, 2], [3, 0], [0, 0], nonfinite=case.flags())
        case.verify([4, 3], [63, 2], [3, 2], [3, 4], [0, 0], [2, 2], nonfinite=case.flags())
        case.rows(0, 4).prefill([4], [66], [[1, 3]], 64, num_fold=[3], nonfinite=case.flags())
        # Several tiles, of which each is written while the next is on its way.
        case = triton_case(8, 1, D, R=8, window=4, windows_config=launch.Windows(32, 32, 4, 128), **options)
        case.fill(1, 61)
        case.verify([4], [61], [1], [1], [0], [0])
        case.rows(4, 8).verify([4], [63], [1], [1], [2], [2], nonfinite=case.flags())
        for exact in (True, False):
            case = triton_case(70, 1, D, exact=exact, **options)
            case.fill(1, 60)
            case.prefill([8, 62], [60, 0], [[1, 2], [3, 4]], 64, nonfinite=case.flags())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    sys.stdout.write("every kernel ran once\n")


if __name__ == "__main__":
    main()
