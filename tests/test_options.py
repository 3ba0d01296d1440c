"""--additional-config: what can be set, and errors that name the option."""

import pytest

from kimi_vllm.options import KimiOptions, OptionsError


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, {"kimi": {}}])
def test_defaults(config):
    assert KimiOptions.from_additional_config(config) == KimiOptions()


def test_values_are_read():
    options = KimiOptions.from_additional_config({"kimi": {"state_slots": 12, "state_dtype": "bfloat16"}})
    assert (options.state_slots, options.state_dtype, options.checkpoint_interval) == (12, "bfloat16", 0)


@pytest.mark.parametrize("share", [0, 0.5])
def test_checkpoint_share_is_a_number_below_one(share):
    assert KimiOptions.from_additional_config({"kimi": {"checkpoint_share": share}}).checkpoint_share == share


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kimi": {"slots": 4}}, "kimi.slots: no such option. Known: state_slots, typical_tokens, state_dtype"),
        ({"kimi": {"state_slots": 1}}, "kimi.state_slots=1: expected an integer of at least 2"),
        ({"kimi": {"state_slots": "many"}}, "kimi.state_slots='many'"),
        ({"kimi": {"checkpoint_interval": -1}}, "kimi.checkpoint_interval=-1"),
        ({"kimi": {"checkpoint_share": 1}}, "kimi.checkpoint_share=1: expected a number from 0 to below 1"),
        ({"kimi": {"checkpoint_share": -0.1}}, "kimi.checkpoint_share=-0.1"),
        ({"kimi": {"checkpoint_share": "half"}}, "kimi.checkpoint_share='half'"),
        ({"kimi": {"typical_tokens": 0}}, "kimi.typical_tokens=0: expected a number of tokens"),
        ({"kimi": {"state_dtype": "fp8"}}, "kimi.state_dtype='fp8': expected one of float32, bfloat16, float16"),
        ({"kimi": {"eviction": "fifo"}}, "kimi.eviction='fifo': expected one of value, lru"),
        ({"kimi": {"on_nonfinite": "ignore"}}, "kimi.on_nonfinite='ignore': expected one of abort, resume"),
        ({"kimi": {"host_memory_gib": -1}}, "kimi.host_memory_gib=-1: expected a number of GiB"),
        ({"kimi": {"host_memory_gib": True}}, "kimi.host_memory_gib=True"),
        ({"kimi": {"host_memory_gib": float("inf")}}, "kimi.host_memory_gib=inf"),
        ({"kimi": 3}, "--additional-config: expected"),
    ],
)
def test_errors(config, message):
    with pytest.raises(OptionsError, match=message):
        KimiOptions.from_additional_config(config)
