"""The register map as SystemRDL 2.0."""

from lnpu.config import ChipConfig
from lnpu.ctrl.counters import COUNTERS
from lnpu.ctrl.registers import COUNTER_BASE, REGISTERS, Field

__all__ = ["system_rdl"]

_ACCESS = {
    "r": "sw = r; hw = w;",
    "rw": "sw = rw; hw = r;",
    "w1c": "sw = rw; onwrite = woclr; hw = w;",
    "w": "sw = w; hw = r; singlepulse;",
}


def system_rdl(config: ChipConfig) -> str:
    """An address map `lnpu` of all registers of this configuration.

    Constant fields have their values as resets, all others reset to 0. A 64-bit counter is two registers, NAME_LOW and
    NAME_HIGH, because the bus is 32 bits wide.
    """
    lines = [
        f"// Registers of LNPU, configuration {config.name}. Generated: do not edit.",
        "addrmap lnpu {",
        '    name = "LNPU";',
        '    desc = "Registers of the LNPU training processor (AXI4-Lite, 32 bits). Accesses to other addresses, and '
        'writes to read-only registers, answer SLVERR.";',
        "    default regwidth = 32;",
        "    default accesswidth = 32;",
    ]
    for name, register in REGISTERS.items():
        lines += ["", "    reg {", f'        name = "{name}";', f'        desc = "{_text(register.doc)}";']
        lines += [f"        {_field(field, config)}" for field in register.fields]
        lines.append(f"    }} {name} @ {register.offset:#05x};")
    for index, (name, doc) in enumerate(COUNTERS.items()):
        for half, part in enumerate(("LOW", "HIGH")):
            lines += [
                "",
                "    reg {",
                f'        name = "{name}, {part.lower()} word";',
                f'        desc = "{_text(doc)}";',
                "        field { sw = r; hw = w; } value[31:0] = 32'h0;",
                f"    }} COUNTER_{name.upper()}_{part} @ {COUNTER_BASE + 8 * index + 4 * half:#05x};",
            ]
    return "\n".join([*lines, "};", ""])


def _field(field: Field, config: ChipConfig) -> str:
    reset = field.constant(config) if field.constant else 0
    access = "sw = r; hw = na;" if field.constant else _ACCESS[field.access]
    place = f"[{field.low + field.width - 1}:{field.low}]"
    return f'field {{ {access} desc = "{_text(field.doc)}"; }} {field.name}{place} = {field.width}\'h{reset:X};'


def _text(doc: str) -> str:
    return doc.replace("\\", "\\\\").replace('"', '\\"')
