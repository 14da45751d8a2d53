// Checkpoint: the folder that Python wrote (python_tests/test_cpp_checkpoint.py), and folders that are wrong.
#include "flexdit/checkpoint.h"

#include "check.h"
#include "files.h"
#include "io/cast.h"
#include "message_of.h"
#include "support.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const std::filesystem::path kData = FLEXDIT_TEST_DATA;
constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};

bool has(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

std::string load_error(const std::string& path) {
  return message_of<CheckpointError>([&] { Checkpoint::load(path); });
}

// The text with its one `old` replaced.
std::string replaced(std::string text, const std::string& old, const std::string& by) {
  const size_t at = text.find(old);
  if (at == std::string::npos) throw std::runtime_error("no " + old);
  return text.replace(at, old.size(), by);
}

// A copy of Python's folder whose files can be spoiled.
struct Copy {
  TemporaryFolder folder;
  std::string path = folder.string(), weights = (folder / "model.safetensors").string(),
              config = (folder / "config.json").string();

  explicit Copy(const char* of = "tiny") { std::filesystem::copy(kData / of, path); }
  void edit_config(const std::string& old, const std::string& by) const {
    write_file(config, replaced(read_file(config), old, by));
  }
  // The header keeps its length, and so the data their alignment, unless `padding` is added.
  void edit_header(const std::string& old, const std::string& by, const std::string& padding = "") const {
    const std::string file = read_file(weights);
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    const std::string header = replaced(file.substr(8, length), old, by) + padding;
    write_file(weights, safetensors_bytes(header, file.substr(8 + length)));
  }
};

// Every parameter is the file's tensor.
void check_parameters(const char* folder) {
  const Checkpoint c = Checkpoint::load((kData / folder).string());
  const SafetensorsFile file((kData / folder / "model.safetensors").string());
  const auto specs = model_parameters(c.config);
  CHECK_EQ(c.parameters.size(), specs.size());
  CHECK_EQ(file.entries().size(), specs.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    const Matrix& m = c.parameters[i];
    CHECK(m.rows == specs[i].rows && m.cols == specs[i].cols && m.stride == m.cols && m.dtype == DType::float32);
    const auto data = file.find(specs[i].name)->data;
    CHECK(std::memcmp(m.data, data.data(), data.size()) == 0);
    CHECK_EQ(reinterpret_cast<uintptr_t>(m.data) % 4, 0u);
  }
}

}  // namespace

TEST_CASE(what_python_wrote) {
  const Checkpoint c = Checkpoint::load((kData / "tiny").string());
  CHECK(c.config.input_height == 8 && c.config.input_width == 8 && c.config.patch_size == 2);
  CHECK(c.config.in_channels == 1 && c.config.out_channels == 2 && c.config.hidden == 8 && c.config.num_heads == 2);
  CHECK(c.config.mlp_hidden == 26 && c.config.label_rows == 4 && c.config.reinject_position);
  CHECK(c.config.num_pooling_blocks == 1 && c.config.num_sdtm == 1 && c.config.num_dense_blocks == 1);
  CHECK(c.config.generation_blocks == 1 && c.config.sparse_blocks == 1);
  CHECK(c.config.recovery_blocks == 1 && c.config.dense_blocks == 1);
  CHECK(c.schedule == DensitySchedule({{1, 3, 3}, {1, 2, 3}, {1, 2, 2}}, {0, 400, 700}, 1000));
  CHECK(c.dtype == DType::float32 && c.num_classes == 3 && c.has_null_class);
  check_parameters("tiny");
}

TEST_CASE(what_python_wrote_of_the_other_families) {
  const Checkpoint image = Checkpoint::load((kData / "tiny_pixart").string());
  CHECK(image.config.family == ModelFamily::pixart && image.config.out_channels == 2 && image.config.hidden == 12);
  CHECK(image.config.caption_channels == 6 && image.config.max_caption_tokens == 5 && image.config.size_conditions);
  CHECK(image.config.position_scale == 0.5 && !image.names_schedule && !image.has_null_class);
  CHECK(image.schedule == default_schedule(image.config, {1, 4, 4}));
  check_parameters("tiny_pixart");
  const Checkpoint clip = Checkpoint::load((kData / "tiny_latte").string());
  CHECK(clip.config.family == ModelFamily::latte && clip.config.num_frames == 3 && clip.config.label_rows == 4);
  CHECK(clip.schedule == DensitySchedule({{3, 3, 3}, {2, 2, 3}, {1, 2, 2}}, {0, 400, 700}, 1000));
  CHECK(clip.names_schedule && clip.num_classes == 3 && clip.has_null_class);
  check_parameters("tiny_latte");
}

// In float64, where one timestep feature that is rounded differently would show.
TEST_CASE(the_model_computes_what_python_computes) {
  const SafetensorsFile expected((kData / "tiny_forward.safetensors").string());
  const auto data = [&](const char* name) { return expected.find(name)->data; };
  const auto copy = [&](const char* name, auto& to) { std::memcpy(to.data(), data(name).data(), data(name).size()); };
  std::vector<double> x(3 * 64), t(3), features(3 * 256), own(3 * 256), wanted(3 * 128), out(3 * 128, NAN);
  std::vector<int64_t> labels(3);
  copy("x", x), copy("t", t), copy("features", features), copy("y", labels), copy("out", wanted);
  timestep_embedding({.t = t.data(), .out = {own.data(), 3, 256, 256, DType::float64}}, {});
  CHECK(own == features);
  const Checkpoint c = Checkpoint::load((kData / "tiny").string(), DType::float64);
  ModelForward p{.config = c.config, .parameters = c.parameters, .dtype = c.dtype, .batch = 3};
  std::vector<Grid> grids;
  for (const double time : t) grids.push_back(c.schedule.grid(time));
  const HostLayout sparse(grids);
  p.x = x.data(), p.t = t.data(), p.labels = labels.data(), p.out = out.data();
  p.sparse_layout = sparse.view();
  std::vector<char> workspace(static_cast<size_t>(model_workspace_bytes(p, false)));
  p.workspace = workspace.data();
  model_forward(p, {});
  for (size_t i = 0; i < out.size(); ++i) CHECK_NEAR(out[i], wanted[i], 1e-12);
}

TEST_CASE(conversion) {
  const auto file = (kData / "tiny/model.safetensors").string();
  const Checkpoint single = Checkpoint::load(file);
  for (const DType dtype : kDTypes) {
    Checkpoint other = Checkpoint::load((kData / "tiny").string(), dtype);
    const Checkpoint copy = other;
    other = single;  // the copy keeps its memory
    CHECK(copy.dtype == dtype);
    for (size_t i = 0; i < single.parameters.size(); ++i) {
      const Matrix &a = single.parameters[i], &b = copy.parameters[i];
      CHECK(b.dtype == dtype && b.rows == a.rows && b.cols == a.cols && b.stride == b.cols);
      int64_t wrong = 0;
      for (int64_t k = 0; k < a.rows * a.cols; ++k) {
        const double value = read(static_cast<float*>(a.data) + k, DType::float32);
        wrong += read(static_cast<char*>(b.data) + k * size_of(dtype), dtype) != value;  // they fit every dtype
      }
      CHECK_EQ(wrong, 0);
    }
  }
}

TEST_CASE(data_at_any_alignment) {
  const Checkpoint expected = Checkpoint::load((kData / "tiny").string());
  for (const char* padding : {" ", "  ", "   "}) {
    const Copy copy;
    copy.edit_header("{", "{", padding);
    for (const auto dtype : {std::optional<DType>{}, std::optional(DType::float64)}) {
      const Checkpoint c = Checkpoint::load(copy.path, dtype);
      for (size_t i = 0; i < c.parameters.size(); ++i) {
        const Matrix& m = c.parameters[i];
        CHECK_EQ(reinterpret_cast<uintptr_t>(m.data) % static_cast<uintptr_t>(size_of(m.dtype)), 0u);
        CHECK_EQ(read(m.data, m.dtype), read(expected.parameters[i].data, DType::float32));
      }
    }
  }
}

TEST_CASE(where_the_configuration_comes_from) {
  const Copy copy;
  const auto reinjects = [](const std::string& path) { return Checkpoint::load(path).config.reinject_position; };
  copy.edit_config("\"reinject_position\": true", "\"reinject_position\": false");
  CHECK(!reinjects(copy.path));
  CHECK(!reinjects(copy.weights));
  const auto renamed = (copy.folder / "ema.safetensors").string();
  std::filesystem::copy(copy.weights, renamed);
  CHECK(reinjects(renamed));  // its own metadata
  std::filesystem::remove(copy.config);
  CHECK(reinjects(copy.path));
  copy.edit_header("\"config\":\"{", "\"elsewhere\":\"{");
  CHECK(has(load_error(copy.path), "has no configuration: neither config.json beside it nor one in its metadata"));
  std::filesystem::create_directory(copy.config);
  CHECK(has(load_error(copy.path), copy.config + " cannot be read: it is a directory"));
}

// The folder with its weights in a file of another name, and an index; test_cpp_checkpoint.py has Python's shards.
TEST_CASE(shards) {
  const Copy copy;
  const Checkpoint whole = Checkpoint::load((kData / "tiny").string());
  const std::string part = (copy.folder / "part.safetensors").string(), index = copy.weights + ".index.json";
  std::filesystem::rename(copy.weights, part);
  std::string places;
  for (const auto& spec : model_parameters(whole.config)) places += ", \"" + spec.name + "\": \"part.safetensors\"";
  const std::string text =
      "{\"metadata\": {\"total_size\": 1, \"x\": [{}]}, \"weight_map\": {" + places.substr(2) + "}}";
  const auto error = [&](const std::string& old, const std::string& by) {
    write_file(index, replaced(text, old, by));
    return load_error(copy.path);
  };
  write_file(index, text);
  for (const std::string& path : {copy.path, index}) {
    const Checkpoint c = Checkpoint::load(path);
    CHECK(c.config == whole.config && c.schedule == whole.schedule && c.parameters.size() == whole.parameters.size());
    for (size_t i = 0; i < c.parameters.size(); ++i) {
      const Matrix &a = c.parameters[i], &b = whole.parameters[i];
      CHECK(std::memcmp(a.data, b.data, static_cast<size_t>(a.rows * a.cols) * 4) == 0);
    }
  }
  const std::string last = ", \"final_layer.linear.bias\": \"part.safetensors\"";
  CHECK(has(error(last, ""), part + " has 'final_layer.linear.bias', " + index + " does not say so"));
  CHECK(has(error("final_layer.linear.bias", "final_layer.linear.bios"), "'final_layer.linear.bias', "));
  CHECK(has(error("part.safetensors", "other.safetensors"), "other.safetensors does not exist"));
  CHECK(has(error("part.safetensors", "../part.safetensors"), "'weight_map'.'pos_embed': is '../part.safetensors'"));
  CHECK(has(error("part.safetensors", "part.bin"), "must be a .safetensors file beside it"));
  CHECK(has(error("\"part.safetensors\"", "3"), "'weight_map'.'pos_embed': is a number, must be a string"));
  CHECK(has(error("weight_map", "weights"), index + ": "));
  CHECK(has(error("]}", ""), index + ": byte "));
  CHECK(has(error("[{}]", std::string(1000, '[')), "nests too deep"));
  std::filesystem::copy(part, copy.weights);  // then the index is not asked
  CHECK(!has(error("weight_map", "weights"), "index"));
}

TEST_CASE(files_that_are_missing) {
  const TemporaryFolder folder;
  CHECK(has(load_error(folder.string()), (folder / "model.safetensors").string() + " does not exist"));
  CHECK(has(load_error((folder / "nowhere").string()), "nowhere does not exist"));
  CHECK(has(load_error((folder / std::string(5000, 'x')).string()), "cannot be read"));
}

TEST_CASE(tensors_that_do_not_fit) {
  const auto error = [](const std::string& old, const std::string& by) {
    const Copy copy;
    copy.edit_header(old, by);
    const auto message = load_error(copy.path);
    CHECK_NOTE(message.starts_with(copy.weights + " with the configuration in " + copy.config), message);
    return message;
  };
  const std::string bias = "\"patch_embed.bias\":{\"dtype\":\"F32\",\"shape\":[8]";
  CHECK(has(error("\"patch_embed.bias\"", "\"patch_embed.bios\""),
            "; 1 missing: patch_embed.bias; 1 unexpected: 'patch_embed.bios'"));
  CHECK(has(error(bias, replaced(bias, "[8]", "[1,8]")), "1 misshaped: patch_embed.bias [1, 8], must be [8]"));
  CHECK(has(error("[8,1,2,2]", "[8,2,1,2]"), "patch_embed.weight [8, 2, 1, 2], must be [8, 1, 2, 2]"));
  CHECK(has(error("[8,1,2,2]", "[8,4]"), "patch_embed.weight [8, 4], must be [8, 1, 2, 2]"));
  CHECK(has(error(bias, replaced(bias, "F32", "U32")), "patch_embed.bias (U32)"));
  CHECK(has(error("[4,8]", "[8,4]"), "label_embed.weight [8, 4], must be [4, 8]"));
}

TEST_CASE(other_families_that_do_not_fit) {
  const auto error = [](const char* folder, const std::string& old, const std::string& by) {
    const Copy copy(folder);
    copy.edit_config(old, by);
    return load_error(copy.path);
  };
  CHECK(has(error("tiny_pixart", "\"caption_channels\": 6", "\"caption_channels\": 7"),
            "caption_embed.fc1.weight [12, 6], must be [12, 7]"));
  CHECK(has(error("tiny_pixart", "\"size_conditions\": true", "\"size_conditions\": false"),
            "8 unexpected: 'aspect_ratio_embed."));
  CHECK(has(error("tiny_pixart", "FlexPixArt", "FlexLatte"), "'size_conditions': FlexLatteConfig has no such field"));
  CHECK(has(error("tiny_latte", "\"caption_channels\": 6", "\"caption_channels\": 0"), "unexpected: 'caption_embed."));
  CHECK(has(error("tiny_latte", "\"num_classes\": 3", "\"num_classes\": 4"),
            "label_embed.weight [4, 12], must be [5, 12]"));
  CHECK(has(error("tiny_latte", "FlexLatte", "FlexDiT"), "config.json is not a FlexDiT configuration"));
}

TEST_CASE(configurations_that_do_not_fit) {
  const auto error = [](const std::string& old, const std::string& by) {
    const Copy copy;
    copy.edit_config(old, by);
    return load_error(copy.path);
  };
  CHECK(has(error("\"hidden_size\": 8", "\"hidden_size\": 16"),
            "patch_embed.weight [8, 1, 2, 2], must be [16, 1, 2, 2]"));
  CHECK(has(error("\"num_classes\": 3", "\"num_classes\": 4"), "label_embed.weight [4, 8], must be [5, 8]"));
  CHECK(has(error("\"class_dropout_prob\": 0.1", "\"class_dropout_prob\": 0"),
            "label_embed.weight [4, 8], must be [3, 8]"));
  CHECK(has(error("\"learn_sigma\": true", "\"learn_sigma\": false"),
            "final_layer.linear.weight [8, 8], must be [4, 8]"));
  CHECK(has(error("\"mlp_ratio\": 3.3", "\"mlp_ratio\": 3.4"), "mlp.fc1.weight [26, 8], must be [27, 8]"));
  CHECK(has(error("\"mlp_ratio\": 3.3", "\"mlp_ratio\": 2e8"), "mlp.fc1.weight [26, 8], must be [1600000000, 8]"));
  CHECK(has(error("\"num_dense_blocks\": 1", "\"num_dense_blocks\": 2"), "10 missing: dense_blocks.1."));
  CHECK(has(error("\"num_dense_blocks\": 1", "\"num_dense_blocks\": 0"), "10 unexpected: 'dense_blocks.0."));
  CHECK(has(error("\"num_dense_blocks\": 1", "\"num_dense_blocks\": 1000000"), "1000005 blocks, only "));
  CHECK(has(error("\"num_sdtm\": 1", "\"num_sdtm\": 1000000"), "4000002 blocks, only "));
  CHECK(has(error("\"input_size\": 8", "\"input_size\": 1048576"), "pos_embed [16, 8], must be [274877906944, 8]"));
  CHECK(has(error("\"input_size\"", "\"input\""), "config.json is not a FlexDiT configuration: byte 12, 'input': "));
}

TEST_CASE(flipped_header_bytes) {
  const Copy copy;
  const std::string file = read_file(copy.weights);
  const size_t header_end = file.find("}}") + 2;
  int refused = 0;
  for (size_t i = 0; i < header_end; i += 17)
    for (const char mask : {'\x01', '\x04', '\x20', '\x80'}) {
      std::string flipped = file;
      flipped[i] = static_cast<char>(flipped[i] ^ mask);
      write_file(copy.weights, flipped);
      // Refused by name, or what it still says makes a whole model.
      const auto message =
          message_of<CheckpointError>([&] { CHECK_EQ(Checkpoint::load(copy.path).parameters.size(), 80u); });
      refused += !message.empty();
      CHECK_NOTE(message.empty() || has(message, copy.weights), message);
    }
  CHECK(refused > 1000);
}

TEST_CASE(casts_of_16_bits) {
  std::vector<uint16_t> all(0x10000);
  for (size_t bits = 0; bits < all.size(); ++bits) all[bits] = static_cast<uint16_t>(bits);
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    std::vector<float> singles(all.size());
    std::vector<double> doubles(all.size());
    std::vector<uint16_t> back(all.size()), around(all.size());
    const auto count = static_cast<int64_t>(all.size());
    io::cast(all.data(), dtype, singles.data(), DType::float32, count);
    io::cast(all.data(), dtype, doubles.data(), DType::float64, count);
    io::cast(singles.data(), DType::float32, back.data(), dtype, count);
    io::cast(doubles.data(), DType::float64, around.data(), dtype, count);
    for (size_t i = 0; i < all.size(); ++i) {
      const double wanted = read(&all[i], dtype);
      CHECK_NOTE(std::signbit(singles[i]) == i >> 15 && std::signbit(doubles[i]) == i >> 15, i);
      if (std::isnan(wanted)) {
        CHECK_NOTE(std::isnan(singles[i]) && std::isnan(doubles[i]), i);
        CHECK_NOTE(std::isnan(read(&back[i], dtype)) && std::isnan(read(&around[i], dtype)), i);
      } else {
        CHECK_NOTE(singles[i] == wanted && doubles[i] == wanted && back[i] == i && around[i] == i, i);
      }
    }
  }
}

TEST_CASE(casts_round_to_nearest_even) {
  std::vector<float> x = {65519.f, 65520.f, 65536.f, 1e30f, INFINITY, 3.4e38f, 0.f, 1e-30f, 1.4e-45f};
  for (uint32_t half = 0; half < 0x7c00; ++half) {  // what lies between two float16, the ties above all
    const double a = float16_value(static_cast<uint16_t>(half));
    const double step = std::ldexp(1, std::max(half >> 10, 1u) - 25);
    for (const double part : {0.25, 0.5, 0.75}) {
      x.push_back(static_cast<float>(a + part * step));
      x.push_back(std::nextafter(x.back(), 0.f));
    }
  }
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const auto bits = static_cast<uint32_t>(random.next());
    float value;
    std::memcpy(&value, &bits, 4);
    if (!std::isnan(value)) x.push_back(value);
  }
  for (size_t i = 0, count = x.size(); i < count; ++i) x.push_back(-x[i]);
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    std::vector<uint16_t> got(x.size()), wanted(x.size());
    io::cast(x.data(), DType::float32, got.data(), dtype, static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      write(&wanted[i], dtype, x[i]);
      CHECK_NOTE(got[i] == wanted[i], x[i], " to ", name_of(dtype), ": ", got[i], ", must be ", wanted[i]);
    }
  }
}

TEST_CASE(casts_read_from_any_address) {
  const std::vector<float> values = {1, -2, 3.5f, 0.25f};
  std::vector<char> bytes(4 * 4 + 1);
  std::memcpy(bytes.data() + 1, values.data(), 16);
  for (const DType dtype : kDTypes) {
    std::vector<double> out(4);
    io::cast(bytes.data() + 1, DType::float32, out.data(), dtype, 4);
    for (size_t i = 0; i < 4; ++i)
      CHECK_EQ(read(reinterpret_cast<char*>(out.data()) + static_cast<int64_t>(i) * size_of(dtype), dtype),
               static_cast<double>(values[i]));
  }
  io::cast(nullptr, DType::float32, nullptr, DType::float64, 0);
}
