"""Tests of the command processor with models of everything around it (test plan: verif/plans/command_processor.md)."""

from collections import deque
from random import Random

import cocotb
from amaranth.hdl import Shape
from amaranth.lib import data
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.ctrl.command_processor import CommandProcessor
from lnpu.ctrl.commands import COMMAND_BYTES, TAKES_TWO, Command, Opcode, Target, Unit, layout_of
from lnpu.ctrl.counters import COUNTERS
from lnpu.fgmp.controller import TENSOR_STATE, FgmpController
from lnpu.interfaces import Error, memory_read_signature, memory_write_signature
from verif.agents import pack, start, unpack
from verif.runner import parameters, rng

CONFIG = ChipConfig(**parameters()["config"])
CORES = CONFIG.cores
BYTES = CONFIG.axi_bits // 8
WORDS = COMMAND_BYTES // BYTES
READ = {
    name: memory_read_signature(CONFIG).members[name].signature.members["payload"].shape
    for name in ("request", "response")
}
WRITE = {
    name: memory_write_signature(CONFIG).members[name].signature.members["payload"].shape
    for name in ("request", "data")
}
UNIT_OF = {
    Opcode.LOAD: Unit.LOAD,
    Opcode.LOAD_RAW: Unit.LOAD,
    Opcode.STORE: Unit.STORE,
    Opcode.STORE_RAW: Unit.STORE_RAW,
    Opcode.VECTOR: Unit.VECTOR,
    Opcode.DRAIN: Unit.DRAIN,
    Opcode.ADAPT: Unit.FGMP,
    Opcode.STATE: Unit.FGMP,
    Opcode.COMMIT: Unit.FGMP,
}


def unit_of(command: Command) -> Unit | None:
    """Where a command goes."""
    if command.opcode is Opcode.LOAD and command.fields.get("target", 0) & 1:
        return Unit.LOAD_DENSE
    return UNIT_OF.get(command.opcode)


UNITS = ("load", "store", "vector", "drain", "fgmp", "load_dense", "store_raw")
N = len(UNITS)  # of units and cores in one list, the units are the first ones
TENSORS = {
    Opcode.LOAD: ("tensor",),
    Opcode.STORE: ("tensor",),
    Opcode.DRAIN: ("tensor_a", "tensor_b", "tensor_out"),
    Opcode.VECTOR: ("tensor_a", "tensor_b"),
}
ANSWER_CYCLES = 2  # in which `state` is right; the controller would hold it longer
SOURCES = (*UNITS, *(f"core{i}" for i in range(CORES)), "vmem", "read", "write")
FIXED = {"vmem": Error.RANGE, "read": Error.READ, "write": Error.WRITE}
MARK_BYTES = (8 * len(COUNTERS) + 31) // 32 * 32


class Table:
    """Current and next FGMP states (scale, lo, hi) of the tensors."""

    def __init__(self, random: Random) -> None:
        self.current = {tensor: random_state(random) for tensor in range(1, CONFIG.tensor_states)}
        self.next = {tensor: random_state(random) for tensor in range(1, CONFIG.tensor_states)}

    def copy(self) -> "Table":
        """A table with the same states."""
        other = Table.__new__(Table)
        other.current, other.next = dict(self.current), dict(self.next)
        return other

    def look_up(self, tensor: int) -> tuple[int, int, int]:
        """Current state; zeros for a tensor that is not in the table."""
        return self.current.get(tensor, (0, 0, 0))

    def run(self, command: Command, adapted: tuple[int, int, int]) -> None:
        """ADAPT (whose result is `adapted`), STATE or COMMIT."""
        fields = command.fields
        tensor = fields["tensor"]
        if tensor not in self.current:
            return
        if command.opcode is Opcode.ADAPT:
            self.next[tensor] = adapted
        elif command.opcode is Opcode.STATE:
            self.current[tensor] = self.next[tensor] = fields["scale"], fields["lo"], fields["hi"]
        elif fields["frozen"]:
            self.next[tensor] = self.current[tensor]
        else:
            self.current[tensor] = self.next[tensor]

    def resolve(self, command: Command) -> Command:
        """The command as its unit gets it."""
        fields = dict(command.fields)
        scale = {name: self.look_up(fields[name])[0] for name in TENSORS.get(command.opcode, ())}
        match command.opcode:
            case Opcode.LOAD:
                fields["scale"] += scale["tensor"]
            case Opcode.STORE if fields["tensor"]:
                fields["scale"] += scale["tensor"]
                _, fields["lo"], fields["hi"] = self.look_up(fields["tensor"])
            case Opcode.DRAIN:
                fields["shift"] += scale["tensor_a"] + scale["tensor_b"] - scale["tensor_out"]
                fields["scale"] += scale["tensor_out"]
            case Opcode.VECTOR:
                fields["a_shift"] += scale["tensor_a"]
                fields["b_shift"] += scale["tensor_b"]
                if fields["quantise"] and fields["tensor_a"]:
                    _, fields["lo"], fields["hi"] = self.look_up(fields["tensor_a"])
        return Command(command.opcode, **fields)


class Outcome:
    """How a program ended."""

    def __init__(self, done: int, code: int, command: int, detail: int) -> None:
        self.done, self.code, self.command, self.detail = done, code, command, detail

    def check(self, code: Error, command: int | None, *others: Error) -> None:
        """Done, or ended with this first error at this command, with `others` in the detail word too."""
        assert self.done == (code is Error.NONE)
        assert self.code == code.value, f"{Error(self.code)} instead of {code}"
        assert command is None or self.command == command, f"{code}: command {self.command} instead of {command}"
        assert self.detail == sum(1 << bit for bit in {one.value for one in (code, *others)} - {0})


class Chip:
    """Models of memory, units, cores and counters around the command processor, in one clocked coroutine.

    Checked in every cycle: a unit gets just its own commands, in the order of the program and whole; it is offered one
    only when it is ready; what the command waits for is idle then; nothing starts after the end or much after an error;
    its dynamic tensors, just these, are looked up before, while the FGMP unit is idle, and resolved as by the FGMP
    commands before it in the program (each changes the table that is looked up at the end of its job only);
    fetches are contiguous, inside the program, and not too far ahead; nothing is left when the program has ended.
    """

    def __init__(
        self, dut, *, seed: int = 1, longest_job: int = 40, latency: int = 5, fetch_stall: float = 0.2, late_busy=True
    ) -> None:
        self.dut, self.random = dut, Random(seed)
        self.shortest_job = 1
        self.longest_job, self.latency, self.fetch_stall = longest_job, latency, fetch_stall
        self.late_busy = late_busy
        self.memory = bytearray(1 << 16)
        self.marks: dict[int, bytes] = {}
        self.counters = [0] * len(COUNTERS)
        self.errors_at: dict[int, dict[str, Error]] = {}  # cycle of the program -> source -> code
        self.error_after: dict[
            int, tuple[int, Error]
        ] = {}  # command -> (cycles after its unit's busy fell, code); -1: last busy one
        self.abort_at: int | None = None
        self.time = 0
        self.table = Table(self.random)  # that is looked up
        self.program: list[bytes] = []
        self.base = 0
        self.outcome: Outcome | None = None
        self._edge = RisingEdge(dut.clk)
        # Units, then cores: cycles left of the job, cycles until it shows as busy, command of the job
        self._left = [0] * (N + CORES)
        self._length = [0] * (N + CORES)
        self.queued = 0  # as `busy`, a bit each
        self._hidden = [0] * (N + CORES)
        self._job = [0] * (N + CORES)
        self._ready = [True] * (N + CORES)
        for name in ("start", "abort", "program", "length"):
            getattr(dut, f"control__{name}").value = 0
        for unit in UNITS:
            getattr(dut, f"{unit}__ready").value = 1
            getattr(dut, f"{unit}_busy").value = 0
            getattr(dut, f"{unit}_error").value = 0
        for unit in TAKES_TWO:
            getattr(dut, f"{unit.name.lower()}_queued").value = 0
        for name in (
            "core_busy",
            "core_queued",
            "core_error",
            "vmem_error",
            "read_error",
            "write_error",
            "counter_value",
        ):
            getattr(dut, name).value = 0
        dut.core_ready.value = (1 << CORES) - 1
        dut.state.value = self.random.getrandbits(TENSOR_STATE.size)
        dut.fetch__request__ready.value = 0
        dut.fetch__response__valid.value = 0
        dut.mark__request__ready.value = 0
        dut.mark__data__ready.value = 0
        dut.mark__idle.value = 1

    def load(self, commands: list[Command | bytes], *, base: int | None = None) -> None:
        """Put a program into memory."""
        self.program = [command if isinstance(command, bytes) else command.encode() for command in commands]
        self.base = 64 * self.random.randrange(0, 512) if base is None else base
        for i, raw in enumerate(self.program):
            place = self.base + i * COMMAND_BYTES
            self.memory[place : place + COMMAND_BYTES] = raw

    async def run(
        self, commands: list[Command | bytes], *, length: int | None = None, base: int | None = None, limit=100_000
    ) -> Outcome:
        """Run a program to its end; return how it ended."""
        dut = self.dut
        self.load(commands, base=base)
        self.length = len(commands) if length is None else length
        dut.control__program.value = self.base
        dut.control__length.value = self.length
        dut.control__start.value = 1
        await self._edge
        dut.control__start.value = 0
        self._begin()
        for self.time in range(limit):
            await self._edge
            if self._cycle():
                break
        else:
            raise TimeoutError(f"hangs at command {self.started_at}")
        await self._edge
        assert not int(dut.control__busy.value)
        assert not int(dut.control__done.value) and not int(dut.control__error.value)
        return self.outcome

    def _begin(self) -> None:
        self.outcome = None
        self.started: list[int] = []  # commands that started
        self.taken: list[int] = []  # commands that a unit took
        self.started_at = -1
        self.requests = 0
        self.fetching: deque[list[int]] = deque()  # address, words left, earliest time
        self._request_ready = self._response_valid = False
        self._stop_after: int | None = None
        self._mark_request: dict | None = None
        self._mark_words: list[int] = []
        self._mark_ready = [False, False]
        self._mark_idle_at: int | None = None
        self._late: list[tuple[int, int, Error]] = []  # time, unit or core, code
        self.snapshots = 0
        self._index_before = None
        self.lookups: list[int] = []  # tensors, for the command that starts next
        self._answers: dict[int, tuple[int, int, int] | None] = {}  # time -> what `state` becomes, None: garbage
        self._ordered = self.table.copy()  # as if every command were done when it starts
        self._adapted = (0, 0, 0)

    def busy(self, which: int) -> bool:
        """Whether a unit (0 to N - 1) or core (N and up) has a job."""
        return self._left[which] > 0

    def _cycle(self) -> bool:
        """Everything of one clock edge; true when the program has ended."""
        dut = self.dut
        assert int(dut.control__busy.value) == 1
        self._look_up()
        if int(dut.started.value):
            self.started.append(self.time)
            self.started_at += 1
            assert self._stop_after is None or self.time <= self._stop_after, "started after an error"
            command = Command.decode(self.program[self.started_at])
            tensors = [command.fields[name] for name in TENSORS.get(command.opcode, ())]
            assert self.lookups == [tensor for tensor in tensors if tensor], "looked up too much or too little"
            self.lookups = []
        self._streams()
        self._jobs()
        self._fetch()
        self._mark()
        self._errors()
        done, error = int(dut.control__done.value), int(dut.control__error.value)
        if done or error:
            assert not (done and error)
            assert not any(self._left), "ended while a unit is busy"
            assert not self.fetching, "ended with a fetch outstanding"
            assert self._mark_request is None, "ended with a mark outstanding"
            self.outcome = Outcome(done, *(int(getattr(dut, f"control__{name}").value)
                                           for name in ("code", "command", "detail")))  # fmt: skip
            dut.fetch__request__ready.value = 0
            for name in ("vmem_error", "read_error", "write_error", "core_error"):
                getattr(dut, name).value = 0
            return True
        return False

    def _look_up(self) -> None:
        dut = self.dut
        if int(dut.lookup.value):
            assert not self.busy(Unit.FGMP), "looked up while the FGMP unit is busy"
            assert self._stop_after is None or self.time <= self._stop_after, "looked up after an error"
            tensor = int(dut.lookup_tensor.value)
            self.lookups.append(tensor)
            # What is set now is there in the next cycle.
            first = self.time + FgmpController.LOOKUP_LATENCY - 1
            self._answers = {self.time: None, first: self.table.look_up(tensor), first + ANSWER_CYCLES: None}
        if self.time in self._answers:
            answer = self._answers[self.time]
            if answer is None:
                dut.state.value = self.random.getrandbits(TENSOR_STATE.size)
            else:
                dut.state.value = pack(TENSOR_STATE, dict(zip(("scale", "lo", "hi"), answer, strict=True)))

    def _streams(self) -> None:
        dut = self.dut
        valid = [int(getattr(dut, f"{unit}__valid").value) for unit in UNITS]
        core_valid = int(dut.core_valid.value)
        valid += [core_valid >> core & 1 for core in range(CORES)]
        if not any(valid):
            return
        assert all(self._ready[i] for i, one in enumerate(valid) if one), "offered to a unit that is not ready"
        number = self.started_at
        assert int(dut.started.value), "taken without being counted"
        command = Command.decode(self.program[number])
        if command.opcode is Opcode.MULTIPLY:
            expected = [0] * N + [command.fields["cores"] >> core & 1 for core in range(CORES)]
            payload = int(dut.core_command.value)
        else:
            expected = [int(unit_of(command) == i) for i in range(N)] + [0] * CORES
            payload = int(getattr(dut, f"{UNITS[unit_of(command)]}__payload").value)
        assert valid == expected, f"command {number}: {command.opcode}"
        resolved = self._ordered.resolve(command)
        assert payload == int.from_bytes(resolved.encode(), "little"), f"command {number}: not {resolved}"
        if UNIT_OF.get(command.opcode) is Unit.FGMP:
            self._adapted = random_state(self.random)
            self._ordered.run(command, self._adapted)
        self._check_waits(command)
        self.taken.append(number)
        for i, one in enumerate(valid):
            if one:
                self._left[i] = self._length[i] = self.random.randint(self.shortest_job, self.longest_job)
                self._hidden[i] = self.random.randint(0, 1) if self.late_busy else 0
                self._job[i] = number

    def _check_waits(self, command: Command) -> None:
        for i in range(N):
            assert not (command.fields["wait_units"] >> i & 1 and self.busy(i)), f"does not wait for {UNITS[i]}"
            assert not (command.fields["wait_unit_queues"] & self.queued) >> i & 1, f"does not wait for a {UNITS[i]}"
        for core in range(CORES):
            assert not (command.fields["wait_cores"] >> core & 1 and self.busy(N + core)), f"does not wait for {core}"
            assert not (command.fields["wait_queues"] >> core & 1 and self.queued >> (N + core) & 1), f"queue of {core}"

    def _jobs(self) -> None:
        dut = self.dut
        cores_busy = cores_ready = self.queued = 0
        for i in range(N + CORES):
            if self._left[i]:
                shown = self._hidden[i] == 0
                self._hidden[i] -= not shown
                if shown:
                    self._left[i] -= 1
                busy, ready = shown and self._left[i] > 0, self._left[i] == 0
                if ready and i == Unit.FGMP:
                    self.table.run(Command.decode(self.program[self._job[i]]), self._adapted)
                if busy and self._left[i] == 1 and self.error_after.get(self._job[i], (0,))[0] == -1:
                    self._late.append((self.time, i, self.error_after.pop(self._job[i])[1]))
                if ready and self._job[i] in self.error_after:
                    delay, code = self.error_after.pop(self._job[i])
                    self._late.append((self.time + delay, i, code))
            else:
                busy, ready = False, True
            self._ready[i] = ready
            # As if the second half of the job were a second command.
            queued = busy and 2 * self._left[i] > self._length[i] and i != Unit.FGMP
            self.queued |= queued << i
            if i < N:
                if i in TAKES_TWO:
                    getattr(dut, f"{UNITS[i]}_queued").value = int(queued)
                getattr(dut, f"{UNITS[i]}_busy").value = int(busy)
                getattr(dut, f"{UNITS[i]}__ready").value = int(ready)
            else:
                cores_busy |= busy << (i - N)
                cores_ready |= ready << (i - N)
        dut.core_busy.value = cores_busy
        dut.core_queued.value = self.queued >> N
        dut.core_ready.value = cores_ready

    def _fetch(self) -> None:
        dut = self.dut
        if self._request_ready and int(dut.fetch__request__valid.value):
            request = unpack(READ["request"], int(dut.fetch__request__payload.value))
            assert request == {"address": self.base + COMMAND_BYTES * self.requests, "words": WORDS, "kind": 0}
            self.requests += 1
            assert self.requests <= self.length, "fetches beyond the program"
            assert self.requests <= self.started_at + 1 + CommandProcessor.PREFETCH + 2, "fetches too far ahead"
            self.fetching.append([request["address"], WORDS, self.time + self.latency])
        if self._response_valid:
            assert int(dut.fetch__response__ready.value), "no room for what was asked for"
            self.fetching[0][0] += BYTES
            self.fetching[0][1] -= 1
            if not self.fetching[0][1]:
                self.fetching.popleft()
        self._request_ready = self.random.random() >= self.fetch_stall
        dut.fetch__request__ready.value = int(self._request_ready)
        self._response_valid = (
            bool(self.fetching)
            and self.time >= self.fetching[0][2]
            and self.random.random() >= self.fetch_stall
        )  # fmt: skip
        dut.fetch__response__valid.value = int(self._response_valid)
        if self._response_valid:
            address, left, _ = self.fetching[0]
            word = int.from_bytes(self.memory[address : address + BYTES], "little")
            dut.fetch__response__payload.value = pack(READ["response"], {"data": word, "last": left == 1})

    def _mark(self) -> None:
        dut = self.dut
        if int(dut.snapshot.value):
            self.snapshots += 1
            self.counters = [self.random.randrange(1 << 48) for _ in COUNTERS]
            assert not any(self._left), "MARK does not wait"
            assert not self.fetching, "MARK does not wait for the prefetch"
        index = int(dut.counter_index.value)
        dut.counter_value.value = (
            self.counters[index] if int(dut.counter_read.value) else self.random.randrange(1 << 48)
        )
        if self._mark_ready[0] and int(dut.mark__request__valid.value):
            assert self._mark_request is None
            self._mark_request = unpack(WRITE["request"], int(dut.mark__request__payload.value))
            assert self._mark_request["words"] == MARK_BYTES // BYTES
            assert self._mark_request["kind"] == 7
            dut.mark__idle.value = 0
        if self._mark_ready[1] and int(dut.mark__data__valid.value):
            word = unpack(WRITE["data"], int(dut.mark__data__payload.value))
            assert word["strobe"] == (1 << BYTES) - 1
            self._mark_words.append(word["data"])
            if len(self._mark_words) == self._mark_request["words"]:
                self._mark_idle_at = self.time + self.random.randint(1, 30)
        if self._mark_idle_at == self.time:
            dut.mark__idle.value = 1
            content = b"".join(word.to_bytes(BYTES, "little") for word in self._mark_words)
            expected = b"".join(value.to_bytes(8, "little") for value in self.counters)
            assert content == expected.ljust(MARK_BYTES, b"\0")
            self.marks[self._mark_request["address"]] = content
            self._mark_request, self._mark_idle_at, self._mark_words = None, None, []
        self._mark_ready = [
            self._mark_request is None and self.random.random() < 0.5,
            self._mark_request is not None
            and len(self._mark_words) < self._mark_request["words"]
            and self.random.random() < 0.5,
        ]
        dut.mark__request__ready.value = int(self._mark_ready[0])
        dut.mark__data__ready.value = int(self._mark_ready[1])

    def _errors(self) -> None:
        dut = self.dut
        now = dict(self.errors_at.get(self.time, {}))
        for time, which, code in self._late:
            if time == self.time:
                now[UNITS[which] if which < N else f"core{which - N}"] = code
        abort = self.abort_at == self.time
        dut.control__abort.value = int(abort)
        for unit in UNITS:
            getattr(dut, f"{unit}_error").value = now.get(unit, Error.NONE).value
        dut.core_error.value = pack(
            data.ArrayLayout(Shape.cast(Error), CORES),
            [now.get(f"core{core}", Error.NONE).value for core in range(CORES)],
        )
        for name in FIXED:
            getattr(dut, f"{name}_error").value = int(name in now)
        if now or abort:
            # Given in the next cycle; registered once; a start that is decided then takes place one cycle later.
            stop = self.time + 4
            self._stop_after = stop if self._stop_after is None else min(self._stop_after, stop)


def random_state(random: Random) -> tuple[int, int, int]:
    """A scale and two magnitudes; extreme scales are not rare."""
    lo, hi = sorted(random.getrandbits(15) for _ in range(2))
    return random.choice((-64, 64, random.randint(-64, 64), random.randint(-64, 64))), lo, hi


def random_tensor(random: Random) -> int:
    """Often the same ones, so that FGMP commands matter; sometimes 0 or one that is not in the table."""
    return random.choice((0, 1, 2, 3, random.randrange(1, CONFIG.tensor_states), random.randrange(256)))


def random_command(random: Random, *, marks: bool = True, opcode: Opcode | None = None) -> Command:
    """Any command but END, or one with this opcode, with random fields (legal for the command processor)."""
    if opcode is None:
        opcode = random.choice([one for one in Opcode if one is not Opcode.END and (marks or one is not Opcode.MARK)])
    if opcode is Opcode.MARK and random.random() < 0.7:
        opcode = Opcode.MULTIPLY
    raw = random.getrandbits(512) & ((1 << layout_of(opcode).size) - 1)
    fields = Command.decode((raw & ~0xFF | opcode.value).to_bytes(COMMAND_BYTES, "little")).fields
    for name in ("wait_units", "wait_unit_queues"):
        fields[name] &= random.getrandbits(8) & random.getrandbits(8)
    for name in ("wait_cores", "wait_queues"):
        fields[name] &= random.getrandbits(16) & random.getrandbits(16)
    if opcode is Opcode.MULTIPLY:
        fields["cores"] = random.randrange(1, 1 << CORES)
    if opcode is Opcode.MARK:
        fields["address"] &= (1 << CONFIG.address_bits) - 32
    for name in TENSORS.get(opcode, ()):
        fields[name] = random_tensor(random)
    if UNIT_OF.get(opcode) is Unit.FGMP:
        fields["tensor"] = random_tensor(random)
    if opcode is Opcode.STATE:
        fields["scale"], fields["lo"], fields["hi"] = random_state(random)
    # Sums with the tensors' scales stay in the fields' ranges, and reach their ends.
    for name in {"scale", "a_shift", "b_shift"} & fields.keys() if opcode in TENSORS else ():
        fields[name] = random.choice((-64, 63, random.randint(-64, 63)))
    if opcode is Opcode.DRAIN:
        fields["shift"] = random.choice((-2048 + 192, 2047 - 192, random.randint(-2048 + 192, 2047 - 192)))
    return Command(opcode, **fields)


def random_state_command(random: Random) -> Command:
    """A command of the FGMP unit for tensor 1, 2 or 3 that waits for nothing."""
    command = random_command(random, opcode=random.choice((Opcode.ADAPT, Opcode.STATE, Opcode.COMMIT, Opcode.COMMIT)))
    command.fields |= {
        "tensor": random.randint(1, 3),
        "wait_units": 0,
        "wait_cores": 0,
        "wait_queues": 0,
        "wait_unit_queues": 0,
    }
    return command


def random_program(random: Random, length: int, **options) -> list[Command]:
    """Random commands and END."""
    return [*(random_command(random, **options) for _ in range(length - 1)), Command(Opcode.END)]


async def begin(dut, seed: int, **options) -> Chip:
    rng(seed)
    chip = Chip(dut, seed=seed, **options)
    await start(dut)
    return chip


async def check_recovery(chip: Chip) -> None:
    """A good program after a bad one."""
    chip.errors_at, chip.error_after, chip.abort_at = {}, {}, None
    program = random_program(chip.random, 6)
    (await chip.run(program)).check(Error.NONE, len(program) - 1)
    assert len(chip.started) == len(program)


@cocotb.test()
async def random_programs(dut):
    chip = await begin(dut, 1)
    for length in (1, 2, 3, 10, 40, 100):
        chip.latency = chip.random.choice((1, 5, 30))
        program = random_program(chip.random, length)
        (await chip.run(program)).check(Error.NONE, length - 1)
        assert len(chip.started) == length
        assert chip.taken == [
            i for i, one in enumerate(program) if one.opcode in UNIT_OF or one.opcode is Opcode.MULTIPLY
        ]  # fmt: skip
        assert chip.snapshots == sum(one.opcode is Opcode.MARK for one in program)


@cocotb.test()
async def every_wait_bit(dut):
    """Long jobs everywhere, then a command that waits for just one unit or core."""
    chip = await begin(dut, 2, longest_job=300)
    everyone = [Command(Opcode.LOAD), Command(Opcode.STORE), Command(Opcode.VECTOR), Command(Opcode.DRAIN)]
    everyone += [Command(Opcode.COMMIT, tensor=1), Command(Opcode.LOAD, target=Target.DENSE.value)]
    everyone += [Command(Opcode.STORE_RAW)]
    everyone += [Command(Opcode.MULTIPLY, cores=1 << core) for core in range(CORES)]
    program = []
    waits = [{name: 1 << bit} for name in ("wait_units", "wait_unit_queues") for bit in range(N)]
    waits += [{name: 1 << core} for name in ("wait_cores", "wait_queues") for core in range(CORES)]
    for wait in waits:
        program += [*everyone, Command(Opcode.VECTOR, **wait)]
    program.append(Command(Opcode.END))
    (await chip.run(program)).check(Error.NONE, len(program) - 1)


@cocotb.test()
async def wait_bits_without_unit(dut):
    chip = await begin(dut, 3)
    program = [
        Command(
            Opcode.NOP,
            wait_units=0xFF & ~((1 << N) - 1),
            wait_unit_queues=0xFF & ~((1 << N) - 1),
            wait_cores=0xFFFF & ~((1 << CORES) - 1),
            wait_queues=0xFFFF & ~((1 << CORES) - 1),
        ),
        Command(Opcode.END),
    ]
    (await chip.run(program)).check(Error.NONE, 1)


@cocotb.test()
async def command_every_ten_cycles(dut):
    chip = await begin(dut, 4, longest_job=3, fetch_stall=0.0, latency=2, late_busy=False)
    program = [Command(Opcode(chip.random.choice((1, 2, 3, 7, 8)))) for _ in range(60)]
    (await chip.run([*program, Command(Opcode.END)])).check(Error.NONE, 60)
    cycles = (chip.started[59] - chip.started[9]) / 50
    assert cycles <= (10 if WORDS == 8 else 6), cycles


@cocotb.test()
async def latency_is_hidden(dut):
    """While a unit works, commands are fetched up to the limit and then start quickly."""
    chip = await begin(dut, 5, fetch_stall=0.0, latency=40)
    chip.longest_job = 1
    program = [Command(Opcode.NOP) for _ in range(5)] + [Command(Opcode.END)]
    (await chip.run(program)).check(Error.NONE, 5)
    # Five requests leave at once, so their answers follow each other after one latency.
    assert chip.started[3] - chip.started[0] <= 3 * (WORDS + 4)


@cocotb.test()
async def unknown_opcodes(dut):
    chip = await begin(dut, 6)
    known = {opcode.value for opcode in Opcode}
    unknown = [value for value in range(256) if value not in known]
    for value in {unknown[0], 255, *chip.random.sample(unknown, 12)}:
        position = chip.random.randrange(6)
        program = random_program(chip.random, 8, marks=False)
        program[position] = bytes([value]) + bytes(COMMAND_BYTES - 1)
        (await chip.run(program)).check(Error.OPCODE, position)
        assert len(chip.started) == position
    await check_recovery(chip)


@cocotb.test()
async def bits_beyond_the_fields(dut):
    chip = await begin(dut, 7, fetch_stall=0.0)
    for opcode in Opcode:
        size = layout_of(opcode).size
        for bit in sorted({size, (size + 512) // 2, 511}):
            if bit >= 512:
                continue
            word = opcode.value | 1 << bit
            program = [Command(Opcode.NOP), word.to_bytes(COMMAND_BYTES, "little"), Command(Opcode.END)]
            outcome = await chip.run(program)
            assert len(chip.started) == 1
            field = (Opcode.MULTIPLY,)  # its `cores` is 0, but the opcode's error comes first
            outcome.check(Error.OPCODE, 1)
            assert opcode in field or not outcome.detail & 1 << Error.FIELD.value
    await check_recovery(chip)


@cocotb.test()
async def last_bit_of_the_fields(dut):
    """The highest bit of every layout is not taken for a bit beyond it."""
    chip = await begin(dut, 8, fetch_stall=0.0)
    for opcode in Opcode:
        word = opcode.value | 1 << (layout_of(opcode).size - 1)
        if opcode is Opcode.MULTIPLY:
            word |= 1 << layout_of(opcode)["cores"].offset
        if layout_of(opcode).size - 1 < 32:  # a wait mask
            word &= 0xFF
        program = [word.to_bytes(COMMAND_BYTES, "little"), Command(Opcode.END)]
        (await chip.run(program)).check(Error.NONE, 0 if opcode is Opcode.END else 1)


@cocotb.test()
async def bad_fields(dut):
    chip = await begin(dut, 9)
    bad = [Command(Opcode.MULTIPLY), *(Command(Opcode.MARK, address=1 << bit) for bit in range(5))]
    if CORES < 16:
        bad += [Command(Opcode.MULTIPLY, cores=1 << core | 1) for core in {CORES, 15}]
    for command in bad:
        position = chip.random.randrange(6)
        program = random_program(chip.random, 8, marks=False)
        program[position] = command
        (await chip.run(program)).check(Error.FIELD, position)
        assert len(chip.started) == position
    await check_recovery(chip)


@cocotb.test()
async def no_end(dut):
    chip = await begin(dut, 10)
    for length in (0, 1, 2, 7):
        program = random_program(chip.random, 10, marks=False)
        (await chip.run(program, length=length)).check(Error.LENGTH, max(length - 1, 0))
        assert len(chip.started) == length
        assert chip.requests == length
    await check_recovery(chip)


@cocotb.test()
async def end_before_the_length(dut):
    """Commands after END are at most fetched."""
    chip = await begin(dut, 11)
    program = random_program(chip.random, 5) + [bytes([0xFF] * COMMAND_BYTES)] * 10
    (await chip.run(program)).check(Error.NONE, 4)
    assert len(chip.started) == 5
    await check_recovery(chip)


@cocotb.test()
async def misaligned_program(dut):
    chip = await begin(dut, 12)
    for bit in range(6):
        (await chip.run([Command(Opcode.END)], base=0x1000 + (1 << bit))).check(Error.FIELD, 0)
        assert chip.requests == 0
    await check_recovery(chip)


@cocotb.test()
async def error_of_each_source(dut):
    chip = await begin(dut, 13)
    for source in SOURCES:
        for _ in range(2):
            code = FIXED.get(source) or Error(chip.random.choice((2, 3, 4)))
            time = chip.random.randrange(20, 200)
            chip.errors_at = {time: {source: code}}
            program = random_program(chip.random, 60, marks=False)
            outcome = await chip.run(program)
            outcome.check(code, max(chip.started_at, 0))
            assert len(chip.started) < 60
    await check_recovery(chip)


@cocotb.test()
async def several_errors(dut):
    """The first wins, in one cycle by the order of the sources; the detail word has all."""
    chip = await begin(dut, 14, longest_job=60)
    for _ in range(25):
        time = chip.random.randrange(20, 100)
        chip.errors_at, order = {}, []
        for step in sorted(chip.random.sample(range(4), 2)):
            some = sorted(chip.random.sample(range(len(SOURCES)), 2))
            codes = {SOURCES[i]: FIXED.get(SOURCES[i]) or Error(chip.random.choice((2, 3, 4))) for i in some}
            chip.errors_at[time + step] = codes
            order += codes.values()
        outcome = await chip.run(random_program(chip.random, 60, marks=False))
        outcome.check(order[0], max(chip.started_at, 0), *order)
    await check_recovery(chip)


@cocotb.test()
async def errors_at_the_end(dut):
    """Errors that come when a unit has just become idle, after the last command."""
    chip = await begin(dut, 15, longest_job=70)
    chip.shortest_job = 50
    for delay in range(CommandProcessor.SETTLE - 2):
        for command in (
            Command(Opcode.STORE),
            Command(Opcode.ADAPT, tensor=1),
            Command(Opcode.MULTIPLY, cores=1 << (CORES - 1)),
        ):
            for last in (Command(Opcode.END), Command(Opcode.MARK, address=64)):
                chip.error_after = {0: (delay, Error.DECODE)}
                chip.marks.clear()
                (await chip.run([command, last, Command(Opcode.END)])).check(Error.DECODE, 1)
                assert not chip.marks
    await check_recovery(chip)


@cocotb.test()
async def write_error_of_mark(dut):
    chip = await begin(dut, 16)
    for time in range(40, 200, 20):
        chip.errors_at = {time: {"write": Error.WRITE}}
        program = [Command(Opcode.MARK, address=0x2000)] + [Command(Opcode.NOP)] * 50 + [Command(Opcode.END)]
        (await chip.run(program)).check(Error.WRITE, None)
    await check_recovery(chip)


@cocotb.test()
async def abort(dut):
    """At any time: code ABORTED unless the program had ended."""
    chip = await begin(dut, 17)
    aborted = 0
    for time in [*range(12), *(chip.random.randrange(400) for _ in range(40))]:
        chip.abort_at = time
        program = random_program(chip.random, 20)
        outcome = await chip.run(program)
        if chip.time > time + 1:
            outcome.check(Error.ABORTED, max(chip.started_at, 0))
            aborted += 1
        else:
            outcome.check(Error.NONE, 19)
    assert aborted > 30
    await check_recovery(chip)


@cocotb.test()
async def abort_and_error(dut):
    chip = await begin(dut, 18, longest_job=60)
    for abort_first in (True, False):
        chip.abort_at = 60 if abort_first else 64
        chip.errors_at = {64 if abort_first else 60: {"load": Error.DECODE}}
        codes = [Error.ABORTED, Error.DECODE]
        outcome = await chip.run([Command(Opcode.LOAD, wait_units=1)] * 30)
        outcome.check(codes[not abort_first], None, *codes)
    await check_recovery(chip)


@cocotb.test()
async def abort_while_idle(dut):
    chip = await begin(dut, 19)
    for _ in range(3):
        dut.control__abort.value = 1
        await RisingEdge(dut.clk)
        dut.control__abort.value = 0
        await check_recovery(chip)


@cocotb.test()
async def marks(dut):
    chip = await begin(dut, 20)
    addresses = [32 * chip.random.randrange(1 << 20) for _ in range(5)]
    program = []
    for address in addresses:
        program += [random_command(chip.random, marks=False) for _ in range(3)]
        program.append(Command(Opcode.MARK, address=address))
    program.append(Command(Opcode.END))
    (await chip.run(program)).check(Error.NONE, len(program) - 1)
    assert list(chip.marks) == addresses


@cocotb.test()
async def dynamic_tensors(dut):
    """FGMP commands and commands with all combinations of tensors, none of which waits by its masks."""
    chip = await begin(dut, 21, longest_job=30, fetch_stall=0.0)
    fixed = [(0, 0, 0), *((a, b, c) for a in (0, 1) for b in (0, 2) for c in (0, 3)), (255, 1, 255)]
    program = []
    for tensors in fixed + [None] * 25:
        for opcode in chip.random.sample(list(TENSORS), 2) if tensors is None else TENSORS:
            if chip.random.random() < 0.6:
                program.append(random_state_command(chip.random))
            command = random_command(chip.random, opcode=opcode)
            command.fields |= {"wait_units": 0, "wait_cores": 0, "wait_queues": 0, "wait_unit_queues": 0}
            if tensors is not None:
                command.fields |= dict(zip(TENSORS[opcode], tensors, strict=False))
            program.append(command)
    program.append(Command(Opcode.END))
    (await chip.run(program)).check(Error.NONE, len(program) - 1)
    assert len(chip.started) == len(program)


@cocotb.test()
async def resolution_time(dut):
    """Four cycles for a tensor, one for a turn without, besides the usual four."""
    chip = await begin(dut, 22, longest_job=1, fetch_stall=0.0, latency=2, late_busy=False)
    three = {"tensor_a": 1, "tensor_b": 2, "tensor_out": 3}
    for command, expected in (
        (Command(Opcode.DRAIN, **three), 16),
        (Command(Opcode.VECTOR, tensor_b=3), 10),
        (Command(Opcode.STORE, tensor=1), 10),
    ):
        (await chip.run([command] * 20 + [Command(Opcode.END)])).check(Error.NONE, 20)
        cycles = (chip.started[19] - chip.started[9]) / 10
        assert cycles <= expected, cycles


@cocotb.test()
async def end_during_resolution(dut):
    """Errors and aborts at any time of it: while it waits for the FGMP unit, looks up, or has not started yet."""
    chip = await begin(dut, 23, longest_job=12, fetch_stall=0.0)
    waiting = looked_up = 0
    for time in range(30, 80):
        program = []
        for _ in range(10):
            program.append(random_state_command(chip.random))
            drain = random_command(chip.random, opcode=Opcode.DRAIN)
            drain.fields |= {
                "tensor_a": 1,
                "tensor_b": 2,
                "tensor_out": 3,
                "wait_units": 0,
                "wait_cores": 0,
                "wait_queues": 0,
                "wait_unit_queues": 0,
            }
            program.append(drain)
        program.append(Command(Opcode.END))
        chip.errors_at, chip.abort_at = {}, None
        code = chip.random.choice((Error.ABORTED, Error.FIELD, Error.RANGE))
        if code is Error.ABORTED:
            chip.abort_at = time
        else:
            chip.errors_at = {time: {"fgmp" if code is Error.FIELD else "vmem": code}}
        (await chip.run(program)).check(code, max(chip.started_at, 0))
        if chip.started_at % 2 == 0:
            looked_up += bool(chip.lookups)
            waiting += not chip.lookups
    assert looked_up > 10 and waiting > 2, (looked_up, waiting)
    await check_recovery(chip)


@cocotb.test()
async def refused_fgmp_command(dut):
    """The FGMP unit gives an error while it is still busy: what waits for it to be resolved does not start."""
    chip = await begin(dut, 24)
    chip.shortest_job = 3
    for opcode in (Opcode.ADAPT, Opcode.STATE, Opcode.COMMIT):
        for resolved in TENSORS:
            chip.error_after = {1: (-1, Error.FIELD)}
            tensors = dict.fromkeys(TENSORS[resolved], 1)
            program = [Command(Opcode.NOP), Command(opcode), Command(resolved, **tensors), Command(Opcode.END)]
            (await chip.run(program)).check(Error.FIELD, 1)
            assert len(chip.started) == 2
    await check_recovery(chip)
