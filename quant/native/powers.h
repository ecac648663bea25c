// Powers of two, of which loops are made that compilers do several at a time.

#pragma once

#include <cstdint>
#include <cstring>

constexpr float LOG2_E = 1.44269504f;

// 2^power to 2e-7, at most 2^126 and at least 2^-126.
inline float two_to(float power) {
    power = power < 126.f ? power : 126.f;
    power = power > -126.f ? power : -126.f;
    const float whole = power + 12582912.f - 12582912.f;
    const float part = power - whole;
    float two = 1.54035304e-4f;  // 2^part, by its series
    for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f,
                    1.f})
        two = two * part + c;
    int32_t bits;
    std::memcpy(&bits, &two, sizeof bits);
    bits += int32_t(whole) * (1 << 23);
    std::memcpy(&two, &bits, sizeof two);
    return two;
}
