"""C headers (C99, and C++) of the commands and of a configuration."""

from dataclasses import asdict, fields
from enum import Enum

from amaranth.hdl import Shape

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, LAYOUTS, Opcode, Target, Unit, VectorOp
from lnpu.ctrl.counters import COUNTERS
from lnpu.formats import TensorKind
from lnpu.interfaces import Error

__all__ = ["command_fields", "commands_header", "config_header"]

_ENUMS: dict[str, type[Enum]] = {
    "OPCODE": Opcode,
    "UNIT": Unit,
    "TARGET": Target,
    "VECTOR_OP": VectorOp,
    "KIND": TensorKind,
    "ERROR": Error,
}

_HELPERS = """
/* A command as it lies in memory. */
typedef struct { uint8_t bytes[LNPU_COMMAND_BYTES]; } lnpu_command_t;

/* The command of an opcode, all other fields zero. */
static inline lnpu_command_t lnpu_command(uint8_t opcode)
{
    lnpu_command_t command = {{0}};
    command.bytes[0] = opcode;
    return command;
}

/* Sets bits offset to offset + width - 1; returns 0 if the value does not fit, and then changes nothing. */
static inline int lnpu_command_set(lnpu_command_t *command, unsigned offset, unsigned width, int is_signed,
                                   int64_t value)
{
    unsigned i;
    if (width < 64) {
        const int64_t low = is_signed ? -((int64_t)1 << (width - 1)) : 0;
        const int64_t high = ((int64_t)1 << (is_signed ? width - 1 : width)) - 1;
        if (value < low || value > high) return 0;
    }
    for (i = 0; i < width; ++i) {
        const uint8_t bit = (uint8_t)(1u << ((offset + i) & 7));
        uint8_t *byte = &command->bytes[(offset + i) >> 3];
        *byte = (uint8_t)(((uint64_t)value >> i) & 1 ? *byte | bit : *byte & ~bit);
    }
    return 1;
}

/* Bits offset to offset + width - 1, with the sign extended. */
static inline int64_t lnpu_command_get(const lnpu_command_t *command, unsigned offset, unsigned width, int is_signed)
{
    uint64_t value = 0;
    unsigned i;
    for (i = 0; i < width; ++i)
        value |= (uint64_t)(command->bytes[(offset + i) >> 3] >> ((offset + i) & 7) & 1) << i;
    if (is_signed && width < 64 && value >> (width - 1)) value |= ~(uint64_t)0 << width;
    return (int64_t)value;
}

/* LNPU_SET(&command, LOAD, SLOTS, address) and LNPU_GET(&command, LOAD, SLOTS). */
#define LNPU_SET(command, opcode, field, value) \\
    lnpu_command_set(command, LNPU_##opcode##__##field##_OFFSET, LNPU_##opcode##__##field##_WIDTH, \\
                     LNPU_##opcode##__##field##_SIGNED, (int64_t)(value))
#define LNPU_GET(command, opcode, field) \\
    lnpu_command_get(command, LNPU_##opcode##__##field##_OFFSET, LNPU_##opcode##__##field##_WIDTH, \\
                     LNPU_##opcode##__##field##_SIGNED)
"""


def command_fields(opcode: Opcode) -> list[tuple[str, int, int, bool]]:
    """Name, offset, width (bits) and signedness of each field; of more than 64 bits: NAME_0, NAME_1, ..."""
    result = []
    for name, place in LAYOUTS[opcode]:
        signed = Shape.cast(place.shape).signed
        if place.width <= 64:
            result.append((name.upper(), place.offset, place.width, signed))
        else:
            result += [
                (f"{name.upper()}_{low // 64}", place.offset + low, min(64, place.width - low), signed)
                for low in range(0, place.width, 64)
            ]
    return result


def commands_header() -> str:
    """`lnpu_commands.h`: opcodes, field positions, functions that set and get fields, for all configurations."""
    lines = [
        "/* Commands of LNPU. Generated: do not edit. */",
        "#ifndef LNPU_COMMANDS_H",
        "#define LNPU_COMMANDS_H",
        "",
        "#include <stdint.h>",
        "",
        f"#define LNPU_COMMAND_BYTES {COMMAND_BYTES}",
    ]
    for prefix, kind in _ENUMS.items():
        lines += ["", *(f"#define LNPU_{prefix}_{item.name} {item.value}" for item in kind)]
    lines.append(_HELPERS)
    for opcode in Opcode:
        lines.append(f"/* {opcode.name} */")
        for name, offset, width, signed in command_fields(opcode):
            prefix = f"#define LNPU_{opcode.name}__{name}"
            lines += [f"{prefix}_OFFSET {offset}", f"{prefix}_WIDTH {width}", f"{prefix}_SIGNED {int(signed)}"]
        lines.append("")
    return "\n".join([*lines, "#endif", ""])


def config_header(config: ChipConfig) -> str:
    """`lnpu_config.h`: every count and width of a configuration, and the number of counters."""
    values = {name: int(value) for name, value in asdict(config).items() if name != "name"}
    assert len(values) == len(fields(ChipConfig)) - 1
    return "\n".join(
        [
            f"/* LNPU, configuration {config.name}. Generated: do not edit. */",
            "#ifndef LNPU_CONFIG_H",
            "#define LNPU_CONFIG_H",
            "",
            f'#define LNPU_CONFIG_NAME "{config.name}"',
            *(f"#define LNPU_CONFIG_{name.upper()} {value}" for name, value in values.items()),
            f"#define LNPU_CONFIG_COUNTERS {len(COUNTERS)}",
            "",
            "#endif",
            "",
        ]
    )
