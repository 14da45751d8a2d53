#include "flexdit/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <new>

#include "io/cast.h"
#include "io/mapped_file.h"
#include "io/text.h"
#include "model/config_json.h"
#include "model/weights.h"

namespace flexdit {
namespace {

constexpr const char* kConfigName = "config.json";
constexpr size_t kNamedTensors = 5;  // at most so many of a kind in a message
constexpr int64_t kAlignment = 64;

// The configuration and where it was found.
std::pair<ModelDescription, std::string> find_config(const Weights& weights) {
  const std::string beside = std::filesystem::path(weights.name()).parent_path() / kConfigName;
  const std::string within = "the metadata of " + weights.name();
  const auto from_metadata = [&]() -> std::optional<ModelDescription> {
    if (!weights.config()) return {};
    return parse_config(*weights.config(), within);
  };
  const auto from_file = [&]() -> std::optional<ModelDescription> {
    try {
      const io::MappedFile config(beside);
      return parse_config({reinterpret_cast<const char*>(config.bytes().data()), config.bytes().size()}, beside);
    } catch (const io::MissingFile&) {
      return {};
    }
  };
  const bool file_first = weights.usual_name();
  if (auto first = file_first ? from_file() : from_metadata()) return {*first, file_first ? beside : within};
  if (auto second = file_first ? from_metadata() : from_file()) return {*second, file_first ? within : beside};
  throw CheckpointError(weights.name() + " has no configuration: neither " + kConfigName +
                        " beside it nor one in its metadata");
}

// The shape that the state_dict has: a convolution's weight has four sides, a bias one.
std::vector<int64_t> shape_of(const ParameterSpec& spec, const Config& c) {
  if (spec.name == "patch_embed.weight") return {c.hidden, c.in_channels, c.patch_size, c.patch_size};
  if (spec.name.ends_with(".bias")) return {spec.cols};
  return {spec.rows, spec.cols};
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t side : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(side);
  return text + "]";
}

// "2 missing: a, b", or nothing where there is nothing to say.
std::string listed(const char* what, const std::vector<std::string>& names) {
  if (names.empty()) return "";
  std::string text = "; " + std::to_string(names.size()) + " " + what + ": ";
  for (size_t i = 0; i < std::min(names.size(), kNamedTensors); ++i) text += (i ? ", " : "") + names[i];
  return text + (names.size() > kNamedTensors ? " and " + std::to_string(names.size() - kNamedTensors) + " more" : "");
}

// The file's tensor for every parameter. Throws unless the file has exactly these, in their shapes and of a DType.
std::vector<const SafetensorsEntry*> match(const Weights& weights, const Config& c, const std::string& source) {
  const std::string refusal = source + " does not fit the model";
  const int64_t module = c.generation_blocks + c.sparse_blocks + c.recovery_blocks + c.dense_blocks;
  const int64_t depth = c.num_pooling_blocks + c.num_sdtm * module + c.num_dense_blocks;
  // First, so that a wrong number asks for no memory.
  if (depth > static_cast<int64_t>(weights.entries().size()))
    throw CheckpointError(refusal + "; " + std::to_string(depth) + " blocks, only " +
                          std::to_string(weights.entries().size()) + " tensors");
  std::vector<const SafetensorsEntry*> entries;
  std::vector<std::string> missing, unexpected, misshaped, not_floating;
  for (const ParameterSpec& spec : model_parameters(c)) {
    const SafetensorsEntry* entry = entries.emplace_back(weights.find(spec.name));
    if (!entry) {
      missing.push_back(spec.name);
    } else if (const auto shape = shape_of(spec, c); entry->shape != shape) {
      misshaped.push_back(spec.name + " " + text_of(entry->shape) + ", must be " + text_of(shape));
    } else if (!dtype_of(entry->dtype)) {
      not_floating.push_back(spec.name + " (" + entry->dtype + ")");
    }
  }
  std::vector<const SafetensorsEntry*> expected = entries;
  std::sort(expected.begin(), expected.end());
  for (const SafetensorsEntry* entry : weights.entries())
    if (!std::binary_search(expected.begin(), expected.end(), entry)) unexpected.push_back(io::quoted(entry->name));
  const std::string problems = listed("missing", missing) + listed("unexpected", unexpected) +
                               listed("misshaped", misshaped) +
                               listed("not float32, bfloat16, float16 or float64", not_floating);
  if (!problems.empty()) throw CheckpointError(refusal + problems);
  return entries;
}

struct Storage {
  Weights weights;
  std::unique_ptr<std::byte[], void (*)(std::byte*)> converted{
      nullptr, [](std::byte* p) { ::operator delete[](p, std::align_val_t(kAlignment)); }};

  void allocate(int64_t bytes) {
    converted.reset(new (std::align_val_t(kAlignment)) std::byte[static_cast<size_t>(bytes)]);
  }
};

bool usable_in_place(const SafetensorsEntry& entry, DType dtype) {
  const auto address = reinterpret_cast<uintptr_t>(entry.data.data());
  return dtype_of(entry.dtype) == dtype && address % static_cast<uintptr_t>(size_of(dtype)) == 0;
}

int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Checkpoint Checkpoint::load(const std::string& path, std::optional<DType> dtype) {
  const auto storage = std::make_shared<Storage>(Storage{Weights(path)});
  const Weights& weights = storage->weights;
  auto [description, source] = find_config(weights);
  const Config& config = description.config;
  const auto entries = match(weights, config, weights.name() + " with the configuration in " + source);
  const std::vector<ParameterSpec> specs = model_parameters(config);
  const DType target = dtype ? *dtype : *dtype_of(weights.find("patch_embed.weight")->dtype);
  int64_t bytes = 0;
  for (size_t i = 0; i < specs.size(); ++i)
    if (!usable_in_place(*entries[i], target)) bytes += padded(specs[i].rows * specs[i].cols * size_of(target));
  storage->allocate(bytes);
  std::byte* next = storage->converted.get();
  std::vector<Matrix> parameters;
  for (size_t i = 0; i < specs.size(); ++i) {
    const auto& [name, rows, cols] = specs[i];
    const std::byte* data = entries[i]->data.data();
    if (!usable_in_place(*entries[i], target)) {
      io::cast(data, *dtype_of(entries[i]->dtype), next, target, rows * cols);
      data = next;
      next += padded(rows * cols * size_of(target));
    }
    parameters.push_back({const_cast<std::byte*>(data), rows, cols, cols, target});
  }
  return {.config = config,
          .schedule = std::move(description.schedule),
          .names_schedule = description.names_schedule,
          .dtype = target,
          .num_classes = description.num_classes,
          .has_null_class = description.has_null_class,
          .parameters = std::move(parameters),
          .storage = storage};
}

}  // namespace flexdit
