"""Clock and power of a GPU during a measurement, with an NVML of the test's own."""
# ruff: noqa: N802, N815  # NVML's names

import time
from types import SimpleNamespace

import pytest

from serve.bench.engine import clocks
from serve.bench.engine.clocks import Clocks


class FakeNVML:
    """A GPU that is idle at first, then held down by power in one of four samples."""

    NVML_CLOCK_SM, nvmlClocksThrottleReasonSwPowerCap = 1, 4
    NVMLError = OSError

    def __init__(self, fails=False):
        self.asked, self.fails = 0, fails

    def nvmlInit(self):
        if self.fails:
            raise OSError("no library")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-abc"
        return "gpu"

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700_000

    def nvmlDeviceGetUtilizationRates(self, gpu):
        self.asked += 1
        return SimpleNamespace(gpu=0 if self.asked <= 2 else 90)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return 5 if self.asked % 4 == 0 else 1

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return 1500 + 100 * (self.asked % 4 == 0)

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 650_000


@pytest.fixture
def gpu(monkeypatch):
    def with_nvml(nvml):
        monkeypatch.setattr(clocks, "EVERY_S", 0.001)
        monkeypatch.setattr("vllm.utils.import_utils.import_pynvml", lambda: nvml)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
        return nvml

    return with_nvml


def test_only_busy_samples_count(gpu):
    nvml = gpu(FakeNVML())
    with Clocks(cuda=True) as found:
        while nvml.asked < 42:
            time.sleep(0.001)
    assert found.fields["sm_mhz"] == 1500
    assert (found.fields["watts"], found.fields["watts_limit"]) == (650, 700)
    assert 0.2 < found.fields["throttled"] < 0.3


def test_without_a_library_the_measurement_goes_on(gpu):
    gpu(FakeNVML(fails=True))
    with Clocks(cuda=True) as found:
        pass
    assert found.fields == {"clocks": "OSError('no library')"}


def test_without_a_gpu_nothing_is_asked():
    with Clocks(cuda=False) as found:
        pass
    assert found.fields == {}
