"""Energy of a netlist from the changes of its nets and the library's power tables.

A change of a net costs 1/2 C V^2, C being the capacitances of the input pins on it: there are no wires. A change of a
cell's output costs its internal energy besides, at one transition time for all inputs and at the net's load; where the
library tells the inputs apart that cause it, they are weighted by their own changes. A change of an input pin costs its
own internal energy, if the library has one: that of the clock pin is most of what an idle flip-flop takes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from lnpu.energy.activity import Activity
from lnpu.energy.gates import Gates, Net
from lnpu.energy.tables import PowerTables

__all__ = ["SLEW", "Energy", "PowerModel"]

SLEW = 0.15e-9
"""Transition time of every input, in seconds."""


@dataclass
class Energy:
    """Joules a cycle, by cause.

    Attributes
    ----------
    switching : float
        Of the capacitances of input pins.
    internal : float
        Within cells.
    clock : float
        Both, of the clock's net and clock pins. There is no clock tree.
    """

    switching: float = 0.0
    internal: float = 0.0
    clock: float = 0.0

    @property
    def total(self) -> float:
        """All three, in joules a cycle."""
        return self.switching + self.internal + self.clock


class PowerModel:
    """Works out what a change of each net costs, once for a netlist.

    Parameters
    ----------
    gates : Gates
    tables : PowerTables
    group : function
        Name of the group of cells that a cell's energy counts for, from the cell's name. A net's switching energy
        counts for the groups of the pins on it.
    slew : float
        Transition time of every input, in seconds.
    """

    def __init__(
        self, gates: Gates, tables: PowerTables, group: Callable[[str], str] = lambda name: "all", slew: float = SLEW
    ) -> None:
        self._clock = gates.clock
        liberty = tables.liberty
        square = 0.5 * liberty.voltage**2
        loads: dict[Net, float] = defaultdict(float)
        for cell in gates.cells:
            for pin, capacitance in tables[cell.type].capacitances.items():
                if pin in cell.pins:
                    loads[cell.pins[pin][0]] += capacitance
        self.loads = dict(loads)
        """Capacitance of the input pins on each net, in farads."""
        self.clocked = sum(gates.clock in nets for cell in gates.cells for nets in cell.pins.values())
        """Cells on the clock's net: flip-flops."""
        self.leakage: dict[str, float] = defaultdict(float)
        """Watts, by group."""
        # Of each cell: its group, joules a change of nets, and of outputs by what causes them.
        self._cells: list[tuple[str, list[tuple[Net, float, float]], list[tuple[Net, list[tuple[Net, float]]]]]] = []
        scaled = slew / liberty.time_unit
        for cell in gates.cells:
            power, name = tables[cell.type], group(cell.name)
            self.leakage[name] += power.leakage
            inputs: dict[Net, list[float]] = defaultdict(lambda: [0.0, 0.0])
            outputs: dict[Net, list[tuple[Net, float]]] = defaultdict(list)
            for pin, capacitance in power.capacitances.items():
                if pin in cell.pins:
                    inputs[cell.pins[pin][0]][0] += square * capacitance
            for arc in power.arcs:
                if arc.pin not in cell.pins:
                    continue
                net = cell.pins[arc.pin][0]
                load = loads[net] / liberty.capacitance_unit if arc.pin in power.outputs else 0.0
                energy = arc.energy(scaled, load)
                if arc.pin in power.outputs and arc.related in cell.pins:
                    outputs[net].append((cell.pins[arc.related][0], energy))
                else:
                    inputs[net][1] += energy
            self._cells.append((name, [(net, both[0], both[1]) for net, both in inputs.items()], list(outputs.items())))

    def energy(self, activity: Activity) -> dict[str, Energy]:
        """Energy a cycle, by group of cells."""
        found: dict[str, Energy] = defaultdict(Energy)
        count = activity.toggles
        for name, inputs, outputs in self._cells:
            one = found[name]
            for net, switching, internal in inputs:
                times = count.get(net, 0) if isinstance(net, int) else 0
                if net == self._clock:
                    one.clock += times * (switching + internal)
                else:
                    one.switching += times * switching
                    one.internal += times * internal
            for net, causes in outputs:
                times = count.get(net, 0) if isinstance(net, int) else 0
                if times:
                    weights = [count.get(cause, 0) if isinstance(cause, int) else 0 for cause, _ in causes]
                    whole = sum(weights)
                    if whole:
                        mean = sum(w * energy for w, (_, energy) in zip(weights, causes, strict=True)) / whole
                    else:
                        mean = sum(energy for _, energy in causes) / len(causes)
                    one.internal += times * mean
        for one in found.values():
            one.switching /= activity.cycles
            one.internal /= activity.cycles
            one.clock /= activity.cycles
        return dict(found)
