// adaptive_threshold: Lloyd's iteration with two centres on one score per pixel, image by image: threshold = (upper +
// lower) / 2, the centres being the means of the scores on both sides of the threshold before.
// Work mapping: some blocks share an image, each sums a part of it. Every pass is one launch, whose blocks first join
// the parts of the pass before, all of them alike, and so know the threshold without a word to the host or to each
// other. An image that is done is not read again. Parts are joined in one order, so the result has the same bits on
// every run.
#include "common/adaptive_threshold.h"

#include <cmath>
#include <utility>

#include "common/host_device.h"
#include "cuda/pack.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostParts = kThreads;  // of an image: a block joins them with one thread each
constexpr int64_t kPacks = 4;             // of 16 bytes, of a thread, unless a part would be too small or too large

struct Sums {
    double upper, lower;
    int64_t count;  // of the upper class
};

struct Range {
    double smallest, largest;
};

// What is known of an image before a pass.
struct Centres {
    double offset, spread;  // of the scores
    double upper, lower;
    double threshold;
    bool done;
};

struct Parts {
    int64_t batch, count, parts;  // images, pixels and blocks of each
    Range* ranges;                // [B, parts]
    // Of this pass and of the one before; they change places from launch to launch.
    Sums *sums, *sums_before;           // [B, parts]
    Centres *centres, *centres_before;  // [B]
};

__device__ __forceinline__ Sums join(const Sums& a, const Sums& b) {
    return {a.upper + b.upper, a.lower + b.lower, a.count + b.count};
}

__device__ __forceinline__ Range join(const Range& a, const Range& b) {
    return {b.smallest < a.smallest ? b.smallest : a.smallest, b.largest > a.largest ? b.largest : a.largest};
}

// What all threads of the block bring, joined in the same tree always; `room` has a place for each.
template <typename P>
__device__ __forceinline__ P join_block(const P& mine, P* room) {
    room[threadIdx.x] = mine;
    __syncthreads();
    for (unsigned step = kThreads / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) room[threadIdx.x] = join(room[threadIdx.x], room[threadIdx.x + step]);
        __syncthreads();
    }
    const P all = room[0];
    __syncthreads();
    return all;
}

// f(score) for this thread's pixels of its block's image, as float64.
template <typename T, typename F>
__device__ __forceinline__ void for_scores(const T* score, const Parts& p, const F& f) {
    const int64_t image = blockIdx.x / p.parts, part = blockIdx.x - image * p.parts;
    const T* const from = score + image * p.count;
    const int64_t whole = p.count / kPack<T> * kPack<T>, step = p.parts * kThreads;
    const int64_t next = step * kPack<T>;
    for (int64_t at = (part * kThreads + threadIdx.x) * kPack<T>; at < whole; at += kPacks * next) {
        // All are on their way before the first is waited for.
        Pack<T, kPack<T>> scores[kPacks];
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            if (at + n * next < whole) scores[n] = load_pack<kPack<T>>(from + at + n * next);
        }
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            if (at + n * next >= whole) break;
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) f(static_cast<double>(static_cast<Work<T>>(scores[n].at[i])));
        }
    }
    for (int64_t at = whole + part * kThreads + threadIdx.x; at < p.count; at += step) {
        f(static_cast<double>(static_cast<Work<T>>(from[at])));
    }
}

// Smallest and largest score of each part.
template <typename T>
__global__ void __launch_bounds__(kThreads) adaptive_threshold_range_kernel(const T* score /* [B, count] */, Parts p) {
    FASTROUTE_SHARED(Range, room, [kThreads]);
    const double first = static_cast<double>(static_cast<Work<T>>(score[blockIdx.x / p.parts * p.count]));
    Range range{first, first};
    for_scores(score, p, [&](double x) { range = join(range, Range{x, x}); });
    range = join_block(range, room);
    if (threadIdx.x == 0) p.ranges[blockIdx.x] = range;
}

// The centres before pass `pass`. Pass 0 sums all scores, pass n makes assignment n.
__device__ __forceinline__ Centres centres_before(int pass, int64_t image, const Parts& p, Sums* room) {
    const bool bears = threadIdx.x < p.parts;
    if (pass == 0) {
        // All threads without a part repeat the first one.
        const Range range =
            join_block(p.ranges[image * p.parts + (bears ? threadIdx.x : 0)], reinterpret_cast<Range*>(room));
        const double spread = range.largest - range.smallest;
        // A flat image is of class 0: nothing reaches an infinite threshold.
        return {range.smallest, spread, 0, 0, spread > 0 ? 0.0 : HUGE_VAL, !(spread > 0)};
    }
    Centres c = p.centres_before[image];
    if (c.done) return c;
    const Sums mine = bears ? p.sums_before[image * p.parts + threadIdx.x] : Sums{0, 0, 0};
    const Sums sums = join_block(mine, room);
    const auto mean = [](double total, int64_t number) {
        return total / static_cast<double>(number > 1 ? number : int64_t{1});
    };
    if (pass == 1) {
        c.upper = mean(sums.upper, p.count), c.lower = 0;
    } else {
        const double upper = mean(sums.upper, sums.count), lower = mean(sums.lower, p.count - sums.count);
        const double up = upper - c.upper, down = lower - c.lower;
        // Centres that hardly moved: the classes stay as they were assigned with the old ones.
        c.done = add(multiply(up, up), multiply(down, down)) <= kTolerance * multiply(c.spread, c.spread);
        if (c.done) return c;
        c.upper = upper, c.lower = lower;
    }
    c.threshold = 0.5 * (c.upper + c.lower);
    return c;
}

// Sums of score - offset over both sides of the threshold, of each part.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    adaptive_threshold_sum_kernel(const T* score /* [B, count] */, Parts p, int pass) {
    FASTROUTE_SHARED(Sums, room, [kThreads]);
    const int64_t image = blockIdx.x / p.parts;
    const Centres c = centres_before(pass, image, p, room);
    if (blockIdx.x % p.parts == 0 && threadIdx.x == 0) p.centres[image] = c;
    if (c.done) return;
    Sums sums{0, 0, 0};
    for_scores(score, p, [&](double x) {
        const double value = x - c.offset;
        const bool is_upper = value >= c.threshold;
        sums.upper += is_upper ? value : 0.0, sums.lower += is_upper ? 0.0 : value, sums.count += is_upper ? 1 : 0;
    });
    sums = join_block(sums, room);
    if (threadIdx.x == 0) p.sums[blockIdx.x] = sums;
}

// The classes of the last assignment.
template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    adaptive_threshold_kernel(const T* score /* [B, count] */, Parts p, Id* out /* [B, count] */) {
    FASTROUTE_SHARED(Sums, room, [kThreads]);
    const int64_t image = blockIdx.x / p.parts, part = blockIdx.x - image * p.parts;
    const Centres c = centres_before(kMaxAssignments, image, p, room);
    const T* const from = score + image * p.count;
    Id* const to = out + image * p.count;
    for (int64_t at = (part * kThreads + threadIdx.x) * kPack<T>; at < p.count; at += p.parts * kThreads * kPack<T>) {
        const int count = static_cast<int>(min(int64_t{kPack<T>}, p.count - at));
        Pack<T, kPack<T>> scores;
        if (count == kPack<T>) {
            scores = load_pack<kPack<T>>(from + at);
        } else {
            for (int i = 0; i < kPack<T>; ++i) scores.at[i] = from[at + min(i, count - 1)];
        }
        Pack<Id, kPack<T>> ids;
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
            const double value = static_cast<double>(static_cast<Work<T>>(scores.at[i])) - c.offset;
            ids.at[i] = static_cast<Id>(value >= c.threshold);
        }
        store_pack(to + at, ids, count);
    }
}

template <typename T, typename Id>
void run_adaptive_threshold(const Tensor& score, const Tensor& out) {
    Parts p{};
    p.batch = score.size(0), p.count = score.numel() / p.batch;
    const int64_t wanted = blocks_for(p.count, kThreads * kPacks * kPack<T>);
    p.parts = std::clamp<int64_t>(std::min(wanted, kMaxBlocks / p.batch), 1, kMostParts);
    const int64_t blocks = p.batch * p.parts, sums = blocks * static_cast<int64_t>(sizeof(Sums));
    const int64_t centres = p.batch * static_cast<int64_t>(sizeof(Centres));
    const int64_t size[1] = {blocks * static_cast<int64_t>(sizeof(Range)) + 2 * sums + 2 * centres};
    const Tensor memory = torch::stable::empty({size, 1}, ScalarType::Byte, std::nullopt, score.device());
    char* at = static_cast<char*>(memory.mutable_data_ptr());
    const auto take = [&](auto*& pointer, int64_t bytes) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
        at += bytes;
    };
    take(p.sums, sums), take(p.sums_before, sums);
    take(p.centres, centres), take(p.centres_before, centres);
    take(p.ranges, 0);
    const T* data = static_cast<const T*>(score.const_data_ptr());
    const Queue queue(kOp, score);
    queue.launch(adaptive_threshold_range_kernel<T>, blocks, kThreads, 0, data, p);
    // The last assignment needs no sums of its own.
    for (int pass = 0; pass < kMaxAssignments; ++pass) {
        queue.launch(adaptive_threshold_sum_kernel<T>, blocks, kThreads, 0, data, p, pass);
        std::swap(p.sums, p.sums_before), std::swap(p.centres, p.centres_before);
    }
    queue.launch(adaptive_threshold_kernel<T, Id>, blocks, kThreads, 0, data, p,
                 static_cast<Id*>(out.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "adaptive_threshold", adaptive_threshold); }

}  // namespace fastroute
