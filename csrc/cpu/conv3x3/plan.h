// What conv3x3 prepares once per call, the constants of its transforms, and the buffers of a thread.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastroute::conv3x3 {

// Tiles of 4 x 4 outputs, computed from 6 x 6 inputs by products at 36 points.
inline constexpr int64_t kTile = 4, kPoints = 36;
// The numbers at which the transforms evaluate polynomials, beside 0 and infinity: ±kNear and ±kFar. These lose the
// fewest bits of all pairs of short binary fractions: errors at 64 channels are 2 to 3 times those of plain float32
// sums, and half those of the usual 1 and 2.
inline constexpr float kNear = 0.75f, kFar = 1.5f;
// Channels are padded to whole vectors of the widest instruction set.
inline constexpr int64_t kPad = 16;
// Columns of products that are kept at a time: as many vectors as a block of registers holds.
inline constexpr int64_t kColumns = 64;
// Tiles that pass together, at most, and bytes of their transformed inputs, which stay in the second-level cache.
inline constexpr int64_t kMostTiles = 48, kFewestTiles = 12, kBlockBytes = 768 << 10;

inline int64_t padded(int64_t channels) { return (channels + kPad - 1) / kPad * kPad; }

// An image (B, C, H, W) by its strides, in elements.
template <typename T>
struct View {
    T* data;
    int64_t image, channel, row, pixel;

    T* at(int64_t n, int64_t y, int64_t x, int64_t c) const {
        return data + n * image + y * row + x * pixel + c * channel;
    }
};

// What is the same for all types.
struct Shape {
    int64_t images, height, width, channels;  // height of what is written
    int64_t context;                          // rows above and below that are read and not written
    int64_t groups, in;                       // groups, and inputs of each
    int64_t shuffle;                          // a pixel of the output becomes shuffle x shuffle pixels
    int64_t shown, lanes;                     // channels of a group in such a pixel, and the same in whole vectors
    int64_t columns;                          // outputs of a group: shuffle * shuffle * lanes
    bool rectified;
    const float *weight, *bias, *slope;  // see below; [groups][columns]; [groups][columns]
};

// bfloat16, by direct sums. The weight: [9][groups][pairs][columns] pairs of numbers, each pair in the place of a
// float.
struct Direct : Shape {
    int64_t pairs;                          // of inputs of a group
    View<const c10::BFloat16> x, residual;  // residual.data may be null
    View<c10::BFloat16> y;                  // behind the shuffle, as residual is
};

// The same to few channels: weights with all taps in columns, [pairs][columns], and as many zeros as columns.
struct Few {
    int64_t columns = 0;
    std::vector<float> weight, zeros;
};

// float32 and bfloat16, by Winograd's method in float32. The weight: [kPoints][groups][in][columns].
template <typename T>
struct Winograd : Shape {
    int64_t down, across, tiles;  // tiles of an image, and of a block
    View<const T> x, residual;    // residual.data may be null
    View<T> y;                    // behind the shuffle, as residual is

    // Planes lie one line further apart than they are large, so that their lines fall into different sets of a cache.
    int64_t transformed_plane() const { return tiles * padded(channels) + kPad; }
    int64_t products_plane() const { return tiles * std::min(columns, kColumns) + kPad; }
};

inline int64_t tiles_per_block(int64_t channels) {
    const int64_t fit = kBlockBytes / (kPoints * padded(channels) * static_cast<int64_t>(sizeof(float)));
    return std::clamp(fit / kFewestTiles * kFewestTiles, kFewestTiles, kMostTiles);
}

// One thread's buffers, kept from call to call: fresh memory of this size would be mapped anew, page by page, each
// time.
class Workspace {
  public:
    float *transformed = nullptr, *products = nullptr;  // [kPoints][tiles][channels], [kPoints][tiles][columns]

    template <typename T>
    void reserve(const Winograd<T>& p) {
        const int64_t first = kPoints * p.transformed_plane(), count = first + kPoints * p.products_plane();
        if (count > size_) {
            size_ = 0;
            memory_.reset();
            memory_ = std::make_unique<char[]>(count * static_cast<int64_t>(sizeof(float)) + kAlign);
            size_ = count;
        }
        const auto past = reinterpret_cast<uintptr_t>(memory_.get()) % kAlign;
        transformed = reinterpret_cast<float*>(memory_.get() + (kAlign - past));
        products = transformed + first;
    }

  private:
    static constexpr uintptr_t kAlign = 64;
    std::unique_ptr<char[]> memory_;
    int64_t size_ = 0;
};

}  // namespace fastroute::conv3x3
