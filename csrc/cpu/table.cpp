// Picks the instruction set, once. FLEXDIT_ISA in the environment asks for a smaller one, for tests.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace flexdit::cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernel_table;
}
namespace avx2 {
extern const Kernels kernel_table;
}
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* table;
};

Choice choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("FLEXDIT_ISA");
  const auto allowed = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {"avx512", &avx512::kernel_table};
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

}  // namespace flexdit::cpu
