// Sixteen numbers at a time, whatever the machine's registers hold: 16 lanes (AVX-512), 8 (AVX2), 4 (anything).
//
// Additions, products and quotients round alike on every instruction set, and sums over lanes go in one fixed order, so
// a kernel without `fma` gives the same bits everywhere. Included once by each kernels_*.cpp, under its own flags;
// nothing here has a symbol outside of its file.
#pragma once
#include <math.h>
#include <string.h>

#include "native.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 12;  // MAX_ROWS: rows of a product whose sums fit the registers
#elif defined(__AVX2__)
constexpr int LANES = 8, MAX_ROWS = 2;
#else
constexpr int LANES = 4, MAX_ROWS = 2;
#endif
constexpr int PARTS = 16 / LANES;
constexpr int64_t HALF_ROWS = MAX_ROWS / 2;  // rows of which four sums each fit the registers

// A template over the number of rows, for each number there is.
#if defined(__AVX512F__)
#define HEIGHTS(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}
#else
#define HEIGHTS(f) {f<1>, f<2>}
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH for (int i = 0; i < PARTS; i++)

typedef float FloatPart __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t IntPart __attribute__((vector_size(4 * LANES), may_alias));
typedef uint16_t HalfPart __attribute__((vector_size(2 * LANES), may_alias));
typedef uint8_t BytePart __attribute__((vector_size(LANES), may_alias));

struct Floats { FloatPart part[PARTS]; };
struct Ints { IntPart part[PARTS]; };

INLINE Floats splat(float x) { Floats a; EACH a.part[i] = x - FloatPart{}; return a; }
INLINE Ints splat(int32_t x) { Ints a; EACH a.part[i] = x - IntPart{}; return a; }
INLINE Floats operator+(Floats a, Floats b) { EACH a.part[i] += b.part[i]; return a; }
INLINE Floats operator-(Floats a, Floats b) { EACH a.part[i] -= b.part[i]; return a; }
INLINE Floats operator*(Floats a, Floats b) { EACH a.part[i] *= b.part[i]; return a; }
INLINE Floats operator/(Floats a, Floats b) { EACH a.part[i] /= b.part[i]; return a; }
INLINE Ints operator+(Ints a, Ints b) { EACH a.part[i] += b.part[i]; return a; }
INLINE Ints operator-(Ints a, Ints b) { EACH a.part[i] -= b.part[i]; return a; }
INLINE Ints operator&(Ints a, Ints b) { EACH a.part[i] &= b.part[i]; return a; }
INLINE Ints operator|(Ints a, Ints b) { EACH a.part[i] |= b.part[i]; return a; }
INLINE Ints operator<(Ints a, Ints b) { EACH a.part[i] = a.part[i] < b.part[i]; return a; }
INLINE Ints operator<(Floats a, Floats b) { Ints m; EACH m.part[i] = a.part[i] < b.part[i]; return m; }
INLINE Ints shift_left(Ints a, int n) { EACH a.part[i] <<= n; return a; }
INLINE Ints shift_right(Ints a, int n) { EACH a.part[i] >>= n; return a; }
INLINE Floats select(Ints mask, Floats a, Floats b) { EACH a.part[i] = mask.part[i] ? a.part[i] : b.part[i]; return a; }
INLINE Ints select(Ints mask, Ints a, Ints b) { EACH a.part[i] = mask.part[i] ? a.part[i] : b.part[i]; return a; }
INLINE Floats as_floats(Ints a) { Floats f; EACH f.part[i] = (FloatPart)a.part[i]; return f; }
INLINE Ints as_ints(Floats a) { Ints n; EACH n.part[i] = (IntPart)a.part[i]; return n; }
INLINE Floats to_floats(Ints a) { Floats f; EACH f.part[i] = __builtin_convertvector(a.part[i], FloatPart); return f; }
INLINE float as_float(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE Floats max(Floats a, Floats b) { return select(a < b, b, a); }  // of a NaN and a number, `a`
INLINE Ints max(Ints a, Ints b) { return select(a < b, b, a); }

INLINE Floats load(const float *p) { Floats a; memcpy(&a, p, 64); return a; }
INLINE Ints load(const int32_t *p) { Ints a; memcpy(&a, p, 64); return a; }
INLINE void save(float *p, Floats a) { memcpy(p, &a, 64); }
INLINE Floats load_first(const float *p, int64_t count) {  // zeros behind
    if (count >= 16) return load(p);
    Floats a = splat(0.0f);
    memcpy(&a, p, 4 * count);
    return a;
}
INLINE void save_first(float *p, Floats a, int64_t count) { memcpy(p, &a, count < 16 ? 4 * count : 64); }
INLINE Ints lane() {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(numbers);
}

INLINE float sum(Floats a) {  // halves on halves: lane i with i + 8, then i + 4, i + 2, i + 1
    float x[16];
    save(x, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
INLINE float largest(Floats a) {
    float x[16];
    save(x, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] < x[i + half] ? x[i + half] : x[i];
    return x[0];
}
INLINE int32_t sum(Ints a) {
    int32_t x[16], total = 0;
    memcpy(x, &a, 64);
    for (int i = 0; i < 16; i++) total += x[i];
    return total;
}
INLINE int32_t largest(Ints a) {
    int32_t x[16];
    memcpy(x, &a, 64);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] < x[i + half] ? x[i + half] : x[i];
    return x[0];
}

// a * b + c; rounded once where the machine can, twice on the portable path.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    c.part[0] = (FloatPart)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
    return c;
#elif defined(__FMA__)
    EACH c.part[i] = (FloatPart)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE Floats from_bf16(const uint16_t *p) {
    Floats a;
    EACH {
        HalfPart half;
        memcpy(&half, p + i * LANES, sizeof half);
        a.part[i] = (FloatPart)(__builtin_convertvector(half, IntPart) << 16);
    }
    return a;
}
INLINE void to_bf16(uint16_t *p, Floats a) {  // to nearest, ties to even; NaN stays one
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)a.part[0]);  // takes what is below 1.2e-38 for zero
    memcpy(p, &halves, sizeof halves);
#else
    Ints bits = as_ints(a), magnitude = bits & splat(0x7FFFFFFF);
    Ints rounded = shift_right(bits + splat(0x7FFF) + (shift_right(bits, 16) & splat(1)), 16);
    rounded = select(splat(0x7F800000) < magnitude, splat(0x7FC0), rounded);
    EACH {
        HalfPart half = __builtin_convertvector(rounded.part[i], HalfPart);
        memcpy(p + i * LANES, &half, sizeof half);
    }
#endif
}

INLINE void to_bytes(uint8_t *p, Ints a) {  // the low byte of each
    EACH {
        BytePart bytes = __builtin_convertvector(a.part[i], BytePart);
        memcpy(p + i * LANES, &bytes, sizeof bytes);
    }
}

// Sixteen sums take in four products each: x holds four unsigned bytes (value + 128), w [16][4] signed ones. The sums
// then carry 128 times the weights, which `without_offset` takes off. AVX2 multiplies signed values outright.
INLINE Ints dot_bytes(Ints sums, uint32_t x, const int8_t *w) {
#if defined(__AVX512VNNI__)
    __m512i four = _mm512_set1_epi32((int)x), weight = _mm512_loadu_si512(w);
    sums.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)sums.part[0], four, weight);
#elif defined(__AVX2__)
    __m256i value = _mm256_set1_epi32((int)(x ^ 0x80808080u));
    EACH {
        // |w| * (sign of w) x: two products are at most 32,258, so the 16-bit sums of `maddubs` never saturate.
        __m256i weight = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(value, weight));
        sums.part[i] += (IntPart)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#else
    for (int c = 0; c < 16; c++)
        for (int k = 0; k < 4; k++) sums.part[c / LANES][c % LANES] += (int32_t)((x >> (8 * k)) & 255) * w[4 * c + k];
#endif
    return sums;
}
INLINE Ints without_offset(Ints sums, const int32_t *correction) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    (void)correction;
    return sums;
#else
    return sums - load(correction);
#endif
}

// Sixteen sums take in four products each: x holds four signed bytes, none of them -128, w [16][4] too. The sums begin
// with `signed_offset` of the sum of all x, as AVX-512 multiplies w + 128.
INLINE IntPart byte_of(IntPart a, int k) { return a << (24 - 8 * k) >> 24; }  // signed
INLINE Ints dot_signed(Ints sums, uint32_t x, Ints w) {
#if defined(__AVX512VNNI__)
    const __m512i unsigned_w = _mm512_xor_si512((__m512i)w.part[0], _mm512_set1_epi8((char)0x80));
    sums.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)sums.part[0], unsigned_w, _mm512_set1_epi32((int)x));
#elif defined(__AVX2__)
    EACH {
        const __m256i four = _mm256_sign_epi8(_mm256_set1_epi32((int)x), (__m256i)w.part[i]);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w.part[i]), four);
        sums.part[i] += (IntPart)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#else
    EACH for (int k = 0; k < 4; k++) sums.part[i] += byte_of(w.part[i], k) * (int8_t)(x >> (8 * k));
#endif
    return sums;
}
INLINE int32_t signed_offset(int32_t sum_of_x) {
#if defined(__AVX512VNNI__)
    return -128 * sum_of_x;
#else
    (void)sum_of_x;
    return 0;
#endif
}
// The same where each byte of x is one of 0 to 127, and no offset.
INLINE Ints dot_positive(Ints sums, uint32_t x, Ints w) {
#if defined(__AVX512VNNI__)
    const __m512i four = _mm512_set1_epi32((int)x);
    sums.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)sums.part[0], four, (__m512i)w.part[0]);
#elif defined(__AVX2__)
    EACH {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32((int)x), (__m256i)w.part[i]);
        sums.part[i] += (IntPart)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#else
    sums = dot_signed(sums, x, w);
#endif
    return sums;
}

// Sixteen sums take in two products of bf16 each, the second of the pair first, as `vdpbf16ps` does. A product of two
// bf16 is exact in fp32, so all instruction sets agree (but that `vdpbf16ps` takes what is below 1.2e-38 for zero).
INLINE Floats dot_pairs(Floats sums, uint32_t x, Ints pairs) {
#if defined(__AVX512BF16__)
    sums.part[0] = (FloatPart)_mm512_dpbf16_ps((__m512)sums.part[0], (__m512bh)pairs.part[0],
                                              (__m512bh)_mm512_set1_epi32((int)x));
    return sums;
#else
    Ints high = splat((int32_t)0xFFFF0000u);
    sums = sums + as_floats(pairs & high) * as_floats(splat((int32_t)(x & 0xFFFF0000u)));
    return sums + as_floats(shift_left(pairs, 16)) * as_floats(splat((int32_t)(x << 16)));
#endif
}
INLINE Ints load_pairs(const uint16_t *p) { return load((const int32_t *)p); }
INLINE Ints load_bits(const uint8_t *p) { return load((const int32_t *)p); }

INLINE uint32_t word(const void *p) { uint32_t x; memcpy(&x, p, 4); return x; }

// e^x within 2 units in the last place; e^0 is exactly 1, what is below -87 gives 0, NaN stays NaN (Cody and Waite
// 1980).
INLINE Floats exp(Floats x) {
    Floats clamped = select(splat(88.0f) < x, splat(88.0f), x);
    Floats shifted = fma(clamped, splat(1.44269504f), splat(12582912.0f));  // the integer part is in the low bits
    Floats n = shifted - splat(12582912.0f);
    Floats r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + splat(1.0f);
    Floats power = as_floats(shift_left(as_ints(shifted) - splat(0x4B400000 - 127), 23));
    return select(x < splat(-87.0f), splat(0.0f), p * power);
}

INLINE float exp_of(float x) {
    float y[16];
    save(y, exp(splat(x)));
    return y[0];
}

INLINE Floats tanh(Floats x) {
    Floats e = exp(x + x);
    return splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
}
