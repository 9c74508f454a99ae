"""What a Liberty file says of the energy of its cells: pin capacitances, internal power tables, leakage."""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lnpu.synth.liberty import Liberty, LibertyError

__all__ = ["Arc", "CellPower", "PowerTables"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.|\\\n)*"|[A-Za-z0-9_.+\-*/!&|^\'\[\]]+|[(){}:;,]')
_WATTS = {"w": 1.0, "mw": 1e-3, "uw": 1e-6, "nw": 1e-9, "pw": 1e-12, "fw": 1e-15}
_TRANSITIONS = ("input_transition_time", "input_net_transition")


@dataclass
class _Group:
    """`kind (names) { attributes, groups }`."""

    kind: str
    names: list[str]
    values: dict[str, list[str]]
    groups: list["_Group"]

    def all(self, kind: str) -> list["_Group"]:
        return [group for group in self.groups if group.kind == kind]

    def number(self, name: str) -> float | None:
        return float(self.values[name][0]) if name in self.values else None


def _parse(tokens: list[str], at: int, group: _Group) -> int:
    """Read what is between the braces of a group; the place behind the closing one."""
    while at < len(tokens) and tokens[at] != "}":
        name = tokens[at]
        if name == ";":
            at += 1
            continue
        values = []
        if tokens[at + 1] == ":":
            at += 2
            while tokens[at] not in (";", "}"):
                values.append(tokens[at].strip('"'))
                at += 1
        elif tokens[at + 1] == "(":
            at += 2
            while tokens[at] != ")":
                if tokens[at] != ",":
                    values.append(tokens[at].strip('"'))
                at += 1
            at += 1
            if at < len(tokens) and tokens[at] == "{":
                inner = _Group(name, values, {}, [])
                at = _parse(tokens, at + 1, inner)
                group.groups.append(inner)
                continue
        else:
            raise LibertyError(f"unexpected {tokens[at + 1]!r} after {name!r}")
        group.values[name] = values
    return at + 1


@dataclass(frozen=True)
class Table:
    """An energy (in joules) by the transition time of the input (in library units), and by the load (likewise)."""

    slews: NDArray[np.float64]
    loads: NDArray[np.float64]
    energy: NDArray[np.float64]

    def at(self, slew: float, load: float) -> float:
        """Bilinear, with the outermost cells of the table beyond its edges."""

        def place(axis: NDArray[np.float64], value: float) -> tuple[int, float]:
            if len(axis) < 2:
                return 0, 0.0
            i = int(np.clip(np.searchsorted(axis, value) - 1, 0, len(axis) - 2))
            return i, (value - axis[i]) / (axis[i + 1] - axis[i])

        (i, u), (j, v) = place(self.slews, slew), place(self.loads, load)
        near = self.energy[i : i + 2, j : j + 2]
        rows = near @ (np.array([1 - v, v]) if near.shape[1] == 2 else np.ones(1))
        return float(rows @ (np.array([1 - u, u]) if len(rows) == 2 else np.ones(1)))


@dataclass(frozen=True)
class Arc:
    """Internal energy of a change of a pin: `related` is the input that causes it, or "" (an input's own energy)."""

    pin: str
    related: str
    tables: tuple[Table, ...]

    def energy(self, slew: float, load: float) -> float:
        """Joules a change: the mean of rising and falling, and of the conditions (`when`) in which tables differ."""
        return sum(table.at(slew, load) for table in self.tables) / len(self.tables)


@dataclass(frozen=True)
class CellPower:
    """A cell: capacitance of its input pins (F), its arcs, its leakage (W), and its outputs."""

    capacitances: dict[str, float]
    arcs: tuple[Arc, ...]
    leakage: float
    outputs: tuple[str, ...]


class PowerTables:
    """The power tables of a library's cells, read when they are asked for.

    Internal energies are in units of the capacitance unit times the square of the voltage unit; leakage in
    `leakage_power_unit`. Both are read from the file.

    Raises
    ------
    LibertyError
        If units are missing, or a cell is unknown.
    """

    def __init__(self, liberty: Liberty) -> None:
        self.liberty = liberty
        volts = re.search(r'\bvoltage_unit\s*:\s*"?\s*([\d.]+)\s*(mV|V)', liberty.text)
        watts = re.search(r'\bleakage_power_unit\s*:\s*"?\s*([\d.]+)\s*([a-zA-Z]+)', liberty.text)
        if volts is None or watts is None or watts[2].lower() not in _WATTS:
            raise LibertyError(f"{liberty.path}: energies need voltage_unit and leakage_power_unit")
        self.energy_unit = liberty.capacitance_unit * (float(volts[1]) * (1e-3 if volts[2] == "mV" else 1)) ** 2
        self.leakage_unit = float(watts[1]) * _WATTS[watts[2].lower()]
        self._cells: dict[str, CellPower] = {}

    @cached_property
    def _templates(self) -> dict[str, list[str]]:
        """Names of the variables of each template."""
        found = {}
        for match in re.finditer(
            r'\b(?:power_lut_template|lu_table_template)\s*\(\s*"?(\w+)"?\s*\)\s*\{(.*?)\}',
            self.liberty.text,
            re.DOTALL,
        ):
            found[match[1]] = re.findall(r'variable_\d\s*:\s*"?(\w+)"?', match[2])
        return found

    def __getitem__(self, cell: str) -> CellPower:
        if cell not in self._cells:
            self._cells[cell] = self._read(cell)
        return self._cells[cell]

    def _read(self, name: str) -> CellPower:
        text = self.liberty.text
        start = re.search(rf'\bcell\s*\(\s*"?{re.escape(name)}"?\s*\)\s*\{{', text)
        if start is None:
            raise LibertyError(f"{self.liberty.path}: no cell {name}")
        end = re.compile(r"\bcell\s*\(").search(text, start.end())
        cell = _Group("cell", [name], {}, [])
        tokens = _TOKEN.findall(text[start.end() : end.start() if end else len(text)].replace("\\\n", " "))
        _parse(tokens, 0, cell)
        capacitances, arcs, outputs = {}, [], []
        for pin in cell.all("pin"):
            pin_name, direction = pin.names[0], pin.values["direction"][0]
            if direction == "output":
                outputs.append(pin_name)
            else:
                capacitances[pin_name] = (pin.number("capacitance") or 0.0) * self.liberty.capacitance_unit
            by_related: dict[str, list[Table]] = {}
            for power in pin.all("internal_power"):
                related = power.values.get("related_pin", [""])[0].split()
                tables = [table for group in power.groups if (table := self._table(group))]
                for one in related or [""]:
                    by_related.setdefault(one, []).extend(tables)
            arcs += [Arc(pin_name, related, tuple(tables)) for related, tables in by_related.items() if tables]
        leakage = cell.number("cell_leakage_power")
        if leakage is None:
            states = [group.number("value") or 0.0 for group in cell.all("leakage_power")]
            leakage = sum(states) / len(states) if states else 0.0
        return CellPower(capacitances, tuple(arcs), leakage * self.leakage_unit, tuple(outputs))

    def _table(self, group: _Group) -> Table | None:
        if group.kind not in ("rise_power", "fall_power", "power") or "values" not in group.values:
            return None
        rows = [[float(x) for x in row.replace(",", " ").split()] for row in group.values["values"]]
        axes = {}
        names = self._templates.get(group.names[0] if group.names else "", [])
        for i, variable in enumerate(names, 1):
            if f"index_{i}" in group.values:
                text = " ".join(group.values[f"index_{i}"])
                axes[variable] = np.array([float(x) for x in text.replace(",", " ").split()])
        energy = np.array(rows, float) * self.energy_unit
        slew = next((axes[name] for name in _TRANSITIONS if name in axes), np.zeros(1))
        load = axes.get("total_output_net_capacitance", np.zeros(1))
        if names and names[0] not in _TRANSITIONS and energy.shape[0] == len(load):
            energy = energy.T
        return Table(slew, load, energy.reshape(len(slew), len(load)))
