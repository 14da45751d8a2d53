// The position tables of every size in the batch.
#pragma once

#include "model/sampling_model.h"

namespace flexdit {

class PositionTables {
 public:
  explicit PositionTables(const SamplingModel::Prepared& prepared) : prepared_(prepared) {}

  // Makes the tables of sizes that come and were not there before; true if all tables have moved. Those that nobody
  // here has stay as long as there is little of them, whatever sizes come by.
  bool add(std::span<const Grid> coming, std::span<const Grid> staying);
  // All of them; where a size's table begins, and that of its temporal embedding, which lies behind it.
  Matrix rows() const;
  int32_t position(const Grid& dense) const;
  int32_t time(const Grid& dense) const { return position(dense) + static_cast<int32_t>(dense.tokens()); }

 private:
  int64_t rows_of(const Grid& dense) const;
  void fill(const Grid& dense, char* to);
  void upload(const std::vector<double>& values, void* to);

  const SamplingModel::Prepared& prepared_;
  Buffer tables_;
  std::vector<std::pair<Grid, int32_t>> places_;
  int64_t count_ = 0;  // rows
  Uploader uploader_;
};

}  // namespace flexdit
