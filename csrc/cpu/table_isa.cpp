// The table of one instruction set.
#include "cpu/kernels.h"

namespace flexdit::cpu::FLEXDIT_ISA {

#define FLEXDIT_ENTRY(name, Parameters) FLEXDIT_ISA::name,
const Kernels kernel_table = {FLEXDIT_CPU_KERNELS(FLEXDIT_ENTRY)};

}  // namespace flexdit::cpu::FLEXDIT_ISA
