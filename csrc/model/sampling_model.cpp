#include "model/sampling_model.h"

#include "flexdit/checkpoint.h"
#include "model/arena.h"
#include "model/family.h"

namespace flexdit {
namespace {

// A modulation layer or table: those lie together.
bool is_modulation(const std::string& name) {
  return name.find("modulation.") != std::string::npos || name.ends_with("modulation_table");
}

// A linear layer's weight that the blocks use, better packed. The ends' are small.
bool is_packed_weight(const ParameterSpec& spec) {
  const bool block = spec.name.rfind("pooling_blocks", 0) == 0 || spec.name.rfind("sdtm", 0) == 0 ||
                     spec.name.rfind("dense_blocks", 0) == 0;
  return block && spec.name.ends_with(".weight") && !is_modulation(spec.name);
}

void copy_matrix(const Matrix& from, const Matrix& to, const Execution& exec) {
  copy_bytes(to.data, from.data, to.rows * to.cols * size_of(to.dtype), exec);
}

// Of FlexPixArt and FlexLatte: what their parameters' shapes do not tell.
void check_family(const Config& c) {
  const auto require = [](bool holds, const std::string& message) {
    if (!holds) throw ArgumentError("sampling model: " + message);
  };
  const bool latte = c.family == ModelFamily::latte;
  require(c.num_frames >= 1 && (latte || c.num_frames == 1),
          "config.num_frames is " + std::to_string(c.num_frames) + ", must be " + (latte ? "at least 1" : "1"));
  require(c.caption_channels == 0 || (shares_modulation(c) && c.max_caption_tokens >= 1),
          "config.caption_channels is " + std::to_string(c.caption_channels) +
              ", only FlexPixArt and FlexLatte read captions, with max_caption_tokens of at least 1");
  require(!c.size_conditions || (shares_modulation(c) && c.hidden % 3 == 0),
          "config.size_conditions is set, which only FlexPixArt and FlexLatte have, with hidden a multiple of 3");
  if (!shares_modulation(c)) return;
  require(c.hidden % 4 == 0, "config.hidden is " + std::to_string(c.hidden) + ", must be a multiple of 4");
  require(c.position_scale > 0, "config.position_scale must be above 0");
  require(!model_blocks(c).empty(), "config has no blocks");
}

// The options' config, if nothing is wrong.
const Config& checked(const SamplingModelOptions& o) {
  check_family(o.config);
  const auto specs = model_parameters(o.config);
  const auto require = [](bool holds, const std::string& message) {
    if (!holds) throw ArgumentError("sampling model: " + message);
  };
  require(o.exec.device == Device::cpu || kHasCuda, "this build of flexdit has no CUDA backend");
  require(o.parameters.size() == specs.size(), "parameters holds " + std::to_string(o.parameters.size()) +
                                                   " tensors, must hold " + std::to_string(specs.size()));
  for (size_t i = 0; i < specs.size(); ++i) {
    const Matrix& m = o.parameters[i];
    require(m.data && m.rows == specs[i].rows && m.cols == specs[i].cols && (m.rows <= 1 || m.stride == m.cols),
            specs[i].name + " must be a contiguous [" + std::to_string(specs[i].rows) + ", " +
                std::to_string(specs[i].cols) + "]");
    require(m.dtype == o.dtype, specs[i].name + " is " + name_of(m.dtype) + ", must be " + name_of(o.dtype));
  }
  require(o.null_label >= -1 && o.null_label < o.config.label_rows, "null_label is " + std::to_string(o.null_label) +
                                                                        ", must be -1 for none or lie in [0, " +
                                                                        std::to_string(o.config.label_rows) + ")");
  if (o.config.num_sdtm == 0 || !o.schedule) return o.config;
  const Grid dense = o.config.dense_grid();
  for (const Grid& g : o.schedule->grids())
    require(g.frames <= dense.frames && g.height <= dense.height && g.width <= dense.width,
            "schedule has a grid that is larger than the dense one");
  return o.config;
}

DensitySchedule schedule_of(const SamplingModelOptions& o) {
  if (o.schedule) return *o.schedule;
  if (o.config.num_sdtm == 0) return DensitySchedule({Grid{}});
  return default_schedule(o.config, o.config.dense_grid());
}

}  // namespace

SamplingModel::Prepared::Prepared(const SamplingModelOptions& o)
    : config(checked(o)),
      schedule(schedule_of(o)),
      own_schedule(o.schedule.has_value()),
      dtype(o.dtype),
      null_label(o.null_label),
      exec(o.exec) {
  take_modulations(o.parameters);
  if (shares_modulation(config)) take_tables(o.parameters);
  take_parameters(o.parameters);
  synchronize(exec);  // the caller's parameters may go now
}

// Everything but modulations: packed where that is worth it, else copied into one buffer behind the folded weights.
// Folding is for a GPU, where it saves a launch. On the CPU it would save nothing, and W_o (W_v x) as the module has it
// makes all outputs the module's, to the bit with AVX-512.
void SamplingModel::Prepared::take_parameters(std::span<const Matrix> from) {
  const auto specs = model_parameters(config);
  const int64_t c = config.hidden;
  const bool folds = exec.device != Device::cpu;
  packed_owners.resize(from.size()), packed.resize(from.size(), nullptr);
  if (exec.device == Device::cpu)
    for (size_t i = 0; i < from.size(); ++i)
      if (is_packed_weight(specs[i])) {
        packed_owners[i] = pack_weight(from[i], exec);
        packed[i] = packed_owners[i].get();
      }
  const auto lay_out = [&](Arena& arena) {
    parameters.assign(from.begin(), from.end());
    folded.clear();
    for (size_t i = 0; i < from.size(); ++i) {
      const bool elsewhere = packed[i] || is_modulation(specs[i].name);
      parameters[i].stride = from[i].cols;
      parameters[i].data = elsewhere ? nullptr : arena.matrix(from[i].rows, from[i].cols, dtype).data;
    }
    for (int64_t i = 0; folds && i < config.num_pooling_blocks; ++i)
      folded.push_back(arena.matrix(c, c, dtype)), folded.push_back(arena.matrix(1, c, dtype));
  };
  Arena sizes;
  lay_out(sizes);
  storage = Buffer(sizes.used(), exec);
  Arena arena(storage.data());
  lay_out(arena);
  for (size_t i = 0; i < from.size(); ++i)
    if (parameters[i].data) copy_matrix(from[i], parameters[i], exec);
  size_t block = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name.ends_with("cross.kv.weight")) cross_kv.push_back(i);
    if (!folds || !specs[i].name.ends_with("attn.v.weight")) continue;  // then its bias, and proj's weight and bias
    // The caller's may lie on the host; these have been copied to the device.
    fold(parameters[i + 2], parameters[i], parameters[i + 3], parameters[i + 1], folded[2 * block], folded[2 * block + 1]);
    ++block;
  }
}

// W_o (W_v x + b_v) + b_o = (W_o W_v) x + (W_o b_v + b_o)
void SamplingModel::Prepared::fold(const Matrix& w_o, const Matrix& w_v, const Matrix& b_o, const Matrix& b_v,
                                   Matrix& weight, Matrix& bias) {
  linear_backward({.x = weight, .weight = w_v, .grad_y = w_o, .grad_x = weight}, exec);  // grad_y times weight
  linear({.x = b_v, .weight = w_o, .bias = b_o, .y = bias}, exec);
}

void SamplingModel::Prepared::take_modulations(std::span<const Matrix> from) {
  const auto specs = model_parameters(config);
  const int64_t c = config.hidden, columns = shares_modulation(config) ? 6 * c : model_modulation_columns(config);
  modulation_storage = Buffer((c + 1) * columns * size_of(dtype), exec);
  modulation_weight = {modulation_storage.data(), columns, c, c, dtype};
  modulation_bias = {modulation_weight.row_range(columns, 0).data, 1, columns, columns, dtype};
  int64_t row = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!specs[i].name.ends_with("modulation.weight")) continue;
    copy_matrix(from[i], modulation_weight.row_range(row, specs[i].rows), exec);
    copy_matrix(from[i + 1], modulation_bias.columns(row, specs[i].rows), exec);
    row += specs[i].rows;
  }
  pack_modulation();
}

void SamplingModel::Prepared::take_tables(std::span<const Matrix> from) {
  const auto specs = model_parameters(config);
  const int64_t c = config.hidden, rows = model_modulation_columns(config) / c;
  table_storage = Buffer(rows * c * size_of(dtype), exec);
  modulation_tables = {table_storage.data(), rows, c, c, dtype};
  int64_t row = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!specs[i].name.ends_with("modulation_table")) continue;
    copy_matrix(from[i], modulation_tables.row_range(row, specs[i].rows), exec);
    row += specs[i].rows;
  }
}

void SamplingModel::Prepared::pack_modulation() {
  if (exec.device != Device::cpu) return;
  const int64_t columns = modulation_weight.rows;
  modulation_packed = pack_weight(modulation_weight, exec);
  if (!modulation_packed) return;
  Buffer bias(columns * size_of(dtype), exec);  // the packed weight replaces the plain one
  copy_bytes(bias.data(), modulation_bias.data, columns * size_of(dtype), exec);
  modulation_storage = std::move(bias);
  modulation_bias.data = modulation_storage.data(), modulation_weight.data = nullptr;
}

SamplingModel::SamplingModel(const SamplingModelOptions& options) : prepared_(std::make_unique<Prepared>(options)) {}
SamplingModel::~SamplingModel() = default;
const Config& SamplingModel::config() const { return prepared_->config; }
const DensitySchedule& SamplingModel::schedule() const { return prepared_->schedule; }
DType SamplingModel::dtype() const { return prepared_->dtype; }
int64_t SamplingModel::null_label() const { return prepared_->null_label; }
const Execution& SamplingModel::execution() const { return prepared_->exec; }

std::shared_ptr<const SamplingModel> prepare_sampling(const Checkpoint& checkpoint, const Execution& exec) {
  std::optional<DensitySchedule> schedule;
  if (checkpoint.names_schedule || checkpoint.config.family == ModelFamily::dit) schedule = checkpoint.schedule;
  return std::make_shared<SamplingModel>(
      SamplingModelOptions{.config = checkpoint.config,
                           .schedule = schedule,
                           .parameters = checkpoint.parameters,
                           .dtype = checkpoint.dtype,
                           .null_label = checkpoint.has_null_class ? checkpoint.num_classes : -1,
                           .exec = exec});
}

}  // namespace flexdit
