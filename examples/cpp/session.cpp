// Images from a checkpoint in C++: session FOLDER, what FlexDiT.save_pretrained wrote.
#include <cmath>
#include <cstdio>

#include "flexdit/checkpoint.h"
#include "flexdit/session.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const char* folder = argv[1];

  const flexdit::Checkpoint checkpoint = flexdit::Checkpoint::load(folder, flexdit::DType::float32);
  const auto model = std::make_shared<flexdit::SamplingModel>(
      flexdit::SamplingModelOptions{.config = checkpoint.config,
                                    .schedule = checkpoint.schedule,
                                    .parameters = checkpoint.parameters,
                                    .dtype = checkpoint.dtype,
                                    .null_label = checkpoint.has_null_class ? checkpoint.num_classes : -1,
                                    .exec = {.threads = 2}});
  flexdit::Session session(model, {.max_batch = 8});
  const auto steps = flexdit::sampler_steps(flexdit::SamplerKind::dpmpp, 4);
  for (int64_t label = 0; label < 3; ++label) session.add({.label = label, .seed = 7, .steps = steps});
  while (session.step() > 0) {
  }
  const std::vector<flexdit::Finished> images = session.take_all();

  for (const flexdit::Finished& image : images) {
    double sum = 0;
    for (const double value : image.image) sum += std::abs(value);
    std::printf("image %d: mean %.4f\n", int(image.id), sum / double(image.image.size()));
    if (!(sum > 0 && std::isfinite(sum))) return 1;
  }
  return images.size() == 3 ? 0 : 1;
}
