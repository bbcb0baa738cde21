// Vectors of one instruction set. Included once per instruction set, inside a namespace of its own, with
//     FASTROUTE_BYTES    the size of a vector
//     FASTROUTE_TARGET   the attribute that selects the instruction set, on every function that touches a vector
// A generic vector operation in a function without that attribute would be split into narrow ones before inlining.

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

template <typename T>
struct Simd {
    typedef T Vector __attribute__((vector_size(FASTROUTE_BYTES)));
    typedef T Unaligned __attribute__((vector_size(FASTROUTE_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = FASTROUTE_BYTES / static_cast<int>(sizeof(T));
};
template <typename T>
using Vector = typename Simd<T>::Vector;

template <typename T>
FASTROUTE_SIMD Vector<T> load(const T* from) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

template <typename T>
FASTROUTE_SIMD void store(T* to, Vector<T> x) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = x;
}

template <typename T>
FASTROUTE_SIMD Vector<T> broadcast(T x) {
    return x - Vector<T>{};
}

// fma(a, b, c) = a · b + c, rounded once where the instruction set can. relu keeps NaN: the maximum returns its second
// operand when the two do not compare.
#if FASTROUTE_BYTES == 64
FASTROUTE_SIMD Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm512_fmadd_ps(a, b, c); }
FASTROUTE_SIMD Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
    return _mm512_fmadd_pd(a, b, c);
}
FASTROUTE_SIMD Vector<float> relu(Vector<float> x) { return _mm512_maskz_max_ps(0xffff, Vector<float>{}, x); }
FASTROUTE_SIMD Vector<double> relu(Vector<double> x) { return _mm512_maskz_max_pd(0xff, Vector<double>{}, x); }
#elif FASTROUTE_BYTES == 32
FASTROUTE_SIMD Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm256_fmadd_ps(a, b, c); }
FASTROUTE_SIMD Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
    return _mm256_fmadd_pd(a, b, c);
}
FASTROUTE_SIMD Vector<float> relu(Vector<float> x) { return _mm256_max_ps(Vector<float>{}, x); }
FASTROUTE_SIMD Vector<double> relu(Vector<double> x) { return _mm256_max_pd(Vector<double>{}, x); }
#else
template <typename V>
FASTROUTE_SIMD V fma(V a, V b, V c) {
    return a * b + c;
}
template <typename V>
FASTROUTE_SIMD V relu(V x) {
    return x < V{} ? V{} : x;
}
#endif

// The lanes of a and b that `Pick` names: i for a[i], lanes + i for b[i].
template <typename T, int... Pick>
FASTROUTE_SIMD Vector<T> pick(Vector<T> a, Vector<T> b, std::integer_sequence<int, Pick...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Pick...);
#else
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Index Mask __attribute__((vector_size(FASTROUTE_BYTES)));
    return __builtin_shuffle(a, b, Mask{Pick...});
#endif
}

template <int Step, int Lanes, bool Second, int... I>
constexpr auto exchange_lanes(std::integer_sequence<int, I...>) {
    if constexpr (Second) {
        return std::integer_sequence<int, ((I & Step) ? Lanes + I : I + Step)...>{};
    } else {
        return std::integer_sequence<int, ((I & Step) ? Lanes + I - Step : I)...>{};
    }
}

// A square of vectors transposed: log2(lanes) rounds that exchange blocks across the diagonal.
template <typename T, int Step>
FASTROUTE_SIMD void transpose(Vector<T>* x) {
    constexpr int lanes = Simd<T>::lanes;
    using All = std::make_integer_sequence<int, lanes>;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
        if (i & Step) continue;
        const Vector<T> a = x[i], b = x[i + Step];
        x[i] = pick<T>(a, b, exchange_lanes<Step, lanes, false>(All{}));
        x[i + Step] = pick<T>(a, b, exchange_lanes<Step, lanes, true>(All{}));
    }
    if constexpr (Step > 1) transpose<T, Step / 2>(x);
}

#undef FASTROUTE_SIMD
