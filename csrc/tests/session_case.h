// What the tests of sampling share: small models with random weights, the samplers as their papers write them, around
// the model as it is (nothing prepared, one image at a time, in double), and memory that runs out when it is told to.
#pragma once

#include <stdlib.h>

#include <memory>

#include "check.h"
#include "flexdit/session.h"
#include "support.h"

namespace flexdit::test {

struct TestModel {
  Config config;
  std::optional<DensitySchedule> schedule;
  std::vector<Values> parameters;

  TestModel(const Config& c, const std::optional<DensitySchedule>& s, uint64_t seed = 5) : config(c), schedule(s) {
    Random random(seed);
    for (const ParameterSpec& spec : model_parameters(c))
      parameters.push_back(
          random_values(spec.rows, spec.cols, random, spec.rows == 1 ? 0.25 : 1 / std::sqrt(spec.cols)));
  }
  int64_t null_label() const { return config.label_rows - 1; }

  std::shared_ptr<const SamplingModel> prepare(DType dtype, const Execution& exec = {.threads = 2}) const {
    std::vector<Tensor> tensors;
    std::vector<Matrix> views;
    for (const Values& v : parameters) tensors.emplace_back(v, dtype);
    for (Tensor& t : tensors) views.push_back(t.view());
    return std::make_shared<SamplingModel>(SamplingModelOptions{.config = config,
                                                                .schedule = schedule,
                                                                .parameters = views,
                                                                .dtype = dtype,
                                                                .null_label = null_label(),
                                                                .exec = exec});
  }
};

inline Config tiny_config() {
  Config c;
  c.input_height = 6, c.input_width = 8, c.patch_size = 2, c.in_channels = 2, c.out_channels = 4;
  c.hidden = 48, c.mlp_hidden = 96, c.num_heads = 2, c.label_rows = 5, c.timestep_features = 8;
  c.num_pooling_blocks = 1, c.num_sdtm = 1, c.num_dense_blocks = 1;
  c.generation_blocks = c.sparse_blocks = c.recovery_blocks = c.dense_blocks = 1;
  return c;
}
inline DensitySchedule tiny_schedule() { return DensitySchedule({{1, 3, 4}, {1, 2, 3}, {1, 2, 2}, {1, 1, 1}}); }

// ---- The samplers, written after their papers.

struct SamplerCase {
  SamplerKind kind = SamplerKind::ddim;
  int64_t steps = 4;
  double eta = 0;
  bool learned_variance = false;

  std::vector<SamplerStep> table() const { return sampler_steps(kind, steps, eta, learned_variance); }
};

class NaiveSampler {
 public:
  NaiveSampler(const TestModel& model, const SampleRequest& request, int64_t guided_channels)
      : r_(request), guided_(guided_channels), schedule_(*model.schedule), own_(model.config.dense_grid()) {
    config_ = model.config;
    if (r_.height) config_.input_height = r_.height;
    if (r_.width) config_.input_width = r_.width;
    parameters_ = model.parameters;
    if (config_.dense_grid() != own_) parameters_[0] = positions();
    for (Values& v : parameters_) views_.push_back({v.v.data(), v.rows, v.cols, v.cols, DType::float64});
    null_label_ = model.null_label();
  }

  Values run(const SamplerCase& c) {
    Values x = noise();
    if (c.kind == SamplerKind::ddim || c.kind == SamplerKind::ddpm) return diffuse(c, x);
    if (c.kind == SamplerKind::dpmpp) return multistep(c.steps, x);
    const bool heun = c.kind == SamplerKind::flow_heun;
    for (int64_t k = c.steps; k > 0; --k) {
      const double t = double(k) / double(c.steps), s = double(k - 1) / double(c.steps);
      const Values v = predict(x, 1000 * t);
      if (!heun || k == 1) {
        x = sum(1, x, s - t, v);
        continue;
      }
      const Values second = predict(sum(1, x, s - t, v), 1000 * s);
      x = sum(1, x, (s - t) / 2, sum(1, v, 1, second));
    }
    return x;
  }

 private:
  static Values sum(double a, const Values& x, double b, const Values& y) {
    Values out = x;
    for (size_t i = 0; i < x.v.size(); ++i) out.v[i] = a * x.v[i] + b * y.v[i];
    return out;
  }
  Values noise() {
    Values out(1, config_.in_channels * config_.input_height * config_.input_width);
    normal_noise({.seeds = &r_.seed, .draw = draw_, .out = {out.v.data(), 1, out.cols, out.cols, DType::float64}}, {});
    return out;
  }

  // MAE's embedding: columns of half the width for x, then as many for y; sines, then cosines.
  Values positions() const {
    const Grid g = config_.dense_grid();
    Values out(g.tokens(), config_.hidden);
    const int64_t quarter = config_.hidden / 4;
    for (int64_t y = 0; y < g.height; ++y)
      for (int64_t x = 0; x < g.width; ++x)
        for (int64_t i = 0; i < config_.hidden; ++i) {
          const double place =
              double(i < 2 * quarter ? x : y) / std::pow(10000., double(i % quarter) / double(quarter));
          out(y * g.width + x, i) = float(i / quarter % 2 ? std::cos(place) : std::sin(place));
        }
    return out;
  }
  Grid sparse_grid(double t) const {
    if (r_.sparse_grid) return *r_.sparse_grid;
    const Grid g = schedule_.grid(t), dense = config_.dense_grid();
    const auto scaled = [](int side, int from, int to) {
      return std::max(1, int(std::lround(double(side) * to / from)));
    };
    return {1, scaled(g.height, own_.height, dense.height), scaled(g.width, own_.width, dense.width)};
  }
  Values call(const Values& x, double t, int64_t label) {
    const HostLayout sparse(1, sparse_grid(t));
    Values out(1, config_.out_channels * config_.input_height * config_.input_width);
    ModelForward p{.config = config_, .parameters = views_, .dtype = DType::float64, .batch = 1};
    p.x = x.v.data(), p.t = &t, p.labels = &label, p.out = out.v.data();
    if (config_.num_sdtm) p.sparse_layout = sparse.view();
    GuardedBytes workspace(model_workspace_bytes(p, false));
    p.workspace = workspace.data();
    model_forward(p, {.threads = 2});
    return out;
  }
  // The guided prediction; the rest of the model's channels stays in variance_.
  Values predict(const Values& x, double t) {
    Values out = call(x, t, r_.label);
    const int64_t pixels = config_.input_height * config_.input_width;
    if (r_.guidance != 1 && t >= r_.guidance_begin && t <= r_.guidance_end) {
      const Values null = call(x, t, null_label_);
      for (int64_t i = 0; i < guided_ * pixels; ++i) out(0, i) = null(0, i) + r_.guidance * (out(0, i) - null(0, i));
    }
    const Values all = out;
    out = Values(1, config_.in_channels * pixels);
    variance_ = Values(1, all.cols - out.cols);
    std::copy_n(all.v.begin(), out.cols, out.v.begin());
    std::copy_n(all.v.begin() + out.cols, variance_.cols, variance_.v.begin());
    ++draw_;
    return out;
  }
  Values clipped(Values x0) const {
    if (r_.clip_x0)
      for (double& v : x0.v) v = std::clamp(v, -1., 1.);
    return x0;
  }

  static double signal_power(double t) {
    double product = 1;
    for (int s = 0; s <= int(t); ++s) product *= 1 - (1e-4 + s * (0.02 - 1e-4) / 999);
    return product;
  }

  // DDIM, arXiv 2010.02502, eq. 12 and 16; DDPM, arXiv 2006.11239, eq. 7, with IDDPM's variance, arXiv 2102.09672,
  // eq. 15.
  Values diffuse(const SamplerCase& c, Values x) {
    const auto timesteps = space_timesteps(c.steps);
    const auto power = [&](int64_t k) { return k < 0 ? 1 : signal_power(double(timesteps[size_t(k)])); };
    const auto posterior = [&](int64_t k) {
      return (1 - power(k - 1)) / (1 - power(k)) * (1 - power(k) / power(k - 1));
    };
    for (int64_t k = c.steps - 1; k >= 0; --k) {
      const double now = power(k), before = power(k - 1), beta = 1 - now / before;
      const Values epsilon = predict(x, double(timesteps[size_t(k)]));
      const Values x0 = clipped(sum(1 / std::sqrt(now), x, -std::sqrt((1 - now) / now), epsilon)), z = noise();
      if (c.kind == SamplerKind::ddim) {
        const double deviation = c.eta * std::sqrt(posterior(k));
        const Values direction = sum(1 / std::sqrt(1 - now), x, -std::sqrt(now / (1 - now)), x0);
        x = sum(std::sqrt(before), x0, std::sqrt(1 - before - deviation * deviation), direction);
        if (deviation > 0) x = sum(1, x, deviation, z);
        continue;
      }
      x = sum(std::sqrt(before) * beta / (1 - now), x0, std::sqrt(1 - beta) * (1 - before) / (1 - now), x);
      for (size_t i = 0; k > 0 && i < x.v.size(); ++i) {
        const double f = c.learned_variance ? (variance_.v[i] + 1) / 2 : 0;
        x.v[i] += z.v[i] * std::exp((f * std::log(beta) + (1 - f) * std::log(posterior(k))) / 2);
      }
    }
    return x;
  }

  // DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, the last step of first order.
  Values multistep(int64_t steps, Values x) {
    Values previous;
    double lambda_before = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const auto time = [&](int64_t j) { return std::nearbyint(double(steps - j) * (999. / double(steps))); };
      const double now = signal_power(time(i)), next = i + 1 < steps ? signal_power(time(i + 1)) : 1;
      const double lambda = std::log(now / (1 - now)) / 2;
      const Values x0 = clipped(sum(1 / std::sqrt(now), x, -std::sqrt((1 - now) / now), predict(x, time(i))));
      if (i + 1 == steps) return x0;
      const double h = std::log(next / (1 - next)) / 2 - lambda, r = (lambda - lambda_before) / h;
      const Values d = i == 0 ? x0 : sum(1 + 1 / (2 * r), x0, -1 / (2 * r), previous);
      x = sum(std::sqrt((1 - next) / (1 - now)), x, -std::sqrt(next) * std::expm1(-h), d);
      previous = x0, lambda_before = lambda;
    }
    return x;
  }

  const SampleRequest r_;
  const int64_t guided_;
  const DensitySchedule schedule_;
  const Grid own_;
  Config config_;
  std::vector<Values> parameters_;
  std::vector<Matrix> views_;
  int64_t null_label_ = 0;
  uint32_t draw_ = 0;  // of the noise: 0 at the start, i + 1 in pass i
  Values variance_;
};

// ---- Sessions.

inline Values image_of(const Finished& f) {
  Values out(1, static_cast<int64_t>(f.image.size()));
  out.v = f.image;
  return out;
}

// Steps until nothing is left.
inline void run_all(Session& session) {
  while (session.step() > 0) {
  }
}

// The image of a request that is alone in a session.
inline Values alone(const std::shared_ptr<const SamplingModel>& model, const SampleRequest& request,
                    const SessionOptions& options = {}) {
  Session session(model, options);
  const int64_t id = session.add(request);
  run_all(session);
  const auto done = session.take(id);
  if (!done || !done->error.empty()) throw std::runtime_error("no image: " + (done ? done->error : "unknown"));
  return image_of(*done);
}

// max |got - wanted| / max |wanted|; infinity for a NaN or another size.
inline double relative_difference(const Values& got, const Values& wanted) {
  if (got.v.size() != wanted.v.size()) return INFINITY;
  double worst = 0, largest = 0;
  for (size_t i = 0; i < wanted.v.size(); ++i) {
    const double d = std::abs(got.v[i] - wanted.v[i]);
    worst = std::isnan(d) ? INFINITY : std::max(worst, d);
    largest = std::max(largest, std::abs(wanted.v[i]));
  }
  return worst / largest;
}

inline CaptionInput random_caption(Random& random, const Config& c) {
  CaptionInput caption;
  caption.tokens = 1 + random.below(c.max_caption_tokens);
  caption.rows = random_values(caption.tokens, c.caption_channels, random).v;
  return caption;
}
// What a model is conditioned on besides the label; the unconditional captions are one of two.
inline void add_conditions(SampleRequest& r, Random& random, const Config& c) {
  if (c.caption_channels) {
    Random null(1 + random.below(2));
    r.caption = random_caption(random, c), r.null_caption = random_caption(null, c);
  }
  if (c.size_conditions)
    r.resolution[0] = 64 + random.below(900), r.resolution[1] = 64 + random.below(900),
    r.aspect_ratio = r.resolution[0] / r.resolution[1];
  if (c.num_frames > 1) r.frames = random.below(c.num_frames + 1);
}

// Any sampler, guidance, interval and size.
inline SampleRequest random_request(Random& random, const TestModel& model, int64_t most_steps) {
  const Config& c = model.config;
  SamplerCase sampler;
  sampler.kind = static_cast<SamplerKind>(random.below(5));
  sampler.steps = 1 + random.below(most_steps);
  if (sampler.kind == SamplerKind::ddim && random.below(2)) sampler.eta = 0.5;
  if (sampler.kind == SamplerKind::ddpm)
    sampler.learned_variance = c.out_channels == 2 * c.in_channels && random.below(2);
  SampleRequest r{
      .label = c.label_rows ? random.below(c.label_rows) : 0, .seed = random.next(), .steps = sampler.table()};
  const double guidances[] = {1, 1, 0, 1.5, 4};
  r.guidance = guidances[random.below(5)];
  if (!c.label_rows && !c.caption_channels) r.guidance = 1;
  add_conditions(r, random, c);
  if (random.below(3) == 0) r.guidance_begin = 200, r.guidance_end = 800;
  if (random.below(3) == 0)
    r.height = c.patch_size * (1 + random.below(6)), r.width = c.patch_size * (1 + random.below(6));
  if (random.below(4) == 0) r.sparse_grid = Grid{1, 1, 1};
  r.clip_x0 = sampler.kind <= SamplerKind::ddpm && random.below(2);
  return r;
}

// ---- Memory that runs out. Device memory of the CPU and of the emulator comes from aligned_alloc alone.

// While it lives, of the calling thread's allocations the first `left` succeed, then `failures` fail (-1: never), and
// none may be larger than `largest` bytes.
struct ScarceMemory {
  int64_t left, failures;
  size_t largest;

  explicit ScarceMemory(int64_t l, int64_t f, size_t most = ~size_t{0}) : left(l), failures(f), largest(most) {
    current = this;
  }
  ~ScarceMemory() { current = nullptr; }
  ScarceMemory(const ScarceMemory&) = delete;
  bool refuses(size_t bytes) {
    if (bytes > largest) return true;
    if (left < 0) return false;
    if (left > 0) return --left, false;
    return failures > 0 && failures-- > 0;
  }
  static inline thread_local ScarceMemory* current = nullptr;
};

}  // namespace flexdit::test

extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  auto* scarce = flexdit::test::ScarceMemory::current;
  void* memory = nullptr;
  if (scarce && scarce->refuses(size)) return nullptr;
  return posix_memalign(&memory, alignment, size) == 0 ? memory : nullptr;
}
