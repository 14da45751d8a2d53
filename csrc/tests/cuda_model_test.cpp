// The whole model, forward and backward, with the CUDA kernels on the emulator against the CPU in float64: a ragged
// batch through every kind of block.
#include "check.h"
#include "flexdit/model.h"
#include "support.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const std::vector<Grid> kSparse = {{1, 2, 2}, {1, 1, 1}, {1, 3, 4}};

Config tiny() {
  Config c;
  c.input_height = 6, c.input_width = 8, c.patch_size = 2, c.in_channels = 2, c.out_channels = 4;
  c.hidden = 48, c.mlp_hidden = 96, c.num_heads = 2, c.label_rows = 5, c.timestep_features = 8;
  c.num_pooling_blocks = 1, c.num_sdtm = 2, c.num_dense_blocks = 1;
  c.generation_blocks = c.sparse_blocks = c.recovery_blocks = c.dense_blocks = 1;
  c.reinject_position = true;
  return c;
}

struct Inputs {
  Config config = tiny();
  Values x, grad_out;
  std::vector<double> t = {3.5, 700, 999};
  std::vector<int64_t> labels = {4, 0, 4};
  std::vector<Values> parameters;

  Inputs() {
    Random random(23);
    const auto batch = static_cast<int64_t>(kSparse.size()), pixels = config.input_height * config.input_width;
    x = random_values(batch, config.in_channels * pixels, random);
    grad_out = random_values(batch, config.out_channels * pixels, random);
    for (const ParameterSpec& spec : model_parameters(config))
      parameters.push_back(
          random_values(spec.rows, spec.cols, random, spec.rows == 1 ? 0.25 : 1 / std::sqrt(spec.cols)));
  }
};

// The output, the gradient of x, and those of the parameters.
std::vector<Values> compute(const Inputs& in, DType dtype, const Execution& exec) {
  Tensor x(in.x, dtype), out(in.x.rows, in.grad_out.cols, dtype), kept(in.x.rows, in.grad_out.cols, dtype);
  Tensor grad_out(in.grad_out, dtype), grad_x(in.x.rows, in.x.cols, dtype);
  // On a GPU the host knows no totals: buffers have room for more rows.
  const bool spare = exec.device == Device::cuda;
  const HostLayout layout(in.x.rows, in.config.dense_grid()), sparse_layout(kSparse);
  std::vector<Tensor> parameters, gradients;
  std::vector<Matrix> views, grad_views;
  for (const Values& v : in.parameters) {
    parameters.emplace_back(v, dtype);
    gradients.emplace_back(v.rows, v.cols, dtype);
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    views.push_back(parameters[i].view());
    grad_views.push_back(gradients[i].view());
  }
  ModelBackward p;
  p.config = in.config, p.parameters = views, p.dtype = dtype, p.batch = in.x.rows;
  p.x = x.data(), p.t = in.t.data(), p.labels = in.labels.data();
  p.layout = layout.view(), p.sparse_layout = sparse_layout.view();
  if (spare) p.rows = layout.view().total() + 5, p.sparse_rows = sparse_layout.view().total() + 9;
  p.grad_out = grad_out.data(), p.grad_x = grad_x.data(), p.grad_parameters = grad_views;

  GuardedBytes inference(model_workspace_bytes(p, false)), workspace(model_workspace_bytes(p, true)),
      context(model_context_bytes(p)), backward(model_backward_workspace_bytes(p));
  p.out = out.data(), p.workspace = inference.data();
  model_forward(p, exec);
  p.out = kept.data(), p.workspace = workspace.data(), p.context = context.data();
  model_forward(p, exec);
  CHECK(identical(out.values(), kept.values()));
  p.workspace = backward.data();
  model_backward(p, exec);
  CHECK(inference.intact() && workspace.intact() && context.intact() && backward.intact());
  std::vector<Values> results = {out.values(), grad_x.values()};
  for (size_t i = 1; i < gradients.size(); ++i) {  // the first is the fixed position table
    CHECK(gradients[i].guards_intact());
    results.push_back(gradients[i].values());
  }
  return results;
}

// max |a - b| / max |b|: gradients of different parameters differ by orders of magnitude.
double relative(const Values& a, const Values& b) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < a.v.size(); ++i) {
    const double difference = std::abs(a.v[i] - b.v[i]);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    largest = std::max(largest, std::abs(b.v[i]));
  }
  return worst / largest;
}

}  // namespace

TEST_CASE(model_forward_and_backward) {
  const Inputs in;
  const auto exact = compute(in, DType::float64, {});
  // Largest allowed error over the largest magnitude, of the output and of any gradient. Seen on the emulator,
  // 2026-11-22: 3.1e-7 and 2.0e-6, 6.3e-3 and 3.2e-2, 8.5e-4 and 3.0e-3.
  const struct {
    DType dtype;
    double out, gradients;
  } bounds[] = {{DType::float32, 1e-6, 5e-6}, {DType::bfloat16, 2e-2, 8e-2}, {DType::float16, 2e-3, 8e-3}};
  for (const auto& [dtype, out, gradients] : bounds) {
    const auto got = compute(in, dtype, {.device = Device::cuda});
    double worst = 0;
    for (size_t i = 1; i < got.size(); ++i) worst = std::max(worst, relative(got[i], exact[i]));
    std::printf("  %-9s output %.1e, gradients %.1e\n", name_of(dtype), relative(got[0], exact[0]), worst);
    CHECK_NOTE(relative(got[0], exact[0]) <= out && worst <= gradients, name_of(dtype));
  }
}
