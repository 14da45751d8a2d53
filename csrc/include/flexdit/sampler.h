// Samplers as tables of numbers: every step of every sampler is one linear combination, as StepNumbers in ops.h says.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace flexdit {

enum class SamplerKind : uint8_t {
  ddim,        // arXiv 2010.02502, eq. 12 and 16
  ddpm,        // arXiv 2006.11239, algorithm 2
  dpmpp,       // DPM-Solver++(2M), arXiv 2211.01095, algorithm 2
  flow_euler,  // of a flow matching model, arXiv 2210.02747
  flow_heun,   // second order: two passes of the model in every step but the last
};
// "ddim", "ddpm", "dpmpp", "flow" or "heun"; throws ArgumentError for another name.
SamplerKind sampler_kind(const std::string& name);

// One pass of the model and what follows it; see StepNumbers.
struct SamplerStep {
  double timestep = 0;  // what the model is called with
  double x0_from_x = 0, x0_from_output = 0, x_coef = 0, x0_coef = 0, x0_previous_coef = 0, noise_coef = 0;
  bool learned_variance = false;  // then the noise's coefficient comes from the output and
  double log_variance_small = 0, log_variance_large = 0;
};

constexpr int64_t kDiffusionSteps = 1000;  // timesteps of the diffusion process, of linear variances 1e-4 to 0.02

// The timesteps that `count` steps keep, ascending, spread evenly with both ends as DiT's respacing does.
std::vector<int64_t> space_timesteps(int64_t count);

// First step first. `steps` in 1..1000 (heun: 2 steps - 1 passes); eta in [0, 1] is DDIM's; learned_variance is DDPM's
// for a model with twice the channels. Throws ArgumentError.
std::vector<SamplerStep> sampler_steps(SamplerKind kind, int64_t steps, double eta = 0, bool learned_variance = false);
// The same for ddim or ddpm on timesteps of your own, ascending within 0...999.
std::vector<SamplerStep> sampler_steps(SamplerKind kind, std::span<const int64_t> timesteps, double eta = 0,
                                       bool learned_variance = false);

// The seed of image `index` of a run: distinct for distinct indices. Splitmix64's finalizer, which is one-to-one.
uint64_t derive_seed(uint64_t seed, uint64_t index);

}  // namespace flexdit
