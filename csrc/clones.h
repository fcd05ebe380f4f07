// One function body, compiled for each instruction set and chosen when it is first asked for.
//
// gcc has an attribute for that, target_clones. clang does not take it for templates, and the loader's
// choice crashes under ThreadSanitizer; this needs neither.
#pragma once
#include "vec.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FP_HAVE_CLONES 1
// The features of x86-64-v3 and x86-64-v4 that code of loops over floats can use.
#define FP_V3 "avx,avx2,fma,bmi,bmi2"
#define FP_V4 FP_V3 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#endif

namespace fastpref {

enum class Isa { baseline, avx2, avx512 };

inline Isa processor_isa() {
#if defined(FP_HAVE_CLONES)
    static const Isa found = [] {
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
        const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
        return v4 ? Isa::avx512 : v3 ? Isa::avx2 : Isa::baseline;
    }();
    return found;
#else
    return Isa::baseline;
#endif
}

template <class Body, class Run = decltype(&Body::run)> struct Clones;
template <class Body, class... A> struct Clones<Body, void (*)(A...)> {
    static void baseline(A... a) { Body::run(a...); }
#if defined(FP_HAVE_CLONES)
    __attribute__((target(FP_V3))) static void avx2(A... a) { Body::run(a...); }
    __attribute__((target(FP_V4))) static void avx512(A... a) { Body::run(a...); }
#endif
};

// Body::run for this processor. Body::run is FP_INLINE, as is whatever it calls in its loops: a function of
// its own would be compiled for the baseline.
template <class Body> auto clone_of() {
    using All = Clones<Body>;
#if defined(FP_HAVE_CLONES)
    switch (processor_isa()) {
        case Isa::avx512: return &All::avx512;
        case Isa::avx2: return &All::avx2;
        default: break;
    }
#endif
    return &All::baseline;
}

}  // namespace fastpref
