// Runs of memory, copied and asked for: in whole vectors, past the caches, or ahead of their use.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/isa.h"

namespace fastroute {

constexpr int64_t kLine = 64;  // bytes of a cache line

// memcpy past the caches, for output larger than they are: the old content of its lines is then not read first.
inline void stream_copy(void* target, const void* source, int64_t bytes) {
#if defined(__SSE2__)
    char* to = static_cast<char*>(target);
    const char* from = static_cast<const char*>(source);
    int64_t head = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(to) % 16) % 16);
    if (head > bytes) head = bytes;
    std::memcpy(to, from, head);
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
        const __m128i* in = reinterpret_cast<const __m128i*>(from + at);
        __m128i* out = reinterpret_cast<__m128i*>(to + at);
        const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2),
                      d = _mm_loadu_si128(in + 3);
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
    }
    std::memcpy(to + at, from + at, bytes - at);
#else
    std::memcpy(target, source, bytes);
#endif
}

// memcpy in whole vectors: rows of a patch are too short for the library's to pay.
FASTROUTE_INLINE void copy_run(void* target, const void* source, int64_t bytes) {
    char* to = static_cast<char*>(target);
    const char* from = static_cast<const char*>(source);
    int64_t at = 0;
    for (; at + kLine <= bytes; at += kLine) std::memcpy(to + at, from + at, kLine);
    for (; at + 16 <= bytes; at += 16) std::memcpy(to + at, from + at, 16);
    if (at < bytes) std::memcpy(to + at, from + at, bytes - at);
}

// Asks for the cache lines of a run that will be read soon. Strided runs of a few lines are beyond the hardware's own
// guesses.
FASTROUTE_INLINE void prefetch_run(const void* source, int64_t bytes) {
    const char* from = static_cast<const char*>(source);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
    __builtin_prefetch(from + bytes - 1);
}

// Makes what stream_copy wrote visible to other threads.
inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace fastroute
