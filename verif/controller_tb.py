"""FgmpController: random commands, lookups and statistics against golden.controller, cycle by cycle; see the plan."""

from collections import deque
from dataclasses import asdict, dataclass
from random import Random

import cocotb
from cocotb.triggers import RisingEdge, Timer

from golden.controller import COUNT_MAX, RECORD_DTYPE, Controller, ControllerState, Statistics, Targets
from lnpu.config import ChipConfig
from lnpu.ctrl.commands import Command, Opcode
from lnpu.fgmp.controller import ADAPT_RECORD, STORE_STATISTICS, TENSOR_STATE, FgmpController
from lnpu.interfaces import Error
from verif.agents import Sink, Source, pack, start, unpack
from verif.controller_model import (
    LOOP_START,
    LOOP_TARGETS,
    closed_loop,
    random_state,
    random_statistics,
    random_targets,
)
from verif.runner import parameters, rng

PERIOD = 10
CONFIG = ChipConfig(**parameters()["config"])
ENTRIES = CONFIG.tensor_states
BEAT_MAX = 127
COUNTS = ("zero", "underflow", "fp8", "fp16")
NO_TARGETS = Targets()


def random_of(seed: int) -> Random:
    return Random(int(rng(seed).integers(1 << 32)))


def adapt_command(tensor: int, targets: Targets = NO_TARGETS, address: int = 0) -> Command:
    fields = {name: int(value) for name, value in asdict(targets).items()}
    return Command(Opcode.ADAPT, tensor=tensor, address=address, **fields)


def state_command(tensor: int, state: ControllerState) -> Command:
    return Command(Opcode.STATE, tensor=tensor, **asdict(state))


def as_state(word: int) -> ControllerState:
    fields = unpack(TENSOR_STATE, word)
    fields["scale"] -= fields["scale"] >> 7 << 8
    return ControllerState(**fields)


def beats_of(random: Random, statistics: Statistics, most: int = BEAT_MAX) -> list[Statistics]:
    """Beats of random sizes up to `most` that add up to the statistics."""
    left = {name: getattr(statistics, name) for name in COUNTS}
    beats = []
    while any(left.values()) or not beats:
        part = {name: min(value, random.choice((0, most, random.randint(0, most)))) for name, value in left.items()}
        left = {name: left[name] - part[name] for name in COUNTS}
        beats.append(part | {"top": random.randint(0, statistics.top), "nonfinite": 0})
    random.choice(beats)["top"] = statistics.top
    if statistics.nonfinite:
        random.choice(beats)["nonfinite"] = 1
    return [Statistics(**beat) for beat in beats]


@dataclass
class InFlight:
    """A command that was taken: what it will do to the current state of its tensor."""

    command: Command
    error: int
    tensor: int
    before: ControllerState
    after: ControllerState
    cycles: int = 0


class Bench:
    """The controller, its twin, and a monitor that compares them in every cycle."""

    def __init__(self, dut, seed: int, *, lookups: float = 0.3, stall: float = 0.3) -> None:
        self.dut, self.random, self.lookups = dut, random_of(seed), lookups
        self.edge = RisingEdge(dut.clk)
        self.commands = Source(dut, "command", seed=seed)
        self.sink = Sink(dut, "record", seed=seed, stall=stall)
        self.model = Controller(ENTRIES)
        self.tensors: list[int] = []  # lookups favour these
        self.noise = 0.0  # probability of a beat that no test asked for
        self.records: list[tuple[int, int]] = []  # expected: payload, address
        self.errors: list[int] = []
        self.in_flight: InFlight | None = None
        self.durations: list[tuple[Opcode, int]] = []
        self.driven = False  # `store` has a beat of `drive`
        self.forced: int | None = None  # tensor of the next lookup
        self.adapts = 0

    async def begin(self, *, wait: bool = True) -> "Bench":
        dut = self.dut
        dut.lookup.value = dut.lookup_tensor.value = dut.store.value = 0
        await start(dut)
        self.monitor = cocotb.start_soon(self._monitor())
        while wait and not int(dut.command__ready.value):
            await self.edge
        return self

    def drive(self, beat: Statistics | None) -> None:
        """`store` of the coming cycle."""
        self.driven = beat is not None
        self.dut.store.value = pack(STORE_STATISTICS, asdict(beat)) if beat else 0

    async def store(self, beats: list[Statistics], gap: float = 0.0) -> None:
        for beat in beats:
            while self.random.random() < gap:
                await self.edge
            self.drive(beat)
            await self.edge
            self.drive(None)

    async def run(self, command: Command) -> None:
        """Give a command, without waiting for its end."""
        await self.commands.put(int.from_bytes(command.encode(), "little"))

    async def idle(self) -> None:
        await self.edge
        while int(self.dut.busy.value) or self.in_flight:
            await self.edge

    def _draw(self) -> int:
        if self.tensors and self.random.random() < 0.7:
            return self.random.choice(self.tensors)
        return self.random.choice((0, 1, ENTRIES - 1, min(ENTRIES, 255), 255, self.random.randrange(256)))

    def _take(self, word: int) -> InFlight:
        """Effect of a command that was taken; next states change at once, as only commands can see them."""
        command = Command.decode(word.to_bytes(64, "little"))
        fields = dict.fromkeys(("tensor", "scale", "lo", "hi"), 0) | command.fields
        tensor, model = fields["tensor"], self.model
        before = after = model.lookup(tensor)
        error = Error.NONE.value
        try:
            match command.opcode:
                case Opcode.STATE:
                    after = ControllerState(fields["scale"], fields["lo"], fields["hi"])
                    model.state(tensor, after)
                case Opcode.COMMIT:
                    model.commit(tensor, bool(fields["frozen"]))
                    after = model.lookup(tensor)
                case Opcode.ADAPT:
                    if fields["address"] % 32 or fields["address"] >> CONFIG.address_bits:
                        raise ValueError
                    names = Targets.__dataclass_fields__
                    record = model.adapt(tensor, Targets(**{name: fields[name] for name in names}))
                    self.records.append((int.from_bytes(record, "little"), fields["address"]))
                    self.adapts += 1
                case _:
                    error = Error.OPCODE.value
        except ValueError:
            error = Error.FIELD.value
        return InFlight(command, error, tensor, before, after)

    async def _monitor(self) -> None:
        dut, edge, random = self.dut, self.edge, self.random
        valid, ready, payload = dut.command__valid, dut.command__ready, dut.command__payload
        record_valid, record_ready, record = dut.record__valid, dut.record__ready, dut.record__payload
        busy, error, state, store = dut.busy, dut.error, dut.state, dut.store
        lookups: deque = deque([None] * FgmpController.LOOKUP_LATENCY, FgmpController.LOOKUP_LATENCY)
        expected = None
        sweep = True
        reported = []
        while True:
            tensor = self._draw() if random.random() < self.lookups else None
            if self.forced is not None:
                tensor, self.forced = self.forced, None
            dut.lookup.value = int(tensor is not None)
            dut.lookup_tensor.value = self._draw() if tensor is None else tensor
            if not self.driven:
                noise = 0
                if random.random() < self.noise:
                    counts = {name: random.choice((0, 1, BEAT_MAX)) for name in COUNTS}
                    noise = counts | {"top": random.randint(0, 30), "nonfinite": random.random() < 0.02}
                    noise = pack(STORE_STATISTICS, noise)
                store.value = noise
            await edge
            beat = int(store.value)
            if beat:
                self.model.store(Statistics(**unpack(STORE_STATISTICS, beat)))
            is_busy = bool(int(busy.value))
            sweep &= is_busy
            assert int(ready.value) == (not is_busy)
            code = int(error.value)
            if code:
                assert is_busy, "error while idle"
                reported.append(code)
            flight = self.in_flight
            if flight:
                if is_busy:
                    flight.cycles += 1
                else:
                    assert flight.cycles, "not busy in the cycle after a command was taken"
                    wanted = [flight.error] if flight.error else []
                    assert reported == wanted, f"{flight.command}: errors {reported}, not {wanted}"
                    self.errors += reported
                    self.durations.append((flight.command.opcode, flight.cycles))
                    reported, self.in_flight = [], None
            else:
                assert sweep or not is_busy, "busy without a command"
                assert not code
            # What was looked up: the state before or after the command while it runs.
            got = int(state.value)
            if expected is not None:
                one = as_state(got)
                assert one in expected[1], f"state of {expected[0]} is {one}, not {expected[1]}"
                expected = expected[0], [one]  # it holds
            allowed = None
            if tensor is not None:
                allowed = tensor, [self.model.lookup(tensor)]
                if self.in_flight and self.in_flight.tensor == tensor:
                    allowed = tensor, [self.in_flight.before, self.in_flight.after]
            lookups.append(allowed)
            expected = lookups[0] or expected
            if int(record_valid.value):
                assert is_busy and self.records, "record without an ADAPT"
                word, address = self.records[0]
                got = int(record.value)
                assert got == word, f"{unpack(ADAPT_RECORD, got)}, not {unpack(ADAPT_RECORD, word)}"
                assert int(dut.record_address.value) == address
                if int(record_ready.value):
                    self.records.pop(0)
            if int(valid.value) and not is_busy:
                self.in_flight = self._take(int(payload.value))

    async def look_up(self, tensor: int) -> ControllerState:
        """The current state in the table, by way of a lookup."""
        saved, self.lookups = self.lookups, 0.0
        await self.edge
        self.forced = tensor
        for _ in range(FgmpController.LOOKUP_LATENCY + 3):
            await self.edge
        self.lookups = saved
        return as_state(int(self.dut.state.value))

    async def next_states(self, tensors) -> list[ControllerState]:
        """Next states in the table, by way of ADAPT with nothing to adapt."""
        self.sink.words.clear()
        states = []
        for tensor in tensors:
            await self.run(adapt_command(tensor))
            await self.idle()
            (word,) = await self.sink.get(1)
            fields = unpack(ADAPT_RECORD, word)
            states.append(ControllerState(fields["scale"] - (fields["scale"] >> 7 << 8), fields["lo"], fields["hi"]))
        return states

    async def check_table(self, tensors) -> None:
        """All states in the table are the twin's."""
        tensors = list(tensors)
        got = await self.next_states(tensors)
        assert got == [self.model.next[tensor] for tensor in tensors]
        self.tensors = tensors
        saved, self.lookups = self.lookups, 1.0
        for _ in range(3 * len(tensors)):
            await self.edge
        self.lookups = saved

    async def end(self) -> None:
        await self.idle()
        for _ in range(4):
            await self.edge
        assert not self.records
        assert not self.monitor.done()


def random_address(random: Random) -> int:
    return 32 * random.randrange(1 << CONFIG.address_bits - 5)


@cocotb.test()
async def random_adapts(dut):
    """Thousands of decisions; the beats for the next one come while the last one runs."""
    bench = await Bench(dut, 1, lookups=0.2, stall=0.2).begin()
    random = bench.random
    bench.tensors = sorted({1, ENTRIES - 1, 1 + random.randrange(ENTRIES - 1)})
    for number in range(parameters()["adapts"]):
        tensor = random.choice(bench.tensors)
        targets = random_targets(random)
        statistics = random_statistics(random, targets, most=random.choice((300, 1000, 2000)))
        if number % 4:
            await bench.run(state_command(tensor, random_state(random, targets)))
        await bench.store(beats_of(random, statistics), gap=random.choice((0, 0, 0.3)))
        await bench.run(adapt_command(tensor, targets, random_address(random)))
        if random.random() < 0.5:
            await bench.run(Command(Opcode.COMMIT, tensor=tensor, frozen=random.randrange(2)))
    await bench.end()
    await bench.check_table(range(1, ENTRIES))
    await bench.end()


@cocotb.test()
async def beats_at_any_time(dut):
    """Beats in every cycle, also those in which ADAPT is taken, checked and refused."""
    bench = await Bench(dut, 2, lookups=0.5, stall=0.5).begin()
    random = bench.random
    bench.noise = 1.0
    for _ in range(300):
        bench.noise = random.choice((1.0, 1.0, 0.5, 0.02))
        tensor = random.choice((1, ENTRIES - 1, 0))
        targets = random_targets(random)
        await bench.run(adapt_command(tensor, targets, random_address(random) | (random.random() < 0.1)))
        for _ in range(random.choice((0, 1, 2, 60))):
            await bench.edge
    bench.noise = 0.0
    await bench.end()


async def hold(bench: Bench, beat: Statistics, cycles: int) -> None:
    """The same beat for many cycles, which the monitor does not watch."""
    bench.drive(beat)
    await Timer(PERIOD * cycles - PERIOD // 2, "ns")
    await bench.edge
    bench.drive(None)
    sums = {name: min(getattr(beat, name) * cycles, COUNT_MAX) for name in COUNTS}
    bench.model.store(Statistics(**sums, top=beat.top, nonfinite=beat.nonfinite))


@cocotb.test(skip=not parameters()["large"])
async def large_counts(dut):
    """Counts up to saturation, and thresholds among them."""
    bench = await Bench(dut, 3, lookups=0.0, stall=0.0).begin()
    random = bench.random
    bench.monitor.cancel()

    async def adapt(targets: Targets) -> None:
        await bench.run(adapt_command(1, targets))
        (word,) = await bench.sink.get(1)
        record = bench.model.adapt(1, targets)
        assert word == int.from_bytes(record, "little"), (unpack(ADAPT_RECORD, word), targets)

    everything = Statistics(zero=BEAT_MAX, underflow=BEAT_MAX, fp8=BEAT_MAX, fp16=BEAT_MAX)
    to_saturate = COUNT_MAX // BEAT_MAX
    for extra in (0, 1, 1000):
        await hold(bench, everything, to_saturate + extra)
        if not extra:
            rest = COUNT_MAX % BEAT_MAX
            await hold(bench, Statistics(rest, rest - 1, rest + 1, rest), 1)
        await adapt(Targets(adapt_hi=True, adapt_lo=True, hi_least=128, hi_most=128, lo_least=85, lo_most=85))
    for _ in range(parameters()["large"]):
        targets = random_targets(random)
        state = random_state(random, targets)
        bench.model.state(1, state)
        await bench.run(state_command(1, state))
        left = asdict(random_statistics(random, targets))
        top, nonfinite = left.pop("top"), left.pop("nonfinite")
        while any(left.values()):
            part = {name: min(BEAT_MAX, value) for name, value in left.items()}
            cycles = min(value // part[name] for name, value in left.items() if value)
            await hold(bench, Statistics(**part, top=top, nonfinite=nonfinite), cycles)
            left = {name: value - cycles * part[name] for name, value in left.items()}
        await hold(bench, Statistics(top=top, nonfinite=nonfinite), 1)
        await adapt(targets)


@cocotb.test()
async def tensors_are_independent(dut):
    """Every entry has a state of its own; a command changes its own entry only."""
    bench = await Bench(dut, 4, stall=0.0).begin()
    random = bench.random
    order = list(range(1, ENTRIES))
    random.shuffle(order)
    for tensor in order:
        await bench.run(state_command(tensor, random_state(random)))
    await bench.end()
    await bench.check_table(order)
    for tensor in random.choices(order, k=12):
        targets = random_targets(random)
        await bench.store(beats_of(random, random_statistics(random, targets, most=500)))
        await bench.run(adapt_command(tensor, targets))
        await bench.end()
    await bench.check_table(order)
    await bench.end()


@cocotb.test()
async def commit_and_frozen(dut):
    """ADAPT changes the next state only; COMMIT takes it over, or with `frozen` drops it."""
    bench = await Bench(dut, 5, lookups=0.0).begin()
    tensor = ENTRIES - 1
    bench.tensors = [tensor]
    up = Targets(adapt_scale=True, adapt_hi=True, top=10, hi_max=31)
    first = ControllerState(-3, 0x0123, 0x4567)
    adapted = ControllerState(7, 0x0123, 0x4667)

    for frozen in (1, 0):
        await bench.run(state_command(tensor, first))
        await bench.store([Statistics(fp16=1, top=20)])
        await bench.run(adapt_command(tensor, up))
        await bench.idle()
        assert await bench.look_up(tensor) == first
        assert await bench.next_states([tensor]) == [adapted]
        await bench.run(Command(Opcode.COMMIT, tensor=tensor, frozen=frozen))
        await bench.idle()
        final = first if frozen else adapted
        assert await bench.look_up(tensor) == final
        assert await bench.next_states([tensor]) == [final]
    await bench.end()


@cocotb.test()
async def lookups_in_every_cycle(dut):
    """A lookup in (almost) every cycle is right; commands wait for a cycle without one."""
    bench = await Bench(dut, 6, lookups=0.95).begin()
    random = bench.random
    bench.tensors = [1, ENTRIES - 1]
    for number in range(300):
        tensor = random.choice(bench.tensors)
        bench.lookups = random.choice((0.95, 0.5))
        targets = random_targets(random)
        await bench.store(beats_of(random, random_statistics(random, targets, most=100)))
        if random.random() < 0.5:
            await bench.run(state_command(tensor, random_state(random)))
        await bench.run(adapt_command(tensor, targets))
        await bench.run(Command(Opcode.COMMIT, tensor=tensor, frozen=number % 3 == 0))
    await bench.idle()
    bench.lookups = 1.0
    await bench.run(Command(Opcode.COMMIT, tensor=1))
    for _ in range(200):
        await bench.edge
        assert bench.in_flight is None or bench.in_flight.cycles < 200
    assert int(dut.busy.value)
    bench.lookups = 0.0
    for _ in range(5):
        await bench.edge
    assert not int(dut.busy.value)
    await bench.end()


@cocotb.test()
async def durations(dut):
    """Cycles of `busy`."""
    bench = await Bench(dut, 7, lookups=0.0, stall=0.0).begin()
    everything = Targets(adapt_scale=True, adapt_hi=True, adapt_lo=True)
    for statistics in (Statistics(fp8=1), Statistics(fp8=1, nonfinite=True), Statistics(zero=9)):
        await bench.store([statistics])
        await bench.run(adapt_command(1, everything))
    await bench.run(state_command(1, LOOP_START))
    await bench.run(Command(Opcode.COMMIT, tensor=1))
    await bench.run(Command(Opcode.COMMIT, tensor=0))
    await bench.end()
    assert [cycles for _, cycles in bench.durations] == [42, 6, 6, 2, 4, 2]


@cocotb.test()
async def malformed_commands(dut):
    """Each rule, and that the nearest command that keeps it runs."""
    bench = await Bench(dut, 8, lookups=0.3).begin()
    random = bench.random
    bench.tensors = [1, ENTRIES - 1]
    for tensor in bench.tensors:
        await bench.run(state_command(tensor, random_state(random)))
    last = ENTRIES - 1
    outside = [0] + [value for value in (ENTRIES, ENTRIES + 1, 255) if ENTRIES <= value <= 255]
    bad, good = [], [Command(Opcode.COMMIT, tensor=last), adapt_command(last), Command(Opcode.STATE, tensor=last)]
    for tensor in outside:
        bad += [Command(opcode, tensor=tensor) for opcode in (Opcode.ADAPT, Opcode.STATE, Opcode.COMMIT)]
    for scale in (65, 127, -65, -128):
        bad.append(Command(Opcode.STATE, tensor=1, scale=scale))
    good += [Command(Opcode.STATE, tensor=1, scale=scale) for scale in (64, -64)]
    for lo, hi in ((1, 0), (0x7FFF, 0x7FFE), (0x4000, 0x3FFF)):
        bad.append(Command(Opcode.STATE, tensor=1, lo=lo, hi=hi))
        good.append(Command(Opcode.STATE, tensor=1, lo=hi, hi=hi))
        good.append(Command(Opcode.STATE, tensor=1, lo=hi, hi=lo))
    for least, most, top in (
        ("hi_least", "hi_most", 255),
        ("lo_least", "lo_most", 255),
        ("hi_min", "hi_max", 31),
        ("lo_min", "lo_max", 31),
    ):
        for value in (0, top // 2, top - 1):
            bad.append(Command(Opcode.ADAPT, tensor=1, **{least: value + 1, most: value}))
            good.append(Command(Opcode.ADAPT, tensor=1, **{least: value + 1, most: value + 1}))
    bad += [Command(Opcode.ADAPT, tensor=1, address=1 << bit) for bit in range(5)]
    bad += [Command(Opcode.ADAPT, tensor=1, address=1 << bit) for bit in range(CONFIG.address_bits, 40)]
    good += [Command(Opcode.ADAPT, tensor=1, address=1 << bit) for bit in (5, CONFIG.address_bits - 1)]
    commands = [(command, Error.FIELD) for command in bad] + [(command, Error.NONE) for command in good]
    others = [opcode for opcode in Opcode if opcode not in (Opcode.ADAPT, Opcode.STATE, Opcode.COMMIT)]
    commands += [(Command(opcode), Error.OPCODE) for opcode in others]
    random.shuffle(commands)
    for command, error in commands:
        bench.errors.clear()
        await bench.store(beats_of(random, random_statistics(random, NO_TARGETS, most=100)))
        await bench.run(command)
        await bench.idle()
        assert bench.errors == ([error.value] if error is not Error.NONE else []), command
    await bench.check_table(range(1, ENTRIES))
    await bench.end()


@cocotb.test()
async def records_wait(dut):
    """A record that is not taken stays as it is, and the block busy, whatever is stored meanwhile."""
    bench = await Bench(dut, 9, lookups=0.5, stall=1.0).begin()
    bench.noise = 0.5
    targets = Targets(adapt_scale=True, adapt_hi=True, adapt_lo=True, top=9, hi_least=30, hi_most=90, hi_max=31)
    await bench.run(adapt_command(1, targets, 0x1240))
    for _ in range(300):
        await bench.edge
    assert int(dut.record__valid.value) and int(dut.busy.value)
    bench.sink.stall = 0.0
    await bench.idle()
    assert len(bench.sink.words) == 1
    fields = RECORD_DTYPE.fields
    assert fields is not None
    for name, place in ADAPT_RECORD:
        assert place.offset == 8 * fields[name][1] and place.width == 8 * fields[name][0].itemsize
    bench.noise = 0.0
    await bench.end()


@cocotb.test()
async def reset(dut):
    """After reset, at once, every state is {0, 0, 0}, and the sums are empty."""
    bench = await Bench(dut, 10, lookups=1.0).begin(wait=False)
    cycles = 0
    while int(dut.busy.value):
        await bench.edge
        cycles += 1
    assert ENTRIES - 2 <= cycles <= ENTRIES + 2
    bench.lookups = 0.3
    tensors = sorted({1, ENTRIES // 2 or 1, ENTRIES - 1})
    for moment in (1, 3, 20, 44):
        for tensor in tensors:
            await bench.run(state_command(tensor, ControllerState(5, 0x111, 0x7777)))
        await bench.store([Statistics(1, 2, 3, 4, 5, True)])
        await bench.run(adapt_command(1))
        for _ in range(moment):
            await bench.edge
        bench.monitor.cancel()
        await bench.edge
        bench = Bench(dut, 10 + moment, lookups=1.0)
        bench.tensors = tensors
        await bench.begin(wait=moment % 2 == 0)
        for _ in range(20):
            await bench.edge
        bench.lookups = 0.3
        await bench.check_table(range(1, ENTRIES))
        await bench.end()


@cocotb.test()
async def convergence(dut):
    """The closed loop of `verif.controller_model` in hardware: the same states, step by step."""
    bench = await Bench(dut, 11, lookups=0.1).begin()
    await bench.run(state_command(1, LOOP_START))
    visited = 0
    for phase, step, state, beats, _ in closed_loop(3, elements=1024):
        await bench.run(Command(Opcode.COMMIT, tensor=1))
        await bench.idle()
        assert await bench.look_up(1) == state, (phase, step)
        await bench.store(beats)
        await bench.run(adapt_command(1, LOOP_TARGETS))
        visited += 1
    assert visited > 50
    await bench.end()
