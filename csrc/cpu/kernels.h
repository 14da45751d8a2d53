// The CPU kernels: one list, declared for every instruction set and called through a table.
#pragma once

#include "cpu/isa.h"
#include "flexdit/ops.h"

// name, parameters. Linear layers of float32 and bfloat16 are oneDNN's (gemm_cpu.cpp) and not in this list.
#define FLEXDIT_CPU_KERNELS(KERNEL)                                 \
  KERNEL(linear_float64, Linear)                                    \
  KERNEL(linear_float64_backward, LinearBackward)                   \
  KERNEL(column_sums, ColumnSums)                                   \
  KERNEL(convert, Elementwise)                                      \
  KERNEL(modulated_layer_norm, ModulatedLayerNorm)                  \
  KERNEL(modulated_layer_norm_backward, ModulatedLayerNormBackward) \
  KERNEL(gated_residual, GatedResidual)                             \
  KERNEL(gated_residual_backward, GatedResidualBackward)            \
  KERNEL(modulated_mean, ModulatedMean)                             \
  KERNEL(modulated_mean_backward, ModulatedMeanBackward)            \
  KERNEL(pool_tokens, PoolTokens)                                   \
  KERNEL(pool_tokens_backward, PoolTokensBackward)                  \
  KERNEL(gather_sparse, GatherSparse)                               \
  KERNEL(gather_sparse_backward, GatherSparseBackward)              \
  KERNEL(add_position, AddPosition)                                 \
  KERNEL(attention, Attention)                                      \
  KERNEL(attention_backward, AttentionBackward)                     \
  KERNEL(gelu, Elementwise)                                         \
  KERNEL(gelu_backward, GeluBackward)                               \
  KERNEL(silu, Elementwise)                                         \
  KERNEL(silu_backward, SiluBackward)                               \
  KERNEL(patchify, Patches)                                         \
  KERNEL(unpatchify, Patches)                                       \
  KERNEL(timestep_embedding, TimestepEmbedding)                     \
  KERNEL(label_embedding, LabelEmbedding)                           \
  KERNEL(label_embedding_backward, LabelEmbeddingBackward)          \
  KERNEL(normal_noise, NormalNoise)                                 \
  KERNEL(denoise_step, DenoiseStep)                                 \
  KERNEL(model_input, ModelInput)                                   \
  KERNEL(guidance_combine, GuidanceCombine)                         \
  KERNEL(gather_rows, GatherRows)                                   \
  KERNEL(add_tables, AddTables)

namespace flexdit::cpu {

// sums[j] = sum over i of x[i, j]: a bias's gradient.
struct ColumnSums {
  Matrix x;     // [M, N]
  Matrix sums;  // [1, N], written
};

struct Kernels {
#define FLEXDIT_FIELD(name, Parameters) void (*name)(const Parameters&, int threads);
  FLEXDIT_CPU_KERNELS(FLEXDIT_FIELD)
#undef FLEXDIT_FIELD
};

// The kernels for the best instruction set that this machine has.
const Kernels& kernels();
const char* instruction_set();
// Whether there are tile registers for products (gemm_amx.cpp).
bool has_amx();

// Defined in gemm_cpu.cpp.
void linear(const Linear& p, int threads);
void linear_backward(const LinearBackward& p, int threads);
PackedWeightPointer pack_weight(const Matrix& weight, int threads);  // null where there is no such product
const char* onednn_version();

namespace FLEXDIT_ISA {
extern const Kernels kernel_table;
#define FLEXDIT_DECLARE(name, Parameters) void name(const Parameters& p, int threads);
FLEXDIT_CPU_KERNELS(FLEXDIT_DECLARE)
#undef FLEXDIT_DECLARE
}  // namespace FLEXDIT_ISA

}  // namespace flexdit::cpu
