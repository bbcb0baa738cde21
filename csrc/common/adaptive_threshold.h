// adaptive_threshold: Lloyd's iteration with two centres on one score per pixel, image by image. What every device
// checks and allocates, and the numbers of the iteration.
#pragma once

#include "common/dispatch.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "adaptive_threshold";
// Of the published iteration: see fastroute/reference/adaptive_threshold.py.
constexpr int kMaxAssignments = 19;
constexpr double kTolerance = 1e-4;

// Each device defines the kernel; T is the type of the scores, Id that of the classes. There are scores.
template <typename T, typename Id>
void run_adaptive_threshold(const Tensor& score,  // [B, ...] contiguous
                            const Tensor& out);   // [B, ...]

Tensor adaptive_threshold(const Tensor& score,  // [B, ...]
                          int64_t id_bytes) {
    const ScalarType dtype = id_type(kOp, id_bytes);
    FASTROUTE_CHECK(score.dim() >= 2, kOp, ": score must be (B, ...) with at least 2 dimensions; got ", score.dim());
    const Tensor dense = torch::stable::contiguous(score);
    const Tensor out = empty_tensor(kOp, "the classes", dense.sizes(), dtype, dense);
    if (out.numel() == 0) return out;
    dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
        dispatch_index(kOp, dtype, [&](auto id) { run_adaptive_threshold<decltype(zero), decltype(id)>(dense, out); });
    });
    return out;
}

}  // namespace
}  // namespace fastroute
