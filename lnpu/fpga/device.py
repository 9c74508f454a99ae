"""The ECP5 family: what a device has, and whether a design fits."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DEVICES", "Device", "DoesNotFitError", "get_device", "resources_of"]


class DoesNotFitError(ValueError):
    """The design takes more of a resource than the device has; the message names each and how much."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """An ECP5. Counts are those of the family's data sheet (Lattice FPGA-DS-02012), as nextpnr's database has them.

    Parameters
    ----------
    name : str
        Lattice's part.
    flag : str
        nextpnr-ecp5's option.
    luts, ffs : int
        Look-up tables of four inputs; flip-flops.
    block_rams : int
        Block RAMs of 18 Kbit (DP16KD).
    multipliers : int
        Multipliers of 18 x 18 bits (MULT18X18D).
    packages : tuple of str
        Packages that nextpnr knows for it.
    """

    name: str
    flag: str
    luts: int
    ffs: int
    block_rams: int
    multipliers: int
    packages: tuple[str, ...]

    @property
    def resources(self) -> dict[str, int]:
        """Number of each resource, under the names of `resources_of`."""
        return {
            "LUT4": self.luts,
            "flip-flops": self.ffs,
            "block RAMs": self.block_rams,
            "multipliers": self.multipliers,
        }

    def check(self, used: Mapping[str, int]) -> None:
        """Raise `DoesNotFitError` if more of a resource is used than there is."""
        self.refuse({name: (used[name], there) for name, there in self.resources.items()})

    def refuse(self, sites: Mapping[str, tuple[int, int]]) -> None:
        """Raise `DoesNotFitError` if of anything more is used (first) than there is (second)."""
        over = [
            f"{used:,} {name}, {used - there:,} more than its {there:,}"
            for name, (used, there) in sites.items()
            if used > there
        ]
        if over:
            raise DoesNotFitError(f"the design does not fit a {self.name}: it takes {'; '.join(over)}")


_SMALL = ("CABGA256", "CSFBGA285", "CABGA381")
DEVICES = {
    "25k": Device(
        name="LFE5U-25F", flag="--25k", luts=24288, ffs=24288, block_rams=56, multipliers=28, packages=_SMALL
    ),
    "45k": Device(
        name="LFE5U-45F", flag="--45k", luts=43848, ffs=43848, block_rams=108, multipliers=72,
        packages=(*_SMALL, "CABGA554"),
    ),
    "85k": Device(
        name="LFE5U-85F", flag="--85k", luts=83640, ffs=83640, block_rams=208, multipliers=156,
        packages=("CSFBGA285", "CABGA381", "CABGA554", "CABGA756"),
    ),
}  # fmt: skip
"""Devices by the name of the command line."""


def get_device(name: str) -> Device:
    """The named device; `ValueError` lists the names if there is none."""
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    return DEVICES[name]


def resources_of(cells: Mapping[str, int]) -> dict[str, int]:
    """What mapped cells take of a device's resources.

    A CCU2C (two bits of a carry chain) takes two LUTs; a distributed RAM of 16 x 4 bits takes four, and two more for
    its write port.
    """
    return {
        "LUT4": cells.get("LUT4", 0) + 2 * cells.get("CCU2C", 0) + 6 * cells.get("TRELLIS_DPR16X4", 0),
        "flip-flops": cells.get("TRELLIS_FF", 0),
        "block RAMs": cells.get("DP16KD", 0),
        "multipliers": cells.get("MULT18X18D", 0),
    }
