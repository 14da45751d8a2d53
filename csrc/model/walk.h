// One walk over the blocks serves three purposes: it computes (forward), it measures buffers (null pointers, nothing
// computed), and it recalls where forward kept its activations (backward).
#pragma once

#include <optional>

#include "model/arena.h"
#include "model/family.h"

namespace flexdit {

struct BlockCall {
  BlockShape shape;
  size_t index;  // among the blocks
  size_t first_parameter, num_parameters;
  bool sparse;  // x are sparse tokens
  Matrix x, other, out;
  void* context;
};

struct Module {
  Matrix dense, pooled;         // the tokens that enter, and their pooled grid
  size_t first, recovery, end;  // block calls: [first, recovery) on sparse tokens, [recovery, end) recovery blocks
};

class Walk {
 public:
  // With `exec` the walk computes; without, it only lays the buffers out.
  Walk(const ModelForward& p, bool keeps_context, const Execution* exec);

  const ParameterPlaces places;
  Matrix patches, features, condition, final_rows, tokens;
  std::vector<BlockCall> calls;
  std::vector<Module> modules;
  size_t final_parameter = 0;

  int64_t rows() const { return rows_; }
  int64_t sparse_rows() const { return sparse_rows_; }
  int64_t context_bytes() const { return kept_.used(); }
  int64_t workspace_bytes() const { return scratch_.used() + temporary_bytes_; }
  const TokenLayout& layout() const { return layout_; }
  Patches image(void* data) const;
  Patches final_image(void* data) const;
  BlockForward forward_of(const BlockCall& call, void* workspace) const;

 private:
  Arena& store() { return keeps_ ? kept_ : scratch_; }
  Matrix place(bool sparse, const Matrix& busy);
  void* temporary(int64_t bytes);
  std::span<const Matrix> parameters(size_t first, size_t count) const { return p_.parameters.subspan(first, count); }
  bool fuses_norms() const { return p_.prepared.modulation.cols > 0; }
  Matrix modulation_of(size_t block) const;
  PositionTable positions() const;
  PositionTable reinjected() const { return c_.reinject_position && exec_ ? positions() : PositionTable{}; }
  NextNorm next_norm(size_t block, bool sparse) const;
  BlockPrepared prepared_for(const BlockCall& call) const;

  void add_time();
  void embed();
  void module();
  Matrix block(BlockKind kind, bool sparse, const Matrix& x, const Matrix& other = {});
  void finish();

  const ModelForward& p_;
  const Config& c_;
  const Execution* exec_;
  bool keeps_;
  Arena kept_, scratch_;
  std::vector<BlockKind> kinds_;
  std::optional<HostLayout> own_layout_;
  TokenLayout layout_;
  int64_t rows_ = 0, sparse_rows_ = 0;
  Matrix buffers_[2][2];  // without context: two for dense tokens, two for sparse ones
  Matrix normed_[2];      // with prepared modulations: the norm that the next block begins with, dense and sparse
  size_t next_parameter_ = places.first_block;
  int64_t temporary_bytes_ = 0;  // that blocks and ends take besides, one after another in the same place
};

}  // namespace flexdit
