// refine_boundaries: a pixel of class 0 with a more expensive neighbour becomes the mean of its 3 x 3 pixels; all
// others are copied. Work mapping: one thread per 16 bytes of an image row; it finds their boundary pixels once for all
// channels.
#include "common/refine_boundaries.h"

#include "common/pixel.h"
#include "cuda/pack.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;
// Of a multiprocessor, at least: left to aim at more, the compiler keeps too few registers and spills.
constexpr int kBlocks = 4;

// Bit 1 + i: pixel `x + i` of a row of classes is not of class 0; bits 0 and N + 1 are those beside them, 0 outside.
template <int N, typename Id>
__device__ __forceinline__ unsigned expensive_pixels(const Id* row, int64_t x, int64_t width) {
    const Id* const at = row + x;
    unsigned bits = 0;
    if (x + N < width) {
        const Pack<Id, N> ids = load_pack<N>(at);
#pragma unroll
        for (int i = N - 1; i >= 0; --i) bits = bits << 1 | unsigned{ids.at[i] != 0};
        bits |= unsigned{at[N] != 0} << N;
    } else {
#pragma unroll
        for (int i = N - 1; i >= 0; --i) bits = bits << 1 | unsigned{x + i < width && at[i] != 0};
    }
    return bits << 1 | unsigned{x > 0 && at[-1] != 0};
}

template <typename T, typename Out, typename Id>
struct Refine {
    const T* image;     // [B, C, H, W]
    const Id* classes;  // [B, H, W]
    int64_t channels, height, width;
    int64_t begin, rows, lines;  // the first output row, how many, and of all images
    Out* out;                    // [B, C, rows, W]
    int64_t stride[3];
};

template <typename T, typename Out, typename Id>
__global__ void __launch_bounds__(kThreads, kBlocks) refine_boundaries_kernel(Refine<T, Out, Id> r) {
    constexpr int N = kPack<T>;
    const int64_t packs = (r.width + N - 1) / N, total = r.lines * packs, width = r.width;
    for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < total;
         item += int64_t{gridDim.x} * kThreads) {
        const int64_t line = item / packs, x = (item - line * packs) * N, b = line / r.rows, row = line - b * r.rows;
        const int64_t y = r.begin + row;
        const int count = static_cast<int>(min(int64_t{N}, width - x));
        unsigned refined = 0;
        if (y > 0 && y + 1 < r.height) {
            const Id* const classes = r.classes + (b * r.height + y) * width;
            const unsigned own = expensive_pixels<N>(classes, x, width);
            const unsigned near =
                own | expensive_pixels<N>(classes - width, x, width) | expensive_pixels<N>(classes + width, x, width);
            refined = (near | near >> 1 | near >> 2) & ~(own >> 1) & ((1u << count) - 1);
            // The first and the last column stay.
            if (x == 0) refined &= ~1u;
            if (x + count == width) refined &= ~(1u << (count - 1));
        }
        for (int64_t c = 0; c < r.channels; ++c) {
            const T* const from = r.image + ((b * r.channels + c) * r.height + y) * width + x;
            Out* const to = r.out + b * r.stride[0] + c * r.stride[1] + row * r.stride[2] + x;
            Pack<T, N> pixels;
            if (count == N) {
                pixels = load_pack<N>(from);
            } else {
#pragma unroll
                for (int i = 0; i < N; ++i) pixels.at[i] = from[i < count ? i : 0];
            }
            Pack<Out, N> result;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                Work<T> value = static_cast<Work<T>>(pixels.at[i]);
                if ((refined >> i & 1u) != 0) {
                    value = 0;
                    for (int64_t dy = -width; dy <= width; dy += width) {
                        for (int64_t dx = -1; dx <= 1; ++dx) value += static_cast<Work<T>>(from[dy + dx + i]);
                    }
                    value /= 9;
                }
                result.at[i] = to_pixel<Out>(value);
            }
            store_pack(to, result, count);
        }
    }
}

template <typename T, typename Out, typename Id>
void run_refine_boundaries(const Refinement& call, const Tensor& out) {
    const int64_t width = call.image.size(3), rows = call.end - call.begin, lines = call.image.size(0) * rows;
    const Refine<T, Out, Id> task{.image = static_cast<const T*>(call.image.const_data_ptr()),
                                  .classes = static_cast<const Id*>(call.class_map.const_data_ptr()),
                                  .channels = call.image.size(1),
                                  .height = call.image.size(2),
                                  .width = width,
                                  .begin = call.begin,
                                  .rows = rows,
                                  .lines = lines,
                                  .out = static_cast<Out*>(out.mutable_data_ptr()),
                                  .stride = {out.stride(0), out.stride(1), out.stride(2)}};
    const Queue queue(kOp, call.image);
    queue.launch(refine_boundaries_kernel<T, Out, Id>, blocks_for(lines * blocks_for(width, kPack<T>), kThreads),
                 kThreads, 0, task);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "refine_boundaries", refine_boundaries);
    FASTROUTE_IMPL(m, "refine_boundaries.out", refine_boundaries_out);
}

}  // namespace fastroute
