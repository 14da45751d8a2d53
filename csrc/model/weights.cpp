#include "model/weights.h"

#include <algorithm>
#include <filesystem>

#include "io/json.h"
#include "io/mapped_file.h"
#include "io/text.h"

namespace flexdit {
namespace {

constexpr const char *kFile = "model.safetensors", *kIndex = "model.safetensors.index.json";
constexpr const char *kIndexEnding = ".safetensors.index.json", *kMetadataKey = "config";

// Which file of the index's folder has a tensor.
using WeightMap = std::map<std::string, std::string>;

std::string find_file(const std::string& path) {
  const std::filesystem::path folder(path);
  std::error_code unknown;  // then opening it says what is wrong
  if (!std::filesystem::is_directory(folder, unknown)) return path;
  const bool sharded =
      !std::filesystem::exists(folder / kFile, unknown) && std::filesystem::exists(folder / kIndex, unknown);
  return (folder / (sharded ? kIndex : kFile)).string();
}

// Only a file beside the index: it comes from others.
void check_place(io::JsonReader& json, const std::string& file) {
  if (!file.ends_with(".safetensors") || file.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos)
    json.fail("is " + io::quoted(file) + ", must be a .safetensors file beside it");
}

std::pair<WeightMap, std::optional<std::string>> parse_index(std::string_view text) {
  WeightMap places;
  std::optional<std::string> config;
  io::JsonReader json(text);
  json.object([&](const std::string& key) {
    if (key == "weight_map") {
      json.object([&](const std::string& tensor) { check_place(json, places[tensor] = json.string()); });
    } else if (key == "metadata" && json.peek() == io::JsonReader::Kind::object) {
      json.object([&](const std::string& name) {
        if (name == kMetadataKey && json.peek() == io::JsonReader::Kind::string)
          config = json.string();
        else
          json.skip();
      });
    } else {
      json.skip();
    }
  });
  json.end();
  if (places.empty()) json.fail("has no weight_map, must be the index of a sharded checkpoint");
  return {places, config};
}

}  // namespace

Weights::Weights(const std::string& path) : name_(find_file(path)) {
  if (name_.ends_with(kIndexEnding)) {
    read_index();
    return;
  }
  files_.emplace_back(name_);
  for (const SafetensorsEntry& entry : files_[0].entries()) entries_.push_back(&entry);
  const auto found = files_[0].metadata().find(kMetadataKey);
  if (found != files_[0].metadata().end()) config_ = found->second;
}

void Weights::read_index() {
  WeightMap places;
  try {
    const io::MappedFile index(name_);
    std::tie(places, config_) =
        parse_index({reinterpret_cast<const char*>(index.bytes().data()), index.bytes().size()});
  } catch (const io::JsonError& error) {
    throw CheckpointError(name_ + ": " + error.what());
  }
  std::vector<std::string> names;
  for (const auto& [tensor, file] : places) names.push_back(file);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  files_.reserve(names.size());  // entries point into them
  for (const std::string& name : names) {
    const SafetensorsFile& file = files_.emplace_back(std::filesystem::path(name_).replace_filename(name).string());
    for (const SafetensorsEntry& entry : file.entries()) {
      const auto place = places.find(entry.name);
      if (place == places.end() || place->second != name)
        throw CheckpointError(file.name() + " has " + io::quoted(entry.name) + ", " + name_ + " does not say so");
      entries_.push_back(&entry);
    }
  }
  std::sort(entries_.begin(), entries_.end(), [](auto* a, auto* b) { return a->name < b->name; });
  for (const auto& [tensor, file] : places)
    if (!find(tensor))
      throw CheckpointError(std::filesystem::path(name_).replace_filename(file).string() + " has no " +
                            io::quoted(tensor) + ", " + name_ + " says it has");
}

bool Weights::usual_name() const {
  const auto file = std::filesystem::path(name_).filename();
  return file == kFile || file == kIndex;
}

const SafetensorsEntry* Weights::find(std::string_view name) const {
  const auto found = std::lower_bound(entries_.begin(), entries_.end(), name,
                                      [](auto* entry, auto& wanted) { return entry->name < wanted; });
  return found != entries_.end() && (*found)->name == name ? *found : nullptr;
}

}  // namespace flexdit
