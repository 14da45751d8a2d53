#include "model/request.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

#include "model/family.h"

namespace flexdit {
namespace {

void require(bool holds, const std::string& message) {
  if (!holds) throw ArgumentError(message);
}

std::string text(double value) {
  char out[32];
  std::snprintf(out, sizeof out, "%g", value);
  return out;
}
std::string text(const Config& c, const Grid& g) {
  return "(" + (c.family == ModelFamily::latte ? std::to_string(g.frames) + ", " : "") + std::to_string(g.height) +
         ", " + std::to_string(g.width) + ")";
}

void check_steps(const SamplingModel::Prepared& m, const SampleRequest& r) {
  require(!r.steps.empty(), "steps is empty, must hold at least one step");
  const auto last = static_cast<double>(m.schedule.num_timesteps());
  for (const SamplerStep& step : r.steps) {
    require(step.timestep >= 0 && step.timestep <= last,
            "a step's timestep is " + text(step.timestep) + ", must lie in [0, " + text(last) + "]");
    require(!step.learned_variance || m.config.learned_variance(),
            "learned_variance is set, but the model has no variance channels");
  }
  require(r.steps[0].x0_previous_coef == 0, "the first step reads the x0 of a step before it");
}

void check_guidance(const SamplingModel::Prepared& m, const SampleRequest& r) {
  require(r.guidance >= 0 && std::isfinite(r.guidance),
          "guidance is " + text(r.guidance) + ", must be finite and at least 0");
  require(r.guidance == 1 || m.config.caption_channels || m.null_label >= 0,
          "guidance is " + text(r.guidance) + ", but the model has no null class: only 1 is allowed");
  require(r.guidance_begin <= r.guidance_end,
          "guidance_begin is " + text(r.guidance_begin) + ", must be at most guidance_end, " + text(r.guidance_end));
}

void check_label(const Config& c, const SampleRequest& r) {
  if (c.label_rows || c.family == ModelFamily::dit)
    require(r.label >= 0 && r.label < c.label_rows,
            "label is " + std::to_string(r.label) + ", must lie in [0, " + std::to_string(c.label_rows) + ")");
  else
    require(r.label == 0, "label is " + std::to_string(r.label) + ", but the model has no labels: must be 0");
}

void check_caption(const Config& c, const std::string& name, const CaptionInput& caption) {
  require(caption.tokens >= 1 && caption.tokens <= c.max_caption_tokens,
          name + " has " + std::to_string(caption.tokens) + " tokens, must have 1 to " +
              std::to_string(c.max_caption_tokens));
  require(std::ssize(caption.rows) == caption.tokens * c.caption_channels,
          name + ".rows holds " + std::to_string(caption.rows.size()) + " values, must hold " +
              std::to_string(caption.tokens) + " tokens of " + std::to_string(c.caption_channels));
  require(std::all_of(caption.rows.begin(), caption.rows.end(), [](double value) { return std::isfinite(value); }),
          name + ".rows holds a value that is not finite");
}

// The unconditional caption is read where there is guidance, and checked wherever it is given.
void check_captions(const Config& c, const SampleRequest& r) {
  for (const auto& [name, caption, wanted] :
       {std::tuple("caption", &r.caption, true), std::tuple("null_caption", &r.null_caption, r.guidance != 1)}) {
    const bool given = caption->tokens != 0 || !caption->rows.empty();
    require(c.caption_channels || !given, std::string(name) + " is given, but the model reads none");
    if (!c.caption_channels) continue;
    require(given || !wanted, std::string(name) + " is missing" +
                                  (r.guidance == 1 ? "" : ", guidance is " + text(r.guidance)) +
                                  ": the model reads captions");
    if (given) check_caption(c, name, *caption);
  }
}

void check_size_conditions(const Config& c, const SampleRequest& r) {
  for (const auto& [name, value] :
       {std::pair("resolution[0]", r.resolution[0]), std::pair("resolution[1]", r.resolution[1]),
        std::pair("aspect_ratio", r.aspect_ratio)})
    if (c.size_conditions)
      require(value > 0 && std::isfinite(value),
              std::string(name) + " is " + text(value) + ", must be finite and above 0");
    else
      require(value == 0,
              std::string(name) + " is " + text(value) + ", but the model has no size_conditions: must be 0");
}

Grid check_size(const Config& c, SampleRequest& r) {
  const bool clips = c.family == ModelFamily::latte;
  if (r.height == 0) r.height = c.input_height;
  if (r.width == 0) r.width = c.input_width;
  if (r.frames == 0) r.frames = c.num_frames;
  constexpr int64_t kMaxSide = 1 << 14;
  for (const auto& [name, side] : {std::pair("height", r.height), std::pair("width", r.width)})
    require(side > 0 && side % c.patch_size == 0 && side <= kMaxSide,
            std::string(name) + " is " + std::to_string(side) + ", must be a multiple of the patch size " +
                std::to_string(c.patch_size) + " from it to " + std::to_string(kMaxSide));
  require(r.frames >= 1 && r.frames <= c.num_frames, "frames is " + std::to_string(r.frames) +
                                                         (clips ? ", must be 1 to " + std::to_string(c.num_frames)
                                                                : ", but the model makes images: must be 0 or 1"));
  const Grid dense{static_cast<int32_t>(r.frames), static_cast<int32_t>(r.height / c.patch_size),
                   static_cast<int32_t>(r.width / c.patch_size)};
  require(dense.tokens() <= std::numeric_limits<int32_t>::max() / 4, "frames, height and width make too many tokens");
  require(dense == c.dense_grid() || c.hidden % 4 == 0,
          "height and width must be the model's: its hidden size is no multiple of 4, as position tables need");
  return dense;
}

void require_within(const Config& c, const std::string& what, const Grid& g, const Grid& dense) {
  require(g.frames >= 1 && g.height >= 1 && g.width >= 1 && g.frames <= dense.frames && g.height <= dense.height &&
              g.width <= dense.width,
          what + text(c, g) + ", must lie within the dense grid " + text(c, dense));
}

}  // namespace

Grid check_request(const SamplingModel::Prepared& m, SampleRequest& r) {
  const Config& c = m.config;
  check_label(c, r);
  check_steps(m, r);
  check_guidance(m, r);
  check_captions(c, r);
  check_size_conditions(c, r);
  const Grid dense = check_size(c, r);
  if (r.sparse_grid)
    require_within(c, "sparse_grid is ", *r.sparse_grid, dense);
  else if (shares_modulation(c) && m.own_schedule && c.num_sdtm)  // the same grids on every size
    for (const Grid& g : m.schedule.grids())
      require_within(c, "sparse_grid is not given, and the schedule has ", g, dense);
  return dense;
}

}  // namespace flexdit
