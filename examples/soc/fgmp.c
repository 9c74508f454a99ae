#include "fgmp.h"

#include <math.h>
#include <string.h>

/* `magnitude` without its `shift` lowest bits, to nearest, ties to even. */
static uint32_t rounded(uint32_t magnitude, unsigned shift)
{
    const uint32_t rest = magnitude & ((1u << shift) - 1), half = 1u << (shift - 1);
    const uint32_t kept = magnitude >> shift;
    return kept + (rest > half || (rest == half && (kept & 1)));
}

uint16_t fgmp_to_half(float x)
{
    uint32_t bits, magnitude, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7E00;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x33000000) return (uint16_t)sign;
    if (magnitude >= 0x38800000) return (uint16_t)(sign | rounded(magnitude - 0x38000000, 13));
    return (uint16_t)(sign | rounded((magnitude & 0x7FFFFF) | 0x800000, 126 - (magnitude >> 23))); /* subnormal */
}

uint8_t fgmp_to_e4m3(uint16_t half, int *beyond)
{
    enum { LARGEST = 0x7E, BIAS = 15 - 7 };
    const uint8_t sign = (uint8_t)(half >> 8 & 0x80);
    const uint32_t magnitude = half & 0x7FFF;
    uint32_t code;
    if (magnitude >= (BIAS + 1) << 10) { /* a normal E4M3 number */
        code = rounded(magnitude - (BIAS << 10), 7);
    } else { /* multiples of 2^-9; FP16 numbers are multiples of 2^(exponent - 25) */
        const uint32_t exponent = magnitude >> 10 ? magnitude >> 10 : 1;
        const uint32_t significand = (magnitude & 0x3FF) | (magnitude >> 10 ? 0x400 : 0);
        code = rounded(significand, 16 - exponent);
    }
    *beyond = code > LARGEST;
    return (uint8_t)(sign | (*beyond ? LARGEST : code));
}

unsigned fgmp_encode_block(uint8_t *out, const float *values, const fgmp_policy_t *policy)
{
    enum { DENSE = 0, MASKED = 1, EMPTY = 2, FP8 = 0 << 2, FP16 = 1 << 2, MIXED = 2 << 2, FEW = 3 << 2, MAGIC = 0xA0 };
    uint8_t mask[FGMP_BLOCK / 8] = {0}, precision[FGMP_BLOCK / 8] = {0}, list[FGMP_BLOCK], payload[2 * FGMP_BLOCK];
    unsigned i, count = 0, wide = 0, bytes = 0, length = 1;
    for (i = 0; i < FGMP_BLOCK; ++i) {
        const uint16_t half = fgmp_to_half(ldexpf(values[i], -policy->scale)), magnitude = half & 0x7FFF;
        enum fgmp_choice choice = FGMP_FP16; /* infinity and NaN stay */
        uint8_t code = 0;
        int beyond = 0;
        if (magnitude == 0) continue;
        if (magnitude < 0x7C00) {
            code = fgmp_to_e4m3(half, &beyond);
            if (magnitude < policy->lo) choice = policy->below;
            else if (magnitude > policy->hi || beyond) choice = policy->above;
            else choice = FGMP_FP8;
        }
        if (choice == FGMP_ZERO || (choice == FGMP_FP8 && (code & 0x7F) == 0)) continue;
        if (choice == FGMP_FP16) {
            precision[count / 8] |= (uint8_t)(1u << count % 8);
            list[wide++] = (uint8_t)count;
            payload[bytes++] = (uint8_t)half;
            payload[bytes++] = (uint8_t)(half >> 8);
        } else {
            payload[bytes++] = code;
        }
        mask[i / 8] |= (uint8_t)(1u << i % 8);
        ++count;
    }
    if (count == 0) {
        out[0] = MAGIC | EMPTY;
        return 1;
    }
    out[0] = MAGIC | (count == FGMP_BLOCK ? DENSE : MASKED);
    if (count < FGMP_BLOCK) {
        memcpy(out + length, mask, sizeof mask);
        length += sizeof mask;
    }
    if (wide == 0 || wide == count) {
        out[0] |= wide ? FP16 : FP8;
    } else if (wide < (count + 7) / 8) {
        out[0] |= FEW;
        list[wide - 1] |= 0x80;
        memcpy(out + length, list, wide);
        length += wide;
    } else {
        out[0] |= MIXED;
        memcpy(out + length, precision, (count + 7) / 8);
        length += (count + 7) / 8;
    }
    memcpy(out + length, payload, bytes);
    return length + bytes;
}
