// One wording for every check. Shapes and dtypes are checked in Python too, where they raise ValueError and TypeError;
// these guard callers of torch.ops. `value_error` is for what only a kernel can see; Python turns its prefix into a
// ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#define FASTROUTE_CHECK(condition, ...)                                        \
    do {                                                                       \
        if (!(condition)) ::fastroute::fail("fastroute error: ", __VA_ARGS__); \
    } while (false)

namespace fastroute {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

template <typename... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
    fail("fastroute value error: ", parts...);
}

inline void check_rank(const char* op, const char* name, const Tensor& x, int64_t rank) {
    FASTROUTE_CHECK(x.dim() == rank, op, ": ", name, " must have ", rank, " dimensions; got ", x.dim());
}

inline void check_cpu(const char* op, const char* name, const Tensor& x) {
    FASTROUTE_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU, as the first argument is");
}

inline void check_same_device(const char* op, const char* name, const Tensor& x, const Tensor& first) {
    if (first.is_cpu()) return check_cpu(op, name, x);
    FASTROUTE_CHECK(x.device() == first.device(), op, ": ", name, " must be on the device of the first argument");
}

// torch::stable::contiguous looks its operator up by name in every call, which a small call feels.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A contiguous int64 vector on the device of the first argument, or nothing.
inline std::optional<Tensor> checked_index(const char* op, const char* name, const std::optional<Tensor>& index,
                                           const Tensor& first) {
    if (!index.has_value()) return std::nullopt;
    check_same_device(op, name, *index, first);
    check_rank(op, name, *index, 1);
    FASTROUTE_CHECK(index->scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
    return as_contiguous(*index);
}

inline void check_in_range(const char* op, const char* name, const int64_t* index, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i) {
        if (index[i] < 0 || index[i] >= limit) {
            value_error(op, ": ", name, " must lie in [0, ", limit, "); got ", index[i]);
        }
    }
}

}  // namespace fastroute
