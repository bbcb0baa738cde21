// Instruction sets chosen at run time: a kernel body is an always-inlined template, compiled once per instruction set.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

#define FASTROUTE_INLINE inline __attribute__((always_inline))

// FASTROUTE_PORTABLE builds as on any other processor: the sanitizers' builds in the tests take half as long.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTROUTE_PORTABLE)
#define FASTROUTE_X86 1
#define FASTROUTE_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define FASTROUTE_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")))
#define FASTROUTE_AVX512_BF16 \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#else
#define FASTROUTE_X86 0
#endif

namespace fastroute {

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set of this processor, or a narrower one that FASTROUTE_ISA=baseline|avx2|avx512 names.
inline Isa active_isa() {
    static const Isa isa = [] {
#if FASTROUTE_X86
        Isa widest = Isa::baseline;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) widest = Isa::avx2;
        if (widest == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            widest = Isa::avx512;
        }
        const char* name = std::getenv("FASTROUTE_ISA");
        if (name != nullptr && std::strcmp(name, "baseline") == 0) return Isa::baseline;
        if (name != nullptr && std::strcmp(name, "avx2") == 0 && widest == Isa::avx512) return Isa::avx2;
        return widest;
#else
        return Isa::baseline;
#endif
    }();
    return isa;
}

// Whether AVX-512 comes with products of bfloat16; FASTROUTE_ISA=avx512 does without.
inline bool active_bf16() {
#if FASTROUTE_X86
    static const bool active = [] {
        const char* name = std::getenv("FASTROUTE_ISA");
        return active_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") &&
               !(name != nullptr && std::strcmp(name, "avx512") == 0);
    }();
    return active;
#else
    return false;
#endif
}

#if FASTROUTE_X86
template <typename Body, typename... Args>
FASTROUTE_AVX512 __attribute__((noinline)) void run_avx512(const Args&... args) {
    Body::run(args...);
}

template <typename Body, typename... Args>
FASTROUTE_AVX2 __attribute__((noinline)) void run_avx2(const Args&... args) {
    Body::run(args...);
}
#endif

// Body::run(args...) in the active instruction set; Body::run must be FASTROUTE_INLINE, and so must all that it calls.
// What is there for precision alone may do with the baseline, which makes the extension compile sooner.
template <typename Body, bool Precise = false, typename... Args>
void run_isa(const Args&... args) {
#if FASTROUTE_X86
    if constexpr (!Precise) {
        switch (active_isa()) {
            case Isa::avx512: return run_avx512<Body>(args...);
            case Isa::avx2: return run_avx2<Body>(args...);
            case Isa::baseline: break;
        }
    }
#endif
    Body::run(args...);
}

// Splits [0, count) over torch's own threads, at least `grain` items each. An exception of `f`, such as memory that
// runs out, is thrown here again: across torch's boundary it would lose its kind and its words.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
    if (count <= 0) return;
    std::exception_ptr first;
    std::mutex mutex;
    torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, [&](int64_t begin, int64_t end) {
        try {
            f(begin, end);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!first) first = std::current_exception();
        }
    });
    if (first) std::rethrow_exception(first);
}

// Calls `worker(next)` in every thread, where `next()` gives the number of an item that nobody has done: those from
// `count` on do not exist. A core that is slower than the others, or busy with something else, does fewer of them.
template <typename F>
void in_turn(int64_t count, const F& worker) {
    std::atomic<int64_t> taken{0};
    const auto next = [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
    parallel(std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) { worker(next); });
}

// Items that make a chunk of work worth a thread: about 64 KiB of traffic.
inline int64_t grain_for(int64_t bytes_per_item) { return 65536 / (bytes_per_item < 1 ? 1 : bytes_per_item) + 1; }

}  // namespace fastroute
