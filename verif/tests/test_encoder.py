"""Quantizer and encoder, see `verif/plans/encoder.md`."""

import pytest
from amaranth.hdl import Module
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY, ChipConfig
from lnpu.fgmp.encoder import Encoder
from lnpu.fgmp.quantizer import Quantizer
from lnpu.hdl import Block, place
from verif.runner import run

LANES = 32

CONFIGS = [
    TINY,
    ChipConfig(axi_bits=128),
    ChipConfig(beat=8, axi_bits=64),
    ChipConfig(beat=16, lanes=16, axi_bits=256),
]


class QuantizerBank(Block):
    """Many quantizers side by side, outputs padded to bytes: an element at a time would take minutes."""

    combinational = True

    def __init__(self) -> None:
        super().__init__(
            {
                "v": In(data.ArrayLayout(16, LANES)),
                "lo": In(15),
                "hi": In(15),
                "below": In(2),
                "above": In(1),
                "code": Out(data.ArrayLayout(8, LANES)),
                "fp8": Out(data.ArrayLayout(8, LANES)),
                "value": Out(data.ArrayLayout(16, LANES)),
                "underflow": Out(data.ArrayLayout(8, LANES)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        for k in range(LANES):
            quantizer = place(m, f"quantizer{k}", Quantizer())
            m.d.comb += quantizer.v.eq(self.v[k])
            m.d.comb += [getattr(quantizer, name).eq(getattr(self, name)) for name in ("lo", "hi", "below", "above")]
            m.d.comb += [
                getattr(self, name)[k].eq(getattr(quantizer, name)) for name in ("code", "fp8", "value", "underflow")
            ]
        return m


def test_quantizer():
    run(QuantizerBank(), "verif.quantizer_tb", lanes=LANES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.beat}x{config.axi_bits}")
def test_encoder(config):
    run(Encoder(config=config), "verif.encoder_tb", beat=config.beat, axi_bits=config.axi_bits)
