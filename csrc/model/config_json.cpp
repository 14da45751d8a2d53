#include "model/config_json.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "flexdit/safetensors.h"
#include "io/json.h"
#include "io/text.h"

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

// Python's class of a configuration, in the order of ModelFamily, and the key that names it: FlexDiT's has none.
constexpr const char *kClasses[] = {"FlexDiT", "FlexPixArt", "FlexLatte"}, *kClassKey = "_class_name";
constexpr unsigned kDit = 1 << 0, kPixart = 1 << 1, kLatte = 1 << 2, kSingle = kPixart | kLatte, kAll = kDit | kSingle;

std::string class_of(ModelFamily family) { return kClasses[static_cast<size_t>(family)]; }

// The fields of FlexDiTConfig, FlexPixArtConfig and FlexLatteConfig, which of them the family has.
struct Fields {
  explicit Fields(ModelFamily model) : family(model) {
    if (family == ModelFamily::dit) num_classes = 1000, class_dropout_prob = 0.1;
    if (family == ModelFamily::pixart) caption_channels = 4096;
    if (family == ModelFamily::latte) num_frames = 16;
  }

  ModelFamily family;
  int64_t input_size = 32, patch_size = 2, in_channels = 4, out_channels = 8, hidden_size = 1152, num_heads = 16;
  int64_t num_classes = 0, caption_channels = 0, max_caption_tokens = 120, num_frames = 1;
  int64_t num_pooling_blocks = 2, num_sdtm = 4, num_dense_blocks = 2;
  std::vector<int64_t> sdtm_blocks = {1, 3, 1, 1};
  int64_t timestep_shift = 0;
  double mlp_ratio = 4, class_dropout_prob = 0, mlp_norm_eps = kLayerNormEps, position_scale = 1;
  bool learn_sigma = true, reinject_position = false, size_conditions = false;
  std::optional<Segments> schedule;
};

template <class Value>
struct Field {
  std::string_view name;
  Value Fields::* value;
  unsigned families = kAll;
  int64_t least = 0, most = kMostSize;  // of integers
};
constexpr Field<int64_t> kIntegers[] = {
    {"input_size", &Fields::input_size, kAll, 1},
    {"patch_size", &Fields::patch_size, kAll, 1},
    {"in_channels", &Fields::in_channels, kAll, 1},
    {"out_channels", &Fields::out_channels, kSingle, 1},
    {"hidden_size", &Fields::hidden_size, kAll, 1},
    {"num_heads", &Fields::num_heads, kAll, 1},
    {"num_classes", &Fields::num_classes, kDit, 1, kMostClasses},
    {"num_classes", &Fields::num_classes, kLatte, 0, kMostClasses},
    {"caption_channels", &Fields::caption_channels, kPixart, 1},
    {"caption_channels", &Fields::caption_channels, kLatte, 0},
    {"max_caption_tokens", &Fields::max_caption_tokens, kSingle, 1},
    {"num_frames", &Fields::num_frames, kLatte, 1, kMostSide},
    {"num_pooling_blocks", &Fields::num_pooling_blocks},
    {"num_sdtm", &Fields::num_sdtm},
    {"num_dense_blocks", &Fields::num_dense_blocks},
    {"timestep_shift", &Fields::timestep_shift, kDit, 0, 1},
};
constexpr Field<double> kReals[] = {
    {"mlp_ratio", &Fields::mlp_ratio},
    {"class_dropout_prob", &Fields::class_dropout_prob, kDit | kLatte},
    {"mlp_norm_eps", &Fields::mlp_norm_eps, kDit},
    {"position_scale", &Fields::position_scale, kSingle},
};
constexpr Field<bool> kBooleans[] = {
    {"learn_sigma", &Fields::learn_sigma, kDit},
    {"reinject_position", &Fields::reinject_position, kDit},
    {"size_conditions", &Fields::size_conditions, kPixart},
};

// The family's field of that name, or null.
template <class Value, size_t count>
const Field<Value>* find(const Field<Value> (&fields)[count], const std::string& name, ModelFamily family) {
  const auto* found = std::find_if(std::begin(fields), std::end(fields), [&](const auto& f) {
    return f.name == name && f.families >> static_cast<unsigned>(family) & 1;
  });
  return found == std::end(fields) ? nullptr : found;
}

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
  if (const auto* integer = find(kIntegers, key, fields.family)) {
    fields.*integer->value = json.integer(integer->least, integer->most);
  } else if (const auto* real = find(kReals, key, fields.family)) {
    fields.*real->value = json.real();
  } else if (const auto* boolean = find(kBooleans, key, fields.family)) {
    fields.*boolean->value = json.boolean();
  } else if (key == "sdtm_blocks") {
    fields.sdtm_blocks = read_integers(json, 0, kMostSize);
  } else if (key == "schedule") {
    fields.schedule = read_schedule(json);
  } else if (key == kClassKey && fields.family != ModelFamily::dit) {
    json.string();  // family_of has read it
  } else {
    json.fail(class_of(fields.family) + "Config has no such field");
  }
}

// By the class that the text names, wherever it does: the other fields' meaning depends on it.
ModelFamily family_of(std::string_view text) {
  ModelFamily family = ModelFamily::dit;
  io::JsonReader json(text);
  json.object([&](const std::string& key) {
    if (key != kClassKey) return json.skip();
    const std::string name = json.string();
    for (const ModelFamily one : {ModelFamily::pixart, ModelFamily::latte})
      if (name == class_of(one)) family = one;
    if (family == ModelFamily::dit) json.fail("is " + io::quoted(name) + ", must be 'FlexPixArt' or 'FlexLatte'");
  });
  json.end();
  return family;
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
  require(f.position_scale > 0, "position_scale is " + std::to_string(f.position_scale) + ", must be above 0");
  require(!f.size_conditions || f.hidden_size % 3 == 0,
          "hidden_size is " + std::to_string(f.hidden_size) + ", must be a multiple of 3 with size_conditions");
  const double units = static_cast<double>(f.hidden_size) * f.mlp_ratio;
  require(units >= 1 && units <= static_cast<double>(kMostClasses),
          "mlp_ratio is " + std::to_string(f.mlp_ratio) + ", must give at least one unit and at most 2^31 - 1");
}

bool has_null_class(const Fields& f) { return f.num_classes > 0 && f.class_dropout_prob > 0; }

Config config_of(const Fields& f) {
  return {.input_height = f.input_size,
          .input_width = f.input_size,
          .patch_size = f.patch_size,
          .in_channels = f.in_channels,
          .out_channels = f.family != ModelFamily::dit ? f.out_channels : f.in_channels * (f.learn_sigma ? 2 : 1),
          .hidden = f.hidden_size,
          .mlp_hidden = static_cast<int64_t>(static_cast<double>(f.hidden_size) * f.mlp_ratio),
          .num_heads = f.num_heads,
          .label_rows = f.num_classes + has_null_class(f),
          .num_pooling_blocks = f.num_pooling_blocks,
          .num_sdtm = f.num_sdtm,
          .generation_blocks = f.sdtm_blocks[0],
          .sparse_blocks = f.sdtm_blocks[1],
          .recovery_blocks = f.sdtm_blocks[2],
          .dense_blocks = f.sdtm_blocks[3],
          .num_dense_blocks = f.num_dense_blocks,
          .reinject_position = f.reinject_position,
          .timestep_shift = f.timestep_shift,
          .mlp_norm_eps = f.mlp_norm_eps,
          .family = f.family,
          .num_frames = f.num_frames,
          .caption_channels = f.caption_channels,
          .max_caption_tokens = f.family == ModelFamily::dit ? 0 : f.max_caption_tokens,
          .size_conditions = f.size_conditions,
          .position_scale = f.position_scale};
}

std::string text_of(const Grid& g) {
  return "(" + std::to_string(g.frames) + ", " + std::to_string(g.height) + ", " + std::to_string(g.width) + ")";
}

DensitySchedule schedule_of(const Fields& f, const Config& config) {
  const Grid dense = config.dense_grid();
  if (!f.schedule && f.family != ModelFamily::dit) return default_schedule(config, dense);
  // The paper's pruning rates. Source: arXiv 2412.06028.
  if (!f.schedule) return DensitySchedule::from_pruning_rates(0.61, 0.86, dense);
  const Segments& s = *f.schedule;
  for (const Grid& g : s.grids)
    require(g.frames <= dense.frames && g.height <= dense.height && g.width <= dense.width,
            "schedule has the sparse grid " + text_of(g) + ", at most the dense grid " + text_of(dense) +
                " is allowed");
  return s.begins ? DensitySchedule(s.grids, *s.begins, s.num_timesteps) : DensitySchedule(s.grids, s.num_timesteps);
}

}  // namespace

ModelDescription parse_config(std::string_view text, const std::string& source) {
  std::string refusal = source + " is not a FlexDiT configuration: ";
  try {
    Fields fields(family_of(text));
    refusal = source + " is not a " + class_of(fields.family) + " configuration: ";
    io::JsonReader json(text);
    json.object([&](const std::string& key) { read_field(json, key, fields); });
    json.end();
    check(fields);
    const Config config = config_of(fields);
    return {config, schedule_of(fields, config), fields.schedule.has_value(), fields.num_classes,
            has_null_class(fields)};
  } catch (const io::JsonError& error) {
    throw CheckpointError(refusal + error.what());
  } catch (const ArgumentError& error) {
    throw CheckpointError(refusal + error.what());
  }
}

}  // namespace flexdit
