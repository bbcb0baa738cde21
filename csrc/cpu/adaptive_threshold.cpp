// adaptive_threshold: Lloyd's iteration with two centres on one score per pixel, image by image: threshold = (upper +
// lower) / 2, the centres being the means of the scores on both sides of the threshold before.
// Work mapping: chunks of kChunk pixels, each summed on its own and the sums added in order, so that the number of
// threads changes no bit.
#include "common/adaptive_threshold.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/adaptive_threshold_doubles.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

constexpr int64_t kChunk = 1 << 15;
constexpr int kLanes = 8;  // sums side by side, the same in every instruction set

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

#if FASTROUTE_X86
// The same in vectors.
template <typename T>
FASTROUTE_AVX512 void sum_wide(const T* score, int64_t count, double offset, double threshold, Sums* sums) {
    __m512d upper = _mm512_setzero_pd(), lower = _mm512_setzero_pd();
    const __m512d from = _mm512_set1_pd(offset), middle = _mm512_set1_pd(threshold);
    int64_t i = 0, number = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m512d value = _mm512_sub_pd(eight_doubles(score + i), from);
        const __mmask8 above = _mm512_cmp_pd_mask(value, middle, _CMP_GE_OQ);
        upper = _mm512_mask_add_pd(upper, above, upper, value);
        lower = _mm512_mask_add_pd(lower, static_cast<__mmask8>(~above), lower, value);
        number += __builtin_popcount(above);
    }
    double uppers[kLanes], lowers[kLanes];
    _mm512_storeu_pd(uppers, upper), _mm512_storeu_pd(lowers, lower);
    for (; i < count; ++i) {
        const double value = static_cast<double>(static_cast<Work<T>>(score[i])) - offset;
        (value >= threshold ? uppers : lowers)[0] += value;
        number += value >= threshold;
    }
    for (int lane = 0; lane < kLanes; ++lane) sums->upper += uppers[lane], sums->lower += lowers[lane];
    sums->count += number;
}
#endif

template <typename T>
void add_sums(const T* score, int64_t count, double offset, double threshold, Sums* sums) {
#if FASTROUTE_X86
    if (active_isa() == Isa::avx512) return sum_wide(score, count, offset, threshold, sums);
#endif
    run_isa<SumBody<T>>(score, count, offset, threshold, sums);
}

// Extremes lane by lane, so that they are compared in vectors.
template <typename T>
struct RangeBody {
    FASTROUTE_INLINE static void run(const T* score, int64_t count, Range* range) {
        using W = Work<T>;
        constexpr int lanes = 16;
        const auto value = [&](int64_t i) __attribute__((always_inline)) { return static_cast<W>(score[i]); };
        W smallest[lanes], largest[lanes], odd[lanes];
        for (int lane = 0; lane < lanes; ++lane) smallest[lane] = largest[lane] = value(0), odd[lane] = W(0);
        for (int64_t i = 0; i + lanes <= count; i += lanes) {
            for (int lane = 0; lane < lanes; ++lane) {
                const W x = value(i + lane);
                smallest[lane] = x < smallest[lane] ? x : smallest[lane];
                largest[lane] = x > largest[lane] ? x : largest[lane];
                odd[lane] += x - x;  // 0, or NaN for good
            }
        }
        for (int64_t i = count / lanes * lanes; i < count; ++i) {
            smallest[0] = std::min(smallest[0], value(i)), largest[0] = std::max(largest[0], value(i));
            odd[0] += value(i) - value(i);
        }
        for (int lane = 0; lane < lanes; ++lane) {
            range->smallest = std::min(range->smallest, static_cast<double>(smallest[lane]));
            range->largest = std::max(range->largest, static_cast<double>(largest[lane]));
            range->finite &= odd[lane] == W(0);
        }
    }
};

// Class 1 from the threshold on.
template <typename T, typename Id>
struct ClassBody {
    FASTROUTE_INLINE static void run(const T* score, int64_t count, double offset, double threshold, Id* out) {
        for (int64_t i = 0; i < count; ++i) {
            out[i] = static_cast<Id>(static_cast<double>(static_cast<Work<T>>(score[i])) - offset >= threshold);
        }
    }
};

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
    for_chunks(count, [&](int64_t chunk, int64_t at, int64_t length) {
        Range* range = &ranges[chunk];
        run_isa<RangeBody<T>>(score + at, length, range);
    });
    Range range;
    for (const Range& part : ranges) {
        if (!part.finite) fail(kOp, ": score must be finite, and so must its range");
        range.smallest = std::min(range.smallest, part.smallest), range.largest = std::max(range.largest, part.largest);
    }
    const double offset = range.smallest, spread = range.largest - offset;
    if (!(spread <= std::numeric_limits<double>::max())) fail(kOp, ": score must be finite, and so must its range");
    const auto sum = [&](double threshold) {
        std::vector<Sums> parts(chunks);
        for_chunks(count, [&](int64_t chunk, int64_t at, int64_t length) {
            add_sums(score + at, length, offset, threshold, &parts[chunk]);
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
        Id* target = out + at;
        run_isa<ClassBody<T, Id>>(score + at, length, offset, threshold, target);
    });
}

template <typename T, typename Id>
void run_adaptive_threshold(const Tensor& score, const Tensor& out) {
    check_cpu(kOp, "score", score);
    const int64_t batch = score.size(0), count = score.numel() / batch;
    const T* from = score.const_data_ptr<T>();
    Id* to = out.mutable_data_ptr<Id>();
    for (int64_t b = 0; b < batch; ++b) threshold_image(from + b * count, count, to + b * count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "adaptive_threshold", adaptive_threshold); }

}  // namespace fastroute
