// XXH64 of a piece of memory, seed 0, as its public specification defines it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the teacher cache is read as little-endian words");

namespace kdfast {

inline std::uint64_t xxh64(const std::uint8_t* data, std::size_t size) {
    constexpr std::uint64_t p1 = 0x9E3779B185EBCA87, p2 = 0xC2B2AE3D27D4EB4F, p3 = 0x165667B19E3779F9;
    constexpr std::uint64_t p4 = 0x85EBCA77C2B2AE63, p5 = 0x27D4EB2F165667C5;
    const auto rotate = [](std::uint64_t x, int bits) { return x << bits | x >> (64 - bits); };
    const auto read = [](const std::uint8_t* p, auto word) {
        std::memcpy(&word, p, sizeof(word));
        return word;
    };
    const auto round = [&](std::uint64_t sum, std::uint64_t word) { return rotate(sum + word * p2, 31) * p1; };
    const std::uint8_t* const end = data + size;
    std::uint64_t hash = p5;
    if (size >= 32) {
        std::uint64_t a = p1 + p2, b = p2, c = 0, d = 0 - p1;
        for (; end - data >= 32; data += 32) {
            a = round(a, read(data, std::uint64_t{}));
            b = round(b, read(data + 8, std::uint64_t{}));
            c = round(c, read(data + 16, std::uint64_t{}));
            d = round(d, read(data + 24, std::uint64_t{}));
        }
        hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
        for (std::uint64_t sum : {a, b, c, d}) hash = (hash ^ round(0, sum)) * p1 + p4;
    }
    hash += size;
    for (; end - data >= 8; data += 8) hash = rotate(hash ^ round(0, read(data, std::uint64_t{})), 27) * p1 + p4;
    if (end - data >= 4) {
        hash = rotate(hash ^ read(data, std::uint32_t{}) * p1, 23) * p2 + p3;
        data += 4;
    }
    for (; data < end; ++data) hash = rotate(hash ^ *data * p5, 11) * p1;
    hash = (hash ^ hash >> 33) * p2;
    hash = (hash ^ hash >> 29) * p3;
    return hash ^ hash >> 32;
}

}  // namespace kdfast
