// The kernels, compiled for AVX2 and FMA; the flags are in `build.py`.
#include "attention.h"
#include "linear.h"
#include "rows.h"

extern const Kernels kernels_avx2 = {
    embed, add_scaled, normalize, encode_int8, encode_bf16, linear_int8, linear_bf16, rotate,
    merge, route, likeliest, finish, {kernels_of<Int8Cache>, kernels_of<Bf16Cache>},
};
