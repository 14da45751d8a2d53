// Pictures from a trained model, without Python: loads the folder that save_pretrained wrote, samples an image for each
// label, all in one batch, and writes them side by side. With what `make demo` leaves, a row of digits:
//   sample out/flexdit digits.pgm
#include <flexdit/checkpoint.h>
#include <flexdit/session.h>

#include <cstdio>
#include <numeric>

#include "options.h"
#include "picture.h"

namespace {

constexpr const char* kUsage =
    "usage: sample FOLDER OUT.pgm [--labels 0,1,2] [--steps N] [--sampler ddim|ddpm|dpmpp|flow|heun] [--guidance S]\n"
    "              [--seed N] [--latents FILE]   FILE: the float32 values of all images";

struct Settings {
  std::string folder, out, latents, sampler = "flow";
  std::vector<int64_t> labels;  // empty: one of each class
  int64_t steps = 25;
  double guidance = 1.5;
  uint64_t seed = 0;
};

Settings parse(const std::vector<std::string>& words) {
  if (words.size() < 2 || words.size() % 2) throw std::invalid_argument(kUsage);
  Settings s{.folder = words[0], .out = words[1]};
  for (size_t i = 2; i < words.size(); i += 2) {
    const std::string &name = words[i], &value = words[i + 1];
    if (name == "--labels")
      for (size_t begin = 0, end; begin <= value.size(); begin = end + 1) {
        end = std::min(value.find(',', begin), value.size());
        options::read(name, std::string_view(value).substr(begin, end - begin), s.labels.emplace_back());
      }
    else if (name == "--steps")
      options::read(name, value, s.steps);
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
  return s;
}

// The values of all images, one behind the other.
std::vector<float> sample(const flexdit::Checkpoint& checkpoint, const Settings& s) {
  const auto steps = flexdit::sampler_steps(flexdit::sampler_kind(s.sampler), s.steps, /*eta=*/0,
                                            checkpoint.config.learned_variance());
  flexdit::Session session(flexdit::prepare_sampling(checkpoint));  // requests may join and leave at any step
  std::vector<int64_t> ids;
  for (size_t i = 0; i < s.labels.size(); ++i)
    ids.push_back(session.add(
        {.label = s.labels[i], .seed = flexdit::derive_seed(s.seed, i), .steps = steps, .guidance = s.guidance}));
  for (size_t pass = 1; session.step() > 0; ++pass) std::fprintf(stderr, "\r%zu of %zu", pass, steps.size());
  std::fprintf(stderr, "\r%zu of %zu\n", steps.size(), steps.size());
  std::vector<float> values;
  for (const int64_t id : ids) {
    const auto image = session.take(id);
    if (!image->error.empty()) throw std::runtime_error(image->error);
    values.insert(values.end(), image->image.begin(), image->image.end());
  }
  return values;
}

}  // namespace

int main(int argc, char** argv) try {
  Settings s = parse({argv + 1, argv + argc});
  const auto checkpoint = flexdit::Checkpoint::load(s.folder, flexdit::DType::float32);
  if (s.labels.empty()) {
    s.labels.resize(static_cast<size_t>(checkpoint.num_classes));
    std::iota(s.labels.begin(), s.labels.end(), 0);
  }
  const std::vector<float> values = sample(checkpoint, s);
  const flexdit::Config& c = checkpoint.config;
  const picture::Images images{values, c.in_channels, c.input_height, c.input_width};
  picture::write_whole(s.out, picture::netpbm(images, /*columns=*/10, std::max<int64_t>(1, 64 / c.input_height)));
  if (!s.latents.empty())
    picture::write_whole(s.latents, {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)});
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
