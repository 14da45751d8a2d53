// The random bits behind normal_noise: one definition for the CPU and for kernels, which is what makes a seed's noise
// the same everywhere. static, so that the CPU's instruction sets share no code.
#pragma once

#include <cstdint>

namespace flexdit {

struct PhiloxWords {
  uint32_t v[4];
};

// Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
static constexpr PhiloxWords philox4x32_10(PhiloxWords counter, uint64_t key) {
  uint32_t left = static_cast<uint32_t>(key), right = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter.v[0], b = uint64_t{0xCD9E8D57} * counter.v[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.v[1] ^ left, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.v[3] ^ right, static_cast<uint32_t>(a)}};
    left += 0x9E3779B9;  // Weyl sequences: the golden ratio and sqrt(3) - 1
    right += 0xBB67AE85;
  }
  return counter;
}

// Words of the normal values 4 block, ..., 4 block + 3 of a draw. Words 0 and 1 make the first two, 2 and 3 the others:
// of a pair (r, r') radius sqrt(-2 ln u) with u = (r + 1) 2^-32 and angle 2 pi r' 2^-32, cosine first, then sine.
static constexpr PhiloxWords noise_words(uint64_t seed, uint32_t draw, int64_t block) {
  const auto index = static_cast<uint64_t>(block);
  return philox4x32_10({{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), draw, 0}}, seed);
}

}  // namespace flexdit
