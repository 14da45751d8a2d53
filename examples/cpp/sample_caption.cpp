// Images or clips of a caption from a trained FlexPixArt or FlexLatte, without Python: loads the folder that
// save_pretrained wrote and what a text encoder said, float32 tensors "caption" [tokens, channels] and for guidance
// "null_caption" of the empty text, and writes the images side by side, of clips each one's frames in a row:
//   sample_caption FOLDER caption.safetensors images.ppm --count 4
#include <flexdit/checkpoint.h>
#include <flexdit/session.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "options.h"
#include "picture.h"

namespace {

constexpr const char* kUsage =
    "usage: sample_caption FOLDER CAPTION.safetensors OUT.ppm [--count N] [--label N] [--frames N] [--height N]\n"
    "              [--width N] [--steps N] [--sampler ddim|ddpm|dpmpp|flow|heun] [--guidance S] [--seed N] [--latents FILE]\n"
    "              height, width: of the latent image; FILE: the float32 values of all images";
constexpr double kPixelsPerLatent = 8;  // of Stable Diffusion's autoencoder

struct Settings {
  std::string folder, caption, out, latents, sampler = "dpmpp";
  int64_t count = 1, label = 0, frames = 0, height = 0, width = 0, steps = 20;
  double guidance = 4.5;
  uint64_t seed = 0;
};

Settings parse(const std::vector<std::string>& words) {
  if (words.size() < 3 || words.size() % 2 == 0) throw std::invalid_argument(kUsage);
  Settings s{.folder = words[0], .caption = words[1], .out = words[2]};
  const std::pair<const char*, int64_t*> integers[] = {{"--count", &s.count},   {"--label", &s.label},
                                                       {"--frames", &s.frames}, {"--height", &s.height},
                                                       {"--width", &s.width},   {"--steps", &s.steps}};
  for (size_t i = 3; i < words.size(); i += 2) {
    const std::string &name = words[i], &value = words[i + 1];
    const auto* integer =
        std::find_if(std::begin(integers), std::end(integers), [&](auto& one) { return name == one.first; });
    if (integer != std::end(integers))
      options::read(name, value, *integer->second);
    else if (name == "--sampler")
      s.sampler = value;
    else if (name == "--guidance")
      options::read(name, value, s.guidance);
    else if (name == "--seed")
      options::read(name, value, s.seed);
    else if (name == "--latents")
      s.latents = value;
    else
      throw std::invalid_argument(name + " is no option\n" + kUsage);
  }
  if (s.count < 1) throw std::invalid_argument("--count is " + std::to_string(s.count) + ", must be at least 1");
  return s;
}

// The tensor of that name, or no tokens if there is none.
flexdit::CaptionInput read_caption(const flexdit::SafetensorsFile& file, const char* name, int64_t channels) {
  const flexdit::SafetensorsEntry* entry = file.find(name);
  if (!entry || channels == 0) return {};  // a model of labels reads none
  if (entry->dtype != "F32" || entry->shape.size() != 2 || entry->shape[1] != channels)
    throw std::invalid_argument(file.name() + ": " + name + " must be F32 [tokens, " + std::to_string(channels) + "]");
  std::vector<float> values(entry->data.size() / sizeof(float));
  std::memcpy(values.data(), entry->data.data(), entry->data.size());
  return {{values.begin(), values.end()}, entry->shape[0]};
}

// An image as its frames, one behind the other: the library has a clip's channels outside.
void append_frames(const flexdit::Finished& clip, std::vector<float>& values) {
  const int64_t area = clip.height * clip.width;
  for (int64_t frame = 0; frame < clip.frames; ++frame)
    for (int64_t channel = 0; channel < clip.channels; ++channel) {
      const auto plane = clip.image.begin() + (channel * clip.frames + frame) * area;
      values.insert(values.end(), plane, plane + area);
    }
}

std::vector<flexdit::Finished> sample(const flexdit::Checkpoint& checkpoint, const Settings& s) {
  const flexdit::Config& c = checkpoint.config;
  const flexdit::SafetensorsFile file(s.caption);
  flexdit::SampleRequest request{
      .label = s.label,
      .steps = flexdit::sampler_steps(flexdit::sampler_kind(s.sampler), s.steps, /*eta=*/0, c.learned_variance()),
      .guidance = s.guidance,
      .height = s.height ? s.height : c.input_height,
      .width = s.width ? s.width : c.input_width,
      .caption = read_caption(file, "caption", c.caption_channels),
      .null_caption = read_caption(file, "null_caption", c.caption_channels),
      .frames = s.frames};
  if (c.size_conditions) {
    request.resolution[0] = kPixelsPerLatent * static_cast<double>(request.height);
    request.resolution[1] = kPixelsPerLatent * static_cast<double>(request.width);
    request.aspect_ratio = request.resolution[0] / request.resolution[1];
  }
  flexdit::Session session(flexdit::prepare_sampling(checkpoint));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < s.count; ++i) {
    request.seed = flexdit::derive_seed(s.seed, static_cast<uint64_t>(i));
    ids.push_back(session.add(request));
  }
  for (size_t pass = 1; session.step() > 0; ++pass) std::fprintf(stderr, "\r%zu of %zu", pass, request.steps.size());
  std::fprintf(stderr, "\r%zu of %zu\n", request.steps.size(), request.steps.size());
  std::vector<flexdit::Finished> images;
  for (const int64_t id : ids) {
    images.push_back(*session.take(id));
    if (!images.back().error.empty()) throw std::runtime_error(images.back().error);
  }
  return images;
}

}  // namespace

int main(int argc, char** argv) try {
  const Settings s = parse({argv + 1, argv + argc});
  const std::vector<flexdit::Finished> images = sample(flexdit::Checkpoint::load(s.folder, flexdit::DType::float32), s);
  const flexdit::Finished& first = images.front();
  std::vector<float> frames, latents;
  for (const flexdit::Finished& image : images) {
    append_frames(image, frames);
    latents.insert(latents.end(), image.image.begin(), image.image.end());
  }
  const picture::Images shown{frames, first.channels, first.height, first.width};
  const int64_t columns = first.frames > 1 ? first.frames : 10, zoom = std::max<int64_t>(1, 64 / first.height);
  picture::write_whole(s.out, picture::netpbm(shown, columns, zoom));
  if (!s.latents.empty())
    picture::write_whole(s.latents, {reinterpret_cast<const char*>(latents.data()), latents.size() * sizeof(float)});
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
