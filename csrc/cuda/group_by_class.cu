// group_by_class: a stable counting sort (counting_sort.cuh).
#include <tuple>

#include "cuda/counting_sort.cuh"

namespace fastroute {
namespace {

constexpr const char* kOp = "group_by_class";

std::tuple<Tensor, Tensor, Tensor> group_by_class_cuda(const Tensor& class_ids,  // [N]
                                                       int64_t num_classes) {
    check_rank(kOp, "class_ids", class_ids, 1);
    FASTROUTE_CHECK(num_classes >= 1, kOp, ": num_classes must be at least 1; got ", num_classes);
    const Tensor dense = torch::stable::contiguous(class_ids);
    const int64_t count = dense.size(0), items[] = {count}, bounds[] = {num_classes + 1};
    const auto make = [&](const int64_t* size) {
        return torch::stable::empty({size, 1}, ScalarType::Long, std::nullopt, class_ids.device());
    };
    const Tensor order = make(items), inverse = make(items), offsets = make(bounds);
    const Queue queue(kOp, class_ids);
    dispatch_index(kOp, dense.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        counting_sort(queue, dense, dense.const_data_ptr<T>(), count, num_classes, order.mutable_data_ptr<int64_t>(),
                      inverse.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>());
    });
    return {order, inverse, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { m.impl("group_by_class", TORCH_BOX(&group_by_class_cuda)); }

}  // namespace fastroute
