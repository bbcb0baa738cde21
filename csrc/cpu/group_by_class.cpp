// group_by_class: a stable counting sort. Every thread counts its own stretch of items, a scan over (class, thread)
// turns the counts into places, and every thread then places its stretch: two passes over the ids, the same result for
// any thread count.
#include "common/group_by_class.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"

namespace fastroute {
namespace {

// Below this many items a thread costs more than it saves.
constexpr int64_t kItemsPerThread = 32768;

template <typename T>
void count_classes(const T* ids, int64_t begin, int64_t end, int64_t num_classes, int64_t* counts, int64_t* wrong) {
    for (int64_t n = begin; n < end; ++n) {
        const int64_t id = static_cast<int64_t>(ids[n]);
        if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(num_classes)) {
            *wrong = n;
            return;
        }
        ++counts[id];
    }
}

template <typename T>
void run_group_by_class(const Tensor& class_ids, int64_t num_classes, const Groups& out) {
    check_cpu(kOp, "class_ids", class_ids);
    const T* ids = class_ids.const_data_ptr<T>();
    int64_t* order = out.order.mutable_data_ptr<int64_t>();
    int64_t* inverse = out.inverse.mutable_data_ptr<int64_t>();
    int64_t* offsets = out.offsets.mutable_data_ptr<int64_t>();

    const int64_t count = class_ids.size(0), threads = torch::stable::get_num_threads();
    const int64_t parts = std::clamp<int64_t>(count / kItemsPerThread, 1, threads);
    const auto part_begin = [&](int64_t part) { return count * part / parts; };
    // Rows are padded to a cache line, or the threads would share one.
    const int64_t row = (num_classes + 15) / 8 * 8;
    std::vector<int64_t> counts(parts * row, 0), wrong(parts * 8, -1);
    parallel(parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) {
            count_classes(ids, part_begin(p), part_begin(p + 1), num_classes, &counts[p * row], &wrong[p * 8]);
        }
    });
    for (int64_t p = 0; p < parts; ++p) {
        if (wrong[p * 8] < 0) continue;
        fail(kOp, ": class_ids must lie in [0, ", num_classes, "); got ", static_cast<int64_t>(ids[wrong[p * 8]]));
    }
    int64_t total = 0;
    for (int64_t k = 0; k < num_classes; ++k) {
        offsets[k] = total;
        for (int64_t p = 0; p < parts; ++p) {
            const int64_t here = counts[p * row + k];
            counts[p * row + k] = total;
            total += here;
        }
    }
    offsets[num_classes] = total;
    parallel(parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) {
            int64_t* next = &counts[p * row];
            for (int64_t n = part_begin(p); n < part_begin(p + 1); ++n) {
                const int64_t place = next[static_cast<int64_t>(ids[n])]++;
                order[place] = n;
                inverse[n] = place;
            }
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "group_by_class", group_by_class); }

}  // namespace fastroute
