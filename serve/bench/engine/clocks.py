"""How fast and at what power the first GPU ran while something was measured, by NVML."""

import statistics
import threading
from typing import Any, Self

EVERY_S = 0.05


class Clocks:
    """Samples clock and power in a thread, between ``with`` and its end.

    Attributes:
        fields: Medians ``sm_mhz`` and ``watts`` while the GPU was busy, the limit ``watts_limit``, and ``throttled``,
            the share of samples in which power held the clock down; ``clocks``, an error, where NVML has none.
    """

    def __init__(self, *, cuda: bool) -> None:
        self.fields: dict[str, Any] = {}
        self._cuda = cuda
        self._over = threading.Event()
        self._samples: list[tuple[int, float, bool]] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        if self._cuda:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if not self._cuda:
            return
        self._thread.join()
        if self._samples:
            mhz, watts, throttled = zip(*self._samples, strict=True)
            self.fields |= {
                "sm_mhz": statistics.median(mhz),
                "watts": round(statistics.median(watts), 1),
                "throttled": round(sum(throttled) / len(throttled), 3),
            }

    def _sample(self) -> None:
        import torch
        from vllm.utils.import_utils import import_pynvml

        nvml = import_pynvml()
        try:
            nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            device = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.fields["watts_limit"] = nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3
            while not self._over.wait(EVERY_S):
                if nvml.nvmlDeviceGetUtilizationRates(device).gpu:
                    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)
                    self._samples.append(
                        (
                            nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
                            nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
                            bool(reasons & nvml.nvmlClocksThrottleReasonSwPowerCap),
                        )
                    )
        except nvml.NVMLError as error:
            self.fields["clocks"] = repr(error)
