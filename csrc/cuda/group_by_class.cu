// group_by_class: a stable counting sort, in the three launches of counting_sort.cuh: every warp counts its own stretch
// of items, one block turns the counts into places, and every warp then places its stretch.
#include "common/group_by_class.h"

#include "cuda/counting_sort.cuh"

namespace fastroute {
namespace {

template <typename T>
void run_group_by_class(const Tensor& class_ids, int64_t num_classes, const Groups& out) {
    const Queue queue(kOp, class_ids);
    counting_sort(queue, class_ids, class_ids.const_data_ptr<T>(), class_ids.size(0), num_classes,
                  out.order.mutable_data_ptr<int64_t>(), out.inverse.mutable_data_ptr<int64_t>(),
                  out.offsets.mutable_data_ptr<int64_t>());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "group_by_class", group_by_class); }

}  // namespace fastroute
