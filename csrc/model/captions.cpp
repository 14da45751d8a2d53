#include "model/captions.h"

#include <algorithm>

#include "io/cast.h"
#include "model/arena.h"
#include "model/family.h"

namespace flexdit {
namespace {

struct Workspace {
  Matrix input, hidden, embedded;  // [L, caption_channels], [L, C], [L, C]
};

Workspace plan_workspace(const Config& c, int64_t tokens, DType dtype, Arena& arena) {
  return {arena.matrix(tokens, c.caption_channels, dtype), arena.matrix(tokens, c.hidden, dtype),
          arena.matrix(tokens, c.hidden, dtype)};
}

}  // namespace

bool same(const Caption& a, const Caption& b) {
  return a == b || (a && b && a->tokens == b->tokens && a->rows == b->rows);
}

CaptionStore::CaptionStore(const SamplingModel::Prepared& prepared)
    : prepared_(prepared), slot_rows_(prepared.config.max_caption_tokens) {}

LayoutRow CaptionStore::place(const Occupant& occupant, bool null) const {
  const int32_t slot = of_.at(occupant.id)[null];
  const auto& caption = null ? occupant.null_caption : occupant.caption;
  return {static_cast<int32_t>(slot * slot_rows_), {1, 1, static_cast<int32_t>(caption->tokens)}};
}

Matrix CaptionStore::matrix(const Buffer& buffer, int64_t rows, size_t block) const {
  const int64_t columns = 2 * prepared_.config.hidden, bytes = rows * columns * size_of(prepared_.dtype);
  return {buffer.as<char>() + static_cast<int64_t>(block) * bytes, rows, columns, columns, prepared_.dtype};
}

// The slot of an equal caption, or -1.
int32_t CaptionStore::known(const Plan& plan, const Caption& caption) const {
  const auto found =
      std::find_if(plan.slots.begin(), plan.slots.end(), [&](const Caption& c) { return c && same(c, caption); });
  return found == plan.slots.end() ? -1 : static_cast<int32_t>(found - plan.slots.begin());
}

CaptionStore::Plan CaptionStore::plan(std::span<const Occupant> occupants) const {
  Plan plan{.slots = slots_, .of = {}, .fresh = {}};
  std::vector<bool> used(slots_.size());
  std::vector<std::pair<Caption, std::vector<int32_t*>>> coming;  // and who waits for it
  const auto seek = [&](const Caption& caption, int32_t& slot) {
    slot = caption ? known(plan, caption) : -1;
    if (!caption || slot >= 0) return;
    const auto equal =
        std::find_if(coming.begin(), coming.end(), [&](const auto& c) { return same(c.first, caption); });
    (equal == coming.end() ? coming.emplace_back(caption, std::vector<int32_t*>()) : *equal).second.push_back(&slot);
  };
  for (const Occupant& o : occupants) {
    Slots& slots = plan.of[o.id];
    if (const auto found = of_.find(o.id); found != of_.end())
      slots = found->second;
    else
      seek(o.caption, slots[0]), seek(o.null_caption, slots[1]);
    for (const int32_t slot : slots)
      if (slot >= 0) used[static_cast<size_t>(slot)] = true;
  }
  for (auto& [caption, waiting] : coming) {
    const auto free = static_cast<size_t>(std::find(used.begin(), used.end(), false) - used.begin());
    if (free == used.size()) used.push_back(true), plan.slots.emplace_back();
    used[free] = true, plan.slots[free] = caption;
    plan.fresh.push_back(static_cast<int32_t>(free));
    for (int32_t* slot : waiting) *slot = static_cast<int32_t>(free);
  }
  return plan;
}

bool CaptionStore::reserve(std::span<const Occupant> occupants) {
  const Config& c = prepared_.config;
  if (prepared_.cross_kv.empty()) return false;
  Plan next = plan(occupants);
  Arena arena;
  plan_workspace(c, slot_rows_, prepared_.dtype, arena);
  workspace_.reserve(arena.used(), prepared_.exec);
  const bool moved = grow(next.slots.size());
  next_ = std::move(next);
  return moved;
}

// What lies there moves with it.
bool CaptionStore::grow(size_t slots) {
  if (slots <= slots_.size()) return false;
  const Execution& exec = prepared_.exec;
  const int64_t rows = static_cast<int64_t>(slots) * slot_rows_,
                row_bytes = 2 * prepared_.config.hidden * size_of(prepared_.dtype);
  const size_t blocks = prepared_.cross_kv.size();
  Buffer larger(static_cast<int64_t>(blocks) * rows * row_bytes, exec);
  std::vector<Matrix> views;
  for (size_t i = 0; i < blocks; ++i) views.push_back(matrix(larger, rows, i));
  for (size_t i = 0; i < kv_.size(); ++i)
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
      if (!slots_[slot]) continue;
      const int64_t first = static_cast<int64_t>(slot) * slot_rows_, count = slots_[slot]->tokens;
      copy_bytes(views[i].row_range(first, count).data, kv_[i].row_range(first, count).data, count * row_bytes, exec);
    }
  synchronize(exec);  // steps may still read the old ones
  slots_.resize(slots);
  storage_ = std::move(larger), kv_ = std::move(views);
  return true;
}

void CaptionStore::enter() {
  for (const int32_t slot : next_.fresh) slots_[static_cast<size_t>(slot)] = nullptr;  // until it is written
  for (const int32_t slot : next_.fresh) compute(*next_.slots[static_cast<size_t>(slot)], slot * slot_rows_);
  slots_ = next_.slots, of_ = next_.of;
  next_.fresh.clear();
}

void CaptionStore::compute(const CaptionInput& caption, int64_t first_row) {
  const Config& c = prepared_.config;
  const Execution& exec = prepared_.exec;
  Arena arena(workspace_.data());
  const Workspace w = plan_workspace(c, caption.tokens, prepared_.dtype, arena);
  const int64_t count = std::ssize(caption.rows), bytes = count * size_of(prepared_.dtype);
  std::vector<std::byte> rows(static_cast<size_t>(bytes));
  io::cast(caption.rows.data(), DType::float64, rows.data(), prepared_.dtype, count);
  uploader_.upload(w.input.data, rows.data(), bytes, exec);
  const auto apply = [&](size_t weight, const Matrix& x, const Matrix& y, Activation activation) {
    linear({.x = x,
            .weight = prepared_.parameters[weight],
            .bias = prepared_.parameters[weight + 1],
            .y = y,
            .packed = prepared_.packed[weight],
            .activation = activation},
           exec);
  };
  const size_t first = *parameter_places(c).caption;
  apply(first, w.input, w.hidden, Activation::gelu_tanh);
  apply(first + 2, w.hidden, w.embedded, Activation::none);
  for (size_t i = 0; i < kv_.size(); ++i)
    apply(prepared_.cross_kv[i], w.embedded, kv_[i].row_range(first_row, caption.tokens), Activation::none);
}

}  // namespace flexdit
