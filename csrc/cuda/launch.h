// Launches kernels and hides who runs them: nvcc's runtime, on the current stream; or, where the compiler is not nvcc,
// an emulation on the CPU that the tests bring (tests/cuda/shim). Kernels name what differs by the macros below.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "common/checks.h"
#include "common/dispatch.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

// Weak, because the library also loads beside a torch without CUDA, which has no such function.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// The dispatch key of the kernels.
#define FASTROUTE_CUDA CUDA
// A shared variable or array: FASTROUTE_SHARED(float, tile, [8][33]).
#define FASTROUTE_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// The shared memory whose size the launch gives, aligned to 16 bytes.
#define FASTROUTE_DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(16) unsigned char fastroute_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(fastroute_shared_bytes)
#else
#include "cuda_shim.h"
#define FASTROUTE_CUDA CPU
#endif

namespace fastroute {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a one-dimensional grid; kernels loop over what is beyond it
constexpr int64_t kSmallShared = 48 << 10;  // bytes of shared memory that a kernel may use without asking
constexpr unsigned kFullWarp = 0xffffffffu;

// Makes the device of a tensor the current one and launches kernels on its current stream. Nothing waits for them.
class Queue {
  public:
    Queue(const char* op, const Tensor& x)
        : op_(op)
#if defined(__CUDACC__)
          ,
          device_(x.get_device_index()),
          guard_(device_)
#endif
    {
#if defined(__CUDACC__)
        void* stream = nullptr;
        if (aoti_torch_get_current_cuda_stream == nullptr ||
            aoti_torch_get_current_cuda_stream(device_, &stream) != 0) {
            throw std::runtime_error(text(op, ": torch has no current CUDA stream"));
        }
        stream_ = static_cast<cudaStream_t>(stream);
#else
        (void)x;
#endif
    }

    // kernel(args...) on `blocks` blocks of `threads` threads; nothing where there are no blocks.
    template <typename... Params, typename... Args>
    void launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
                const Args&... args) const {
        if (blocks <= 0) return;
        const unsigned grid = static_cast<unsigned>(std::min(blocks, kMaxBlocks));
#if defined(__CUDACC__)
        if (shared_bytes > kSmallShared) {
            // A limit of the kernel, not of the launch, so another thread may set it between: it is the same always.
            // Kernels that use so much have no static shared memory, which would count too.
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(max_shared_bytes())));
        }
        kernel<<<grid, threads, shared_bytes, stream_>>>(static_cast<Params>(args)...);
        check(cudaGetLastError());
#else
        FASTROUTE_CHECK(threads <= shim::kMaxThreads, op_, ": a block has at most ", shim::kMaxThreads, " threads");
        const shim::Shape shape{{grid, 1, 1}, {static_cast<unsigned>(threads), 1, 1}, shared_bytes};
        ++shim::launches;
        shim::run_grid(shape, [&] { kernel(static_cast<Params>(args)...); });
#endif
    }

    // Of the device: for kernels whose blocks stay and loop.
    int multiprocessors() const {
#if defined(__CUDACC__)
        return attribute(cudaDevAttrMultiProcessorCount);
#else
        return shim::kMultiprocessors;
#endif
    }

    // Shared memory that one block may use.
    int64_t max_shared_bytes() const {
#if defined(__CUDACC__)
        return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#else
        return shim::max_shared_bytes();
#endif
    }

  private:
#if defined(__CUDACC__)
    int attribute(cudaDeviceAttr name) const {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, name, device_));
        return value;
    }
    void check(cudaError_t error) const {
        if (error == cudaSuccess) return;
        throw std::runtime_error(text(op_, ": the kernel could not be launched: ", cudaGetErrorString(error)));
    }
#endif
    const char* op_;
#if defined(__CUDACC__)
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
#endif
};

// Blocks of `threads` that give every item one thread.
inline int64_t blocks_for(int64_t items, int64_t threads) { return (items + threads - 1) / threads; }

}  // namespace fastroute
