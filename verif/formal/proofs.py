"""All proofs, by name."""

from verif.formal import axi_bursts, exact_sum, streams, zero_skip
from verif.formal.proof import Proof

__all__ = ["PROOFS"]

PROOFS: dict[str, Proof] = {
    proof.name: proof for module in (streams, zero_skip, exact_sum, axi_bursts) for proof in module.PROOFS
}
