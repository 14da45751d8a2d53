#include <algorithm>
#include <cmath>

#include "flexdit/sampler.h"
#include "flexdit/tensor.h"

namespace flexdit {
namespace {

void require(bool holds, const std::string& message) {
  if (!holds) throw ArgumentError(message);
}

// Cumulative products of 1 - beta over the whole process.
std::vector<double> signal_powers() {
  constexpr double kBegin = 1e-4, kEnd = 0.02, kStep = (kEnd - kBegin) / (kDiffusionSteps - 1);
  std::vector<double> out;
  double product = 1;
  for (int64_t t = 0; t < kDiffusionSteps; ++t) {
    const double beta =
        t < kDiffusionSteps / 2 ? kBegin + kStep * double(t) : kEnd - kStep * double(kDiffusionSteps - 1 - t);
    out.push_back(product *= 1 - beta);
  }
  return out;
}

// The process at timesteps that were kept; its betas keep the cumulative products (IDDPM, arXiv 2102.09672, eq. 19).
struct Respaced {
  std::vector<int64_t> timesteps;
  std::vector<double> power, power_before, beta, posterior_variance;

  explicit Respaced(std::span<const int64_t> kept) : timesteps(kept.begin(), kept.end()) {
    const auto full = signal_powers();
    double before = 1;
    for (const int64_t t : timesteps) {
      const double now = full[static_cast<size_t>(t)];
      power.push_back(now), power_before.push_back(before);
      beta.push_back(1 - now / before);
      posterior_variance.push_back(beta.back() * (1 - before) / (1 - now));  // DDPM, eq. 7
      before = now;
    }
  }
  double signal(size_t k) const { return std::sqrt(power[k]); }
  double noise(size_t k) const { return std::sqrt(1 - power[k]); }
};

// The first posterior variance is 0; its logarithm is clipped to the second one (IDDPM's code).
double clipped_log_variance(const Respaced& d, size_t k) {
  if (k > 0) return std::log(d.posterior_variance[k]);
  return std::log(d.posterior_variance.size() > 1 ? d.posterior_variance[1] : d.beta[0]);
}

std::vector<SamplerStep> ddpm_steps(std::span<const int64_t> kept, bool learned_variance) {
  const Respaced d(kept);
  std::vector<SamplerStep> out;
  for (size_t k = d.timesteps.size(); k-- > 0;)
    out.push_back({.timestep = double(d.timesteps[k]),
                   .x0_from_x = 1 / d.signal(k),
                   .x0_from_output = -d.noise(k) / d.signal(k),
                   .x_coef = (1 - d.power_before[k]) * std::sqrt(1 - d.beta[k]) / (1 - d.power[k]),
                   .x0_coef = d.beta[k] * std::sqrt(d.power_before[k]) / (1 - d.power[k]),
                   .noise_coef = std::sqrt(d.posterior_variance[k]),
                   .learned_variance = learned_variance,
                   .log_variance_small = clipped_log_variance(d, k),
                   .log_variance_large = std::log(d.beta[k])});
  return out;
}

std::vector<SamplerStep> ddim_steps(std::span<const int64_t> kept, double eta) {
  require(eta >= 0 && eta <= 1, "eta is " + std::to_string(eta) + ", must lie in [0, 1]");
  const Respaced d(kept);
  std::vector<SamplerStep> out;
  for (size_t k = d.timesteps.size(); k-- > 0;) {
    const double deviation = eta * std::sqrt(d.posterior_variance[k]);
    // next = sqrt(power_before) x0 + direction epsilon, epsilon = (x - signal x0) / noise
    const double direction = std::sqrt(std::max(0., 1 - d.power_before[k] - deviation * deviation));
    out.push_back({.timestep = double(d.timesteps[k]),
                   .x0_from_x = 1 / d.signal(k),
                   .x0_from_output = -d.noise(k) / d.signal(k),
                   .x_coef = direction / d.noise(k),
                   .x0_coef = std::sqrt(d.power_before[k]) - direction * d.signal(k) / d.noise(k),
                   .noise_coef = deviation});
  }
  return out;
}

// The midpoint form, ending at x0; the first and the last step are of first order. Timesteps as diffusers'
// DPMSolverMultistepScheduler takes them: n of n + 1 evenly spaced ones, the last left out.
std::vector<SamplerStep> dpmpp_steps(int64_t steps) {
  const auto power = signal_powers();
  std::vector<double> timesteps, signal, noise, half_log_snr;
  const auto add = [&](double s, double n) {
    signal.push_back(s), noise.push_back(n);
    half_log_snr.push_back(n > 0 ? std::log(s / n) : INFINITY);
  };
  constexpr int64_t kLast = kDiffusionSteps - 1;
  for (int64_t k = steps; k > 0; --k) {
    const double t = steps <= kLast ? std::nearbyint(double(k) * (double(kLast) / double(steps))) : double(k - 1);
    timesteps.push_back(t);
    const double p = power[static_cast<size_t>(t)];
    add(std::sqrt(p), std::sqrt(1 - p));
  }
  add(1, 0);
  std::vector<SamplerStep> out;
  for (size_t i = 0; i < timesteps.size(); ++i) {
    const double h = half_log_snr[i + 1] - half_log_snr[i], x0_coef = -signal[i + 1] * std::expm1(-h);
    const bool second_order = i > 0 && i + 1 < timesteps.size();
    const double previous = second_order ? -0.5 * x0_coef * h / (half_log_snr[i] - half_log_snr[i - 1]) : 0;
    out.push_back({.timestep = timesteps[i],
                   .x0_from_x = 1 / signal[i],
                   .x0_from_output = -noise[i] / signal[i],
                   .x_coef = noise[i + 1] / noise[i],
                   .x0_coef = x0_coef - previous,
                   .x0_previous_coef = previous});
  }
  return out;
}

// From t = k / n to (k - 1) / n. At t the model gives a velocity v and x0 = x - t v, so Euler's step to s is
// (s / t) x + (1 - s / t) x0.
SamplerStep euler_step(int64_t k, int64_t n) {
  return {.timestep = double(kDiffusionSteps * k) / double(n),  // rounded once: integers must meet the schedule's
          .x0_from_x = 1,
          .x0_from_output = -double(k) / double(n),
          .x_coef = double(k - 1) / double(k),
          .x0_coef = 1 / double(k)};
}

std::vector<SamplerStep> flow_euler_steps(int64_t steps) {
  std::vector<SamplerStep> out;
  for (int64_t k = steps; k > 0; --k) out.push_back(euler_step(k, steps));
  return out;
}

// Heun's step is Euler's to x' at s and then x + (s - t) (v + v') / 2. With v = (x - x0) / t, v' = (x' - x0') / s and
// x taken back out of x' it is a combination of x', x0' and the x0 before. The last step ends at s = 0, where the model
// is not called, and stays Euler's.
std::vector<SamplerStep> flow_heun_steps(int64_t steps) {
  std::vector<SamplerStep> out;
  for (int64_t k = steps; k > 0; --k) {
    const double t = double(k) / double(steps), s = double(k - 1) / double(steps);
    out.push_back(euler_step(k, steps));
    if (k == 1) break;
    const double half = (s - t) / 2;
    // x = (t / s) x' + (1 - t / s) x0
    const double from_x = 1 + half / t;  // of x in x + half (x - x0) / t + half (x' - x0') / s
    out.push_back({.timestep = euler_step(k - 1, steps).timestep,
                   .x0_from_x = 1,
                   .x0_from_output = -s,
                   .x_coef = from_x * t / s + half / s,
                   .x0_coef = -half / s,
                   .x0_previous_coef = from_x * (1 - t / s) - half / t});
  }
  return out;
}

}  // namespace

SamplerKind sampler_kind(const std::string& name) {
  if (name == "ddim") return SamplerKind::ddim;
  if (name == "ddpm") return SamplerKind::ddpm;
  if (name == "dpmpp") return SamplerKind::dpmpp;
  if (name == "flow") return SamplerKind::flow_euler;
  if (name == "heun") return SamplerKind::flow_heun;
  throw ArgumentError("sampler is \"" + name + "\", must be one of ddim, ddpm, dpmpp, flow, heun");
}

std::vector<int64_t> space_timesteps(int64_t count) {
  require(count >= 1 && count <= kDiffusionSteps,
          "steps is " + std::to_string(count) + ", must lie in 1..." + std::to_string(kDiffusionSteps));
  const double stride = count > 1 ? double(kDiffusionSteps - 1) / double(count - 1) : 1;
  std::vector<int64_t> out;
  double position = 0;
  for (int64_t i = 0; i < count; ++i) {
    out.push_back(static_cast<int64_t>(std::nearbyint(position)));
    position += stride;  // summed, not multiplied: halves must round as they do in ADM
  }
  return out;
}

std::vector<SamplerStep> sampler_steps(SamplerKind kind, std::span<const int64_t> timesteps, double eta,
                                       bool learned_variance) {
  require(kind == SamplerKind::ddim || kind == SamplerKind::ddpm, "timesteps are only for ddim and ddpm");
  require(!timesteps.empty(), "timesteps is empty, must have at least one");
  for (size_t i = 0; i < timesteps.size(); ++i)
    require(timesteps[i] < kDiffusionSteps && timesteps[i] >= (i ? timesteps[i - 1] + 1 : 0),
            "timesteps has " + std::to_string(timesteps[i]) + " at " + std::to_string(i) +
                ", must ascend within 0..." + std::to_string(kDiffusionSteps - 1));
  require(eta == 0 || kind == SamplerKind::ddim, "eta is " + std::to_string(eta) + ", only ddim takes another than 0");
  return kind == SamplerKind::ddim ? ddim_steps(timesteps, eta) : ddpm_steps(timesteps, learned_variance);
}

std::vector<SamplerStep> sampler_steps(SamplerKind kind, int64_t steps, double eta, bool learned_variance) {
  require(steps >= 1 && steps <= kDiffusionSteps,
          "steps is " + std::to_string(steps) + ", must lie in 1..." + std::to_string(kDiffusionSteps));
  require(eta == 0 || kind == SamplerKind::ddim, "eta is " + std::to_string(eta) + ", only ddim takes another than 0");
  switch (kind) {
    case SamplerKind::ddim:
    case SamplerKind::ddpm:
      return sampler_steps(kind, space_timesteps(steps), eta, learned_variance);
    case SamplerKind::dpmpp:
      return dpmpp_steps(steps);
    case SamplerKind::flow_euler:
      return flow_euler_steps(steps);
    case SamplerKind::flow_heun:
      return flow_heun_steps(steps);
  }
  throw ArgumentError("sampler kind is not known");
}

uint64_t derive_seed(uint64_t seed, uint64_t index) {
  const auto mix = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  };
  return mix(mix(seed + 0x9e3779b97f4a7c15) + index);
}

}  // namespace flexdit
