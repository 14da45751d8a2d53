// Picks the instruction set, once. FLEXDIT_ISA in the environment asks for a smaller one, for tests.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#ifdef FLEXDIT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flexdit::cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernel_table;
}
namespace avx2 {
extern const Kernels kernel_table;
}
#endif
#ifdef FLEXDIT_AMX
namespace amx {
void attention(const Attention& p, int threads);  // in bfloat16
}
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* table;
  bool amx = false;
};

#ifdef FLEXDIT_AMX
void attention_on_tiles(const Attention& p, int threads) {
  (p.q.dtype == DType::bfloat16 ? amx::attention : avx512::kernel_table.attention)(p, threads);
}

const Kernels& kernels_with_tiles() {
  static const Kernels table = [] {
    Kernels kernels = avx512::kernel_table;
    kernels.attention = attention_on_tiles;
    return kernels;
  }();
  return table;
}

// Tiles of bfloat16 and of bytes, which Linux gives to a process that asks for them.
bool may_use_tiles() {
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // of bfloat16, at all, of bytes: in edx of leaf 7, 0
  constexpr unsigned kAvx512Bfloat16 = 1u << 5;                // in eax of leaf 7, 1
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bfloat16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Choice choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("FLEXDIT_ISA");
  const auto allowed = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
#ifdef FLEXDIT_AMX
    if (allowed("amx") && may_use_tiles()) return {"amx", &kernels_with_tiles(), true};
#endif
    if (allowed("avx512")) return {"avx512", &avx512::kernel_table};
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", &avx2::kernel_table};
#endif
  return {"baseline", &baseline::kernel_table};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().table; }
const char* instruction_set() { return choice().name; }
bool has_amx() { return choice().amx; }

}  // namespace flexdit::cpu
