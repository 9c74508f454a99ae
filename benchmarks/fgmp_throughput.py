"""Beats per cycle of the FGMP encoder and decoder and of the STORE and LOAD units around them, by mix of elements.

python benchmarks/fgmp_throughput.py [--config paper]

Runs the tests `throughput` of their testbenches, which compare every output with a model and hold the rates to the
bound: a beat of elements or a word of the bus a cycle, whichever binds. Needs the test tools (`make setup-test`).
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lnpu.config import get_config
from lnpu.fgmp.decoder import Decoder
from lnpu.fgmp.encoder import Encoder
from lnpu.mem.load import LoadUnit
from lnpu.mem.store import StoreUnit
from verif import runner


def main() -> None:
    parser = argparse.ArgumentParser(description="Beats per cycle of encoder and decoder")
    parser.add_argument("--config", default="paper")
    config = get_config(parser.parse_args().config)
    fields = {"beat": config.beat, "axi_bits": config.axi_bits}
    shape = fields | {"lanes": config.lanes, "cores": config.cores, "rows": config.rows}
    os.environ["COCOTB_TEST_FILTER"] = "throughput"
    for block, testbench, parameters in (
        (Decoder(config=config), "decoder_tb", {"config": shape}),
        (LoadUnit(config=config), "load_tb", {"config": shape | {"dense_rows": config.dense_rows}}),
        (Encoder(config=config), "encoder_tb", fields),
        (StoreUnit(config=config), "store_tb", fields | {"address_bits": config.address_bits}),
    ):
        log = runner.run(block, f"verif.{testbench}", **parameters)
        for line in log.read_text(errors="replace").splitlines():
            if found := re.search(r"(throughput \d.*|LOAD \d.*beats a cycle.*)", line):
                print(f"{testbench.removesuffix('_tb'):<9}{found[0].removeprefix('throughput ')}", flush=True)


if __name__ == "__main__":
    main()
