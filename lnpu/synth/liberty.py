"""Cell libraries in the Liberty format: where they are, and what is read of them here."""

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lnpu.toolchain import ToolError

__all__ = ["OSU018", "Latch", "Liberty", "LibertyError", "read_liberty"]

OSU018 = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
"""The default: the 0.18 um library of Oklahoma State University, as Debian packages it."""

_GROUP = re.compile(r'\bcell\s*\(\s*"?([^")\s]+)"?\s*\)\s*\{')
_BRACE = re.compile(r"[{}]")
_AREA = re.compile(r'\barea\s*:\s*"?([-+.\deE]+)"?')
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_LIBRARY = re.compile(r'\blibrary\s*\(\s*"?([^")\s]+)"?\s*\)\s*\{')
# A two-input NAND; not nand2b (an inverted input), nor a NAND3X2.
_NAND2 = re.compile(r"(?<![a-z])nand2(?![a-z]*b)", re.IGNORECASE)
_SPECIAL = re.compile(r"lpflow|dly|probe|lsbuf", re.IGNORECASE)
_PIN = re.compile(r'\bpin\s*\(\s*"?([^")\s]+)"?\s*\)\s*\{')
_STATE = re.compile(r"\b(?:ff|latch)\s*\(")
_CLOCKED = re.compile(r'\bclocked_on\s*:\s*"[!( ]*(\w+)')
_LATCH = re.compile(r'\blatch\s*\(\s*"?(\w+)[^)]*\)\s*\{([^}]*)\}')
_INPUT = re.compile(r'\b(data_in|enable)\s*:\s*"\(?(!?)\s*(\w+)\)?"')
_OUTPUT = re.compile(r'\bpin\s*\(\s*"?(\w+)"?\s*\)\s*\{(?:(?!\bpin\b).)*?\bfunction\s*:\s*"(\w+)"', re.DOTALL)
_FUNCTION = re.compile(r'\bfunction\s*:\s*"([^"]*)"')
_SECONDS = {"ns": 1e-9, "ps": 1e-12, "fs": 1e-15, "us": 1e-6}
_FARADS = {"ff": 1e-15, "pf": 1e-12, "nf": 1e-9}


class LibertyError(ValueError):
    """A file is not a cell library that this flow can use."""


@dataclass(frozen=True)
class Latch:
    """A latch: its pins, and whether it is transparent while the enable is low."""

    data: str
    enable: str
    low: bool
    output: str


@dataclass(frozen=True)
class Liberty:
    """A cell library.

    Attributes
    ----------
    path : Path
        The file it came from (.lib or .lib.gz).
    name : str
        What the library calls itself.
    text : str
        The library, without comments.
    areas : dict of str to float
        Area of each cell, in the library's unit: um2 in all libraries this flow was tried with.
    buffers : dict of str to (str, str)
        Cells that just drive: input pin and output pin.
    sequential : frozenset of str
        Flip-flops and latches.
    clocks : dict of str to str
        Clock pin of each flip-flop.
    latches : dict of str to Latch
        Latches without set and reset.
    time_unit, capacitance_unit : float
        In seconds and farads.
    voltage : float
        Nominal supply, in volts.
    """

    path: Path
    name: str
    text: str
    areas: dict[str, float]
    buffers: dict[str, tuple[str, str]]
    sequential: frozenset[str]
    clocks: dict[str, str]
    latches: dict[str, Latch]
    time_unit: float
    capacitance_unit: float
    voltage: float

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def nand2_area(self) -> float:
        """Area of the smallest two-input NAND: one gate equivalent (GE)."""
        areas = [area for cell, area in self.areas.items() if _NAND2.search(cell) and area > 0]
        if not areas:
            raise LibertyError(f"{self.path}: a gate equivalent needs a cell with nand2 in its name, and there is none")
        return min(areas)

    @cached_property
    def dont_use(self) -> tuple[str, ...]:
        """Cells that are no plain logic: for power domains, delay, or probing."""
        return tuple(cell for cell in self.areas if _SPECIAL.search(cell))

    @cached_property
    def buffer(self) -> tuple[str, str, str]:
        """Name, input and output pin of the second smallest buffer (the smallest drives little)."""
        special = set(self.dont_use)
        found = sorted((self.areas[cell], cell) for cell in self.buffers if cell not in special)
        if not found:
            raise LibertyError(f"{self.path}: no buffer, a cell whose one output has its one input as function")
        cell = found[min(1, len(found) - 1)][1]
        return (cell, *self.buffers[cell])

    @cached_property
    def latch(self) -> tuple[str, Latch]:
        """The smallest latch; one that is transparent while its enable is low, if there is one."""
        if not self.latches:
            raise LibertyError(f"{self.path}: a clock gate needs a latch without set and reset, and there is none")
        cell = min(self.latches, key=lambda name: (not self.latches[name].low, self.areas[name], name))
        return cell, self.latches[cell]

    def plain(self, folder: Path) -> Path:
        """The library as a file that is not compressed, which is what Yosys and OpenSTA read; made in `folder`."""
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.name)}-{self.digest[:8]}.lib"
        if not path.exists():
            from lnpu.results import write_whole

            write_whole(path, lambda part: part.write_text(self.text))
        return path.resolve()


def read_liberty(path: Path | str | None = None) -> Liberty:
    """Read a cell library.

    Parameters
    ----------
    path : path or None
        A Liberty file, .lib or .lib.gz (default: osu018).

    Raises
    ------
    ToolError
        If there is no path and osu018 is not installed; says which package has it.
    LibertyError
        If the file is not a cell library, or lacks units or areas.
    FileNotFoundError
        If there is no such file.
    """
    if path is None and not OSU018.exists():
        raise ToolError(f"no cell library: run `apt-get install qflow-tech-osu018` (it has {OSU018}), or name another")
    path = OSU018 if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no cell library {path}: a Liberty file is wanted, .lib or .lib.gz")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "strict")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise LibertyError(f"{path}: not a Liberty file, .lib or .lib.gz: {error}") from None
    text = _COMMENT.sub("", text)
    library = _LIBRARY.search(text)
    if library is None:
        raise LibertyError(f"{path}: not a Liberty file: no library ( ... ) {{ in it")
    areas, buffers, sequential, clocks, latches = {}, {}, set(), {}, {}
    for match in _GROUP.finditer(text):
        # The cell's own area is before its first inner group, or after one: not inside.
        outer, end = _outer(text, match.end(), path, match[1])
        area = _AREA.search(outer)
        if area is None:
            raise LibertyError(f"{path}: cell {match[1]} has no area")
        areas[match[1]] = float(area[1])
        body = text[match.end() : end]
        if _STATE.search(body):
            sequential.add(match[1])
        if clock := _CLOCKED.search(body):
            clocks[match[1]] = clock[1]
        if latch := _latch(body):
            latches[match[1]] = latch
        pins = _PIN.findall(body)
        functions = [function.strip("() ") for function in _FUNCTION.findall(body)]
        if len(pins) == 2 and len(functions) == 1 and functions[0] in pins:
            target = next(pin for pin in pins if pin != functions[0])
            buffers[match[1]] = (functions[0], target)
    if not areas:
        raise LibertyError(f"{path}: a library without cells")
    head = text[library.end() : _GROUP.search(text).start()]  # type: ignore[union-attr]
    time = re.search(r'\btime_unit\s*:\s*"?\s*([\d.]+)\s*([a-z]+)', head)
    capacitance = re.search(r'\bcapacitive_load_unit\s*\(\s*"?([\d.]+)"?\s*,\s*"?([a-zA-Z]+)', head)
    voltage = re.search(r"\bnom_voltage\s*:\s*([\d.]+)", head) or re.search(r"\bvoltage\s*:\s*([\d.]+)", head)
    if time is None or time[2] not in _SECONDS:
        raise LibertyError(f"{path}: time_unit must be a number of {', '.join(_SECONDS)}")
    if capacitance is None or capacitance[2].lower() not in _FARADS:
        raise LibertyError(f"{path}: capacitive_load_unit must be a number of {', '.join(_FARADS)}")
    if voltage is None:
        raise LibertyError(f"{path}: no nom_voltage, and no voltage in its operating conditions")
    return Liberty(
        path=path,
        name=library[1],
        text=text,
        areas=areas,
        buffers=buffers,
        sequential=frozenset(sequential),
        clocks=clocks,
        latches=latches,
        time_unit=float(time[1]) * _SECONDS[time[2]],
        capacitance_unit=float(capacitance[1]) * _FARADS[capacitance[2].lower()],
        voltage=float(voltage[1]),
    )


def _latch(cell: str) -> Latch | None:
    """The latch that a cell is, if it is just that."""
    latch = _LATCH.search(cell)
    if latch is None or re.search(r"\b(clear|preset)\b", latch[2]):
        return None
    inputs = {name: (pin, low) for name, low, pin in _INPUT.findall(latch[2])}
    outputs = [pin for pin, function in _OUTPUT.findall(cell) if function == latch[1]]
    if len(inputs) != 2 or inputs["data_in"][1] or not outputs:
        return None
    return Latch(inputs["data_in"][0], inputs["enable"][0], inputs["enable"][1] == "!", outputs[0])


def _outer(text: str, start: int, path: Path, cell: str) -> tuple[str, int]:
    """What is between the brace before `start` and the one that closes it, without inner groups; where that is."""
    parts, depth, begin = [], 0, start
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            if depth == 0:
                parts.append(text[begin : brace.start()])
            depth += 1
        elif depth:
            depth -= 1
            begin = brace.end()
        else:
            parts.append(text[begin : brace.start()])
            return "".join(parts), brace.start()
    raise LibertyError(f"{path}: the braces of cell {cell} are not closed")
