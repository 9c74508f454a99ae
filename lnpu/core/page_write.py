"""Which of the two write ports of a core's buffers a page takes its beat from."""

from collections.abc import Sequence
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value

__all__ = ["page_write"]


def page_write(m: Module, ports: Sequence[Any], page: int, *fields: str) -> tuple[Value, list[Value]]:
    """Whether a beat is for this page, and `fields` (of `buffer_write`, dotted) of the first port that has one.

    Parameters
    ----------
    ports
        Two of `buffer_write(config)`.
    """
    mine = Signal(2, name=f"ports_{page}")
    m.d.comb += mine.eq(Cat(port.valid & (port.page == page) for port in ports))
    return mine.any(), [Mux(mine[0], *(_field(port, name) for port in ports)) for name in fields]


def _field(port: Any, name: str) -> Value:
    for part in name.split("."):
        port = getattr(port, part)
    return Value.cast(port)
