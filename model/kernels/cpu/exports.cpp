// The C interface: what `library.py` calls.
#include "step.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// The best instruction set of this machine is the last: 0 portable, 1 AVX2, 2 AVX-512 with VNNI and bf16.
EXPORT int32_t native_instruction_sets() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    for (bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                     __builtin_cpu_supports("avx512vl") != 0, __builtin_cpu_supports("avx512dq") != 0,
                     __builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx512bf16") != 0})
        if (!has) return 2;
    return 3;
#else
    return 1;
#endif
}

EXPORT const Kernels *native_kernels(int32_t instruction_set) {
#if defined(__x86_64__)
    if (instruction_set == 2) return &kernels_avx512;
    if (instruction_set == 1) return &kernels_avx2;
#endif
    return instruction_set == 0 ? &kernels_portable : nullptr;
}

// Null where there is not enough memory.
EXPORT Step *native_create(const Model *model) {
    Step *step = new Step(*model, *native_kernels(model->instruction_set));
    if (step->complete) return step;
    delete step;
    return nullptr;
}
EXPORT void native_destroy(Step *step) { delete step; }
EXPORT const float *native_hidden(const Step *step) { return step->hidden; }
EXPORT void native_step(Step *step, const Batch *batch, Verdict *verdict) {
    *verdict = check(step->model, *batch);
    if (verdict->refusal == TAKEN) step->run(*batch);
}
EXPORT void native_head(Step *step, const float *hidden, int64_t stride, int64_t count, float *logits) {
    step->run_head(hidden, stride, nullptr, count, logits);
}
