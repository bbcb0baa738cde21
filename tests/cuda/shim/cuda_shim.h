// Lets a C++ compiler build the kernels of csrc/cuda and run them on the CPU: test-only. A block runs as fibers of one
// thread (fibers.h), or with FASTROUTE_SHIM_THREADS as threads of the system (threads.h). Blocks of a launch run one
// after the other in fibers, and without any order between them in threads. What a GPU leaves undefined is made to
// fail: shared memory starts as NaN, deadlocks and oversized launches abort.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif
#if defined(__SANITIZE_THREAD__)
#define SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SHIM_UNSEEN
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace shim {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxShared = 227 << 10;
constexpr int64_t kRedZone = 64;
// Few, so that blocks that stay take several turns.
#if defined(FASTROUTE_SHIM_THREADS)
constexpr int kMultiprocessors = 1;
#else
constexpr int kMultiprocessors = 2;
#endif

// Shared memory that a block may ask for; SHIM_SHARED_KIB stands for devices that have more or less.
inline int64_t max_shared_bytes() {
    const char* kib = std::getenv("SHIM_SHARED_KIB");
    return (kib == nullptr ? 99 : std::atoll(kib)) << 10;
}

[[noreturn]] inline void die(const char* what) {
    std::fprintf(stderr, "cuda shim: %s\n", what);
    std::fflush(stderr);
    std::abort();
}

// Shared memory of one block: the dynamic part, then each variable as the first thread reaches it. Gaps are poisoned.
class Arena {
  public:
    Arena() : bytes_(kMaxShared + 64 * kRedZone) {}
    ~Arena() { ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size()); }

    void reset(int64_t dynamic_bytes) {
        ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size());
        // 0xFF is NaN in every floating type and -1 in integers. Only what was used must be filled again.
        std::memset(bytes_.data(), 0xff, count_ < 0 ? bytes_.size() : used_ + 128);
        ASAN_POISON_MEMORY_REGION(bytes_.data(), bytes_.size());
        count_ = 0, used_ = 0, total_ = 0;
        dynamic_ = carve(dynamic_bytes);
    }

    void* dynamic() const { return dynamic_; }

    // The variable that `key` stands for. Unseen by ThreadSanitizer: on a GPU this is no synchronisation.
    SHIM_UNSEEN void* variable(const void* key, int64_t bytes) {
        while (__atomic_exchange_n(&lock_, 1, __ATOMIC_ACQUIRE) != 0) {
        }
        int at = 0;
        while (at < count_ && keys_[at] != key) ++at;
        if (at == count_) {
            if (count_ == kVariables) die("too many shared variables in one kernel");
            keys_[at] = key, places_[at] = carve(bytes), ++count_;
        }
        void* place = places_[at];
        __atomic_store_n(&lock_, 0, __ATOMIC_RELEASE);
        return place;
    }

  private:
    static constexpr int kVariables = 32;

    SHIM_UNSEEN void* carve(int64_t bytes) {
        total_ += (bytes + 15) / 16 * 16;
        if (total_ > kMaxShared) die("a block uses more shared memory than any device has");
        // Aligned to 128 bytes as the largest alignment that device code may ask for.
        used_ = (used_ + kRedZone + 127) / 128 * 128;
        char* place = base() + used_;
        used_ += bytes;
        ASAN_UNPOISON_MEMORY_REGION(place, bytes);
        return place;
    }
    char* base() { return bytes_.data() + (128 - reinterpret_cast<uintptr_t>(bytes_.data()) % 128) % 128; }

    std::vector<char> bytes_;
    const void* keys_[kVariables];
    void* places_[kVariables];
    void* dynamic_ = nullptr;
    int count_ = -1, lock_ = 0;  // -1: never filled
    int64_t used_ = 0, total_ = 0;
};

inline int64_t launches = 0;

struct Shape {
    dim3 grid, block;
    int64_t shared_bytes;
};

}  // namespace shim

#if defined(FASTROUTE_SHIM_THREADS)
#include "threads.h"
#else
#include "fibers.h"
#endif

#define threadIdx (::shim::self->thread)
#define blockIdx (::shim::self->block->index)
#define blockDim (::shim::self->block->shape.block)
#define gridDim (::shim::self->block->shape.grid)
#define warpSize (::shim::kWarp)

// A shared variable or array: FASTROUTE_SHARED(float, tile, [8][33]).
#define FASTROUTE_SHARED(type, name, ...) \
    static const char name##_key = 0;     \
    using name##_type = type __VA_ARGS__; \
    name##_type& name =                   \
        *static_cast<name##_type*>(::shim::self->block->arena->variable(&name##_key, sizeof(name##_type)))
#define FASTROUTE_DYNAMIC_SHARED(type, name) \
    type* const name = static_cast<type*>(::shim::self->block->arena->dynamic())

#include "cuda_warp.h"

inline void __syncthreads() { ::shim::self->block->barrier.wait(); }
inline int __syncthreads_or(int predicate) {
    FASTROUTE_SHARED(unsigned, any, );
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) any = 0;
    __syncthreads();
    if (predicate != 0) __atomic_fetch_or(&any, 1u, __ATOMIC_RELAXED);
    __syncthreads();
    const int result = static_cast<int>(__atomic_load_n(&any, __ATOMIC_RELAXED));
    __syncthreads();
    return result;
}
