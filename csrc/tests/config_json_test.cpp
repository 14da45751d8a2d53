// Configurations of every family: their defaults, and texts that are none.
#include "model/config_json.h"

#include <tuple>

#include "check.h"
#include "files.h"
#include "flexdit/safetensors.h"
#include "message_of.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

bool has(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

ModelDescription parse(const std::string& json) {
  const ExactBytes bytes(json);
  return parse_config(bytes.text(), "config.json");
}
std::string config_error(const std::string& json) {
  const auto message = message_of<CheckpointError>([&] { parse(json); });
  if (!message.empty()) CHECK_NOTE(message.starts_with("config.json is not a FlexDiT configuration: "), message);
  return message;
}

}  // namespace

TEST_CASE(defaults_of_the_configuration) {
  const ModelDescription d = parse("{}");  // FlexDiTConfig(), which is XL/2 for 256 pixels
  const Config c = d.config, wanted;
  CHECK(c.input_height == wanted.input_height && c.patch_size == wanted.patch_size && c.hidden == wanted.hidden);
  CHECK(c.mlp_hidden == wanted.mlp_hidden && c.label_rows == wanted.label_rows && c.num_heads == wanted.num_heads);
  CHECK(c.out_channels == wanted.out_channels && c.num_pooling_blocks == wanted.num_pooling_blocks);
  CHECK(c.num_sdtm == wanted.num_sdtm && c.sparse_blocks == wanted.sparse_blocks && !c.reinject_position);
  CHECK(d.schedule == DensitySchedule({{1, 10, 10}, {1, 8, 8}, {1, 7, 7}, {1, 6, 6}}));
  CHECK(d.num_classes == 1000 && d.has_null_class);
  CHECK(c.timestep_shift == 0 && c.mlp_norm_eps == 1e-6);
  const Config diffusers = parse(R"({"timestep_shift": 1, "mlp_norm_eps": 1e-5})").config;
  CHECK(diffusers.timestep_shift == 1 && diffusers.mlp_norm_eps == 1e-5);
  CHECK(parse(R"({"schedule": null})").schedule == d.schedule);
  CHECK(!parse(R"({"class_dropout_prob": 0.0})").has_null_class);
  CHECK_EQ(parse(R"({"class_dropout_prob": 0})").config.label_rows, 1000);
  CHECK_EQ(parse(R"({"learn_sigma": false, "in_channels": 3})").config.out_channels, 3);
  CHECK_EQ(parse(R"({"mlp_ratio": 4, "hidden_size": 12, "num_heads": 1})").config.mlp_hidden, 48);
  CHECK(parse(R"({"schedule": {"grids": [[1, 5, 6], [3, 2]]}})").schedule == DensitySchedule({{1, 5, 6}, {1, 3, 2}}));
  CHECK(parse(R"({"schedule": {"grids": [[5, 6]], "begins": null, "num_timesteps": 50}})").schedule ==
        DensitySchedule({{1, 5, 6}}, 50));
}

TEST_CASE(configurations_that_are_none) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "the text ends"},
      {"{", "a key"},
      {"[]", "is an array, must be an object"},
      {"null", "is null, must be an object"},
      {"{} {}", "nothing may follow"},
      {R"({"no_such_key": 1})", "'no_such_key': FlexDiTConfig has no such field"},
      {R"({"timestep_shift": 2})", "'timestep_shift': is"},
      {R"({"mlp_norm_eps": 0})", "mlp_norm_eps is 0"},
      {R"({"hidden_size": "8"})", "'hidden_size': is a string, must be a number"},
      {R"({"hidden_size": null})", "'hidden_size': is null"},
      {R"({"hidden_size": 8.0})", "'hidden_size': is '8.0', must be an integer"},
      {R"({"hidden_size": true})", "'hidden_size': is true or false"},
      {R"({"hidden_size": 0})", "'hidden_size': is '0', must be from 1 to 1048576"},
      {R"({"hidden_size": 8, "hidden_size": 8})", "comes twice"},
      {R"({"hidden_size": 1152, "num_heads": 7})", "hidden_size is 1152, must be a multiple of num_heads 7"},
      {R"({"hidden_size": 6, "num_heads": 2})", "hidden_size is 6, must be a multiple of 4"},
      {R"({"input_size": 31})", "input_size is 31, must be a multiple of patch_size 2"},
      {R"({"num_classes": 1000000000000000000000000000000})", "'num_classes': is '10"},
      {R"({"num_dense_blocks": -1})", "'num_dense_blocks': is '-1', must be from 0"},
      {R"({"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 0})", "no blocks"},
      {R"({"mlp_ratio": 0})", "mlp_ratio"},
      {R"({"mlp_ratio": -1})", "mlp_ratio"},
      {R"({"mlp_ratio": 1e300})", "mlp_ratio"},
      {R"({"mlp_ratio": 1e400})", "no 64-bit float"},
      {R"({"mlp_ratio": NaN})", "no JSON value begins with 'N'"},
      {R"({"mlp_ratio": Infinity})", "no JSON value begins with 'I'"},
      {R"({"class_dropout_prob": 1})", "class_dropout_prob"},
      {R"({"class_dropout_prob": -0.1})", "class_dropout_prob"},
      {R"({"learn_sigma": 1})", "'learn_sigma': is a number, must be true or false"},
      {R"({"sdtm_blocks": 3})", "'sdtm_blocks': is a number, must be an array"},
      {R"({"sdtm_blocks": [1, 1, 1]})", "sdtm_blocks has 3 numbers, must have 4"},
      {R"({"sdtm_blocks": [0, 1, 1, 1]})", "generation"},
      {R"({"sdtm_blocks": [1, 1, 0, 1]})", "recovery"},
      {R"({"sdtm_blocks": [1, -1, 1, 1]})", "'sdtm_blocks'[1]: is '-1'"},
      {R"({"schedule": 5})", "'schedule': is a number, must be an object"},
      {R"({"schedule": {}})", "'schedule': has no grids"},
      {R"({"schedule": {"grids": []}})", "'schedule': has no grids"},
      {R"({"schedule": {"grids": 5}})", "'schedule'.'grids': is a number, must be an array"},
      {R"({"schedule": {"grids": [[5]]}})", "'schedule'.'grids'[0]: must be a grid"},
      {R"({"schedule": {"grids": [[1, 1, 1, 1]]}})", "'schedule'.'grids'[0]: must be a grid"},
      {R"({"schedule": {"grids": [[0, 5]]}})", "'schedule'.'grids'[0][0]: is '0', must be from 1 to 32767"},
      {R"({"schedule": {"grids": [[17, 5]]}})", "schedule has the sparse grid (1, 17, 5), at most the dense grid"},
      {R"({"schedule": {"grids": [[2, 5, 5]]}})", "schedule has the sparse grid (2, 5, 5)"},
      {R"({"schedule": {"grids": [[5, 5]], "begins": [1]}})", "begins starts with 1"},
      {R"({"schedule": {"grids": [[5, 5]], "begins": []}})", "begins holds 0"},
      {R"({"schedule": {"grids": [[5, 5]], "begins": "ab"}})", "'schedule'.'begins': is a string"},
      {R"({"schedule": {"grids": [[5, 5]], "num_timesteps": 0}})", "'num_timesteps': is '0'"},
      {R"({"schedule": {"grids": [[5, 5]], "steps": 0}})", "'schedule'.'steps': no such key"},
      {R"({"input_size": 1048576})", "dense_grid"},  // whose schedule would be of 2^38 tokens
  };
  for (const auto& [text, part] : cases) CHECK_NOTE(has(config_error(text), part), text, ": ", config_error(text));
  CHECK(has(config_error(std::string(1000000, '[')), "must be an object"));
}

TEST_CASE(defaults_of_the_other_families) {
  const ModelDescription image = parse(R"({"_class_name": "FlexPixArt"})");  // FlexPixArtConfig()
  const Config& p = image.config;
  CHECK(p.family == ModelFamily::pixart && p.input_height == 32 && p.hidden == 1152 && p.mlp_hidden == 4608);
  CHECK(p.out_channels == 8 && p.label_rows == 0 && p.num_frames == 1 && p.caption_channels == 4096);
  CHECK(p.max_caption_tokens == 120 && !p.size_conditions && p.position_scale == 1 && p.num_sdtm == 4);
  CHECK(image.schedule == DensitySchedule({{1, 11, 11}, {1, 9, 9}, {1, 8, 8}, {1, 7, 7}}));
  CHECK(image.num_classes == 0 && !image.has_null_class);
  const ModelDescription clip = parse(R"({"num_frames": 8, "_class_name": "FlexLatte"})");
  const Config& l = clip.config;
  CHECK(l.family == ModelFamily::latte && l.num_frames == 8 && l.caption_channels == 0 && l.label_rows == 0);
  CHECK(clip.schedule == DensitySchedule({{4, 6, 6}, {3, 6, 6}, {2, 6, 6}, {2, 6, 6}}));
  CHECK_EQ(parse(R"({"_class_name": "FlexLatte"})").config.num_frames, 16);
  const Config full = parse(R"({"_class_name": "FlexPixArt", "size_conditions": true, "position_scale": 0.5,
      "max_caption_tokens": 300, "caption_channels": 8, "out_channels": 4, "in_channels": 4, "mlp_ratio": 2})")
                          .config;
  CHECK(full.size_conditions && full.position_scale == 0.5 && full.max_caption_tokens == 300);
  CHECK(full.caption_channels == 8 && full.out_channels == 4 && !full.learned_variance() && full.mlp_hidden == 2304);
  const ModelDescription classes =
      parse(R"({"_class_name": "FlexLatte", "num_classes": 10, "class_dropout_prob": 0.1, "caption_channels": 8,
                "schedule": {"grids": [[16, 2, 3], [4, 5]]}})");
  CHECK(classes.config.label_rows == 11 && classes.num_classes == 10 && classes.has_null_class);
  CHECK(classes.config.caption_channels == 8 && classes.schedule == DensitySchedule({{16, 2, 3}, {1, 4, 5}}));
  const ModelDescription without = parse(R"({"_class_name": "FlexLatte", "class_dropout_prob": 0.1})");
  CHECK(without.config.label_rows == 0 && !without.has_null_class);
}

// Halves go to even, as in Python's round: 9/16 of 8 is 4.5, of 24 13.5.
TEST_CASE(default_schedules_in_proportion) {
  const Config image = parse(R"({"_class_name": "FlexPixArt"})").config;
  CHECK(default_schedule(image, {1, 8, 24}) ==
        DensitySchedule({{1, 6, 16}, {1, 4, 14}, {1, 4, 12}, {1, 4, 10}}));
  CHECK(default_schedule(image, {1, 1, 2}) == DensitySchedule({{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}}));
  CHECK(default_schedule(parse(R"({"_class_name": "FlexLatte"})").config, {1, 4, 32}) ==
        DensitySchedule({{1, 2, 12}, {1, 2, 12}, {1, 2, 12}, {1, 2, 12}}));
}

TEST_CASE(configurations_of_the_other_families_that_are_none) {
  const auto error = [](const std::string& family, const std::string& members) {
    const auto message = message_of<CheckpointError>(
        [&] { parse("{\"_class_name\": \"" + family + "\"" + (members.empty() ? "" : ", ") + members + "}"); });
    CHECK_NOTE(message.starts_with("config.json is not a Flex"), message);
    return message;
  };
  CHECK(has(error("FlexDiT", ""), "'_class_name': is 'FlexDiT', must be 'FlexPixArt' or 'FlexLatte'"));
  CHECK(has(error("FlexPixArt", "\"_class_name\": \"FlexLatte\""), "comes twice"));
  CHECK(has(config_error(R"({"_class_name": 3})"), "'_class_name': is a number, must be a string"));
  CHECK(has(config_error(R"({"deep": )" + std::string(1000, '[')), "nests too deep"));
  const std::tuple<const char*, const char*, const char*> cases[] = {
      {"FlexPixArt", R"("num_classes": 3)", "FlexPixArt configuration: byte "},
      {"FlexPixArt", R"("num_classes": 3)", "'num_classes': FlexPixArtConfig has no such field"},
      {"FlexPixArt", R"("num_frames": 3)", "'num_frames': FlexPixArtConfig has no such field"},
      {"FlexPixArt", R"("learn_sigma": true)", "'learn_sigma': FlexPixArtConfig has no such field"},
      {"FlexPixArt", R"("caption_channels": 0)", "'caption_channels': is '0', must be from 1"},
      {"FlexPixArt", R"("max_caption_tokens": 0)", "'max_caption_tokens': is '0', must be from 1"},
      {"FlexPixArt", R"("position_scale": 0)", "position_scale is 0.000000, must be above 0"},
      {"FlexPixArt", R"("position_scale": -1)", "position_scale is -1"},
      {"FlexPixArt", R"("size_conditions": 1)", "'size_conditions': is a number, must be true or false"},
      {"FlexPixArt", R"("size_conditions": true, "hidden_size": 16)",
       "hidden_size is 16, must be a multiple of 3 with size_conditions"},
      {"FlexPixArt", R"("schedule": {"grids": [[2, 5, 5]]})", "schedule has the sparse grid (2, 5, 5)"},
      {"FlexPixArt", R"("out_channels": 0)", "'out_channels': is '0'"},
      {"FlexLatte", R"("size_conditions": false)", "'size_conditions': FlexLatteConfig has no such field"},
      {"FlexLatte", R"("num_frames": 0)", "'num_frames': is '0', must be from 1 to 32767"},
      {"FlexLatte", R"("num_frames": 32768)", "'num_frames': is '32768'"},
      {"FlexLatte", R"("num_classes": -1)", "'num_classes': is '-1', must be from 0"},
      {"FlexLatte", R"("class_dropout_prob": 1)", "class_dropout_prob is 1"},
      {"FlexLatte", R"("schedule": {"grids": [[17, 5, 5]]})",
       "schedule has the sparse grid (17, 5, 5), at most the dense grid (16, 16, 16) is allowed"},
      {"FlexLatte", R"("input_size": 1048576)", "grid"},
  };
  for (const auto& [family, members, part] : cases)
    CHECK_NOTE(has(error(family, members), part), members, ": ", error(family, members));
  CHECK(has(config_error(R"({"caption_channels": 8})"), "'caption_channels': FlexDiTConfig has no such field"));
}
