"""All proofs, by name."""

from verif.formal import (
    aligner,
    axi_bursts,
    decoder_store,
    encoder_blocks,
    encoder_words,
    exact_sum,
    operand_fetch,
    pe_flags,
    streams,
    zero_skip,
)
from verif.formal.proof import Proof

__all__ = ["PROOFS"]

PROOFS: dict[str, Proof] = {
    proof.name: proof
    for module in (
        streams,
        operand_fetch,
        zero_skip,
        pe_flags,
        exact_sum,
        axi_bursts,
        aligner,
        decoder_store,
        encoder_blocks,
        encoder_words,
    )
    for proof in module.PROOFS
}
