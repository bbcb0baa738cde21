// Warp functions: lanes leave their values at a meeting place, wait for each other, and read.
#pragma once

namespace shim {

// The values that the lanes of `mask` brought; those of other lanes are garbage.
template <typename T>
struct Exchanged {
    T value[kWarp];
};

template <typename T>
Exchanged<T> exchange(unsigned mask, const T& value) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    Meeting& meeting = self->block->meeting(self->linear, mask);
    // Two sets of slots: a lane that is one exchange ahead does not overwrite what others still read.
    const uint64_t turn = meeting.barrier.generation() % 2;
    std::memcpy(meeting.slots[turn][self->linear % kWarp], &value, sizeof(T));
    meeting.barrier.wait();
    Exchanged<T> all;
    std::memset(static_cast<void*>(&all), 0xff, sizeof(all));
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((meeting.mask >> lane & 1u) != 0) std::memcpy(&all.value[lane], meeting.slots[turn][lane], sizeof(T));
    }
    return all;
}

inline int lane() { return self->linear % kWarp; }
inline bool present(unsigned mask, int lane) {
    const int lanes = self->block->threads() - self->linear / kWarp * kWarp;
    return lane < lanes && (mask >> lane & 1u) != 0;
}

}  // namespace shim

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    ::shim::self->block->meeting(::shim::self->linear, mask).barrier.wait();
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int from = ::shim::lane() / width * width + (source & (width - 1));
    return ::shim::exchange(mask, value).value[from];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const auto all = ::shim::exchange(mask, value);
    const int at = ::shim::lane() % width - static_cast<int>(delta);
    return at < 0 ? value : all.value[::shim::lane() - static_cast<int>(delta)];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const auto all = ::shim::exchange(mask, value);
    const int at = ::shim::lane() % width + static_cast<int>(delta);
    return at >= width ? value : all.value[::shim::lane() + static_cast<int>(delta)];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const auto all = ::shim::exchange(mask, value);
    const int from = ::shim::lane() ^ lanes;
    return from / width != ::shim::lane() / width && from > ::shim::lane() ? value : all.value[from];
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    const auto all = ::shim::exchange(mask, value);
    unsigned same = 0;
    for (int lane = 0; lane < ::shim::kWarp; ++lane) {
        if (::shim::present(mask, lane) && all.value[lane] == value) same |= 1u << lane;
    }
    return same;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto all = ::shim::exchange(mask, predicate);
    unsigned set = 0;
    for (int lane = 0; lane < ::shim::kWarp; ++lane) {
        if (::shim::present(mask, lane) && all.value[lane] != 0) set |= 1u << lane;
    }
    return set;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
    const auto all = ::shim::exchange(mask, value);
    T sum = 0;
    for (int lane = 0; lane < ::shim::kWarp; ++lane) {
        if (::shim::present(mask, lane)) sum += all.value[lane];
    }
    return sum;
}
