"""The proofs that take seconds, and that a defect of the block refutes each (see `verif/plans/formal.md`)."""

import pytest

from verif.formal.proof import Proof, check
from verif.formal.proofs import PROOFS

QUICK = [proof for proof in PROOFS.values() if proof.quick]


@pytest.mark.parametrize("proof", QUICK, ids=lambda proof: proof.name)
def test_holds(proof):
    result = check(proof)
    assert result.proven and not result.refuted


@pytest.mark.parametrize(
    "proof, fault",
    [pytest.param(proof, fault, id=f"{proof.name}-{fault.signal}") for proof in QUICK for fault in proof.faults],
)
def test_fault_is_found(proof, fault):
    result = check(proof, fault=fault)
    assert result.refuted and not result.proven


def test_every_proof_has_a_fault():
    assert all(proof.faults for proof in PROOFS.values())


@pytest.mark.parametrize("change, message", [({"method": "guess"}, "induction, bounded"), ({"depth": 0}, "at least 1")])
def test_bad_proofs_are_refused(change, message):
    fields = {"name": "x", "block": "x", "statement": "x", "harness": None, "method": "bounded", "depth": 1}
    with pytest.raises(ValueError, match=message):
        Proof(**{**fields, **change})
