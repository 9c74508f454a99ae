"""The one configuration object of the chip, and its named instances."""

from dataclasses import dataclass, fields, replace

from lnpu.formats import BLOCK, psum_layout

__all__ = ["CONFIGS", "EDGE", "PAPER", "TINY", "ChipConfig", "get_config"]


def _check(name: str, value: int, allowed: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class ChipConfig:
    """Every count and width of a chip.

    Parameters
    ----------
    name : str
        Name in reports.
    cores : int
        DL cores, 1 to 16.
    lanes : int
        PEs in a core's line, each with an accumulator of its own: one FP16 or two FP8 products a cycle. A multiple of
        `beat`, at most 128.
    beat : int
        Elements a cycle on the element streams (decoder, buffers' write ports, vector memory, encoder), and lanes of
        the vector unit: 4, 8 or 16.
    axi_bits : int
        Data width of the AXI4 master: 64, 128 or 256, and at most 32 * beat.
    address_bits : int
        Width of the AXI4 master's byte address, 32 to 40.
    rows : int
        Rows of a page of the sparse buffer (each core has two pages), a multiple of `beat` from 16 to 1024.
    depth : int
        Elements in a row of the sparse buffer, which is the width of the zero-skip masks: a multiple of `beat` from
        16 to 128.
    dense_rows : int
        Rows of a page of the dense buffer (each core has two pages), a multiple of `beat`, `depth` or more, up to
        2048.
    dense_banks : int
        Banks that they are spread over, 2 or 4: the rows of two FP8 elements of a cycle are in different banks.
    buffer_registers : bool
        Registers behind the block RAMs of the cores' buffers, where these are slow (FPGAs): a MULTIPLY takes two cycles
        more.
    psum_rows : int
        Rows of the exact partial-sum store of a core, 16 to 2048.
    acc_bits : int
        Accumulator width: two's complement with an LSB of 2^-48. 81 + t bits hold any 2^t products exactly; 84 to 128.
    vmem_rows : int
        Rows (of `beat` FP32 elements) of the vector memory, 256 to 65536.
    vmem_banks : int
        Banks that they are spread over, 4 or 8: each has a read and a write a cycle.
    sum_rows : int
        Rows (of `beat` channels) of the vector unit's exact accumulators, 2 to 1024.
    reads_in_flight, writes_in_flight : int
        AXI bursts outstanding in each direction, 1 to 64.
    burst_beats : int
        Longest AXI burst, a power of two from 4 to 256.
    tensor_states : int
        Entries of the FGMP controller's table, 2 to 256: tensors 1 to tensor_states - 1 can have a dynamic state.
    """

    name: str = "custom"
    cores: int = 2
    lanes: int = 8
    beat: int = 4
    axi_bits: int = 64
    address_bits: int = 40
    rows: int = 64
    depth: int = 64
    dense_rows: int = 256
    dense_banks: int = 4
    buffer_registers: bool = False
    psum_rows: int = 64
    acc_bits: int = 97
    vmem_rows: int = 4096
    vmem_banks: int = 4
    sum_rows: int = 128
    reads_in_flight: int = 8
    writes_in_flight: int = 8
    burst_beats: int = 16
    tensor_states: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind:
                raise ValueError(f"{field.name} must be of type {kind.__name__}, not {value!r}")
        _check("cores", self.cores, "1 to 16", 1 <= self.cores <= 16)
        _check("beat", self.beat, "4, 8 or 16", self.beat in (4, 8, 16))
        _check(
            "lanes",
            self.lanes,
            f"a multiple of beat ({self.beat}) up to 128",
            self.beat <= self.lanes <= 128 and self.lanes % self.beat == 0,
        )
        _check(
            "axi_bits",
            self.axi_bits,
            f"64, 128 or 256 and at most 32 * beat ({32 * self.beat})",
            self.axi_bits in (64, 128, 256) and self.axi_bits <= 32 * self.beat,
        )
        _check("address_bits", self.address_bits, "32 to 40", 32 <= self.address_bits <= 40)
        for name, low, high in (
            ("rows", 16, 1024),
            ("depth", 16, 128),
            ("dense_rows", self.depth, 2048),
        ):
            value = getattr(self, name)
            _check(
                name,
                value,
                f"a multiple of beat ({self.beat}) from {low} to {high}",
                low <= value <= high and value % self.beat == 0,
            )
        for name, low, high in (
            ("psum_rows", 16, 2048),
            ("acc_bits", 84, 128),
            ("vmem_rows", 256, 65536),
            ("sum_rows", 2, 1024),
            ("reads_in_flight", 1, 64),
            ("writes_in_flight", 1, 64),
            ("tensor_states", 2, 256),
        ):
            value = getattr(self, name)
            _check(name, value, f"{low} to {high}", low <= value <= high)
        _check("dense_banks", self.dense_banks, "2 or 4", self.dense_banks in (2, 4))
        _check("vmem_banks", self.vmem_banks, "4 or 8", self.vmem_banks in (4, 8))
        _check(
            "burst_beats",
            self.burst_beats,
            "a power of two from 4 to 256",
            self.burst_beats in (4, 8, 16, 32, 64, 128, 256),
        )

    @property
    def macs_fp16(self) -> int:
        """FP16 multiply-accumulates a cycle at peak."""
        return self.cores * self.lanes

    def ideal_cycles(self, fp16: float, fp8: float) -> float:
        """Cycles that so many products take at peak: one FP16 or two FP8 a PE and cycle."""
        return (fp16 + fp8 / 2) / self.macs_fp16

    @property
    def max_terms(self) -> int:
        """Longest reduction that the accumulator holds exactly, whatever the operands."""
        return 1 << (self.acc_bits - 81)

    @property
    def sram_bytes(self) -> float:
        """On-chip SRAM: buffers, masks and sums of the cores, vector memory, exact accumulators, FGMP states."""
        element, psum = 16 + 2, psum_layout(self.acc_bits).size
        core = (
            2 * self.rows * self.depth * element
            + 2 * self.dense_rows * self.lanes * (16 + 1)
            + self.psum_rows * self.lanes * psum
            + 2 * self.psum_rows * (self.lanes + self.lanes // self.beat)
        )
        states = 2 * 38 * self.tensor_states
        vector = self.vmem_rows * self.beat * 32 + self.sum_rows * self.beat * psum
        return (self.cores * core + vector + states) / 8

    @property
    def block_beats(self) -> int:
        """Element beats in an encoded block."""
        return BLOCK // self.beat

    def replace(self, **changes) -> "ChipConfig":
        """A copy with some fields changed (validated again)."""
        unknown = set(changes) - {field.name for field in fields(self)}
        if unknown:
            raise TypeError(f"no such field: {', '.join(sorted(unknown))}")
        return replace(self, **changes)


TINY = ChipConfig(name="tiny")
"""Unit tests and CI: 16 FP16 MACs a cycle."""

EDGE = ChipConfig(
    name="edge", cores=1, lanes=8, address_bits=32, dense_rows=512, dense_banks=2, buffer_registers=True,
    psum_rows=512, vmem_rows=4096, sum_rows=512,
)  # fmt: skip
"""For an ECP5-85k: 8 FP16 MACs a cycle in one core, 4 GiB of memory. Block RAMs have 512 words of 36 bits, so rows of
sums are 512, and four banks of dense rows would take twice as many of them as two."""

PAPER = ChipConfig(
    name="paper",
    cores=12,
    lanes=64,
    beat=16,
    axi_bits=256,
    rows=128,
    dense_rows=192,
    psum_rows=64,
    vmem_rows=4688,
    vmem_banks=8,
    sum_rows=64,
    reads_in_flight=16,
    writes_in_flight=16,
    burst_beats=32,
)
"""768 FP16 MACs a cycle."""

CONFIGS = {config.name: config for config in (TINY, EDGE, PAPER)}


def get_config(name: str) -> ChipConfig:
    """The named configuration; `ValueError` lists the names if there is none."""
    if name not in CONFIGS:
        raise ValueError(f"configuration must be one of {', '.join(CONFIGS)}, not {name!r}")
    return CONFIGS[name]
