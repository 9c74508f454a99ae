"""Buffers: no net of a netlist drives more than so many pins, and every output port has a net of its own."""

from typing import Any

from lnpu.synth.liberty import Liberty

__all__ = ["limit_fanout"]

Json = dict[str, Any]

_PORT_PINS = 4


def limit_fanout(module: Json, liberty: Liberty, limit: int) -> int:
    """Put trees of buffers behind every net that drives more than `limit` pins; clocks stay as they are.

    Output ports that share a net with another port get a buffer each: timing analysers refuse or mistake aliases.

    Ports of blocks and SRAM macros count as one pin each, and so do output ports of the module. For this to hold, an
    input port that drives more than `_PORT_PINS` pins gets a buffer: a net to many blocks is no load of their insides.

    Parameters
    ----------
    module : dict
        A module in the JSON format of Yosys' `write_json`; it is changed.
    liberty : Liberty
        The library, whose `buffer` is used.
    limit : int
        At least 2.

    Returns
    -------
    int
        Buffers added.
    """
    if limit < 2:
        raise ValueError(f"limit must be at least 2, not {limit!r}")
    sinks: dict[int, list[tuple[list[Any], int]]] = {}
    top = 0

    def collect(bits: list[Any], reads: bool) -> None:
        nonlocal top
        for index, bit in enumerate(bits):
            if isinstance(bit, int):
                top = max(top, bit)
                if reads:
                    sinks.setdefault(bit, []).append((bits, index))

    clock = set(module["ports"].get("clk", {"bits": []})["bits"])
    for cell in module["cells"].values():
        clock.update(cell["connections"].get(liberty.clocks.get(cell["type"], ""), []))
        for pin, bits in cell["connections"].items():
            collect(bits, cell["port_directions"][pin] == "input")
    for port in module["ports"].values():
        collect(port["bits"], port["direction"] == "output")
    for names in module.get("netnames", {}).values():  # also of nets that nothing is connected to
        collect(names["bits"], reads=False)
    name, source, target = liberty.buffer
    added = 0

    def buffer(bit: int) -> tuple[list[Any], int]:
        nonlocal top, added
        top += 1
        wire = [bit]
        module["cells"][f"_fanout_{added}_"] = {
            "hide_name": 0,
            "type": name,
            "parameters": {},
            "attributes": {},
            "port_directions": {source: "input", target: "output"},
            "connections": {source: wire, target: [top]},
        }
        added += 1
        return wire, top

    inputs = {bit for port in module["ports"].values() if port["direction"] == "input" for bit in port["bits"]}
    taken = set(inputs)
    for port in module["ports"].values():
        if port["direction"] != "output":
            continue
        for index, bit in enumerate(port["bits"]):
            if bit in taken and isinstance(bit, int):
                wire, port["bits"][index] = buffer(bit)
                sinks[bit] = [pin for pin in sinks[bit] if pin[0] is not port["bits"] or pin[1] != index] + [(wire, 0)]
            taken.add(bit)
    for bit, pins in sinks.items():
        if bit in clock:
            continue
        while len(pins) > (min(limit, _PORT_PINS) if bit in inputs else limit):
            level: list[tuple[list[Any], int]] = []
            for start in range(0, len(pins), limit):
                wire, driven = buffer(bit)
                for bits, index in pins[start : start + limit]:
                    bits[index] = driven
                level.append((wire, 0))
            pins = level
    for label, port in module["ports"].items():
        if label in module.get("netnames", {}):
            module["netnames"][label]["bits"] = [*port["bits"]]
    return added
