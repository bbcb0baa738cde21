// One wording for every check. An error of an argument is std::invalid_argument, which is a ValueError in Python;
// memory that runs out is a MemoryError. Python checks what it can see first, in the same words; these also guard
// callers of torch.ops, compiled graphs and processes without Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#define FASTROUTE_CHECK(condition, ...)                   \
    do {                                                  \
        if (!(condition)) ::fastroute::fail(__VA_ARGS__); \
    } while (false)

// Registers a kernel; its errors name operator `name`, whoever raises them.
#define FASTROUTE_IMPL(m, name, kernel) \
    (m).impl(name, &::fastroute::named_errors<::fastroute::OperatorName(name), TORCH_BOX(&kernel)>)

namespace fastroute {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    return message.str();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw std::invalid_argument(text(parts...));
}

// Memory that ran out, with words: Python makes a MemoryError of it.
class OutOfMemory : public std::bad_alloc {
  public:
    explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
    const char* what() const noexcept override { return message_.c_str(); }

  private:
    std::string message_;
};

[[noreturn]] inline void out_of_memory(const std::string& op, const std::string& what) {
    throw OutOfMemory(text(op, ": out of memory: cannot allocate ", what,
                           "; work on fewer or smaller images at a time, for example some rows, or free memory"));
}

template <size_t N>
struct OperatorName {
    char characters[N];

    constexpr OperatorName(const char (&name)[N]) { std::copy_n(name, N, characters); }
    // The public operator: without an overload, and a gradient goes by the name of what it belongs to.
    std::string op() const {
        std::string all(characters);
        all = all.substr(0, all.find('.'));
        constexpr std::string_view kGradient = "_backward";
        return all[0] == '_' ? all.substr(1, all.size() - 1 - kGradient.size()) : all;
    }
};

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

template <OperatorName Name, BoxedKernel Kernel>
void named_errors(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
    const auto named = [](const std::exception& error) {
        const std::string message(error.what()), op = Name.op();
        return message.find(op) == std::string::npos ? op + ": " + message : message;
    };
    try {
        Kernel(stack, arguments, outputs);
    } catch (const OutOfMemory&) {
        throw;
    } catch (const std::bad_alloc&) {
        out_of_memory(Name.op(), "the buffers of the kernel");
    } catch (const std::length_error&) {
        out_of_memory(Name.op(), "the buffers of the kernel");
    } catch (const std::logic_error& error) {
        throw std::invalid_argument(named(error));
    } catch (const std::exception& error) {
        throw std::runtime_error(named(error));
    }
}

inline void check_rank(const char* op, const char* name, const Tensor& x, int64_t rank) {
    FASTROUTE_CHECK(x.dim() == rank, op, ": ", name, " must have ", rank, " dimensions; got ", x.dim());
}

inline void check_cpu(const char* op, const char* name, const Tensor& x) {
    FASTROUTE_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU, as the first argument is; move it with .to()");
}

inline void check_same_device(const char* op, const char* name, const Tensor& x, const Tensor& first) {
    if (first.is_cpu()) return check_cpu(op, name, x);
    FASTROUTE_CHECK(x.device() == first.device(), op, ": ", name,
                    " must be on the device of the first argument; move it with .to()");
}

inline void check_at_least(const char* op, const char* name, int64_t value, int64_t least) {
    FASTROUTE_CHECK(value >= least, op, ": ", name, " must be at least ", least, "; got ", value);
}

// Rows [begin, end) of an output of `height`.
inline void check_rows(const char* op, int64_t begin, int64_t end, int64_t height) {
    FASTROUTE_CHECK(0 <= begin && begin <= end && end <= height, op, ": rows must be ordered and lie in [0, ", height,
                    "]; got (", begin, ", ", end, ")");
}

using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// The product of sizes, which must fit into an address.
inline int64_t checked_product(const char* op, const char* what, Shape sizes) {
    constexpr int64_t kMost = int64_t{1} << 62;  // two of them can be added
    int64_t product = 1;
    bool fits = true, nothing = false;
    for (const int64_t size : sizes) fits &= size >= 0, nothing |= size == 0;
    for (const int64_t size : sizes) fits = fits && (nothing || !__builtin_mul_overflow(product, size, &product));
    if (!fits || product > kMost) {
        std::ostringstream got;
        for (size_t d = 0; d < sizes.size(); ++d) got << (d == 0 ? "" : " * ") << sizes[d];
        fail(op, ": ", what, " is too large; got ", got.str());
    }
    return nothing ? 0 : product;
}

// A new contiguous tensor where `beside` is; running out of memory has words.
inline Tensor empty_tensor(const char* op, const char* what, Shape size, ScalarType dtype, const Tensor& beside,
                           torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
    const int64_t count = checked_product(op, what, size);
    try {
        return torch::stable::empty(size, dtype, std::nullopt, beside.device(), std::nullopt, format);
    } catch (const std::exception&) {
        out_of_memory(op, text(count, " numbers for ", what));
    }
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
            fail(op, ": ", name, " must lie in [0, ", limit, "); got ", index[i]);
        }
    }
}

}  // namespace fastroute
