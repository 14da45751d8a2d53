// What SamplingModel holds.
#pragma once

#include "flexdit/session.h"
#include "ops/memory.h"

namespace flexdit {

struct SamplingModel::Prepared {
  Config config;
  DensitySchedule schedule;
  bool own_schedule;  // not the family's default one
  DType dtype;
  int64_t null_label;
  Execution exec;

  std::vector<Matrix> parameters;  // those that are packed and the modulation layers have no data
  std::vector<PackedWeightPointer> packed_owners;
  std::vector<const PackedWeight*> packed;
  std::vector<Matrix> folded;
  Matrix modulation_weight, modulation_bias;  // of all blocks and the final layer, or the one that blocks share
  Matrix modulation_tables;                   // then the tables of all blocks and of the final layer, [6 blocks + 2, C]
  PackedWeightPointer modulation_packed;
  std::vector<size_t> cross_kv;  // of the blocks that read the caption: where cross.kv's weight lies in parameters
  Buffer storage, modulation_storage, table_storage;

  explicit Prepared(const SamplingModelOptions& options);

 private:
  void take_parameters(std::span<const Matrix> from);
  void take_modulations(std::span<const Matrix> from);
  void take_tables(std::span<const Matrix> from);
  void pack_modulation();
  void fold(const Matrix& w_o, const Matrix& w_v, const Matrix& b_o, const Matrix& b_v, Matrix& weight, Matrix& bias);
};

}  // namespace flexdit
