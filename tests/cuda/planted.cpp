// Kernels with mistakes, to see that the sanitizers report them: the argument names the mistake.
#include <cstdio>
#include <string>

#include "cuda_shim.h"

namespace {

constexpr int kThreads = 64;

// Writes one element behind the end.
__global__ void global_bounds_kernel(float* out, int size) {
    const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (n <= size) out[n] = 1.0f;
}

__global__ void shared_bounds_kernel(float* out) {
    FASTROUTE_SHARED(float, tile, [kThreads]);
    float* element = tile + threadIdx.x + (out == nullptr ? 0 : 1);
    *element = 1.0f;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

// Reads what its neighbour wrote: a mistake unless it waits.
__global__ void neighbour_kernel(float* out, bool wait) {
    FASTROUTE_SHARED(float, tile, [kThreads]);
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (wait) __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + 1) % kThreads];
}

// The same between the lanes of a warp.
__global__ void lane_kernel(float* out, bool wait) {
    FASTROUTE_SHARED(float, tile, [32]);
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (wait) __syncwarp();
    out[threadIdx.x] = tile[31 - threadIdx.x];
}

// Every block writes the same element.
__global__ void blocks_kernel(float* out) {
    if (threadIdx.x == 0) out[0] = static_cast<float>(blockIdx.x);
}

// Lane 0 waits for lane 1, which waits at a barrier for lane 0.
__global__ void deadlock_kernel(float* out) {
    if (threadIdx.x == 0) __shfl_sync(3u, 1, 1);
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}

// Shows what shared memory holds that nobody wrote.
__global__ void unwritten_kernel(float* out) {
    FASTROUTE_SHARED(float, tile, [kThreads]);
    out[threadIdx.x] = tile[threadIdx.x];
}

void launch(int64_t blocks, int threads, const std::function<void()>& kernel) {
    shim::run_grid({{static_cast<unsigned>(blocks), 1, 1}, {static_cast<unsigned>(threads), 1, 1}, 0}, kernel);
}

}  // namespace

int main(int, char** arguments) {
    const std::string mistake = arguments[1];
    const std::unique_ptr<float[]> out(new float[kThreads]);
    float* data = out.get();
    if (mistake == "global_bounds") launch(2, kThreads, [&] { global_bounds_kernel(data, kThreads); });
    if (mistake == "shared_bounds") launch(1, kThreads, [&] { shared_bounds_kernel(data); });
    if (mistake == "no_barrier") launch(1, kThreads, [&] { neighbour_kernel(data, false); });
    if (mistake == "no_warp_barrier") launch(1, 32, [&] { lane_kernel(data, false); });
    if (mistake == "two_blocks") launch(2, kThreads, [&] { blocks_kernel(data); });
    if (mistake == "deadlock") launch(1, kThreads, [&] { deadlock_kernel(data); });
    if (mistake == "none") {
        launch(1, kThreads, [&] { neighbour_kernel(data, true); });
        launch(1, 32, [&] { lane_kernel(data, true); });
        for (int n = 0; n < 32; ++n) {
            if (data[n] != static_cast<float>(31 - n)) return 2;
        }
        launch(1, kThreads, [&] { unwritten_kernel(data); });
        for (int n = 0; n < kThreads; ++n) {
            if (data[n] == data[n]) return 3;  // shared memory must start as NaN
        }
    }
    std::puts("finished");
}
