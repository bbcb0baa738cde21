// assign_classes: argmax over classes of score / cost^penalty; with a budget, of log2(score) - penalty · log2(cost) at
// the smallest penalty whose mean cost fits, which is bisected on the device (assign_classes_budget.cuh). One thread
// per run of items of one 16-byte vector of each class, in turns (assign_classes_items.cuh).
#include "common/assign_classes.h"

#include <algorithm>
#include <vector>

#include "cuda/assign_classes_budget.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;  // of a multiprocessor

// Whole vectors of two classes, for K = 2, or of any number, for K = 0.
template <typename T, typename Id, int K>
__global__ void __launch_bounds__(kThreads)
    assign_classes_vector_kernel(const T* __restrict__ score,  // [B, K, L]
                                 const __grid_constant__ Items items, const __grid_constant__ Turns turns,
                                 const __grid_constant__ PerClass<Work<T>> scale, Id* __restrict__ ids) {
    constexpr int N = kPack<T>;
    using W = Work<T>;
    const int classes = K > 0 ? K : static_cast<int>(items.classes);
    for (Runs<N> run(items, turns); run.more(); run.next()) {
        const T* from = run.scores(score);
        Pack<W, N> value;
        Pack<Id, N> best{};
        const Pack<T, N> lowest = load_words<uint4, T, N>(from);
#pragma unroll
        for (int e = 0; e < N; ++e) value.at[e] = multiply(static_cast<W>(lowest.at[e]), scale.value[0]);
        for (int k = 1; k < classes; ++k) {
            const Pack<T, N> next = load_words<uint4, T, N>(from + k * items.class_step);
#pragma unroll
            for (int e = 0; e < N; ++e) {
                const W other = multiply(static_cast<W>(next.at[e]), scale.value[k]);
                if (other > value.at[e]) value.at[e] = other, best.at[e] = static_cast<Id>(k);
            }
        }
        store_run(ids + run.number(), best);
    }
}

template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    assign_classes_kernel(const T* __restrict__ score,  // [B, K, L]
                          const __grid_constant__ Items items, const __grid_constant__ Turns turns,
                          const __grid_constant__ PerClass<Work<T>> scale, Id* __restrict__ ids) {
    using W = Work<T>;
    for (Runs<1> run(items, turns); run.more(); run.next()) {
        const T* from = run.scores(score);
        W value = multiply(static_cast<W>(from[0]), scale.value[0]);
        int best = 0;
        for (int k = 1; k < items.classes; ++k) {
            const W other = multiply(static_cast<W>(from[k * items.class_step]), scale.value[k]);
            if (other > value) value = other, best = k;
        }
        ids[run.number()] = static_cast<Id>(best);
    }
}

template <typename T, typename Id, int K>
__global__ void __launch_bounds__(kBudgetThreads, kBudgetBlocks<T, K>)
    assign_classes_budget_kernel(const T* __restrict__ score,  // [B, K, L]
                                 const __grid_constant__ Items items, const __grid_constant__ Turns turns,
                                 const __grid_constant__ Prices prices, const Interval* solved,
                                 double* __restrict__ penalty_out, Id* __restrict__ ids) {
    constexpr int N = K > 0 ? kPack<T> : 1;
    using W = Work<T>;
    const Cut cut = cut_at(solved->high, prices);
    if (blockIdx.x == 0 && threadIdx.x == 0) *penalty_out = cut.penalty;
    for (Runs<N> run(items, turns); run.more(); run.next()) {
        const T* from = run.scores(score);
        Id* const to = ids + run.number();
        const int count = run.count();
        unsigned left = (1u << count) - 1;
        if constexpr (K > 0) {
            Pack<T, N> pack[K] = {};
            load_classes(from, items, count, pack);
            Pack<Id, N> best;
#pragma unroll
            for (int e = 0; e < N; ++e) {
                const Choice choice = Logs<W, T, K>(pack, e, items, prices).at(cut, items, prices);
                best.at[e] = static_cast<Id>(choice.id);
                left &= ~(unsigned{choice.sure} << e);
            }
            if (items.vectors) {
                store_run(to, best);
            } else {
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    if (e < count) to[e] = best.at[e];
                }
            }
        }
        for (; left != 0; left &= left - 1) {
            const int e = __ffs(static_cast<int>(left)) - 1;
            const Logs<double, T, K> own(from + e * items.item_step, items, prices);
            to[e] = static_cast<Id>(own.at(cut, items, prices).id);
        }
    }
}

__global__ void assign_classes_start_kernel(double low, double high, BudgetState state) {
    for (int64_t e = threadIdx.x; e < state.entries; e += blockDim.x) state.turn(0)[e] = 0;
    if (threadIdx.x == 0) state.intervals[0] = {low, high, 0, 0};
}

template <typename W>
PerClass<W> per_class(const std::vector<double>& values) {
    PerClass<W> all{};
    std::transform(values.begin(), values.end(), all.value, [](double value) { return static_cast<W>(value); });
    return all;
}

template <typename T>
Items items_of(const Tensor& dense) {  // [B, K, ...]
    const int64_t batch = dense.size(0), classes = dense.size(1), length = dense.numel() / (batch * classes);
    // Of one item per image, those of one class lie beside each other.
    if (length == 1) {
        return {.batch = 1,
                .classes = classes,
                .length = batch,
                .batch_step = 0,
                .class_step = 1,
                .item_step = classes,
                .vectors = false};
    }
    const bool vectors =
        length % kPack<T> == 0 && reinterpret_cast<uintptr_t>(dense.const_data_ptr<T>()) % sizeof(uint4) == 0;
    return {.batch = batch,
            .classes = classes,
            .length = length,
            .batch_step = classes * length,
            .class_step = length,
            .item_step = 1,
            .vectors = vectors};
}

// Blocks for runs of `run` items, so many of a multiprocessor at most.
int64_t blocks_of(const Items& items, int run, int threads, int64_t most) {
    return std::min(blocks_for(items.batch * blocks_for(items.length, run), threads), most);
}

template <typename T>
void run_assign_classes(const Tensor& score, const std::vector<double>& cost, double penalty, const Tensor& out) {
    const Tensor dense = torch::stable::contiguous(score);
    const Items items = items_of<T>(dense);
    const Queue queue(kOp, score);
    const PerClass<Work<T>> scale = per_class<Work<T>>(penalty_scales(cost, penalty));
    const T* data = dense.const_data_ptr<T>();
    const int run = items.vectors ? kPack<T> : 1;
    const int64_t blocks = blocks_of(items, run, kThreads, int64_t{kBlocks} * queue.multiprocessors());
    const Turns turns = turns_of(items, run, blocks * kThreads);
    dispatch_index(kOp, out.scalar_type(), [&](auto zero) {
        using Id = decltype(zero);
        const auto kernel = !items.vectors       ? assign_classes_kernel<T, Id>
                            : items.classes == 2 ? assign_classes_vector_kernel<T, Id, 2>
                                                 : assign_classes_vector_kernel<T, Id, 0>;
        queue.launch(kernel, blocks, kThreads, 0, data, items, turns, scale, out.mutable_data_ptr<Id>());
    });
}

Prices prices_of(const std::vector<double>& cost, const Budget& budget) {
    const double most_expensive = *std::max_element(cost.begin(), cost.end());
    Prices prices{};
    prices.allowed = budget.share, prices.logits = budget.logits;
    for (size_t k = 0; k < cost.size(); ++k) {
        const double log = std::log2(cost[k]), slope = log - std::log2(cost[0]);
        prices.log_cost.value[k] = log, prices.share.value[k] = cost[k] / most_expensive;
        prices.slope.value[k] = static_cast<float>(slope);
        prices.steepest = std::max(prices.steepest, std::fabs(log));
        prices.span = std::max(prices.span, std::fabs(slope));
    }
    return prices;
}

// For two classes, for up to four, or for any number, K = 0.
template <typename T, int K>
void solve_and_choose(const T* data, const Items& items, const Prices& prices, const Budget& budget, const Queue& queue,
                      const Tensor& like, const Tensor& out, const Tensor& solved) {
    const int64_t entries = kCuts<K> * items.classes;
    const int64_t bytes[] = {BudgetState::bytes(entries)};
    const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, like.device());
    const BudgetState state(memory.mutable_data_ptr(), entries);
    const int64_t shared = entries * static_cast<int64_t>(sizeof(unsigned));
    constexpr int kRun = K > 0 ? kPack<T> : 1;
    const int64_t blocks =
        blocks_of(items, kRun, kBudgetThreads, int64_t{kBudgetBlocks<T, K>} * queue.multiprocessors());
    const Turns turns = turns_of(items, kRun, blocks * kBudgetThreads);
    const int passes = items.count() <= kFewItems ? 0 : std::min(passes_for(budget.bound, kSteps<K>), kMostPasses);
    queue.launch(assign_classes_start_kernel, 1, kThreads, 0, budget.least, budget.bound, state);
    for (int pass = 0; pass <= passes; ++pass) {
        const bool alone = pass == passes;
        queue.launch(assign_classes_pass_kernel<T, K>, alone ? 1 : blocks, kBudgetThreads, shared, data, items,
                     alone ? turns_of(items, kRun, kBudgetThreads) : turns, prices, pass, alone ? 1 : 0, state);
    }
    dispatch_index(kOp, out.scalar_type(), [&](auto zero) {
        using Id = decltype(zero);
        queue.launch(assign_classes_budget_kernel<T, Id, K>, blocks, kBudgetThreads, 0, data, items, turns, prices,
                     static_cast<const Interval*>(state.intervals + (passes + 1) % 2),
                     solved.mutable_data_ptr<double>(), out.mutable_data_ptr<Id>());
    });
}

template <typename T>
void run_assign_classes_budget(const Tensor& score, const std::vector<double>& cost, const Budget& budget,
                               const Tensor& out, const Tensor& solved) {
    const Tensor dense = torch::stable::contiguous(score);
    const Items items = items_of<T>(dense);
    const auto solve = items.classes == 2   ? solve_and_choose<T, 2>
                       : items.classes <= 4 ? solve_and_choose<T, 4>
                                            : solve_and_choose<T, 0>;
    solve(dense.const_data_ptr<T>(), items, prices_of(cost, budget), budget, Queue(kOp, score), score, out, solved);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "assign_classes", assign_classes);
    FASTROUTE_IMPL(m, "assign_classes.budget", assign_classes_budget);
}

}  // namespace fastroute
