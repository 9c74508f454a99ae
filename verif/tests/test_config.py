"""What a configuration may be."""

import pytest

from lnpu.config import CONFIGS, PAPER, TINY, ChipConfig, get_config

RANGES = {
    "cores": (1, 16),
    "address_bits": (32, 40),
    "psum_rows": (16, 2048),
    "acc_bits": (84, 128),
    "vmem_rows": (256, 65536),
    "sum_rows": (2, 1024),
    "reads_in_flight": (1, 64),
    "writes_in_flight": (1, 64),
    "tensor_states": (2, 256),
}
"""The least and the largest value of a field."""


@pytest.mark.parametrize("name", RANGES)
def test_ends_of_ranges(name):
    low, high = RANGES[name]
    for value in (low, high):
        assert getattr(TINY.replace(**{name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"^{name} must be {low} to {high}, not {value}$"):
            TINY.replace(**{name: value})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beat": 5}, "beat must be 4, 8 or 16, not 5"),
        ({"lanes": 12, "beat": 8}, r"lanes must be a multiple of beat \(8\) up to 128, not 12"),
        ({"lanes": 132}, r"lanes must be a multiple of beat \(4\) up to 128, not 132"),
        ({"lanes": 4, "beat": 8}, "lanes must be"),
        ({"axi_bits": 256}, r"axi_bits must be 64, 128 or 256 and at most 32 \* beat \(128\), not 256"),
        ({"axi_bits": 32}, "axi_bits must be"),
        ({"rows": 18}, r"rows must be a multiple of beat \(4\) from 16 to 1024, not 18"),
        ({"rows": 12}, "rows must be"),
        ({"depth": 132}, r"depth must be a multiple of beat \(4\) from 16 to 128, not 132"),
        ({"dense_rows": 60}, r"dense_rows must be a multiple of beat \(4\) from 64 to 2048, not 60"),
        ({"dense_banks": 3}, "dense_banks must be 2 or 4, not 3"),
        ({"vmem_banks": 2}, "vmem_banks must be 4 or 8, not 2"),
        ({"burst_beats": 12}, "burst_beats must be a power of two from 4 to 256, not 12"),
        ({"cores": "two"}, "cores must be of type int, not 'two'"),
        ({"cores": True}, "cores must be of type int, not True"),
        ({"rows": 64.0}, "rows must be of type int, not 64.0"),
        ({"buffer_registers": 1}, "buffer_registers must be of type bool, not 1"),
        ({"name": 3}, "name must be of type str, not 3"),
    ],
)
def test_errors_name_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TINY.replace(**changes)


def test_unknown_field():
    with pytest.raises(TypeError, match="no such field: colour, lane"):
        PAPER.replace(lane=1, colour=2)


def test_named_ones():
    assert ChipConfig(name="tiny") == TINY
    assert all(get_config(name) is config for name, config in CONFIGS.items())
    with pytest.raises(ValueError, match="one of tiny, edge, paper, not 'Tiny'"):
        get_config("Tiny")
