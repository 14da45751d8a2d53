// Captions of whoever is in the batch, as the blocks read them: keys and values for each block with cross-attention,
// computed once, when a caption comes. Equal captions, as the empty one of most unconditional passes, share a place.
#pragma once

#include <array>
#include <map>

#include "model/sampling_model.h"

namespace flexdit {

using Caption = std::shared_ptr<const CaptionInput>;  // null: none
bool same(const Caption& a, const Caption& b);

// An image or clip under way. Its state stays in the engine from step to step.
struct Occupant {
  int64_t id;
  Grid dense;  // its tokens
  uint64_t seed;
  Caption caption = nullptr, null_caption = nullptr;
};

class CaptionStore {
 public:
  explicit CaptionStore(const SamplingModel::Prepared& prepared);

  // Room for the captions of these; true if the memory has moved. When there is none it throws, and nothing has
  // changed.
  bool reserve(std::span<const Occupant> occupants);
  // Computes those that come. Those of the same occupants that reserve() was called with; others may go.
  void enter();

  // For BlockPrepared::caption_kv, and the line of a layout that says where a caption lies in each of them.
  std::span<const Matrix> keys_and_values() const { return kv_; }
  LayoutRow place(const Occupant& occupant, bool null) const;
  LayoutRow end() const { return {static_cast<int32_t>(std::ssize(slots_) * slot_rows_), {0, 0, 0}}; }

 private:
  using Slots = std::array<int32_t, 2>;  // of the caption and the null caption, or -1
  // Who is where, and which captions come with that.
  struct Plan {
    std::vector<Caption> slots;
    std::map<int64_t, Slots> of;
    std::vector<int32_t> fresh;
  };

  Plan plan(std::span<const Occupant> occupants) const;
  int32_t known(const Plan& plan, const Caption& caption) const;
  bool grow(size_t slots);
  void compute(const CaptionInput& caption, int64_t first_row);
  Matrix matrix(const Buffer& buffer, int64_t rows, size_t block) const;

  const SamplingModel::Prepared& prepared_;
  const int64_t slot_rows_;     // max_caption_tokens: what leaves makes room for whatever comes, and nothing moves
  std::vector<Caption> slots_;  // what lies there, though nobody may need it any more; null: nothing
  std::map<int64_t, Slots> of_;
  Plan next_;
  Buffer storage_, workspace_;
  std::vector<Matrix> kv_;  // of each block [slots * slot_rows, 2C]
  Uploader uploader_;
};

}  // namespace flexdit
