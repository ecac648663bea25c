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
    int64_t stride;  // numbers from one of many narrow rows to the next
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

inline const float* widen_row(const uint16_t* x, int64_t inputs, std::vector<float>& room) {
    room.resize(inputs);
    for (int64_t k = 0; k < inputs; ++k) room[k] = wide_one(x[k]);
    return room.data();
}

// Room for numbers, from the beginning of a cache line.
struct alignas(64) Line {
    char bytes[64];
};

template <class Value>
Value* lines_of(std::vector<Line>& room, int64_t count) {
    const size_t needed = (count * sizeof(Value) + sizeof(Line) - 1) / sizeof(Line);
    if (room.size() < needed) room.resize(needed);
    return reinterpret_cast<Value*>(room.data());
}

// Sums of rows over each `length` inputs, [rows][inputs / length].
inline void sum_groups(const uint16_t* x, int64_t count, int64_t length, float* totals);

#if defined(LOWVRAM_AVX512)
#include "avx512.h"
#else
#include "avx2.h"
#endif

inline void sum_groups(const uint16_t* x, int64_t count, int64_t length, float* totals) {
    for (const uint16_t* end = x + count; x < end; x += length) {
        Lanes lanes = zero();
        for (int64_t k = 0; k < length; k += 16) lanes = add(lanes, widen(x + k, 0));
        float each[16], sum = 0;
        store(each, lanes);
        for (float one : each) sum += one;
        *totals++ = sum;
    }
}
