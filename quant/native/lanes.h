// 16 floats, one for each output of a block, on the processor that this is built for.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

// Rows of activations as the products want them, and their sums over each group, [rows][groups].
struct Activations {
    const uint16_t* narrow;
    const float* wide;
    const float* totals;
};

inline float wide_one(uint16_t value) {
    const uint32_t bits = uint32_t{value} << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// To the nearest, ties to even; what is not a number stays so.
inline uint16_t round_one(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint16_t half_one(int value) {
    return _mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), 0), 0);
}

inline void sum_groups(const uint16_t* x, int64_t rows, int64_t inputs, int64_t group,
                       float* totals) {
    for (int64_t start = 0; start < rows * inputs; start += group) {
        float chains[16] = {};
        for (int64_t k = 0; k < group; k += 16)
            for (int i = 0; i < 16; ++i) chains[i] += wide_one(x[start + k + i]);
        float sum = 0;
        for (float each : chains) sum += each;
        *totals++ = sum;
    }
}

inline const float* widen_row(const uint16_t* x, int64_t inputs, std::vector<float>& room) {
    room.resize(inputs);
    for (int64_t k = 0; k < inputs; ++k) room[k] = wide_one(x[k]);
    return room.data();
}

#if defined(LOWVRAM_AVX512)
#include "avx512.h"
#else
#include "avx2.h"
#endif
