// What extract_patches reads: one patch or region of an image, its pixels converted and normalised, (pixel / maximum -
// mean[c]) / std[c], by each thread for the elements that it writes.
#pragma once

#include "common/geometry.h"
#include "common/pixel.h"
#include "cuda/pack.cuh"

namespace fastroute {
namespace {

// One value per channel in any floating type, or none.
struct Statistic {
    const void* data;  // [C] or null
    ScalarType type;

    template <typename W>
    __device__ __forceinline__ W at(int64_t c) const {
        switch (type) {
            case ScalarType::Half: return static_cast<W>(static_cast<const Half*>(data)[c]);
            case ScalarType::BFloat16: return static_cast<W>(static_cast<const BFloat16*>(data)[c]);
            case ScalarType::Double: return static_cast<W>(static_cast<const double*>(data)[c]);
            default: return static_cast<W>(static_cast<const float*>(data)[c]);
        }
    }
};

struct ExtractPlan {
    int64_t image_step, c_step, y_step, x_step;  // of the image, in elements
    Geometry geometry;
    int64_t tiles, cols;           // patches of an image, and of a row of them
    int64_t count, groups;         // patches of all images, and groups of rows of one patch
    const int64_t* order;          // [M] or null
    int channels, height;          // of a patch or region, and its rows of one channel
    int rows, length, group_rows;  // rows in memory, elements of a row, rows of a group
    bool channels_last;
    Statistic mean, std;
};

// What happens to the pixels of one channel.
template <typename In, typename Out>
struct Convert {
    using W = std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;
    W mean = W(0), std = W(1);
    bool has_mean, has_std;

    __device__ __forceinline__ Convert(const ExtractPlan& plan, int64_t c)
        : has_mean(plan.mean.data != nullptr), has_std(plan.std.data != nullptr) {
        if (has_mean) mean = plan.mean.at<W>(c);
        if (has_std) std = plan.std.at<W>(c);
    }

    __device__ __forceinline__ Out operator()(In pixel) const {
        if constexpr (std::is_integral_v<Out>) {
            return static_cast<Out>(pixel);
        } else {
            if constexpr (std::is_same_v<In, Out>) {
                if (!has_mean && !has_std) return pixel;
            }
            W value = from_pixel<W>(pixel);
            if (has_mean) value = value - mean;
            if (has_std) value = value / std;
            return static_cast<Out>(value);
        }
    }
};

// One patch of the image.
template <typename In, typename Out>
struct Source {
    const ExtractPlan& plan;
    const In* image;
    int64_t y, x;

    __device__ Source(const ExtractPlan& p, const In* images, int64_t m) : plan(p) {
        int64_t n = m;
        if (p.order != nullptr) {
            // Nothing can raise here: a number out of range becomes the nearest patch.
            const int64_t wanted = p.order[m], last = p.count - 1;
            n = wanted < 0 ? 0 : (wanted < last ? wanted : last);
        }
        const int64_t tile = n % p.tiles;
        image = images + n / p.tiles * p.image_step;
        y = p.geometry.y.origin(tile / p.cols);
        x = p.geometry.x.origin(tile % p.cols);
    }

    __device__ __forceinline__ const In* line(int64_t k) const {
        const int64_t at = y + k, last = plan.geometry.y.size - 1;
        return image + (at < last ? at : last) * plan.y_step;
    }

    __device__ __forceinline__ int64_t column(int64_t l) const {
        const int64_t at = x + l, last = plan.geometry.x.size - 1;
        return (at < last ? at : last) * plan.x_step;
    }

    // Element l of row `row`.
    __device__ __forceinline__ Out element(int row, int l) const {
        const int c = plan.channels_last ? l % plan.channels : row / plan.height;
        const int k = plan.channels_last ? row : row - c * plan.height;
        const int at = plan.channels_last ? l / plan.channels : l;
        return Convert<In, Out>(plan, c)(line(k)[c * plan.c_step + column(at)]);
    }

    // Whether N neighbours of a row are anywhere read from N neighbours in memory and alike; the same for all patches.
    template <int N>
    __device__ __forceinline__ bool has_runs() const {
        if (plan.length < N) return false;
        if (!plan.channels_last) return plan.x_step == 1;
        return plan.c_step == 1 && plan.x_step == plan.channels && plan.mean.data == nullptr &&
               plan.std.data == nullptr;
    }

    // Whether elements [l, l + N) of a row are, where there are runs: inside the image.
    template <int N>
    __device__ __forceinline__ bool is_run(int l) const {
        const int64_t pixel = plan.channels_last ? plan.channels : 1;
        return x * pixel + l + N <= plan.geometry.x.size * pixel;
    }

    template <int N>
    __device__ __forceinline__ Pack<Out, N> run(int row, int l) const {
        const int c = plan.channels_last ? 0 : row / plan.height;
        const In* from =
            line(row - c * plan.height) + c * plan.c_step + (plan.channels_last ? x * plan.channels : x) + l;
        const Pack<In, N> pixels = load_pack<N>(from);
        const Convert<In, Out> convert(plan, c);
        Pack<Out, N> result;
#pragma unroll
        for (int e = 0; e < N; ++e) result.at[e] = convert(pixels.at[e]);
        return result;
    }
};

}  // namespace
}  // namespace fastroute
