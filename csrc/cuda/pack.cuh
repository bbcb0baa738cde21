// Runs of elements in registers, read and written in the widest accesses that their address allows.
#pragma once

#include <cstring>

#include "cuda/launch.h"

namespace fastroute {

template <typename T, int N>
struct Pack {
    T at[N];
};

// Elements of one 16-byte access.
template <typename T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename Word, typename T, int N>
__device__ __forceinline__ Pack<T, N> load_words(const T* from) {
    Pack<T, N> pack;
#pragma unroll
    for (int w = 0; w < static_cast<int>(sizeof(pack) / sizeof(Word)); ++w) {
        const Word word = __ldg(reinterpret_cast<const Word*>(from) + w);
        memcpy(reinterpret_cast<char*>(pack.at) + w * sizeof(Word), &word, sizeof(Word));
    }
    return pack;
}

template <typename Word, typename T, int N>
__device__ __forceinline__ void store_words(T* to, const Pack<T, N>& pack) {
#pragma unroll
    for (int w = 0; w < static_cast<int>(sizeof(pack) / sizeof(Word)); ++w) {
        Word word;
        memcpy(&word, reinterpret_cast<const char*>(pack.at) + w * sizeof(Word), sizeof(Word));
        reinterpret_cast<Word*>(to)[w] = word;
    }
}

// N elements of memory that no kernel running now writes.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
    constexpr int bytes = N * static_cast<int>(sizeof(T));
    const uintptr_t address = reinterpret_cast<uintptr_t>(from);
    if constexpr (bytes % 16 == 0) {
        if (address % 16 == 0) return load_words<uint4, T, N>(from);
    }
    if constexpr (bytes % 8 == 0 && sizeof(T) < 8) {
        if (address % 8 == 0) return load_words<uint2, T, N>(from);
    }
    if constexpr (bytes % 4 == 0 && sizeof(T) < 4) {
        if (address % 4 == 0) return load_words<unsigned, T, N>(from);
    }
    Pack<T, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.at[e] = from[e];
    return pack;
}

// The first `count` of N elements.
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack, int count) {
    constexpr int bytes = N * static_cast<int>(sizeof(T));
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    if (count >= N) {
        if constexpr (bytes % 16 == 0) {
            if (address % 16 == 0) return store_words<uint4>(to, pack);
        }
        if constexpr (bytes % 8 == 0 && sizeof(T) < 8) {
            if (address % 8 == 0) return store_words<uint2>(to, pack);
        }
        if constexpr (bytes % 4 == 0 && sizeof(T) < 4) {
            if (address % 4 == 0) return store_words<unsigned>(to, pack);
        }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
        if (e < count) to[e] = pack.at[e];
    }
}

}  // namespace fastroute
