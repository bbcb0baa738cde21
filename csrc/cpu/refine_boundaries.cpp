// refine_boundaries: a pixel of class 0 with a more expensive neighbour becomes the mean of its 3 x 3 pixels; all
// others are copied. Work mapping: one item per output row; its boundary pixels are found once for all channels.
#include "common/refine_boundaries.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/pixel.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

// expensive[x] |= class[x] != 0.
template <typename Id>
struct ExpensiveBody {
    FASTROUTE_INLINE static void run(const Id* classes, int64_t count, uint8_t* expensive) {
        for (int64_t x = 0; x < count; ++x) expensive[x] |= classes[x] != 0;
    }
};

template <typename T, typename Out>
struct CopyBody {
    FASTROUTE_INLINE static void run(const T* from, int64_t count, Out* to) {
        for (int64_t x = 0; x < count; ++x) to[x] = to_pixel<Out>(static_cast<Work<T>>(from[x]));
    }
};

// Columns of row y of `classes` [H, W] whose pixel is refined.
template <typename Id>
void find_boundary(const Id* classes, int64_t width, int64_t y, std::vector<uint8_t>& expensive,
                   std::vector<int64_t>& found) {
    found.clear();
    std::fill(expensive.begin(), expensive.end(), uint8_t{0});
    for (int64_t row = y - 1; row <= y + 1; ++row)
        run_isa<ExpensiveBody<Id>>(classes + row * width, width, expensive.data());
    const Id* here = classes + y * width;
    for (int64_t x = 1; x + 1 < width; ++x) {
        if ((expensive[x - 1] | expensive[x] | expensive[x + 1]) != 0 && here[x] == 0) found.push_back(x);
    }
}

// Of the pixel at `at` and its neighbours, rows `width` apart.
template <typename T>
Work<T> mean_of_nine(const T* at, int64_t width) {
    Work<T> sum = 0;
    for (const T* row : {at - width, at, at + width}) {
        for (int64_t dx = -1; dx <= 1; ++dx) sum += static_cast<Work<T>>(row[dx]);
    }
    return sum / 9;
}

template <typename T, typename Out, typename Id>
void run_refine_boundaries(const Refinement& call, const Tensor& out) {
    check_cpu(kOp, "image", call.image);
    const int64_t batch = call.image.size(0), channels = call.image.size(1);
    const int64_t height = call.image.size(2), width = call.image.size(3), rows = call.end - call.begin;
    const T* pixels = call.image.const_data_ptr<T>();
    const Id* classes = call.class_map.const_data_ptr<Id>();
    Out* target = out.mutable_data_ptr<Out>();
    const auto run_rows = [&](int64_t first, int64_t last) {
        std::vector<uint8_t> expensive(width);
        std::vector<int64_t> found;
        for (int64_t item = first; item < last; ++item) {
            const int64_t b = item / rows, row = item % rows, y = call.begin + row;
            found.clear();
            if (y > 0 && y + 1 < height) find_boundary(classes + b * height * width, width, y, expensive, found);
            for (int64_t c = 0; c < channels; ++c) {
                const T* from = pixels + ((b * channels + c) * height + y) * width;
                Out* to = target + b * out.stride(0) + c * out.stride(1) + row * out.stride(2);
                if constexpr (std::is_same_v<T, Out>) {
                    std::memcpy(to, from, width * sizeof(T));
                } else {
                    run_isa<CopyBody<T, Out>>(from, width, to);
                }
                for (const int64_t x : found) to[x] = to_pixel<Out>(mean_of_nine(from + x, width));
            }
        }
    };
    parallel(batch * rows, grain_for(channels * width * static_cast<int64_t>(sizeof(T))), run_rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "refine_boundaries", refine_boundaries);
    FASTROUTE_IMPL(m, "refine_boundaries.out", refine_boundaries_out);
}

}  // namespace fastroute
