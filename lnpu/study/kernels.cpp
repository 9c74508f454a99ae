// What happens to a tensor when it is stored: a pointwise formula, RNE to FP16, FGMP, and statistics, in one pass.
// Compiled and called by kernels.py. No floating-point contraction: every step is one FP32 operation (docs/training.md).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int BLOCK = 64;
constexpr int PADDINGS = 5;
constexpr int PADDING[PADDINGS] = {2, 4, 8, 16, 32};

constexpr int32_t INFINITE = 0x7F800000, NOT_A_NUMBER = 0x7FC00000;
constexpr int32_t F16_NORMAL = 0x38800000;   // 2^-14
constexpr int32_t F16_BEYOND = 0x47800000;   // 65536, what rounds beyond 65504
constexpr int32_t E4M3_NORMAL = 0x3C800000;  // 2^-6
constexpr int32_t E4M3_MOST = 0x43E00000;    // 448

inline int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }
inline float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }

}  // namespace

extern "C" {

// The formula: [keep where mask > 0] of [max(., 0)] of a x + (b [y] + c), by `form`.
enum Form : int32_t { COPY = 0, AFFINE = 1, NORM_GRADIENT = 2, SUM = 3 };

struct Source {
    const float *x, *y, *mask;     // y and mask may be null
    const float *a, *b, *c;        // a value a channel
    int32_t form, rectify;
};

struct Policy {
    int32_t quantise;     // 0: plain FP32
    int32_t scale;
    int32_t lo, hi;      // FP32 patterns of the limits
    int32_t below, above;  // 0 fp16, 1 fp8, 2 zero
};

struct Shape {
    int64_t segments, segment;  // a block never crosses the end of a segment of elements
    int64_t run;                // elements of a block that are not padding, at most
    int64_t channels;
};

struct Result {
    int64_t zero, underflow, fp8, fp16;
    int64_t blocks, masked, mixed;
    int64_t payload, precision;   // bytes
    int64_t padded[PADDINGS];     // bytes with every block padded to a multiple of PADDING
    int32_t top, nonfinite;
};

}  // extern "C"

namespace {

struct Counts {
    int32_t zero = 0, fp8 = 0, fp16 = 0;
    int32_t top = 0, greatest = 0;
};

inline void load(const Source &s, int64_t base, int64_t place, int n, float *__restrict__ out) {
    const float *x = s.x + base;
    const float *y = s.y ? s.y + base : nullptr;
    switch (s.form) {
    case AFFINE: {
        const float *a = s.a + place, *b = s.b + place;
        for (int i = 0; i < n; i++) out[i] = a[i] * x[i] + b[i];
        if (y)
            for (int i = 0; i < n; i++) out[i] = out[i] + y[i];
        break;
    }
    case NORM_GRADIENT: {
        const float *a = s.a + place, *b = s.b + place, *c = s.c + place;
        for (int i = 0; i < n; i++) out[i] = a[i] * x[i] + (b[i] * y[i] + c[i]);
        break;
    }
    case SUM:
        for (int i = 0; i < n; i++) out[i] = x[i] + y[i];
        break;
    default:
        std::memcpy(out, x, 4 * n);
    }
    if (s.rectify)  // NaN stays
        for (int i = 0; i < n; i++) out[i] = out[i] <= 0.0f ? 0.0f : out[i];
    if (s.mask) {
        const float *mask = s.mask + base;
        for (int i = 0; i < n; i++) out[i] = mask[i] > 0.0f ? out[i] : 0.0f;
    }
}

struct Factors {
    float down, down_rest, up;
};

template <int N>
inline Counts quantise(const float *__restrict__ x, float *__restrict__ out, float *__restrict__ rounded, int n,
                       const Policy &policy, const Factors &factors) {
    const int count = N ? N : n;
    const int32_t lo = policy.lo, hi = policy.hi;
    const int32_t below8 = -(policy.below == 1), below0 = -(policy.below == 2), above8 = -(policy.above == 1);
    const float down = factors.down, rest = factors.down_rest, up = factors.up;
    // Loops apart and booleans as all-ones masks: what GCC vectorises.
    alignas(64) int32_t magnitude[BLOCK], is16[BLOCK], is8[BLOCK];
    for (int i = 0; i < count; i++) {
        const int32_t scaled = bits_of(x[i] * down * rest);
        const int32_t m = scaled & 0x7FFFFFFF;
        // FP16: RNE to 10 bits of fraction, to multiples of 2^-24 below 2^-14 (the spacing of FP32 at 0.5).
        const int32_t fraction = (static_cast<uint32_t>(m) + 0xFFF + ((m >> 13) & 1)) & ~0x1FFF;
        const int32_t tiny = bits_of((float_of(m) + 0.5f) - 0.5f);
        int32_t r = m < F16_NORMAL ? tiny : fraction;
        r = r >= F16_BEYOND ? INFINITE : r;
        r = m > INFINITE ? NOT_A_NUMBER : r;
        magnitude[i] = r;
        rounded[i] = float_of((m > INFINITE ? 0 : scaled & ~0x7FFFFFFF) | r);
    }
    for (int i = 0; i < count; i++) {
        const int32_t r = magnitude[i], sign = bits_of(rounded[i]) & ~0x7FFFFFFF;
        // E4M3: to 3 bits of fraction, to multiples of 2^-9 below 2^-6 (the spacing of FP32 at 16384).
        const int32_t fraction = (r + 0x7FFFF + ((r >> 20) & 1)) & ~0xFFFFF;
        const int32_t tiny = bits_of((float_of(r) + 16384.0f) - 16384.0f);
        int32_t q = r < E4M3_NORMAL ? tiny : fraction;
        const int32_t fits = q <= E4M3_MOST ? -1 : 0;
        q = q <= E4M3_MOST ? q : E4M3_MOST;
        const int32_t under = r < lo ? -1 : 0, over = (r > hi ? -1 : 0) & ~under, inside = ~(under | over);
        const int32_t finite = r < INFINITE ? -1 : 0;
        const int32_t as8 = finite & ((under & below8) | (inside & (fits | above8)) | (over & above8));
        const int32_t kept = ((q & as8) | (r & ~as8)) & ~(finite & under & below0);
        const int32_t nonzero = kept != 0 ? -1 : 0;
        is8[i] = as8 & nonzero;
        is16[i] = ~as8 & nonzero;
        out[i] = float_of(bits_of(float_of(sign | kept) * up) & nonzero);
    }
    int32_t zero = 0, fp8 = 0, fp16 = 0, top = 0, greatest = 0;
    for (int i = 0; i < count; i++) {
        const int32_t r = magnitude[i], finite = r < INFINITE ? r : 0;
        zero -= r == 0 ? -1 : 0;
        fp8 -= is8[i];
        fp16 -= is16[i];
        top = top > finite ? top : finite;
        greatest = greatest > r ? greatest : r;
    }
    return {zero, fp8, fp16, top, greatest};
}

template <int N>
inline Counts copy(const float *__restrict__ x, float *__restrict__ out, int n) {
    const int count = N ? N : n;
    int32_t zero = 0;
    int32_t greatest = 0;
    for (int i = 0; i < count; i++) {
        zero += x[i] == 0.0f;
        const int32_t m = bits_of(x[i]) & 0x7FFFFFFF;
        greatest = greatest > m ? greatest : m;
        out[i] = x[i];
    }
    return {zero, 0, 0, 0, greatest};
}

template <int N>
inline void add_sums(const float *__restrict__ v, int n, double *__restrict__ s1, double *__restrict__ s2) {
    const int count = N ? N : n;
    for (int i = 0; i < count; i++) {
        const double d = v[i];
        s1[i] += d;
        s2[i] += d * d;
    }
}

std::vector<float> tiled(const float *vector, int64_t channels, int64_t places) {
    std::vector<float> out;
    if (vector)
        for (int64_t i = 0; i < places; i++) out.push_back(vector[i % channels]);
    return out;
}

// Size of an encoded block with these non-zeros (docs/architecture.md, Encoded tensors in memory).
inline void measure(int nonzero, int fp16, Result &result) {
    const int masked = nonzero != 0 && nonzero != BLOCK, mixed = fp16 != 0 && fp16 != nonzero;
    // A byte for each FP16 element, or a bit for each non-zero, whichever is shorter.
    const int precision = mixed ? std::min(fp16, (nonzero + 7) / 8) : 0, payload = nonzero + fp16;
    const int bytes = 1 + 8 * masked + precision + payload;
    result.blocks++;
    result.masked += masked;
    result.mixed += mixed;
    result.precision += precision;
    result.payload += payload;
    for (int p = 0; p < PADDINGS; p++) result.padded[p] += (bytes + PADDING[p] - 1) & ~(PADDING[p] - 1);
}

}  // namespace

extern "C" {

// Stores source to out (which may be one of its tensors). sums: null, or [2, channels] sums of the values rounded to
// FP16, and of their squares.
void lnpu_store(const Source *given, float *out, const Shape *shape, const Policy *policy, Result *result, double *sums) {
    const int64_t channels = shape->channels, places = std::max(channels, shape->run);
    Source source = *given;
    const std::vector<float> a = tiled(given->a, channels, places), b = tiled(given->b, channels, places),
                             c = tiled(given->c, channels, places);
    source.a = a.data(), source.b = b.data(), source.c = c.data();
    const int half = policy->scale / 2;
    const Factors factors{std::ldexp(1.0f, -half), std::ldexp(1.0f, half - policy->scale),
                          std::ldexp(1.0f, policy->scale)};
    std::vector<double> totals(sums ? 2 * places : 0);
    alignas(64) float x[BLOCK], rounded[BLOCK];
    std::memset(static_cast<void *>(result), 0, sizeof *result);
    int32_t top = 0, greatest = 0;
    for (int64_t s = 0; s < shape->segments; s++) {
        for (int64_t start = 0; start < shape->segment; start += shape->run) {
            const int n = static_cast<int>(std::min(shape->run, shape->segment - start));
            const int64_t base = s * shape->segment + start;
            const int64_t place = channels > shape->run ? base % channels : 0;
            if (n == BLOCK)
                load(source, base, place, BLOCK, x);
            else
                load(source, base, place, n, x);
            const float *before = policy->quantise ? rounded : x;
            Counts counts;
            if (policy->quantise)
                counts = n == BLOCK ? quantise<BLOCK>(x, out + base, rounded, n, *policy, factors)
                                    : quantise<0>(x, out + base, rounded, n, *policy, factors);
            else
                counts = n == BLOCK ? copy<BLOCK>(x, out + base, n) : copy<0>(x, out + base, n);
            if (sums) {
                double *s1 = totals.data() + place, *s2 = s1 + places;
                if (n == BLOCK)
                    add_sums<BLOCK>(before, n, s1, s2);
                else
                    add_sums<0>(before, n, s1, s2);
            }
            top = std::max(top, counts.top);
            greatest = std::max(greatest, counts.greatest);
            result->zero += counts.zero;
            result->fp8 += counts.fp8;
            result->fp16 += counts.fp16;
            if (policy->quantise) {
                result->underflow += n - counts.zero - counts.fp8 - counts.fp16;
                measure(counts.fp8 + counts.fp16, counts.fp16, *result);
            }
        }
    }
    // The exponent field that FP16 has: 0 for subnormals.
    result->top = top < F16_NORMAL ? 0 : static_cast<int32_t>(top >> 23) - 127 + 15;
    result->nonfinite = greatest >= INFINITE;
    if (!sums) return;
    const int scale = policy->quantise ? policy->scale : 0;
    std::fill(sums, sums + 2 * channels, 0.0);
    for (int64_t i = 0; i < places; i++) {
        sums[i % channels] += std::ldexp(totals[i], scale);
        sums[channels + i % channels] += std::ldexp(totals[places + i], 2 * scale);
    }
}

// sums: [2, channels], of x and of x * y. One accumulator for each of 64 places or more, so that they are in step.
void lnpu_sums(const float *x, const float *y, int64_t elements, int64_t channels, double *sums) {
    const int64_t places = channels * std::max<int64_t>(1, BLOCK / channels);
    std::vector<double> totals(2 * places);
    double *__restrict__ s1 = totals.data(), *__restrict__ s2 = s1 + places;
    for (int64_t base = 0; base < elements; base += places) {
        const int64_t n = std::min(places, elements - base);
        for (int64_t i = 0; i < n; i++) {
            const double d = x[base + i];
            s1[i] += d;
            s2[i] += d * y[base + i];
        }
    }
    std::fill(sums, sums + 2 * channels, 0.0);
    for (int64_t i = 0; i < places; i++) {
        sums[i % channels] += s1[i];
        sums[channels + i % channels] += s2[i];
    }
}

// Update of weights w and momentum m by gradient g.
void lnpu_sgd(float *__restrict__ w, float *__restrict__ m, const float *__restrict__ g, int64_t n, float inv_loss_scale,
              float decay, float momentum, float rate) {
    for (int64_t i = 0; i < n; i++) {
        const float d = g[i] * inv_loss_scale + w[i] * decay;
        m[i] = m[i] * momentum + d;
        w[i] = w[i] - m[i] * rate;
    }
}

}  // extern "C"
