// AVX2 with fused products and sums of floats.

struct Lanes {
    __m256 low, high;
};
struct Words {
    __m256i low, high;
};

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes spread(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes load(const float* values) {
    return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
inline void store(float* out, Lanes values) {
    _mm256_storeu_ps(out, values.low);
    _mm256_storeu_ps(out + 8, values.high);
}
inline Lanes add(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Lanes subtract(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Lanes add_product(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes take_product(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

inline float sum(Lanes values) {
    const __m256 all = _mm256_add_ps(values.low, values.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Of the attention: keys that are scored together, and lanes of values.
constexpr int SCORED_KEYS = 1, VALUE_LANES = 1;

inline __m256 widen_half(const uint16_t* values, int float16) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    if (float16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Lanes widen(const uint16_t* values, int float16) {
    return {widen_half(values, float16), widen_half(values + 8, float16)};
}

inline __m256i rounded(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i moved = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256 none = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const __m256i kept = _mm256_srli_epi32(moved, 16);
    return _mm256_blendv_epi8(kept, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(none));
}

inline void narrow(uint16_t* out, Lanes values) {
    const __m256i joined = _mm256_packus_epi32(rounded(values.low), rounded(values.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(joined, 0xd8));
}

inline Words load_words(const uint8_t* packed) {
    const auto* at = reinterpret_cast<const __m256i*>(packed);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}

inline Lanes nibble(Words words, int place) {
    const __m128i by = _mm_cvtsi32_si128(place);
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(words.low, by), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(words.high, by), mask))};
}

// Nibbles are not shifted to the end of their half of a word; the activations are, in return: the
// inputs 2 i and 2 i + 1 of eight by 4 i bits, exactly but for numbers below 1e-35.
inline Activations prepare_four(const uint16_t* x, int64_t rows, int64_t inputs, int64_t group,
                                std::vector<float>& room) {
    constexpr float SHARE[8] = {1, 1, 1.f / 16, 1.f / 16, 1.f / 256, 1.f / 256, 1.f / 4096,
                                1.f / 4096};
    room.resize(rows * (inputs + inputs / group));
    float* wide = room.data();
    for (int64_t k = 0; k < rows * inputs; ++k) wide[k] = wide_one(x[k]) * SHARE[k % 8];
    float* totals = wide + rows * inputs;
    sum_groups(x, rows * inputs, group, totals);
    return {x, wide, totals, inputs};
}

// Sums over one group of (q - 8) * x, for eight outputs.
template <int ROWS>
inline void half_sums(const Activations& x, int64_t inputs, int64_t start, int64_t length,
                      const uint8_t* packed, __m256* sums) {
    constexpr int CHAINS = ROWS == 1 ? 8 : ROWS == 2 ? 4 : ROWS < 5 ? 2 : 1;
    constexpr int AHEAD = 2048;
    __m256 chains[ROWS][CHAINS];
    for (auto& row : chains)
        for (auto& each : row) each = _mm256_setzero_ps();
    const float* at = x.wide + start;
    for (int64_t k = 0; k < length; k += 8, packed += 64, at += 8) {
        // Across pages the processor does not look ahead by itself.
        _mm_prefetch(reinterpret_cast<const char*>(packed + AHEAD), _MM_HINT_T0);
        const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        const __m256i halves[2] = {even, _mm256_srli_epi32(even, 16)};
        for (int i = 0; i < 8; ++i) {
            const __m256i mask = _mm256_set1_epi32(15 << 4 * (i / 2));
            const __m256 weights = _mm256_cvtepi32_ps(_mm256_and_si256(halves[i % 2], mask));
            for (int r = 0; r < ROWS; ++r) {
                __m256& chain = chains[r][i % CHAINS];
                chain = _mm256_fmadd_ps(weights, _mm256_set1_ps(at[r * inputs + i]), chain);
            }
        }
    }
    const __m256 eight = _mm256_set1_ps(8);
    for (int r = 0; r < ROWS; ++r) {
        sums[r] = chains[r][0];
        for (int i = 1; i < CHAINS; ++i) sums[r] = _mm256_add_ps(sums[r], chains[r][i]);
        const float total = x.totals[r * (inputs / length) + start / length];
        sums[r] = _mm256_fnmadd_ps(eight, _mm256_set1_ps(total), sums[r]);
    }
}

template <int ROWS>
inline void group_sums(const Activations& x, int64_t inputs, int64_t start, int64_t length,
                       const uint8_t* packed, Lanes* sums) {
    __m256 low[ROWS], high[ROWS];
    half_sums<ROWS>(x, inputs, start, length, packed, low);
    half_sums<ROWS>(x, inputs, start, length, packed + 32, high);
    for (int r = 0; r < ROWS; ++r) sums[r] = {low[r], high[r]};
}

// q - 8 of one input of one output.
using Unpacked = float;
using Input = float;
constexpr int TILE_BLOCKS = 1, TILE_ROWS = 6;

// Where a block's weights begin among those of an item: [4 blocks][length][16].
inline int64_t place_in_tiles(int block, int64_t length) { return block * length * 16; }

// One block's, `length` inputs of it.
inline void unpack(const uint8_t* packed, int64_t length, Unpacked* out) {
    constexpr int PLACES[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    for (int64_t k = 0; k < length; k += 8, packed += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(packed + 2048), _MM_HINT_T0);
        const Words words = load_words(packed);
        for (int i = 0; i < 8; ++i, out += 16)
            store(out, subtract(nibble(words, PLACES[i]), spread(8)));
    }
}

// Rows of a step as the tiles want them: side by side, as floats.
inline const Input* inputs_of(const uint16_t* x, int64_t rows, int64_t length, int64_t& stride,
                              std::vector<Line>& room) {
    float* wide = lines_of<float>(room, rows * length);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < length; k += 16)
            store(wide + r * length + k, widen(x + r * stride + k, 0));
    stride = length;
    return wide;
}

template <int ROWS>
inline void tile_sums(const Input* x, int64_t stride, const Unpacked* weights, int64_t length,
                      Lanes (&sums)[ROWS][TILE_BLOCKS]) {
    for (auto& row : sums) row[0] = zero();
    for (int64_t k = 0; k < length; ++k, weights += 16) {
        const Lanes across = load(weights);
        for (int r = 0; r < ROWS; ++r)
            sums[r][0] = add_product(across, spread(x[r * stride + k]), sums[r][0]);
    }
}

inline float dot_eight(const float* x, const int8_t* weights, int64_t inputs) {
    __m256 chains[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                        _mm256_setzero_ps()};
    int64_t k = 0;
    for (; k + 32 <= inputs; k += 32)
        for (int i = 0; i < 4; ++i) {
            const void* at = weights + k + 8 * i;
            const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(at));
            const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
            chains[i] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x + k + 8 * i), chains[i]);
        }
    float parts[8];
    _mm256_storeu_ps(parts, _mm256_add_ps(_mm256_add_ps(chains[0], chains[1]),
                                          _mm256_add_ps(chains[2], chains[3])));
    float sum = 0;
    for (float each : parts) sum += each;
    for (; k < inputs; ++k) sum += x[k] * weights[k];
    return sum;
}

inline float dot_sixteen(const uint16_t* x, const uint16_t* weights, int64_t inputs) {
    Lanes chains[2] = {zero(), zero()};
    for (int64_t k = 0; k < inputs; k += 16) {
        // Across pages the processor does not look ahead by itself.
        _mm_prefetch(reinterpret_cast<const char*>(weights + k + 1024), _MM_HINT_T0);
        Lanes& chain = chains[k / 16 % 2];
        chain = add_product(widen(weights + k, 0), widen(x + k, 0), chain);
    }
    return sum(add(chains[0], chains[1]));
}
