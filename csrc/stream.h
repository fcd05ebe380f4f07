// Non-temporal stores: writing past the caches. An ordinary store to a line that is not cached reads that line
// from memory first, and evicts another one.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "vec.h"

namespace fastpref {

// From how many bytes on an output is written past the caches: it would not stay in them.
constexpr int64_t PAST_CACHES = int64_t(1) << 25;

// to = from; past the caches where `to` is at a multiple of 16 bytes.
template <class T> FP_INLINE void stream(T* to, const T* from, int64_t count) {
    int64_t j = 0;
#if defined(__SSE2__)
    constexpr int64_t WIDTH = 16 / sizeof(T);
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0)
        for (; j + WIDTH <= count; j += WIDTH) {
            __m128i bytes;
            std::memcpy(&bytes, from + j, sizeof bytes);
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), bytes);
        }
#endif
    for (; j < count; ++j) to[j] = from[j];
}

// A fence (sfence): streamed data are visible to other threads before anything that this thread writes
// afterwards, such as the barrier at the end of a parallel region.
inline void streamed() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace fastpref
