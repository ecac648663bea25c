// AVX-512 with products of bfloat16 pairs.

using Lanes = __m512;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes spread(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float* values) { return _mm512_loadu_ps(values); }
inline void store(float* out, Lanes values) { _mm512_storeu_ps(out, values); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes subtract(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes add_product(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes take_product(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }

inline float sum(Lanes values) { return _mm512_reduce_add_ps(values); }

// Of the attention: keys that are scored together, and lanes of values.
constexpr int SCORED_KEYS = 4, VALUE_LANES = 4;

inline Lanes widen(const uint16_t* values, int float16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    if (float16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void narrow(uint16_t* out, Lanes values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
}

inline Activations prepare_four(const uint16_t* x, int64_t rows, int64_t inputs, int64_t group,
                                std::vector<float>& room) {
    room.resize(rows * inputs / group);
    sum_groups(x, rows * inputs, group, room.data());
    return {x, nullptr, room.data(), inputs};
}

// q - 8 as bfloat16, twice over: the lookup takes five bits, of which the upper is a neighbour's.
inline __m512i centred_numbers() {
    const __m256i once = _mm256_setr_epi16(
        (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
        (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    return _mm512_broadcast_i64x4(once);
}

// Sums over one group of (q - 8) * x, for the 16 outputs of a block.
template <int ROWS>
inline void group_sums(const Activations& x, int64_t inputs, int64_t start, int64_t length,
                       const uint8_t* packed, Lanes* sums) {
    // As many sums at a time as hide what one takes; those of several rows do it by themselves.
    constexpr int CHAINS = ROWS == 1 ? 4 : ROWS < 4 ? 2 : 1;
    constexpr int AHEAD = 4096;
    const __m512i numbers = centred_numbers();
    Lanes chains[ROWS][CHAINS];
    for (auto& row : chains)
        for (auto& each : row) each = zero();
    const uint16_t* at = x.narrow + start;
    for (int64_t k = 0; k < length; k += 8, packed += 64, at += 8) {
        // Across pages the processor does not look ahead by itself.
        _mm_prefetch(reinterpret_cast<const char*>(packed + AHEAD), _MM_HINT_T0);
        const __m512i words = _mm512_loadu_si512(packed);
        const __m512i parts[4] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                                  _mm512_srli_epi16(words, 12)};
        for (int i = 0; i < 4; ++i) {
            const __m512i weights = _mm512_permutexvar_epi16(parts[i], numbers);
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                std::memcpy(&pair, at + r * inputs + 2 * i, sizeof pair);
                Lanes& chain = chains[r][i % CHAINS];
                chain = _mm512_dpbf16_ps(chain, (__m512bh)weights,
                                         (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        sums[r] = chains[r][0];
        for (int i = 1; i < CHAINS; ++i) sums[r] = add(sums[r], chains[r][i]);
    }
}

// Two neighbouring inputs of one output, q - 8 of each as bfloat16.
using Unpacked = int32_t;
using Input = uint16_t;
constexpr int TILE_BLOCKS = 4, TILE_ROWS = 6;

// Where a block's weights begin among those of an item: [length / 2][4 blocks][16].
inline int64_t place_in_tiles(int block, int64_t) { return block * 16; }

// One block's, `length` inputs of it.
inline void unpack(const uint8_t* packed, int64_t length, Unpacked* out) {
    constexpr int STRIDE = 16 * TILE_BLOCKS;
    const __m512i numbers = centred_numbers();
    for (int64_t k = 0; k < length; k += 8, packed += 64, out += 4 * STRIDE) {
        _mm_prefetch(reinterpret_cast<const char*>(packed + 4096), _MM_HINT_T0);
        const __m512i words = _mm512_loadu_si512(packed);
        const __m512i parts[4] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                                  _mm512_srli_epi16(words, 12)};
        for (int i = 0; i < 4; ++i)
            _mm512_store_si512(out + i * STRIDE, _mm512_permutexvar_epi16(parts[i], numbers));
    }
}

// Rows of a step as the tiles want them: as they are.
inline const Input* inputs_of(const uint16_t* x, int64_t, int64_t, int64_t&, std::vector<Line>&) {
    return x;
}

template <int ROWS>
inline void tile_sums(const Input* x, int64_t stride, const Unpacked* weights, int64_t length,
                      Lanes (&sums)[ROWS][TILE_BLOCKS]) {
    for (auto& row : sums)
        for (auto& each : row) each = zero();
    for (int64_t k = 0; k < length; k += 2, weights += 16 * TILE_BLOCKS) {
        __m512i across[TILE_BLOCKS];
        for (int b = 0; b < TILE_BLOCKS; ++b) across[b] = _mm512_load_si512(weights + 16 * b);
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride + k, sizeof pair);
            const __m512i both = _mm512_set1_epi32(pair);
            for (int b = 0; b < TILE_BLOCKS; ++b)
                sums[r][b] = _mm512_dpbf16_ps(sums[r][b], (__m512bh)across[b], (__m512bh)both);
        }
    }
}

inline float dot_eight(const float* x, const int8_t* weights, int64_t inputs) {
    Lanes chains[4] = {zero(), zero(), zero(), zero()};
    int64_t k = 0;
    for (; k + 64 <= inputs; k += 64)
        for (int i = 0; i < 4; ++i) {
            const void* at = weights + k + 16 * i;
            const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(at));
            const Lanes values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            chains[i] = add_product(values, _mm512_loadu_ps(x + k + 16 * i), chains[i]);
        }
    float total = sum(add(add(chains[0], chains[1]), add(chains[2], chains[3])));
    for (; k < inputs; ++k) total += x[k] * weights[k];
    return total;
}

inline float dot_sixteen(const uint16_t* x, const uint16_t* weights, int64_t inputs) {
    Lanes chains[4] = {zero(), zero(), zero(), zero()};
    int64_t k = 0;
    for (; k + 128 <= inputs; k += 128) {
        // Across pages the processor does not look ahead by itself.
        for (int i = 0; i < 4; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(weights + k + 32 * i + 2048), _MM_HINT_T0);
        for (int i = 0; i < 4; ++i)
            chains[i] = _mm512_dpbf16_ps(chains[i],
                                         (__m512bh)_mm512_loadu_si512(weights + k + 32 * i),
                                         (__m512bh)_mm512_loadu_si512(x + k + 32 * i));
    }
    for (; k < inputs; k += 16)
        chains[k / 16 % 4] = add_product(widen(weights + k, 0), widen(x + k, 0), chains[k / 16 % 4]);
    return sum(add(add(chains[0], chains[1]), add(chains[2], chains[3])));
}
