// group_by_class: a stable counting sort (counting_sort.cuh).
#include <tuple>

#include "cuda/counting_sort.cuh"

namespace fastroute {
namespace {

constexpr const char* kOp = "group_by_class";

std::tuple<Tensor, Tensor, Tensor> group_by_class_cuda(const Tensor& class_ids,  // [N]
                                                       int64_t num_classes) {
    check_rank(kOp, "class_ids", class_ids, 1);
    check_at_least(kOp, "num_classes", num_classes, 1);
    // Every thread has its own counts.
    checked_product(kOp, "num_classes", {num_classes, int64_t{1} << 16});
    const Tensor dense = torch::stable::contiguous(class_ids);
    const int64_t count = dense.size(0);
    const auto make = [&](int64_t size) {
        return empty_tensor(kOp, "the indices", {size}, ScalarType::Long, class_ids);
    };
    const Tensor order = make(count), inverse = make(count), offsets = make(num_classes + 1);
    const Queue queue(kOp, class_ids);
    dispatch_index(kOp, dense.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        counting_sort(queue, dense, dense.const_data_ptr<T>(), count, num_classes, order.mutable_data_ptr<int64_t>(),
                      inverse.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>());
    });
    return {order, inverse, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "group_by_class", group_by_class_cuda); }

}  // namespace fastroute
