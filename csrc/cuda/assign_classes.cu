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
                                 Items items, const __grid_constant__ Prices prices, const Interval* solved,
                                 double* __restrict__ penalty_out, Ids ids) {
    const double penalty = solved->high;
    if (blockIdx.x == 0 && threadIdx.x == 0) *penalty_out = penalty;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < items.count(); n += step) {
        const T* own = score + n / items.length * items.classes * items.length + n % items.length;
        ids.set(n, choose(own, items, prices, penalty));
    }
}

__global__ void assign_classes_start_kernel(double low, double high, int64_t classes, BudgetState state) {
    for (int64_t e = threadIdx.x; e < kPenalties * classes + 1; e += blockDim.x) state.turn(0, classes)[e] = 0;
    if (threadIdx.x == 0) state.intervals[0] = {low, high, 0, 0};
}

PerClass per_class(const std::vector<double>& values) {
    PerClass all{};
    std::copy(values.begin(), values.end(), all.value);
    return all;
}

Items items_of(const Tensor& score,  // [B, K, ...]
               const Tensor& out) {  // [B, ...]
    return {.batch = score.size(0), .classes = score.size(1), .length = out.numel() / score.size(0)};
}

template <typename T>
void run_assign_classes(const Tensor& score, const std::vector<double>& cost, double penalty, const Tensor& out) {
    const Tensor dense = torch::stable::contiguous(score);
    const Items items = items_of(score, out);
    const Queue queue(kOp, score);
    queue.launch(assign_classes_kernel<T>, blocks_for(items.count(), kThreads), kThreads, 0, dense.const_data_ptr<T>(),
                 items, per_class(penalty_scales(cost, penalty)), Ids{out.mutable_data_ptr(), out.scalar_type()});
}

template <typename T>
void run_assign_classes_budget(const Tensor& score, const std::vector<double>& cost, const Budget& budget,
                               const Tensor& out, const Tensor& solved) {
    const Tensor dense = torch::stable::contiguous(score);
    const Items items = items_of(score, out);
    const Queue queue(kOp, score);
    const double most_expensive = *std::max_element(cost.begin(), cost.end());
    Prices prices{.log_cost = {}, .share = {}, .allowed = budget.share, .logits = budget.logits};
    for (size_t k = 0; k < cost.size(); ++k) {
        prices.log_cost.value[k] = std::log2(cost[k]), prices.share.value[k] = cost[k] / most_expensive;
    }
    const int64_t bytes[] = {BudgetState::bytes(items.classes)};
    const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, score.device());
    const BudgetState state(memory.mutable_data_ptr());
    const T* data = dense.const_data_ptr<T>();
    const int64_t shared = (kPenalties * items.classes + 1) * static_cast<int64_t>(sizeof(unsigned));
    const int64_t blocks = std::min<int64_t>(blocks_for(items.count(), kBudgetThreads), 4 * queue.multiprocessors());
    const int passes = items.count() <= kFewItems ? 0 : std::min(passes_for(budget.bound), kMostPasses);
    queue.launch(assign_classes_start_kernel, 1, kThreads, 0, budget.least, budget.bound, items.classes, state);
    for (int pass = 0; pass < passes; ++pass) {
        queue.launch(assign_classes_pass_kernel<T>, blocks, kBudgetThreads, shared, data, items, prices, pass, state);
    }
    queue.launch(assign_classes_finish_kernel<T>, 1, kBudgetThreads, shared, data, items, prices, passes, state);
    queue.launch(assign_classes_budget_kernel<T>, blocks_for(items.count(), kThreads), kThreads, 0, data, items, prices,
                 static_cast<const Interval*>(state.intervals + (passes + 1) % 2), solved.mutable_data_ptr<double>(),
                 Ids{out.mutable_data_ptr(), out.scalar_type()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "assign_classes", assign_classes);
    FASTROUTE_IMPL(m, "assign_classes.budget", assign_classes_budget);
}

}  // namespace fastroute
