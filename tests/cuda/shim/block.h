// One block: its barrier, its shared memory, and the meeting places of its warps. Included by the thread engines.
#pragma once

#include <list>
#include <mutex>

namespace shim {

// Lanes of one warp that exchange values under one mask.
struct Meeting {
    unsigned mask;
    Barrier barrier;
    alignas(16) unsigned char slots[2][kWarp][16];

    explicit Meeting(unsigned lanes) : mask(lanes), barrier(__builtin_popcount(lanes)) {}
};

class Block {
  public:
    Block(const Shape& of, unsigned number, Arena* memory)
        : shape(of), index{number, 0, 0}, arena(memory), barrier(threads()), warps_((threads() + kWarp - 1) / kWarp) {
        arena->reset(shape.shared_bytes);
    }

    int threads() const { return static_cast<int>(shape.block.x * shape.block.y * shape.block.z); }

    // Called by a thread that has left the kernel.
    void leave(int linear) {
        Warp& warp = warps_[linear / kWarp];
        {
            const std::lock_guard<std::mutex> guard(warp.lock);
            warp.gone |= 1u << (linear % kWarp);
        }
        barrier.leave();
    }

    // Where the lanes of `mask` of a thread's warp meet.
    Meeting& meeting(int linear, unsigned mask) {
        Warp& warp = warps_[linear / kWarp];
        const int lanes = threads() - linear / kWarp * kWarp;
        if (lanes < kWarp) {
            // Lanes that a block never had may be named, as in a full mask.
            mask &= (1u << lanes) - 1;
        }
        if ((mask >> (linear % kWarp) & 1u) == 0) die("a lane calls a warp function whose mask leaves it out");
        const std::lock_guard<std::mutex> guard(warp.lock);
        if ((warp.gone & mask) != 0) die("a warp function waits for a lane that has left the kernel");
        for (Meeting& meeting : warp.meetings) {
            if (meeting.mask == mask) return meeting;
        }
        return warp.meetings.emplace_back(mask);
    }

    const Shape shape;
    const dim3 index;
    Arena* const arena;
    Barrier barrier;

  private:
    struct Warp {
        std::mutex lock;
        std::list<Meeting> meetings;
        unsigned gone = 0;
    };
    std::vector<Warp> warps_;
};

inline Thread thread_of(Block* block, int linear) {
    const dim3 size = block->shape.block;
    const unsigned n = static_cast<unsigned>(linear);
    return {{n % size.x, n / size.x % size.y, n / (size.x * size.y)}, linear, block};
}

}  // namespace shim
