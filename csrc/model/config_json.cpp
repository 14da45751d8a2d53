#include "model/config_json.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "flexdit/safetensors.h"
#include "io/json.h"

namespace flexdit {
namespace {

// With such sizes no count of a parameter's rows or columns overflows.
constexpr int64_t kMostSize = 1 << 20, kMostClasses = (int64_t{1} << 31) - 1;
constexpr int64_t kMostSide = (1 << 15) - 1, kMostTimesteps = 1'000'000;

struct Segments {
  std::vector<Grid> grids;
  std::optional<std::vector<int64_t>> begins;
  int64_t num_timesteps = 1000;
};

// The fields of FlexDiTConfig with its defaults.
struct Fields {
  int64_t input_size = 32, patch_size = 2, in_channels = 4, hidden_size = 1152, num_heads = 16, num_classes = 1000;
  int64_t num_pooling_blocks = 2, num_sdtm = 4, num_dense_blocks = 2;
  std::vector<int64_t> sdtm_blocks = {1, 3, 1, 1};
  int64_t timestep_shift = 0;
  double mlp_ratio = 4, class_dropout_prob = 0.1, mlp_norm_eps = kLayerNormEps;
  bool learn_sigma = true, reinject_position = false;
  std::optional<Segments> schedule;
};

struct IntegerField {
  std::string_view name;
  int64_t Fields::* value;
  int64_t least, most = kMostSize;
};
constexpr IntegerField kIntegers[] = {
    {"input_size", &Fields::input_size, 1},
    {"patch_size", &Fields::patch_size, 1},
    {"in_channels", &Fields::in_channels, 1},
    {"hidden_size", &Fields::hidden_size, 1},
    {"num_heads", &Fields::num_heads, 1},
    {"num_classes", &Fields::num_classes, 1, kMostClasses},
    {"num_pooling_blocks", &Fields::num_pooling_blocks, 0},
    {"num_sdtm", &Fields::num_sdtm, 0},
    {"num_dense_blocks", &Fields::num_dense_blocks, 0},
    {"timestep_shift", &Fields::timestep_shift, 0, 1},
};

bool is_null(io::JsonReader& json) {
  if (json.peek() != io::JsonReader::Kind::null) return false;
  json.null();
  return true;
}

std::vector<int64_t> read_integers(io::JsonReader& json, int64_t least, int64_t most) {
  std::vector<int64_t> values;
  json.array([&] { values.push_back(json.integer(least, most)); });
  return values;
}

Grid read_grid(io::JsonReader& json) {
  const std::vector<int64_t> sides = read_integers(json, 1, kMostSide);
  if (sides.size() != 2 && sides.size() != 3) json.fail("must be a grid [h, w] or [f, h, w]");
  const auto side = [&](size_t from_end) { return static_cast<int32_t>(sides[sides.size() - from_end]); };
  return {sides.size() == 3 ? side(3) : 1, side(2), side(1)};
}

std::optional<Segments> read_schedule(io::JsonReader& json) {
  if (is_null(json)) return {};
  Segments segments;
  json.object([&](const std::string& key) {
    if (key == "grids") {
      json.array([&] { segments.grids.push_back(read_grid(json)); });
    } else if (key == "num_timesteps") {
      segments.num_timesteps = json.integer(1, kMostTimesteps);
    } else if (key == "begins") {
      if (!is_null(json)) segments.begins = read_integers(json, 0, kMostTimesteps);
    } else {
      json.fail("no such key; a schedule has grids, begins and num_timesteps");
    }
  });
  if (segments.grids.empty()) json.fail("has no grids");
  return segments;
}

void read_field(io::JsonReader& json, const std::string& key, Fields& fields) {
  const auto* field = std::find_if(std::begin(kIntegers), std::end(kIntegers), [&](auto& f) { return f.name == key; });
  if (field != std::end(kIntegers)) {
    fields.*field->value = json.integer(field->least, field->most);
  } else if (key == "sdtm_blocks") {
    fields.sdtm_blocks = read_integers(json, 0, kMostSize);
  } else if (key == "mlp_ratio") {
    fields.mlp_ratio = json.real();
  } else if (key == "class_dropout_prob") {
    fields.class_dropout_prob = json.real();
  } else if (key == "mlp_norm_eps") {
    fields.mlp_norm_eps = json.real();
  } else if (key == "learn_sigma") {
    fields.learn_sigma = json.boolean();
  } else if (key == "reinject_position") {
    fields.reinject_position = json.boolean();
  } else if (key == "schedule") {
    fields.schedule = read_schedule(json);
  } else {
    json.fail("FlexDiTConfig has no such field");
  }
}

void require(bool holds, const std::string& message) {
  if (!holds) throw ArgumentError(message);
}

// What config.py asks for, besides the ranges of single numbers.
void check(const Fields& f) {
  const auto divides = [](const char* name, int64_t value, const char* divisor_name, int64_t divisor) {
    require(value % divisor == 0, std::string(name) + " is " + std::to_string(value) + ", must be a multiple of " +
                                      divisor_name + std::to_string(divisor));
  };
  divides("input_size", f.input_size, "patch_size ", f.patch_size);
  divides("hidden_size", f.hidden_size, "num_heads ", f.num_heads);
  divides("hidden_size", f.hidden_size, "", 4);
  const auto& blocks = f.sdtm_blocks;
  require(blocks.size() == 4, "sdtm_blocks has " + std::to_string(blocks.size()) + " numbers, must have 4");
  require(f.num_sdtm == 0 || (blocks[0] > 0 && blocks[2] > 0),
          "sdtm_blocks must have a generation and a recovery block");
  require(f.num_pooling_blocks + f.num_sdtm + f.num_dense_blocks > 0, "the model has no blocks");
  require(f.class_dropout_prob >= 0 && f.class_dropout_prob < 1,
          "class_dropout_prob is " + std::to_string(f.class_dropout_prob) + ", must be at least 0 and below 1");
  require(f.mlp_norm_eps > 0 && f.mlp_norm_eps < 1,
          "mlp_norm_eps is " + std::to_string(f.mlp_norm_eps) + ", must be above 0 and below 1");
  const double units = static_cast<double>(f.hidden_size) * f.mlp_ratio;
  require(units >= 1 && units <= static_cast<double>(kMostClasses),
          "mlp_ratio is " + std::to_string(f.mlp_ratio) + ", must give at least one unit and at most 2^31 - 1");
}

Config config_of(const Fields& f) {
  return {.input_height = f.input_size,
          .input_width = f.input_size,
          .patch_size = f.patch_size,
          .in_channels = f.in_channels,
          .out_channels = f.in_channels * (f.learn_sigma ? 2 : 1),
          .hidden = f.hidden_size,
          .mlp_hidden = static_cast<int64_t>(static_cast<double>(f.hidden_size) * f.mlp_ratio),
          .num_heads = f.num_heads,
          .label_rows = f.num_classes + (f.class_dropout_prob > 0),
          .num_pooling_blocks = f.num_pooling_blocks,
          .num_sdtm = f.num_sdtm,
          .generation_blocks = f.sdtm_blocks[0],
          .sparse_blocks = f.sdtm_blocks[1],
          .recovery_blocks = f.sdtm_blocks[2],
          .dense_blocks = f.sdtm_blocks[3],
          .num_dense_blocks = f.num_dense_blocks,
          .reinject_position = f.reinject_position,
          .timestep_shift = f.timestep_shift,
          .mlp_norm_eps = f.mlp_norm_eps};
}

DensitySchedule schedule_of(const Fields& f, Grid dense) {
  // The paper's pruning rates. Source: arXiv 2412.06028.
  if (!f.schedule) return DensitySchedule::from_pruning_rates(0.61, 0.86, dense);
  const Segments& s = *f.schedule;
  for (const Grid& g : s.grids)
    require(g.frames == 1 && g.height <= dense.height && g.width <= dense.width,
            "schedule has the sparse grid (" + std::to_string(g.frames) + ", " + std::to_string(g.height) + ", " +
                std::to_string(g.width) + "), at most the dense grid (1, " + std::to_string(dense.height) + ", " +
                std::to_string(dense.width) + ") is allowed");
  return s.begins ? DensitySchedule(s.grids, *s.begins, s.num_timesteps) : DensitySchedule(s.grids, s.num_timesteps);
}

}  // namespace

ModelDescription parse_config(std::string_view text, const std::string& source) {
  const std::string refusal = source + " is not a FlexDiT configuration: ";
  try {
    Fields fields;
    io::JsonReader json(text);
    json.object([&](const std::string& key) { read_field(json, key, fields); });
    json.end();
    check(fields);
    const Config config = config_of(fields);
    return {config, schedule_of(fields, config.dense_grid()), fields.num_classes, fields.class_dropout_prob > 0};
  } catch (const io::JsonError& error) {
    throw CheckpointError(refusal + error.what());
  } catch (const ArgumentError& error) {
    throw CheckpointError(refusal + error.what());
  }
}

}  // namespace flexdit
