// Every sampler, in a session with the prepared model, against its paper's loop around the plain model.
#include "message_of.h"
#include "session_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

struct Named {
  const char* name;
  SamplerCase sampler;
};
const std::vector<Named> kSamplers = {
    {"ddim", {SamplerKind::ddim, 6}},
    {"ddim of one step", {SamplerKind::ddim, 1}},
    {"ddim, eta 1", {SamplerKind::ddim, 5, 1}},
    {"ddim, eta 0.3", {SamplerKind::ddim, 5, 0.3}},
    {"ddpm", {SamplerKind::ddpm, 6}},
    {"ddpm of one step", {SamplerKind::ddpm, 1}},
    {"ddpm, learned variance", {SamplerKind::ddpm, 6, 0, true}},
    {"dpmpp", {SamplerKind::dpmpp, 6}},
    {"dpmpp of one step", {SamplerKind::dpmpp, 1}},
    {"dpmpp of two steps", {SamplerKind::dpmpp, 2}},
    {"flow", {SamplerKind::flow_euler, 5}},
    {"heun", {SamplerKind::flow_heun, 4}},
    {"heun of one step", {SamplerKind::flow_heun, 1}},
};

// Largest allowed error over the largest magnitude of the image, and the worst seen here (AMD EPYC, AVX-512,
// 2026-11-25).
struct ImageBound {
  DType dtype;
  double error;
};
constexpr ImageBound kImageBounds[] = {{DType::float64, 1e-12},  // 5.8e-15
                                       {DType::float32, 2e-5},   // 4.3e-6
                                       {DType::bfloat16, 0.1}};  // 3.6e-2

class Comparison {
 public:
  ~Comparison() {
    for (const ImageBound& b : kImageBounds) std::printf("  %-9s %.1e\n", name_of(b.dtype), worst_[int(b.dtype)]);
  }
  void compare(const TestModel& model, const SampleRequest& request, const SamplerCase& sampler,
               const std::string& name, int64_t guided_channels = 0) {
    const int64_t guided = guided_channels ? guided_channels : std::min<int64_t>(3, model.config.in_channels);
    const Values wanted = NaiveSampler(model, request, guided).run(sampler);
    for (const ImageBound& b : kImageBounds) {
      const Values got = alone(model.prepare(b.dtype), request, {.guided_channels = guided_channels});
      const double difference = relative_difference(got, wanted);
      worst_[int(b.dtype)] = std::max(worst_[int(b.dtype)], difference);
      CHECK_NOTE(difference <= b.error, name, " in ", name_of(b.dtype), ": error ", difference);
    }
  }

 private:
  double worst_[4] = {};
};

SampleRequest request_of(const SamplerCase& sampler) { return {.label = 2, .seed = 77, .steps = sampler.table()}; }

}  // namespace

TEST_CASE(samplers_against_their_papers) {
  const TestModel model(tiny_config(), tiny_schedule());
  Comparison comparison;
  for (const auto& [name, sampler] : kSamplers) comparison.compare(model, request_of(sampler), sampler, name);
}

TEST_CASE(guidance) {
  const TestModel model(tiny_config(), tiny_schedule());
  Comparison comparison;
  for (const auto& [name, sampler] : kSamplers)
    for (const double guidance : {0., 1.5, 4.}) {
      SampleRequest r = request_of(sampler);
      r.guidance = guidance;
      comparison.compare(model, r, sampler, check::text(name, ", guidance ", guidance));
      r.guidance_begin = 300, r.guidance_end = 700;
      comparison.compare(model, r, sampler, check::text(name, ", guidance ", guidance, " in [300, 700]"));
      comparison.compare(model, r, sampler, check::text(name, ", one guided channel"), 1);
    }
}

TEST_CASE(models_and_images_of_every_kind) {
  Comparison comparison;
  const auto check_all = [&](const TestModel& model, const std::string& name, auto&& change) {
    for (const size_t i : {size_t{0}, size_t{6}, size_t{7}, size_t{11}}) {
      const auto& [sampler_name, sampler] = kSamplers[i];
      if (sampler.learned_variance && model.config.out_channels != 2 * model.config.in_channels) continue;
      SampleRequest r = request_of(sampler);
      r.guidance = 2;
      change(r);
      comparison.compare(model, r, sampler, check::text(sampler_name, ", ", name));
    }
  };
  const auto nothing = [](SampleRequest&) {};
  const auto with = [](auto&& change) {
    Config c = tiny_config();
    change(c);
    return TestModel(c, tiny_schedule());
  };
  const TestModel plain(tiny_config(), tiny_schedule());
  const auto reinjects = with([](Config& c) { c.reinject_position = true, c.num_sdtm = 2; });
  check_all(reinjects, "positions again", nothing);
  check_all(with([](Config& c) { c.num_sdtm = 0; }), "no modules", nothing);
  check_all(with([](Config& c) { c.num_pooling_blocks = 0; }), "no pooling blocks", nothing);
  check_all(with([](Config& c) { c.num_pooling_blocks = c.num_sdtm = c.num_dense_blocks = 0; }), "no blocks", nothing);
  check_all(with([](Config& c) { c.num_dense_blocks = 0, c.dense_blocks = 0; }), "a recovery block last", nothing);
  check_all(with([](Config& c) { c.generation_blocks = 2, c.recovery_blocks = 2, c.sparse_blocks = 0; }),
            "two generation and recovery blocks", nothing);
  check_all(with([](Config& c) { c.out_channels = c.in_channels; }), "no learned sigma", nothing);
  check_all(with([](Config& c) { c.in_channels = 5, c.out_channels = 10, c.patch_size = 1, c.input_height = 3; }),
            "more channels than are guided", nothing);
  check_all(plain, "clipped", [](SampleRequest& r) { r.clip_x0 = r.steps[0].x0_from_x != 1; });
  check_all(plain, "sparse grid", [](SampleRequest& r) { r.sparse_grid = Grid{1, 2, 4}; });
  check_all(plain, "the null label", [&](SampleRequest& r) { r.label = plain.null_label(); });
  for (const auto& [height, width] : {std::pair(2, 2), std::pair(6, 16), std::pair(14, 10)}) {
    const auto resize = [&](SampleRequest& r) { r.height = height, r.width = width; };
    check_all(plain, check::text(height, " x ", width), resize);
    check_all(reinjects, check::text(height, " x ", width, ", positions again"), resize);
  }
  const auto scheduled = [](const DensitySchedule& s) { return TestModel(tiny_config(), s); };
  check_all(scheduled(DensitySchedule({{1, 3, 4}})), "one grid", nothing);
  check_all(scheduled(DensitySchedule({{1, 2, 2}, {1, 1, 4}, {1, 3, 1}}, {0, 100, 640}, 1000)), "odd schedule",
            nothing);
  check_all(scheduled(DensitySchedule::continuous(0.3, 0.9, {1, 3, 4})), "continuous schedule", nothing);
}

TEST_CASE(step_tables) {
  CHECK((space_timesteps(1) == std::vector<int64_t>{0}));
  CHECK((space_timesteps(4) == std::vector<int64_t>{0, 333, 666, 999}));
  CHECK(space_timesteps(1000).size() == 1000 && space_timesteps(1000)[517] == 517);
  // Both halves of n + 1/2 round to even, but for what summing has lost: 999 / 6 = 166.5.
  CHECK((space_timesteps(7) == std::vector<int64_t>{0, 166, 333, 500, 666, 832, 999}));
  for (const int64_t steps : {1, 2, 3, 50, 999, 1000})
    for (int kind = 0; kind < 5; ++kind) {
      const auto table = sampler_steps(static_cast<SamplerKind>(kind), steps);
      const bool heun = kind == static_cast<int>(SamplerKind::flow_heun);
      CHECK_EQ(static_cast<int64_t>(table.size()), heun ? 2 * steps - 1 : steps);
      for (const SamplerStep& s : table)
        for (const double v : {s.timestep, s.x0_from_x, s.x0_from_output, s.x_coef, s.x0_coef, s.x0_previous_coef,
                               s.noise_coef, s.log_variance_small, s.log_variance_large})
          CHECK_NOTE(std::isfinite(v) && s.timestep >= 0 && s.timestep <= 1000, kind, " in ", steps, " steps");
      // All end at x0 itself, without noise.
      CHECK_NOTE(table[0].x0_previous_coef == 0, kind);
      CHECK_NOTE(table.back().noise_coef == 0, kind);
      CHECK_NEAR(table.back().x_coef, 0., 1e-15);
      CHECK_NEAR(table.back().x0_coef, 1., 1e-12);
    }
}

TEST_CASE(seeds_of_a_run) {
  std::vector<uint64_t> seeds;
  for (const uint64_t seed : {0, 1, 2})
    for (uint64_t i = 0; i < 1000; ++i) seeds.push_back(derive_seed(seed, i));
  std::sort(seeds.begin(), seeds.end());
  CHECK(std::adjacent_find(seeds.begin(), seeds.end()) == seeds.end());
}

TEST_CASE(bad_tables) {
  const auto message = [](auto&& body) { return message_of<ArgumentError>(body); };
  CHECK_EQ(message([] { sampler_kind("euler"); }),
           "sampler is \"euler\", must be one of ddim, ddpm, dpmpp, flow, heun");
  CHECK_EQ(message([] { sampler_steps(SamplerKind::ddim, 0); }), "steps is 0, must lie in 1...1000");
  CHECK_EQ(message([] { sampler_steps(SamplerKind::flow_heun, 1001); }), "steps is 1001, must lie in 1...1000");
  CHECK_EQ(message([] { space_timesteps(-1); }), "steps is -1, must lie in 1...1000");
  CHECK_EQ(message([] { sampler_steps(SamplerKind::ddim, 4, 1.5); }), "eta is 1.500000, must lie in [0, 1]");
  CHECK_EQ(message([] { sampler_steps(SamplerKind::ddim, 4, NAN); }), "eta is nan, must lie in [0, 1]");
  CHECK_EQ(message([] { sampler_steps(SamplerKind::ddpm, 4, 0.5); }),
           "eta is 0.500000, only ddim takes another than 0");
  for (const char* name : {"ddim", "ddpm", "dpmpp", "flow", "heun"})
    CHECK(message([&] { sampler_kind(name); }).empty());
}
