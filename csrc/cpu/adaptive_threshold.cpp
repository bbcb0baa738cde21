// adaptive_threshold: Lloyd's iteration with two centres on one score per pixel, image by image.
// Work mapping: chunks of kChunk pixels, each summed on its own and the sums added in order, so that the number of
// threads changes no bit.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "adaptive_threshold";
constexpr int64_t kChunk = 1 << 15;
constexpr int kLanes = 8;  // sums side by side, the same in every instruction set
// Of the published iteration: see fastroute/reference/adaptive_threshold.py.
constexpr int kMaxAssignments = 19;
constexpr double kTolerance = 1e-4;

struct Sums {
    double upper = 0, lower = 0;
    int64_t count = 0;  // of the upper class
};

struct Range {
    double smallest = std::numeric_limits<double>::infinity(), largest = -std::numeric_limits<double>::infinity();
    bool finite = true;
};

// Sums of score - offset over both sides of the threshold.
template <typename T>
struct SumBody {
    FASTROUTE_INLINE static void run(const T* score, int64_t count, double offset, double threshold, Sums* sums) {
        double upper[kLanes] = {}, lower[kLanes] = {}, number[kLanes] = {};
        const auto add = [&](int lane, T x) __attribute__((always_inline)) {
            const double value = static_cast<double>(static_cast<Work<T>>(x)) - offset;
            upper[lane] += value >= threshold ? value : 0.0;
            lower[lane] += value >= threshold ? 0.0 : value;
            number[lane] += value >= threshold ? 1.0 : 0.0;
        };
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) add(lane, score[i + lane]);
        }
        for (; i < count; ++i) add(0, score[i]);
        for (int lane = 0; lane < kLanes; ++lane) {
            sums->upper += upper[lane], sums->lower += lower[lane], sums->count += static_cast<int64_t>(number[lane]);
        }
    }
};

template <typename T>
Range range_of(const T* score, int64_t count) {
    Range range;
    for (int64_t i = 0; i < count; ++i) {
        const double value = static_cast<double>(static_cast<Work<T>>(score[i]));
        range.smallest = std::min(range.smallest, value), range.largest = std::max(range.largest, value);
        range.finite &= value - value == 0;
    }
    return range;
}

// f(chunk, first pixel, pixels) for all chunks of an image, on all threads.
template <typename F>
void for_chunks(int64_t count, const F& f) {
    parallel((count + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk)
            f(chunk, chunk * kChunk, std::min(kChunk, count - chunk * kChunk));
    });
}

template <typename T, typename Id>
void threshold_image(const T* score, int64_t count, Id* out) {
    const int64_t chunks = (count + kChunk - 1) / kChunk;
    std::vector<Range> ranges(chunks);
    for_chunks(count, [&](int64_t chunk, int64_t at, int64_t length) { ranges[chunk] = range_of(score + at, length); });
    Range range;
    for (const Range& part : ranges) {
        if (!part.finite) value_error(kOp, ": score must be finite");
        range.smallest = std::min(range.smallest, part.smallest), range.largest = std::max(range.largest, part.largest);
    }
    const double offset = range.smallest, spread = range.largest - offset;
    const auto sum = [&](double threshold) {
        std::vector<Sums> parts(chunks);
        for_chunks(count, [&](int64_t chunk, int64_t at, int64_t length) {
            Sums* part = &parts[chunk];
            run_isa<SumBody<T>>(score + at, length, offset, threshold, part);
        });
        Sums total;
        for (const Sums& part : parts) total.upper += part.upper, total.lower += part.lower, total.count += part.count;
        return total;
    };
    const auto mean = [](double total, int64_t number) {
        return total / static_cast<double>(std::max<int64_t>(number, 1));
    };

    // A flat image is of class 0: nothing reaches an infinite threshold.
    double threshold = std::numeric_limits<double>::infinity();
    if (spread > 0) {
        double upper = mean(sum(0).upper, count), lower = 0;
        for (int n = 0; n < kMaxAssignments; ++n) {
            threshold = 0.5 * (upper + lower);
            const Sums sums = sum(threshold);
            const double new_upper = mean(sums.upper, sums.count), new_lower = mean(sums.lower, count - sums.count);
            const double moved = (new_upper - upper) * (new_upper - upper) + (new_lower - lower) * (new_lower - lower);
            if (moved <= kTolerance * spread * spread) break;
            upper = new_upper, lower = new_lower;
        }
    }
    for_chunks(count, [&](int64_t, int64_t at, int64_t length) {
        for (int64_t i = at; i < at + length; ++i) {
            out[i] = static_cast<Id>(static_cast<double>(static_cast<Work<T>>(score[i])) - offset >= threshold);
        }
    });
}

Tensor adaptive_threshold_cpu(const Tensor& score,  // [B, ...]
                              ScalarType dtype) {
    FASTROUTE_CHECK(score.dim() >= 2, kOp, ": score must be (B, ...) with at least 2 dimensions; got ", score.dim());
    const Tensor dense = torch::stable::contiguous(score);
    const Tensor out = torch::stable::empty(dense.sizes(), dtype, std::nullopt, dense.device());
    if (out.numel() == 0) return out;
    const int64_t batch = dense.size(0), count = dense.numel() / batch;
    dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        dispatch_index(kOp, dtype, [&](auto id) {
            using Id = decltype(id);
            for (int64_t b = 0; b < batch; ++b) {
                threshold_image(dense.template const_data_ptr<T>() + b * count, count,
                                out.template mutable_data_ptr<Id>() + b * count);
            }
        });
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { m.impl("adaptive_threshold", TORCH_BOX(&adaptive_threshold_cpu)); }

}  // namespace fastroute
