"""Runs the proofs and prints a table: `python -m verif.formal [NAME ...]`."""

import argparse

from rich.console import Console
from rich.table import Column, Table

from verif.formal.proof import check
from verif.formal.proofs import PROOFS


def main() -> int:
    """Run the chosen proofs, and each with its faults; 1 if a property does not hold, or a fault is not found."""
    parser = argparse.ArgumentParser(prog="python -m verif.formal", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROOFS)} (default: all)")
    names = parser.parse_args().names or list(PROOFS)
    if unknown := set(names) - set(PROOFS):
        parser.error(f"no such proof: {', '.join(sorted(unknown))}; there are {', '.join(PROOFS)}")
    console = Console()
    table = Table("proof", "method", "result", "faults found", Column("seconds", justify="right"))
    good = True
    for name in names:
        proof = PROOFS[name]
        console.print(f"{name}: {proof.block}: {proof.statement}", highlight=False, soft_wrap=True)
        result = check(proof)
        found = sum(check(proof, fault=fault).refuted for fault in proof.faults)
        good &= result.proven and found == len(proof.faults)
        outcome = "proven" if result.proven else "REFUTED" if result.refuted else "OPEN"
        extent = (
            f"k = {result.cycles}"
            if proof.method == "induction"
            else f"{result.cycles} cycle{'s' * (result.cycles > 1)}"
        )
        table.add_row(
            name, f"{proof.method}, {extent}", outcome, f"{found} of {len(proof.faults)}", f"{result.seconds:.1f}"
        )
    console.print(table)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
