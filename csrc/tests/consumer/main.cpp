// A program outside this repository that uses the installed library: it loads a checkpoint and runs the model.
#include <flexdit/checkpoint.h>

#include <cmath>
#include <cstdio>

namespace {

// The mean of |model(x)| of one sample.
double run(const flexdit::Checkpoint& checkpoint) {
  const flexdit::Config& c = checkpoint.config;
  const auto pixels = static_cast<size_t>(c.input_height * c.input_width);
  std::vector<float> x(pixels * static_cast<size_t>(c.in_channels), 0.5f);
  std::vector<float> out(pixels * static_cast<size_t>(c.out_channels), NAN);
  const double t = 500;
  const int64_t label = checkpoint.num_classes - 1;
  const flexdit::HostLayout sparse(1, checkpoint.schedule.grid(t));
  flexdit::ModelForward p{.config = c, .parameters = checkpoint.parameters, .dtype = checkpoint.dtype, .batch = 1};
  p.x = x.data(), p.t = &t, p.labels = &label, p.out = out.data();
  p.sparse_layout = sparse.view();
  std::vector<char> workspace(static_cast<size_t>(flexdit::model_workspace_bytes(p, false)));
  p.workspace = workspace.data();
  flexdit::model_forward(p, {});
  double sum = 0;
  for (const float value : out) sum += std::abs(value);
  return sum / static_cast<double>(out.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    flexdit::Checkpoint::load(std::string(argv[1]) + "/nowhere");
    return 1;
  } catch (const flexdit::CheckpointError& error) {  // the library's exceptions are the program's
    std::printf("as expected: %s\n", error.what());
  }
  const double mean = run(flexdit::Checkpoint::load(argv[1], flexdit::DType::float32));
  std::printf("mean |out| = %.4f\n", mean);
  return std::isfinite(mean) && mean > 0 ? 0 : 1;
}
