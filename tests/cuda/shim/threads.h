// Every thread of the grid as a thread of the system, for ThreadSanitizer. Blocks begin in turn, but nothing orders
// what they do, so a race between two blocks is seen as well as one inside a block.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace shim {

class Block;
struct Thread {
    dim3 thread;
    int linear = 0;
    Block* block = nullptr;
};
inline thread_local Thread* self = nullptr;

// A barrier of `expected` threads; those that have left the kernel no longer count.
class Barrier {
  public:
    explicit Barrier(int expected = 0) : expected_(expected) {}

    uint64_t generation() {
        const std::lock_guard<std::mutex> guard(lock_);
        return generation_;
    }

    void wait() {
        std::unique_lock<std::mutex> guard(lock_);
        if (++arrived_ == expected_) {
            release();
        } else {
            const uint64_t seen = generation_;
            changed_.wait(guard, [&] { return generation_ != seen; });
        }
    }

    // The lock orders the end of this thread before what follows the barrier; that hides no race, as a thread that has
    // left can reach no barrier.
    void leave() {
        const std::lock_guard<std::mutex> guard(lock_);
        --expected_;
        if (expected_ > 0 && arrived_ == expected_) release();
    }

  private:
    void release() {
        arrived_ = 0, ++generation_;
        changed_.notify_all();
    }

    std::mutex lock_;
    std::condition_variable changed_;
    int expected_, arrived_ = 0;
    uint64_t generation_ = 0;
};

}  // namespace shim

#include "block.h"

namespace shim {

// Runs the kernel on every thread of the grid.
inline void run_grid(const Shape& shape, const std::function<void()>& body) {
    constexpr int64_t kLive = 2048;  // threads of the system at a time
    std::vector<std::unique_ptr<Arena>> arenas;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::thread> threads;
    for (int64_t index = 0; index < shape.grid.x; ++index) {
        arenas.push_back(std::make_unique<Arena>());
        blocks.push_back(std::make_unique<Block>(shape, static_cast<unsigned>(index), arenas.back().get()));
        Block* block = blocks.back().get();
        if (static_cast<int64_t>(threads.size()) + block->threads() > kLive) {
            // Joining orders all earlier blocks before later ones; small grids never come here.
            for (std::thread& thread : threads) thread.join();
            threads.clear();
        }
        for (int linear = 0; linear < block->threads(); ++linear) {
            threads.emplace_back([block, linear, &body] {
                Thread thread = thread_of(block, linear);
                self = &thread;
                body();
                block->leave(linear);
            });
        }
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace shim
