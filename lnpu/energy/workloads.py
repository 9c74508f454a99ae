"""Energy of events: blocks in gates, driven with tiles of real tensors.

PE and core are driven with a convolution's operands (`lnpu.energy.tiles`), encoder and decoder with its blocks. The
core is a slice of 4 lanes with beats of 4; its lanes' part (PEs, rotation of dense rows) and the shared part are told
apart by the block that a cell is in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.fgmp import CODE_FP8, CODE_FP16
from golden.memory import encode_block
from lnpu.config import TINY, ChipConfig
from lnpu.core.gated_core import GatedCore
from lnpu.ctrl.commands import Command, Opcode
from lnpu.ctrl.counters import core_events_layout
from lnpu.energy.activity import GateSimulation, Stimulus
from lnpu.energy.gates import read_gates
from lnpu.energy.power import Energy, PowerModel
from lnpu.energy.tables import PowerTables
from lnpu.energy.tiles import Tile, Tiles
from lnpu.fgmp.decoder import Decoder, decoder_input
from lnpu.fgmp.encoder import Encoder, block_place
from lnpu.hdl import Block
from lnpu.interfaces import Buffer, buffer_write
from lnpu.pe.pe import Pe
from lnpu.results import lock
from lnpu.synth.liberty import Liberty
from lnpu.synth.netlist import PLAIN, Netlist, cell_models, synthesise, synthesise_blocks

__all__ = ["SLICE", "Bench", "measure_coding", "measure_core", "measure_pe"]

SLICE = TINY.replace(name="slice", cores=1, lanes=4, rows=128, dense_rows=192)
"""The core that is measured, with its clock gate: a core of `paper` but for lanes and beat."""

_PIXELS, _ROWS, _HALO = 8, 4, 10
"""Pixels in a row, rows of them that a core computes, pixels with the halo."""

_MOST = 3000
"""Cycles of a workload at most, of the PE."""


@dataclass
class Bench:
    """A block in gates, ready to be driven."""

    netlist: Netlist
    simulation: GateSimulation
    power: PowerModel

    @classmethod
    def of(cls, block: Block, liberty: Liberty, folder: Path, *, parts: bool = False) -> "Bench":
        """Synthesise a block and build its simulation; with `parts` energies are told apart by the blocks in it."""
        with lock(folder / "bench"):
            return cls._made(block, liberty, folder, parts)

    @classmethod
    def _made(cls, block: Block, liberty: Liberty, folder: Path, parts: bool) -> "Bench":
        synth = folder / "synth"
        models = cell_models(liberty, synth)
        netlists: Netlist | Mapping[str, Netlist]
        netlists = (
            synthesise_blocks(block, liberty, synth, flow=PLAIN)
            if parts
            else synthesise(block, liberty, synth, flow=PLAIN)
        )
        top = netlists if isinstance(netlists, Netlist) else netlists[block.module_name]
        place = f"{liberty.name}-{liberty.digest[:8]}"
        gates = read_gates(netlists, liberty, models, folder / place / "gates" / block.module_name)
        power = PowerModel(gates, PowerTables(liberty), _group)
        return cls(top, GateSimulation(gates, folder / place / "sim"), power)

    def stimulus(self, cycles: int) -> Stimulus:
        return Stimulus(self.simulation.gates, cycles)

    def run(self, stimulus: Stimulus, first: int) -> tuple[dict[str, Energy], dict[str, NDArray[np.uint8]]]:
        """Joules a cycle from cycle `first` on, by group of cells; the outputs over all cycles."""
        activity, outputs = self.simulation.run(stimulus, first)
        return self.power.energy(activity), outputs


def _group(name: str) -> str:
    """The part of a core that a cell is in, by its hierarchical name."""
    first = name.removeprefix("core.").split(".")[0].lstrip("\\")
    if "." not in name:
        return "core"
    return {"line": "pe", "dense": "dense", "sparse": "sparse"}.get(first, "core")


def _whole(energies: Mapping[str, Energy]) -> float:
    return sum(one.total for one in energies.values())


# PE.


def _pe_operands(tile: Tile, dense: NDArray[np.uint16], kind: str) -> dict[str, NDArray[np.uint64]]:
    """Operands of a PE, cycle by cycle, as a core issues them to lane 0: the first tap over all pixels."""
    a, b, enable, load = [], [], [], []
    for pixel in range(_PIXELS * _PIXELS):
        row = pixel // _PIXELS * _HALO + pixel % _PIXELS
        first = True
        codes = tile.codes[row]
        wide = [[int(k)] for k in np.flatnonzero(codes == CODE_FP16)]
        for ks in wide if kind == "fp16" else _pairs(np.flatnonzero(codes == CODE_FP8)):
            a.append(sum(int(tile.bits[row, k]) << 16 * i for i, k in enumerate(ks)))
            b.append(sum(int(dense[k, 0]) << 16 * i for i, k in enumerate(ks)))
            enable.append((1 << len(ks)) - 1)
            load.append(int(first))
            first = False
    return {
        name: np.array(x[:_MOST], np.uint64) for name, x in (("a", a), ("b", b), ("enable", enable), ("load", load))
    }


def _pairs(ks: NDArray[np.int64]) -> Iterator[list[int]]:
    """FP8 elements of a visit, cycle by cycle: of the two banks of dense rows that have most left."""
    left = [[int(k) for k in ks if k % SLICE.dense_banks == bank] for bank in range(SLICE.dense_banks)]
    while any(left):
        yield [bank.pop(0) for bank in sorted(left, key=len, reverse=True)[:2] if bank]


def measure_pe(bench: Bench, tiles: Tiles) -> dict[str, float]:
    """Joules of a PE (clock included).

    Returns
    -------
    dict
        `idle`: a cycle with its clock and nothing else. `fp16`: an FP16 product. `pair`: a cycle with two FP8 products.
        `load`: what a cycle takes more in which the sum restarts.
    """
    energies = {}
    idle = bench.stimulus(200)
    idle.set("load", 1, 0)
    energies["idle"] = _whole(bench.run(idle, 10)[0])
    for name, tile, kind in (("fp16", "dense16", "fp16"), ("pair", "dense8", "pair")):
        operands = _pe_operands(tiles.sparse[tile], tiles.dense, kind)
        for loads in (False, True):
            stimulus = bench.stimulus(len(operands["a"]))
            stimulus.set("pair", int(kind == "pair"))
            for port, values in operands.items():
                stimulus.set(port, values)
            if not loads:
                stimulus.set("load", 0)
                stimulus.set("load", 1, 0)
            energies[name + ("_loads" if loads else "")] = _whole(bench.run(stimulus, 10)[0])
            if loads:
                share = operands["load"].mean()
    energies["load"] = max(0.0, (energies["fp16_loads"] - energies["fp16"]) / share)
    return {name: energies[name] for name in ("idle", "fp16", "pair", "load")}


# Core.


def _beats(config: ChipConfig, *, buffer: Buffer, bits: NDArray, codes: NDArray) -> list[int]:
    """Values of a fill port that write rows of elements (of the mask store: bits), a beat each."""
    layout = buffer_write(config)
    words = []
    for row in range(len(bits)):
        for column in range(0, bits.shape[1], config.beat):
            part, code = bits[row, column : column + config.beat], codes[row, column : column + config.beat]
            fields = {"valid": 1, "cores": 1, "buffer": buffer.value, "row": row, "column": column}
            if buffer is Buffer.MASK:
                fields["mask"] = sum(int(x) << i for i, x in enumerate(part))
            else:
                fields["beat"] = sum(int(x) << 16 * i for i, x in enumerate(part))
                fields["beat"] |= sum(int(x) << (16 * config.beat + 2 * i) for i, x in enumerate(code))
            words.append(sum(x << layout[name].offset for name, x in fields.items()))
    return words


def _set_wide(stimulus: Stimulus, port: str, cycle: int, value: int, width: int) -> None:
    for bit in range(0, width, 64):
        stimulus.set(port, value >> bit & (1 << 64) - 1, slice(cycle, cycle + 1), bit)


def _core_stimulus(
    bench: Bench, tile: Tile, tiles: Tiles, cycles: int, commands: int, *, masked: bool = False
) -> tuple[Stimulus, int]:
    """Fills the buffers, then multiplies: three taps over 4x8 pixels, then onto these sums again; when it starts.

    `masked`: every other lane is.
    """
    sparse = _beats(SLICE, buffer=Buffer.SPARSE, bits=tile.bits, codes=tile.codes)
    dense = tiles.dense[:, : SLICE.lanes]
    resident = _beats(SLICE, buffer=Buffer.DENSE, bits=dense, codes=np.full(dense.shape, CODE_FP16))
    if masked:
        live = np.tile(np.arange(SLICE.lanes) % 2, (_ROWS * _PIXELS, 1))
        resident += _beats(SLICE, buffer=Buffer.MASK, bits=live, codes=live)
    begin = 4 + max(len(sparse), len(resident))
    stimulus = bench.stimulus(begin + cycles)
    stimulus.set("rst", 1, slice(0, 2))
    width = buffer_write(SLICE).size
    for port, words in (("fill_sparse", sparse), ("fill_dense", resident)):
        for cycle, word in enumerate(words, 2):
            _set_wide(stimulus, port, cycle, word, width)
    for number in range(commands):
        command = Command(
            Opcode.MULTIPLY, cores=1, lanes=SLICE.lanes, masked=int(masked), initialise=int(number == 0),
            count_n=1, count_h=_ROWS, count_w=_PIXELS, count_r=1, count_s=3, row=_HALO, row_h=_HALO, row_w=1, row_s=1,
            psum_h=_PIXELS, psum_w=1, dense_s=SLICE.depth, kmask=(1 << SLICE.depth) - 1,
        )  # fmt: skip
        at = begin + 4 * number
        _set_wide(stimulus, "command__payload", at, int.from_bytes(command.encode(), "little"), 512)
        stimulus.set("command__valid", 1, slice(at, at + 1))
    return stimulus, begin


def _events(outputs: dict[str, NDArray[np.uint8]], first: int) -> dict[str, NDArray[np.int64]]:
    bits = outputs["events"][first:].astype(np.int64)
    found = {}
    for name, place in core_events_layout():
        part = bits[:, place.offset : place.offset + place.width]
        found[name] = part @ (1 << np.arange(place.width))
    return found


def _cycles(tile: Tile) -> int:
    """Cycles that suffice for the visits of both commands."""
    total = 0
    for pixel in range(_ROWS * _PIXELS):
        for tap in range(3):
            codes = tile.codes[(pixel // _PIXELS + 1) * _HALO + pixel % _PIXELS + tap]
            narrow = codes == CODE_FP8
            total += max(1, int((codes == CODE_FP16).sum()) + int(max(narrow[::2].sum(), narrow[1::2].sum())))
    return 2 * total + 60


def measure_core(bench: Bench, tiles: Tiles, progress: Any = lambda text: None) -> dict[str, Any]:
    """Joules of a core of 4 lanes: `lane` is one lane (PE and rotation of dense rows), `core` what they share.

    Returns
    -------
    dict
        `idle`: a cycle in which the gate stops the clock. `clock`: a cycle with the clock. The others come on top of
        that: `visit`; `fp16`: an FP16 element issued; `pair`: a cycle with FP8 elements; `fp16_masked`, `pair_masked`:
        the same for a lane that is masked; `fill`: an element written into a buffer. `checked`: for tiles with zeros,
        cycles, visits, elements, and the energy found and put together from these.
    """
    found: dict[str, dict[str, float]] = {}
    idle = bench.stimulus(300)
    idle.set("rst", 1, slice(0, 2))
    found["idle"] = _parts(bench.run(idle, 100)[0])
    idle.set("psum_request__valid", 1)  # the same row of partial sums again and again: nothing moves but the clock
    found["clock"] = _parts(bench.run(idle, 100)[0])
    fill, begin = _core_stimulus(bench, tiles.sparse["fgmp"], tiles, 1, 0)
    count = {"fill": tiles.sparse["fgmp"].bits.size, "fill_dense": tiles.dense[:, : SLICE.lanes].size}
    runs: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    energies = _parts(bench.run(fill, 2)[0])
    # All cycles but three have beats, so that the clock runs.
    base = {part: found["clock"][part] * (begin - 4) + found["idle"][part] * 3 for part in energies}
    both = {part: (energies[part] * (begin - 1) - base[part]) / sum(count.values()) for part in energies}
    found["fill"] = both
    for name in ("dense16", "dense8", "fgmp", "fp16", "error", "zero", "dense16_masked", "dense8_masked"):
        progress(f"core: {name}")
        tile = tiles.sparse[name.removesuffix("_masked")]
        cycles = _cycles(tile)
        stimulus, begin = _core_stimulus(bench, tile, tiles, cycles, 2, masked=name.endswith("_masked"))
        used, outputs = bench.run(stimulus, begin)
        events = _events(outputs, begin)
        if outputs["busy"][-1].any():
            raise RuntimeError(f"the core is still busy after {cycles} cycles of workload {name}")
        n16, n8 = (int(events[which].sum()) // SLICE.lanes for which in ("mac16", "mac8"))
        pairs = int((events["mac8"] > 0).sum())
        counts: dict[str, float] = {
            "cycles": float(cycles),
            "clocked": float(events["busy"].sum() + 1),  # it takes a cycle to take the first command
            "visit": float(events["visit"].sum()),
            "fp16": float(n16),
            "pair": float(pairs),
        }
        runs[name] = _parts(used), counts | {"fp8": float(n8)}
    for name, source in (
        ("visit", "zero"), ("fp16", "dense16"), ("pair", "dense8"),
        ("fp16_masked", "dense16_masked"), ("pair_masked", "dense8_masked"),
    ):  # fmt: skip
        energy, counts = runs[source]
        number = counts[name.removesuffix("_masked")]
        found[name] = {
            part: (energy[part] * counts["cycles"] - _base(found, counts, part)) / number
            - (found["visit"][part] * counts["visit"] / number if name != "visit" else 0.0)
            for part in energy
        }
    for name in ("fp16", "pair"):  # a lane of those workloads was the mean of one that is masked and one that is not
        found[f"{name}_masked"]["lane"] = 2 * found[f"{name}_masked"]["lane"] - found[name]["lane"]
    checked = {}
    for name in ("fgmp", "fp16", "error"):
        energy, counts = runs[name]
        model = sum(
            scale * (_base(found, counts, part) + sum(found[e][part] * counts[e] for e in ("visit", "fp16", "pair")))
            for part, scale in (("core", 1), ("lane", SLICE.lanes))
        )
        measured = (energy["core"] + SLICE.lanes * energy["lane"]) * counts["cycles"]
        checked[name] = counts | {"measured": measured, "modelled": model}
    return found | {"checked": checked}


def _base(found: Mapping[str, dict[str, float]], counts: Mapping[str, float], part: str) -> float:
    """Joules of a part of the core in a workload if its clock were all that moves."""
    return found["clock"][part] * counts["clocked"] + found["idle"][part] * (counts["cycles"] - counts["clocked"])


def _parts(energies: Mapping[str, Energy]) -> dict[str, float]:
    """Joules of the shared part, and of a lane."""
    lane = sum(energies[name].total for name in ("pe", "dense") if name in energies) / SLICE.lanes
    shared = sum(one.total for name, one in energies.items() if name not in ("pe", "dense"))
    return {"core": shared, "lane": lane}


# Encoder and decoder.

_KINDS = {"zero": "zero", "fp8": "dense8", "fp16": "dense16"}
_BLOCKS = 24


def measure_coding(encoder: Bench, decoder: Bench, tiles: Tiles) -> dict[str, float]:
    """Joules an element above the clock, `encoded_zero` to `decoded_fp16`; and of an idle cycle, `encoded_idle` ..."""
    found: dict[str, float] = {}
    for name, bench, drive, expected in (
        ("encoded", encoder, _encode, _encoded_words),
        ("decoded", decoder, _decode, _decoded_beats),
    ):
        idle = bench.stimulus(200)
        idle.set("rst", 1, slice(0, 2))
        found[f"{name}_idle"] = _whole(bench.run(idle, 100)[0])
        for kind, source in _KINDS.items():
            bits, codes = (part[:_BLOCKS] for part in tiles.blocks[source])
            stimulus = drive(bench, bits, codes, kind)
            cycles = len(stimulus.bits) - 4
            energies, outputs = bench.run(stimulus, 4)
            if _taken(outputs) != [word for block in expected(bits, codes) for word in block]:
                raise RuntimeError(f"the gates' {bench.netlist.top} gives something else than the golden model: {kind}")
            used = _whole(energies)
            found[f"{name}_{kind}"] = (used - found[f"{name}_idle"]) * cycles / bits.size
    return found


def _encode(bench: Bench, bits: NDArray, codes: NDArray, kind: str) -> Stimulus:
    """A beat a cycle and room for a block's words after it; every block starts in a word of its own."""
    beat = TINY.beat
    period = 64 // beat + 20
    stimulus = bench.stimulus(4 + period * len(bits) + 60)
    stimulus.set("rst", 1, slice(0, 2))
    stimulus.set("o__ready", 1)
    stimulus.set("sizes__ready", 1)
    stimulus.set("hi", 0x7BFF if kind == "fp8" else 0)
    stimulus.set("above", int(kind == "fp8"))
    word_bytes = TINY.axi_bits // 8
    for number, (block, code) in enumerate(zip(bits, codes, strict=True)):
        for beat_number in range(64 // beat):
            at = 4 + number * period + beat_number
            value = sum(int(x) << 16 * i for i, x in enumerate(block[beat * beat_number : beat * (beat_number + 1)]))
            stimulus.set("i__payload", value, slice(at, at + 1))
            stimulus.set("i__valid", 1, slice(at, at + 1))
        raw = encode_block(block.tolist(), code.tolist())
        payload = raw[0] & 3
        head = 1 + (8 if payload == 1 else 0)
        place = {"start": 0, "payload": head, "words": -(-len(raw) // word_bytes), "flush": 1}
        layout = block_place(TINY)
        at = 4 + number * period + 64 // beat + 3
        stimulus.set("places__payload", sum(x << layout[name].offset for name, x in place.items()), slice(at, at + 1))
        stimulus.set("places__valid", 1, slice(at, at + 1))
    return stimulus


def _taken(outputs: Mapping[str, NDArray[np.uint8]]) -> list[int]:
    """What left on the stream `o`."""
    valid = outputs["o__valid"][:, 0].astype(bool)
    return [
        int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in outputs["o__payload"][valid]
    ]


def _encoded_words(bits: NDArray, codes: NDArray) -> list[list[int]]:
    """Words of every block."""
    size = TINY.axi_bits // 8
    blocks = [encode_block(block.tolist(), code.tolist()) for block, code in zip(bits, codes, strict=True)]
    return [[int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size)] for raw in blocks]


def _decoded_beats(bits: NDArray, codes: NDArray) -> list[list[int]]:
    """Beats of every block: patterns, then codes."""
    beat = TINY.beat
    return [
        [
            sum(int(x) << 16 * i for i, x in enumerate(block[at : at + beat]))
            | sum(int(x) << (16 * beat + 2 * i) for i, x in enumerate(code[at : at + beat]))
            for at in range(0, len(block), beat)
        ]
        for block, code in zip(bits, codes, strict=True)
    ]


def _decode(bench: Bench, bits: NDArray, codes: NDArray, kind: str) -> Stimulus:
    """Words of one block, then time for its beats."""
    layout, word_bytes = decoder_input(TINY), TINY.axi_bits // 8
    period = 40
    stimulus = bench.stimulus(4 + period * len(bits) + 60)
    stimulus.set("rst", 1, slice(0, 2))
    stimulus.set("o__ready", 1)
    for number, (block, code) in enumerate(zip(bits, codes, strict=True)):
        raw = encode_block(block.tolist(), code.tolist())
        words = -(-len(raw) // word_bytes)
        for index in range(words):
            at = 4 + number * period + index
            part = int.from_bytes(raw[index * word_bytes : (index + 1) * word_bytes], "little")
            fields = {"data": part, "last": int(index == words - 1), "length": len(raw)}
            _set_wide(
                stimulus, "i__payload", at, sum(x << layout[name].offset for name, x in fields.items()), layout.size
            )
            stimulus.set("i__valid", 1, slice(at, at + 1))
    return stimulus


def coding_benches(liberty: Liberty, folder: Path) -> tuple[Bench, Bench]:
    """Encoder and decoder of `tiny`: beats of 4, words of 64 bits."""
    return Bench.of(Encoder(config=TINY), liberty, folder), Bench.of(Decoder(config=TINY), liberty, folder)


def pe_bench(liberty: Liberty, folder: Path) -> Bench:
    return Bench.of(Pe(acc_bits=SLICE.acc_bits), liberty, folder)


def core_bench(liberty: Liberty, folder: Path) -> Bench:
    return Bench.of(GatedCore(config=SLICE), liberty, folder, parts=True)
