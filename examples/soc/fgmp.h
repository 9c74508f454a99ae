/* FGMP in C: encoded blocks of zeros, FP8 (OCP E4M3) and FP16 elements, for tensors that the host writes.
 * The formats are those of docs/architecture.md. */
#ifndef FGMP_H
#define FGMP_H

#include <stdint.h>

#define FGMP_BLOCK 64 /* elements */
#define FGMP_SLOT_BYTES 160

/* What becomes of magnitudes below `lo` and above `hi`. */
enum fgmp_choice { FGMP_FP16, FGMP_FP8, FGMP_ZERO };

typedef struct {
    int scale;       /* elements are x * 2^-scale */
    uint16_t lo, hi; /* FP16 patterns without sign, lo <= hi */
    enum fgmp_choice below, above;
} fgmp_policy_t;

/* IEEE binary16 of x, to nearest, ties to even. */
uint16_t fgmp_to_half(float x);

/* E4M3 of a finite FP16 pattern, to nearest, ties to even, saturated to +-448; `*beyond`: it would have been more. */
uint8_t fgmp_to_e4m3(uint16_t half, int *beyond);

/* Encode 64 values into at most 145 bytes; returns the length. */
unsigned fgmp_encode_block(uint8_t *out, const float *values, const fgmp_policy_t *policy);

#endif
