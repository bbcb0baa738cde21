// conv3x3 in bfloat16: by AVX-512 BF16 where there is such, else by plain sums.
// Work mapping: one item per few rows of an image.
#pragma once

#include "cpu/conv3x3/bf16.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "cpu/conv3x3/plan.h"
#include "cpu/isa.h"

namespace fastroute::conv3x3 {

// Rows of an item. Among few channels two rows more are multiplied, which are others' too.
inline constexpr int64_t kRows = 4, kFewRows = 24;
// So many channels and fewer are few.
inline constexpr int64_t kFew = 4;

// Plain sums, in float32, of one row.
inline void run_plain_row(const Direct& p, int64_t n, int64_t y) {
    const auto* weight = reinterpret_cast<const BFloat16*>(p.weight);
    for (int64_t x = 0; x < p.width; ++x) {
        for (int64_t group = 0; group < p.groups; ++group) {
            for (int64_t column = 0; column < p.columns; ++column) {
                const int64_t part = column / p.lanes, within = column % p.lanes;
                if (within >= p.shown) continue;
                float sum = p.bias[group * p.columns + column];
                for (int64_t tap = 0; tap < 9; ++tap) {
                    const int64_t from_y = y - 1 + tap / 3, from_x = x - 1 + tap % 3;
                    const bool inside = from_y >= -p.context && from_y < p.height + p.context && from_x >= 0;
                    if (!inside || from_x >= p.width) continue;
                    for (int64_t c = 0; c < p.in; ++c) {
                        const int64_t row = (tap * p.groups + group) * p.pairs + c / 2;
                        const int64_t second = c % 2 == 1 || c == p.in - 1;
                        sum += static_cast<float>(*p.x.at(n, from_y, from_x, group * p.in + c)) *
                               static_cast<float>(weight[(row * p.columns + column) * 2 + second]);
                    }
                }
                if (p.rectified && !(sum > 0)) sum *= p.slope[group * p.columns + column];
                const int64_t to_y = y * p.shuffle + part / p.shuffle, to_x = x * p.shuffle + part % p.shuffle;
                const int64_t channel = group * p.shown + within;
                if (p.residual.data != nullptr) sum += static_cast<float>(*p.residual.at(n, to_y, to_x, channel));
                *p.y.at(n, to_y, to_x, channel) = sum;
            }
        }
    }
}

// The weights of one group with all taps in columns.
inline Few few_columns(const Direct& p) {
    Few few;
    few.columns = padded(9 * p.shown);
    few.weight.assign(p.pairs * few.columns, 0.0f);
    few.zeros.assign(few.columns, 0.0f);
    for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t k = 0; k < p.pairs; ++k) {
            for (int64_t o = 0; o < p.shown; ++o)
                few.weight[k * few.columns + tap * p.shown + o] = p.weight[(tap * p.pairs + k) * p.columns + o];
        }
    }
    return few;
}

// Images whose channels do not follow each other are copied, and so are groups of one channel, behind a zero each.
inline void lay_out(Direct& p, std::vector<BFloat16>& room) {
    if (p.x.channel == 1 && p.in >= 2) return;
    const int64_t alone = p.in == 1, height = p.height + 2 * p.context, channels = p.channels << alone;
    room.assign(p.images * height * p.width * channels, BFloat16(0.0f));
    const View<const BFloat16> from = p.x;
    parallel(p.images * height, grain_for(p.width * channels * 2), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            BFloat16* to = room.data() + item * p.width * channels;
            for (int64_t x = 0; x < p.width; ++x, to += channels) {
                for (int64_t c = 0; c < p.channels; ++c)
                    to[(c << alone) + alone] = *from.at(item / height, item % height - p.context, x, c);
            }
        }
    });
    p.in <<= alone;
    p.x = {.data = room.data() + p.context * p.width * channels,
           .image = height * p.width * channels,
           .channel = 1,
           .row = p.width * channels,
           .pixel = channels};
}

inline void run_direct(Direct& p) {
    std::vector<BFloat16> room;
    lay_out(p, room);
    const bool fast = active_bf16(), is_few = fast && p.groups == 1 && p.shuffle == 1 && p.shown <= kFew;
    const int64_t rows = is_few ? kFewRows : kRows, items = (p.height + rows - 1) / rows;
    const Few few = is_few ? few_columns(p) : Few{};
    in_turn(p.images * items, [&](const auto& next) {
        for (int64_t item = next(); item < p.images * items; item = next()) {
            const int64_t n = item / items, first = item % items * rows, last = std::min(first + rows, p.height);
#if FASTROUTE_X86
            if (is_few) {
                half::run_few_rows(p, few, n, first, last);
                continue;
            }
#endif
            for (int64_t y = first; y < last; ++y) {
#if FASTROUTE_X86
                if (fast) {
                    half::run_row(p, n, y);
                    continue;
                }
#endif
                run_plain_row(p, n, y);
            }
        }
    });
}

}  // namespace fastroute::conv3x3
