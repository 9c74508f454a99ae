"""Testbench of the LOAD unit of the dense buffers: what it does, and that it refuses all else."""

from collections import Counter

import cocotb

from lnpu.ctrl.commands import Command, Opcode
from lnpu.interfaces import Error
from verif.load_tb import DENSE, DENSE_LOAD, MASK, MASK_DENSE, SPARSE, VMEM, VMEM_DENSE, Bench


@cocotb.test()
async def random_walks(dut):
    """Random walks, destinations outside the buffer among them, with stalls and latencies."""
    bench = await Bench(dut, 1200).start()
    for number in range(100):
        target = (DENSE, VMEM_DENSE, MASK_DENSE)[number % 3]
        tensor, fields = bench.random_walk(in_range=number % 5 > 1, target=target)
        bench.memory.stall = bench.random.choice([0, 0, 0.3, 0.7])
        bench.memory.latency = int(bench.random.choice([1, 5, 40]))
        await bench.load(tensor, fields, f"walk {number}")


@cocotb.test()
async def refused(dut):
    """Another target or opcode: FIELD once, nothing read or written, the next command works."""
    bench = await Bench(dut, 1300).start()
    for number in range(20):
        for command in (Command(Opcode.LOAD_RAW, address=4096, line_count=1, line_rows=1), None, None, None):
            if command is None:
                tensor, fields = bench.random_walk(target=int(bench.random.choice([SPARSE, VMEM, MASK, DENSE_LOAD])))
                fields = {"slots": tensor.slots, "table": tensor.table, "log2_run": tensor.log2_run} | fields
                command = Command(Opcode.LOAD, **fields)
            await bench.run(command)
            bench.check(([], [], 0, Counter({Error.FIELD: 1}), [], []), {}, f"{command}")
        tensor, fields = bench.random_walk(target=DENSE)
        await bench.load(tensor, fields, f"next {number}")


@cocotb.test()
async def back_to_back(dut):
    """Commands that overlap, refused ones among them."""
    bench = await Bench(dut, 1400).start()
    for number in range(30):
        bench.memory.latency = int(bench.random.choice([1, 5, 40]))
        commands, kinds = [], Counter()
        writes, rows, errors, fetches, table = [], [], Counter(), [], []
        for _ in range(5):
            if bench.random.random() < 0.2:
                commands.append(Command(Opcode.LOAD_RAW, address=4096, line_count=1, line_rows=1))
                errors[Error.FIELD] += 1
                continue
            tensor, fields = bench.random_walk(target=int(bench.random.choice([DENSE, VMEM_DENSE, MASK_DENSE])))
            fields = {"slots": tensor.slots, "table": tensor.table, "log2_run": tensor.log2_run} | fields
            commands.append(Command(Opcode.LOAD, **fields))
            parts = bench.expect(fields, tensor)
            writes += parts[0]
            rows += parts[1]
            kinds[fields["kind"]] += parts[2]
            errors += parts[3]
            fetches += parts[4]
            table += parts[5]
        await bench.run(*commands)
        assert bench.bits == +kinds, f"sequence {number}: {commands}"
        bench.bits = Counter()
        bench.check((writes, rows, 0, errors, fetches, table), {}, f"sequence {number}: {commands}")
