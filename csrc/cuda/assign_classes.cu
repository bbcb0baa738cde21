// assign_classes: argmax over classes of score / cost^penalty; with a budget, of log2(score) - penalty · log2(cost) at
// the smallest penalty whose mean cost fits, which is bisected on the device (assign_classes_budget.cuh). One thread
// per item.
#include "common/assign_classes.h"

#include <algorithm>
#include <vector>

#include "cuda/assign_classes_budget.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;

// Class ids in any of their types.
struct Ids {
    void* data;  // [B, L]
    ScalarType type;

    __device__ __forceinline__ void set(int64_t n, int id) const {
        switch (type) {
            case ScalarType::Byte: static_cast<uint8_t*>(data)[n] = static_cast<uint8_t>(id); break;
            case ScalarType::Int: static_cast<int32_t*>(data)[n] = id; break;
            default: static_cast<int64_t*>(data)[n] = id;
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    assign_classes_kernel(const T* __restrict__ score,  // [B, K, L]
                          Items items, const __grid_constant__ PerClass scale, Ids ids) {
    using W = Work<T>;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < items.count(); n += step) {
        const T* own = score + n / items.length * items.classes * items.length + n % items.length;
        int best = 0;
        W value = multiply(static_cast<W>(own[0]), static_cast<W>(scale.value[0]));
        for (int k = 1; k < items.classes; ++k) {
            const W other = multiply(static_cast<W>(own[k * items.length]), static_cast<W>(scale.value[k]));
            if (other > value) value = other, best = k;
        }
        ids.set(n, best);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    assign_classes_budget_kernel(const T* __restrict__ score,  // [B, K, L]
                                 Items items, const __grid_constant__ Budget budget, const Interval* solved, Ids ids) {
    const double penalty = solved->high;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < items.count(); n += step) {
        const T* own = score + n / items.length * items.classes * items.length + n % items.length;
        ids.set(n, choose(own, items, budget, penalty));
    }
}

__global__ void assign_classes_start_kernel(double bound, int64_t classes, BudgetState state) {
    for (int64_t e = threadIdx.x; e < kPenalties * classes + 1; e += blockDim.x) state.turn(0, classes)[e] = 0;
    if (threadIdx.x == 0) state.intervals[0] = {-bound, bound, 0, 0};
}

PerClass per_class(const std::vector<double>& values) {
    PerClass all{};
    std::copy(values.begin(), values.end(), all.value);
    return all;
}

template <typename T>
void assign_by_budget(const Queue& queue, const Tensor& score, const Items& items, const std::vector<double>& cost,
                      double allowed, const Ids& ids) {
    const double most_expensive = *std::max_element(cost.begin(), cost.end());
    Budget budget{.log_cost = {}, .share = {}, .allowed = allowed};
    for (size_t k = 0; k < cost.size(); ++k) {
        budget.log_cost.value[k] = std::log2(cost[k]), budget.share.value[k] = cost[k] / most_expensive;
    }
    const int64_t bytes[] = {BudgetState::bytes(items.classes)};
    const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, score.device());
    const BudgetState state(memory.mutable_data_ptr());
    const T* data = score.const_data_ptr<T>();
    const int64_t shared = (kPenalties * items.classes + 1) * static_cast<int64_t>(sizeof(unsigned));
    const int64_t blocks = std::min<int64_t>(blocks_for(items.count(), kBudgetThreads), 4 * queue.multiprocessors());
    const double bound = penalty_bound(cost);
    const int passes = items.count() <= kFewItems ? 0 : std::min(passes_for(bound), kMostPasses);
    queue.launch(assign_classes_start_kernel, 1, kThreads, 0, bound, items.classes, state);
    for (int pass = 0; pass < passes; ++pass) {
        queue.launch(assign_classes_pass_kernel<T>, blocks, kBudgetThreads, shared, data, items, budget, pass, state);
    }
    queue.launch(assign_classes_finish_kernel<T>, 1, kBudgetThreads, shared, data, items, budget, passes, state);
    queue.launch(assign_classes_budget_kernel<T>, blocks_for(items.count(), kThreads), kThreads, 0, data, items, budget,
                 static_cast<const Interval*>(state.intervals + (passes + 1) % 2), ids);
}

template <typename T>
void run_assign_classes(const Assignment& call, const Tensor& out) {
    const Tensor dense = torch::stable::contiguous(call.score);
    const int64_t batch = call.score.size(0);
    const Items items{.batch = batch, .classes = call.score.size(1), .length = out.numel() / batch};
    const Ids ids{out.mutable_data_ptr(), out.scalar_type()};
    const Queue queue(kOp, call.score);
    if (call.budget.has_value()) {
        assign_by_budget<T>(queue, dense, items, call.cost, *call.budget, ids);
    } else {
        queue.launch(assign_classes_kernel<T>, blocks_for(items.count(), kThreads), kThreads, 0,
                     dense.const_data_ptr<T>(), items, per_class(penalty_scales(call.cost, call.penalty)), ids);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "assign_classes", assign_classes); }

}  // namespace fastroute
