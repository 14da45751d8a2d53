// A FlexDiT forward pass from C++: two samples at different timesteps, each on its own sparse grid.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "flexdit/model.h"

int main() {
  const flexdit::Config config{.input_height = 16,
                               .input_width = 16,
                               .hidden = 96,
                               .mlp_hidden = 384,
                               .num_heads = 4,
                               .label_rows = 11,
                               .num_pooling_blocks = 1,
                               .num_sdtm = 1,
                               .num_dense_blocks = 1};
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 0.05f);

  // Every parameter as a matrix over memory of ours; a real program fills it from a checkpoint.
  std::vector<std::vector<float>> storage;
  std::vector<flexdit::Matrix> weights;
  for (const auto& spec : flexdit::model_parameters(config)) {
    auto& values = storage.emplace_back(spec.rows * spec.cols);
    for (float& value : values) value = normal(random);
    weights.push_back({values.data(), spec.rows, spec.cols, spec.cols});
  }

  const std::vector<double> t = {100, 900};
  const std::vector<int64_t> labels = {3, 10};
  std::vector<float> x(2 * 4 * 16 * 16), out(2 * 8 * 16 * 16, NAN);
  for (float& value : x) value = normal(random);

  flexdit::ModelForward p{.config = config, .parameters = weights, .batch = 2};
  const flexdit::DensitySchedule schedule({{1, 5, 5}, {1, 4, 4}, {1, 3, 3}, {1, 2, 2}});
  std::vector<flexdit::Grid> grids = {schedule.grid(t[0]), schedule.grid(t[1])};
  const flexdit::HostLayout sparse(grids);
  p.x = x.data(), p.t = t.data(), p.labels = labels.data(), p.out = out.data();
  p.sparse_layout = sparse.view();
  std::vector<char> workspace(flexdit::model_workspace_bytes(p, /*keeps_context=*/false));
  p.workspace = workspace.data();
  flexdit::model_forward(p, {.threads = 2});

  double sum = 0;
  for (float value : out) sum += std::abs(value);
  std::printf("mean |out| = %.4f\n", sum / static_cast<double>(out.size()));
  return std::isfinite(sum) && sum > 0 ? 0 : 1;
}
