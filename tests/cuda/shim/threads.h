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

// A thread of the system that runs one task after another. To begin one it takes what whoever gives it has done, and to
// wait for its end what it has done, as creating and joining a thread would: nothing else is ordered by it.
class Worker {
  public:
    Worker() : thread_([this] { work(); }) {}

    ~Worker() {
        begin(nullptr);
        thread_.join();
    }

    void begin(std::function<void()> task) {
        const std::lock_guard<std::mutex> guard(lock_);
        task_ = std::move(task), busy_ = true;
        changed_.notify_all();
    }

    void end() {
        std::unique_lock<std::mutex> guard(lock_);
        changed_.wait(guard, [&] { return !busy_; });
    }

  private:
    void work() {
        std::unique_lock<std::mutex> guard(lock_);
        for (;;) {
            changed_.wait(guard, [&] { return busy_; });
            if (!task_) return;
            guard.unlock();
            task_();
            guard.lock();
            busy_ = false;
            changed_.notify_all();
        }
    }

    std::mutex lock_;
    std::condition_variable changed_;
    std::function<void()> task_;
    bool busy_ = false;
    std::thread thread_;  // begins when the others are there
};

// Runs the kernel on every thread of the grid. Under the sanitizer a thread takes a millisecond to create: those of one
// grid serve the next.
inline void run_grid(const Shape& shape, const std::function<void()>& body) {
    constexpr size_t kLive = 2048;  // threads of the system at a time
    static std::vector<std::unique_ptr<Worker>> workers;
    std::vector<std::unique_ptr<Arena>> arenas;
    std::vector<std::unique_ptr<Block>> blocks;
    size_t live = 0;
    const auto end = [&] {
        for (; live > 0; --live) workers[live - 1]->end();
    };
    for (int64_t index = 0; index < shape.grid.x; ++index) {
        arenas.push_back(std::make_unique<Arena>());
        blocks.push_back(std::make_unique<Block>(shape, static_cast<unsigned>(index), arenas.back().get()));
        Block* block = blocks.back().get();
        // Waiting orders all earlier blocks before later ones; small grids never come here.
        if (live + static_cast<size_t>(block->threads()) > kLive) end();
        for (int linear = 0; linear < block->threads(); ++linear, ++live) {
            if (live == workers.size()) workers.push_back(std::make_unique<Worker>());
            workers[live]->begin([block, linear, &body] {
                Thread thread = thread_of(block, linear);
                self = &thread;
                body();
                block->leave(linear);
            });
        }
    }
    end();
}

}  // namespace shim
