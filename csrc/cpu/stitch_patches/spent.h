// What the layers of each kind took, measured by the threads that computed them.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/intrinsics.h"

namespace fastroute {
namespace {

// A clock that may be read often; what it counts is of no matter, only ratios are.
inline int64_t ticks() {
#if FASTROUTE_X86
    return static_cast<int64_t>(__rdtsc());
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// What the threads measured: ticks in the layers of each kind, and in everything else.
struct Spent {
    std::mutex lock;
    std::vector<int64_t> ticks;  // [kinds + 1]

    void add(const std::vector<int64_t>& layers, int64_t all) {
        const std::lock_guard guard(lock);
        for (size_t kind = 0; kind < layers.size(); ++kind) {
            ticks[kind] += layers[kind];
            all -= layers[kind];
        }
        ticks.back() += all;
    }
};

}  // namespace
}  // namespace fastroute
