// Scores and the runs of items in which threads take them: items that lie side by side, class by class, in vectors of
// 16 bytes. A thread goes from run to run by addition; it divides only to find its first.
#pragma once

#include "common/host_device.h"
#include "cuda/pack.cuh"

namespace fastroute {
namespace {

constexpr int kMostClasses = 256;

// Item l of image b has class k's score at b · batch_step + k · class_step + l · item_step.
struct Items {
    int64_t batch, classes, length;
    int64_t batch_step, class_step, item_step;
    bool vectors;  // every class of every run begins at a multiple of 16 bytes and is a whole vector

    FASTROUTE_HOST_DEVICE int64_t count() const { return batch * length; }
};

// One number per class, as an argument of a kernel.
template <typename W>
struct PerClass {
    W value[kMostClasses];
};

// How a grid of threads takes turns at runs of `run` items: how many an image has, and how far a turn goes, in images
// and in runs of the next.
struct Turns {
    int64_t per_image, images, runs;
};

inline Turns turns_of(const Items& items, int run, int64_t threads) {
    const int64_t per_image = blocks_for(items.length, run);
    return {.per_image = per_image, .images = threads / per_image, .runs = threads % per_image};
}

// The runs of up to N items of one thread of a one-dimensional grid.
template <int N>
class Runs {
  public:
    __device__ __forceinline__ Runs(const Items& items, const Turns& turns) : items_(items), turns_(turns) {
        const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
        if (thread < turns.per_image) {
            run_ = thread;
        } else if (static_cast<uint64_t>(thread) >> 32 == 0) {
            const unsigned small = static_cast<unsigned>(thread), per_image = static_cast<unsigned>(turns.per_image);
            image_ = small / per_image, run_ = small % per_image;
        } else {
            image_ = thread / turns.per_image, run_ = thread % turns.per_image;
        }
    }

    __device__ __forceinline__ bool more() const { return image_ < items_.batch; }
    __device__ __forceinline__ void next() {
        image_ += turns_.images, run_ += turns_.runs;
        if (run_ >= turns_.per_image) run_ -= turns_.per_image, ++image_;
    }

    // The first item, within its image and of all.
    __device__ __forceinline__ int64_t item() const { return run_ * N; }
    __device__ __forceinline__ int64_t number() const { return image_ * items_.length + item(); }
    __device__ __forceinline__ int count() const {
        return items_.length - item() < N ? static_cast<int>(items_.length - item()) : N;
    }
    // Its score of class 0.
    template <typename T>
    __device__ __forceinline__ const T* scores(const T* score) const {
        return score + image_ * items_.batch_step + item() * items_.item_step;
    }

  private:
    const Items& items_;
    const Turns& turns_;
    int64_t image_ = 0, run_ = 0;
};

// The scores of one class of a run.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_scores(const T* from, const Items& items, int count) {
    if (N == kPack<T> && items.vectors) return load_words<uint4, T, N>(from);
    Pack<T, N> pack{};
#pragma unroll
    for (int e = 0; e < N; ++e) {
        if (e < count) pack.at[e] = from[e * items.item_step];
    }
    return pack;
}

// The scores of all classes of a run.
template <int N, typename T, int K>
__device__ __forceinline__ void load_classes(const T* from, const Items& items, int count, Pack<T, N> (&run)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        if (K == 2 || k < items.classes) run[k] = load_scores<N>(from + k * items.class_step, items, count);
    }
}

// N elements in the fewest accesses, to an address that is a multiple of their size or of 16 bytes.
template <typename T, int N>
__device__ __forceinline__ void store_run(T* to, const Pack<T, N>& pack) {
    constexpr int bytes = N * static_cast<int>(sizeof(T));
    if constexpr (bytes % 16 == 0) {
        store_words<uint4>(to, pack);
    } else if constexpr (bytes == 8) {
        store_words<uint2>(to, pack);
    } else if constexpr (bytes == 4) {
        store_words<unsigned>(to, pack);
    } else {
        store_words<unsigned short>(to, pack);
    }
}

}  // namespace
}  // namespace fastroute
