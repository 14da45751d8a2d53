// Where the families of models differ: which parameters there are, in what style the blocks are, and when a clip's
// frames learn which they are.
#pragma once

#include <optional>

#include "flexdit/model.h"

namespace flexdit {

// One modulation layer for all blocks and a table for each, instead of a layer in each.
constexpr bool shares_modulation(const Config& c) { return c.family != ModelFamily::dit; }

// Where a part's parameters begin in model_parameters, if the model has it.
struct ParameterPlaces {
  std::optional<size_t> position;  // the fixed table of the config's grid; other families compute theirs
  size_t patch_embed = 0, timestep = 0;
  std::optional<size_t> resolution, aspect_ratio, label, caption, modulation;
  size_t first_block = 0;
};
// What a part consists of; the value is the number of its parameters.
enum class Part : uint8_t { table = 1, linear = 2, embedding = 4 };  // embedding: fc1 [out, in] and fc2 [out, out]

// Calls add(name, part, out, in) for what comes before the blocks, in the order of model_parameters.
template <class Add>
constexpr ParameterPlaces for_beginning(const Config& c, Add&& add) {
  const int64_t h = c.hidden;
  ParameterPlaces places;
  size_t next = 0;
  const auto part = [&](auto& place, const char* name, Part what, int64_t out, int64_t in) {
    place = next, next += static_cast<size_t>(what);
    add(name, what, out, in);
  };
  if (!shares_modulation(c)) part(places.position, "pos_embed", Part::table, c.dense_grid().tokens(), h);
  part(places.patch_embed, "patch_embed", Part::linear, h, c.in_channels * c.patch_size * c.patch_size);
  part(places.timestep, "timestep_embed", Part::embedding, h, c.timestep_features);
  if (c.size_conditions) {
    part(places.resolution, "resolution_embed", Part::embedding, h / 3, c.timestep_features);
    part(places.aspect_ratio, "aspect_ratio_embed", Part::embedding, h / 3, c.timestep_features);
  }
  if (c.label_rows || !shares_modulation(c)) part(places.label, "label_embed.weight", Part::table, c.label_rows, h);
  if (c.caption_channels) part(places.caption, "caption_embed", Part::embedding, h, c.caption_channels);
  if (shares_modulation(c)) part(places.modulation, "modulation", Part::linear, 6 * h, h);
  places.first_block = next;
  return places;
}
// Without names: every pass asks.
constexpr ParameterPlaces parameter_places(const Config& c) {
  return for_beginning(c, [](const char*, Part, int64_t, int64_t) {});
}

constexpr int64_t block_count(const Config& c) {
  const int64_t module = c.generation_blocks + c.sparse_blocks + c.recovery_blocks + c.dense_blocks;
  return c.num_pooling_blocks + c.num_sdtm * module + c.num_dense_blocks;
}

// Of block k of the flattened order, which alternate in Latte: even ones attend within a frame and read the caption,
// odd ones attend across the frames at one position (arXiv 2401.03048, variant 1).
constexpr bool has_cross(const Config& c, size_t k) {
  return c.caption_channels > 0 && (c.family == ModelFamily::pixart || (c.family == ModelFamily::latte && k % 2 == 0));
}
constexpr bool within_frames(const Config& c, size_t k) { return c.family == ModelFamily::latte && k % 2 == 0; }
constexpr bool across_frames(const Config& c, size_t k) { return c.family == ModelFamily::latte && k % 2 == 1; }
constexpr BlockStyle style_of(const Config& c, size_t k) { return {shares_modulation(c), has_cross(c, k)}; }
// How many parameters block k has in model_parameters, and how many the final layer.
size_t model_block_parameters(const Config& c, BlockKind kind, size_t k);
constexpr size_t final_parameters(const Config& c) { return shares_modulation(c) ? 3 : 4; }

constexpr size_t cross_index(const Config& c, size_t k) { return c.family == ModelFamily::latte ? k / 2 : k; }
constexpr int64_t cross_blocks(const Config& c) {  // how many have it
  int64_t count = 0;
  for (int64_t k = 0; k < block_count(c); ++k) count += has_cross(c, static_cast<size_t>(k));
  return count;
}

// Latte adds the temporal embedding before its second block, here before the pooling block, module or dense block that
// holds it: the first block of that, or nothing in other models.
constexpr std::optional<size_t> time_place(const Config& c) {
  if (c.family != ModelFamily::latte || block_count(c) < 2) return std::nullopt;
  return c.num_pooling_blocks || !c.num_sdtm ? 1 : 0;
}

}  // namespace flexdit
