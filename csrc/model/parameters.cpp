// What follows from a config alone: the parameters, the blocks, and what a pass costs.
#include <algorithm>
#include <cmath>

#include "model/block_plans.h"
#include "model/family.h"

namespace flexdit {
namespace {

class Specs {
 public:
  explicit Specs(const Config& c) : c_(c), kinds_(model_blocks(c)) {}

  std::vector<ParameterSpec> all() {
    const int64_t h = c_.hidden;
    for_beginning(c_, [&](const std::string& name, Part part, int64_t out, int64_t in) { add(name, part, out, in); });
    blocks("pooling_blocks", c_.num_pooling_blocks);
    for (int64_t i = 0; i < c_.num_sdtm; ++i) {
      const std::string module = "sdtm." + std::to_string(i);
      blocks(module + ".generation", c_.generation_blocks), blocks(module + ".sparse", c_.sparse_blocks);
      blocks(module + ".recovery", c_.recovery_blocks), blocks(module + ".dense", c_.dense_blocks);
    }
    blocks("dense_blocks", c_.num_dense_blocks);
    if (shares_modulation(c_))
      add("final_layer.modulation_table", Part::table, 2, h);
    else
      add("final_layer.modulation", Part::linear, 2 * h, h);
    add("final_layer.linear", Part::linear, c_.out_channels * c_.patch_size * c_.patch_size, h);
    return std::move(list_);
  }

 private:
  void add(const std::string& name, Part part, int64_t out, int64_t in) {
    switch (part) {
      case Part::table:
        list_.push_back({name, out, in});
        break;
      case Part::linear:
        list_.push_back({name + ".weight", out, in}), list_.push_back({name + ".bias", 1, out});
        break;
      case Part::embedding:
        add(name + ".fc1", Part::linear, out, in), add(name + ".fc2", Part::linear, out, out);
        break;
    }
  }
  void blocks(const std::string& prefix, int64_t count) {
    for (int64_t i = 0; i < count; ++i, ++block_) {
      const std::string name = prefix + "." + std::to_string(i) + ".";
      if (shares_modulation(c_)) add(name + "modulation_table", Part::table, 6, c_.hidden);
      for (auto& spec : block_parameters(kinds_[block_], c_.hidden, c_.mlp_hidden, style_of(c_, block_)))
        list_.push_back({name + spec.name, spec.rows, spec.cols});
    }
  }

  const Config& c_;
  const std::vector<BlockKind> kinds_;
  std::vector<ParameterSpec> list_;
  size_t block_ = 0;
};

// Multiply-accumulates of the blocks in the order that they run.
class Macs {
 public:
  Macs(const Config& c, Grid sparse) : c_(c), dense_(c.dense_grid()), sparse_(sparse) {}

  int64_t all() {
    const int64_t n = dense_.tokens(), m = sparse_.tokens(), h = c_.hidden, area = c_.patch_size * c_.patch_size;
    int64_t total = n * h * area * (c_.in_channels + c_.out_channels) + (c_.timestep_features + h) * h;
    total += shares_modulation(c_) ? 6 * h * h : 2 * h * h;  // of all blocks, or of the final layer
    total += text() * (c_.caption_channels + h) * h;
    if (c_.size_conditions) total += 3 * (c_.timestep_features + h / 3) * (h / 3);
    for (const BlockKind kind : model_blocks(c_)) total += block(kind, n, m), ++block_;
    return total;
  }

 private:
  int64_t text() const { return c_.caption_channels ? c_.max_caption_tokens : 0; }

  int64_t block(BlockKind kind, int64_t n, int64_t m) {
    const int64_t h = c_.hidden;
    in_module_ = kind == BlockKind::generation || (in_module_ && kind != BlockKind::recovery);
    switch (kind) {
      case BlockKind::pooling:
        return 2 * h * h + rest(n);
      case BlockKind::generation:
        return (2 * m + 2 * n) * h * h + 2 * n * m * h + rest(m);
      case BlockKind::recovery:
        return (m + n) * h * h + (2 * n + 2 * m) * h * h + 2 * n * m * h + rest(n);
      case BlockKind::dense:
        break;
    }
    const Grid& grid = in_module_ ? sparse_ : dense_;
    const int64_t rows = grid.tokens(), positions = int64_t{grid.height} * grid.width;
    const int64_t keys = within_frames(c_, block_) ? positions : across_frames(c_, block_) ? grid.frames : rows;
    return 4 * rows * h * h + 2 * rows * keys * h + rest(rows);
  }
  // Modulation, caption and MLP.
  int64_t rest(int64_t rows) const {
    const int64_t h = c_.hidden, tokens = text();
    const int64_t cross = has_cross(c_, block_) ? 2 * rows * h * h + 2 * tokens * h * h + 2 * rows * tokens * h : 0;
    return cross + 2 * rows * h * c_.mlp_hidden + (shares_modulation(c_) ? 0 : 6 * h * h);
  }

  const Config& c_;
  const Grid dense_, sparse_;
  size_t block_ = 0;
  bool in_module_ = false;  // between generation and recovery: tokens are sparse
};

}  // namespace

std::vector<ParameterSpec> model_parameters(const Config& c) { return Specs(c).all(); }

size_t model_block_parameters(const Config& c, BlockKind kind, size_t k) {
  return shares_modulation(c) + block_parameter_count(kind, style_of(c, k));
}

std::vector<BlockKind> model_blocks(const Config& c) {
  std::vector<BlockKind> kinds;
  const auto add = [&](int64_t count, BlockKind kind) { kinds.insert(kinds.end(), static_cast<size_t>(count), kind); };
  add(c.num_pooling_blocks, BlockKind::pooling);
  for (int64_t i = 0; i < c.num_sdtm; ++i) {
    add(c.generation_blocks, BlockKind::generation);
    add(c.sparse_blocks, BlockKind::dense);
    add(c.recovery_blocks, BlockKind::recovery);
    add(c.dense_blocks, BlockKind::dense);
  }
  add(c.num_dense_blocks, BlockKind::dense);
  return kinds;
}

int64_t model_macs(const Config& c, Grid sparse) { return Macs(c, sparse).all(); }

}  // namespace flexdit
