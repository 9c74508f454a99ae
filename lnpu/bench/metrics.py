"""What the counters of an operation say about its speed."""

from collections.abc import Mapping
from dataclasses import dataclass

from lnpu.config import ChipConfig

__all__ = ["Metrics", "measure"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Speed of an operation.

    Attributes
    ----------
    macs : int
        Dense multiply-accumulates.
    products : int
        Products that were computed: of non-zero elements inside the image.
    cycles : int
        Of the whole operation, with loads, drains and stores.
    ideal : float
        Cycles that `products` take at the peak rate of their precision.
    utilisation : float
        `ideal` / `cycles`.
    cores : float
        `ideal` over the cycles in which a core was busy, on average.
    bus_read, bus_write, bus : float
        Words on the data channels of the bus a cycle, 0 to 1, and their sum, 0 to 2.
    intensity : float
        Products per byte on the bus.
    bound : float
        Roofline: cycles that products, reads or writes take at least, whichever are most.
    bound_by : str
        Which these are: "products", "reads" or "writes".
    of_roofline : float
        `bound` / `cycles`; where the bus bounds, the share of its busier channel that is used.
    """

    macs: int
    products: int
    cycles: int
    ideal: float
    utilisation: float
    cores: float
    bus_read: float
    bus_write: float
    bus: float
    intensity: float
    bound: float
    bound_by: str
    of_roofline: float


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def measure(config: ChipConfig, macs: int, counters: Mapping[str, int]) -> Metrics:
    """Metrics of an operation of `macs` dense multiply-accumulates, from the chip's counters."""
    cycles, read, write = (counters[name] for name in ("cycles", "read_beats", "write_beats"))
    products = counters["mac16"] + counters["mac8"]
    ideal = config.ideal_cycles(counters["mac16"], counters["mac8"])
    bound, bound_by = max((ideal, "products"), (read, "reads"), (write, "writes"), key=lambda roof: roof[0])
    return Metrics(
        macs=macs,
        products=products,
        cycles=cycles,
        ideal=ideal,
        utilisation=_ratio(ideal, cycles),
        cores=_ratio(ideal, counters["core_busy"] / config.cores),
        bus_read=_ratio(read, cycles),
        bus_write=_ratio(write, cycles),
        bus=_ratio(read + write, cycles),
        intensity=_ratio(products, (read + write) * config.axi_bits / 8),
        bound=bound,
        bound_by=bound_by,
        of_roofline=_ratio(bound, cycles),
    )
