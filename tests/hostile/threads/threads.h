// Eight threads call an operator at once, from the first call of the process on, under ThreadSanitizer: what is made
// once per process, such as the choice of an instruction set, is made by all of them together. Each call in turn
// divides its work among threads, which are those of the system here: torch's belong to a library that the sanitizer
// cannot see into, so its function is replaced by the one below. Every thread must come to the same bits.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "races/tensors.h"

namespace threads {

constexpr int kCallers = 8;
constexpr int64_t kWorkers = 3;  // of one call

// Chunks of nearly one size, whatever the grain: small tensors are then divided too.
inline void divide(int64_t begin, int64_t end, const std::function<void(int64_t, int64_t)>& run) {
    const int64_t count = end - begin, parts = std::min(count, kWorkers);
    std::vector<std::thread> workers;
    for (int64_t p = 0; p < parts; ++p) {
        workers.emplace_back([&, p] { run(begin + count * p / parts, begin + count * (p + 1) / parts); });
    }
    for (std::thread& worker : workers) worker.join();
}

inline bool same(const Tensor& a, const Tensor& b) {
    const size_t bytes = a.numel() * a.element_size();
    return a.numel() == b.numel() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), bytes) == 0;
}

// `call` by all threads; 0 where their results are the same.
inline int at_once(const std::function<std::vector<Tensor>()>& call) {
    std::vector<std::vector<Tensor>> results(kCallers);
    std::vector<std::thread> callers;
    [[maybe_unused]] int64_t calls = 0;
    std::barrier start(kCallers);
    for (std::vector<Tensor>& result : results) {
        callers.emplace_back([&] {
            start.arrive_and_wait();
#if defined(FASTROUTE_PLANT_RACE)
            ++calls;  // to see that a race is reported
#endif
            try {
                result = call();
            } catch (const std::exception& error) {
                std::fprintf(stderr, "%s\n", error.what());
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::vector<Tensor>& result : results) {
        if (result.empty() || !std::equal(result.begin(), result.end(), results[0].begin(), same)) return 1;
    }
    return 0;
}

}  // namespace threads

extern "C" {

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*run)(int64_t, int64_t, void*), void* of) {
    threads::divide(begin, end, [&](int64_t first, int64_t last) { run(first, last, of); });
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_get_num_threads(uint32_t* number) {
    *number = threads::kWorkers;
    return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
