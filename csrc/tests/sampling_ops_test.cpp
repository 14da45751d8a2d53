// The operations of sampling on the CPU and on the emulator: Philox against its published vectors, noise against its
// definition and as a distribution, the others against plain loops in double, on samples of different sizes.
#include <functional>

#include "message_of.h"
#include "ops/philox.h"
#include "run_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCpu{.threads = 2}, kCuda{.device = Device::cuda};

std::string error_of(const std::function<void()>& call) { return message_of<ArgumentError>(call); }

double naive_noise(uint64_t seed, uint32_t draw, int64_t i) {
  const PhiloxWords words = philox4x32_10({{uint32_t(i / 4), uint32_t(i / 4 >> 32), draw, 0}}, seed);
  const uint32_t r = words.v[i % 4 / 2 * 2], other = words.v[i % 4 / 2 * 2 + 1];
  const double radius = std::sqrt(-2 * std::log((r + 1.0) / 4294967296.0));
  const double angle = 2 * 3.14159265358979323846 * other / 4294967296.0;
  return radius * (i % 2 ? std::sin(angle) : std::cos(angle));
}

Values noise_of(const std::vector<uint64_t>& seeds, uint32_t draw, int64_t n, DType dtype, const Execution& exec,
                bool strided = false) {
  Tensor out(int64_t(seeds.size()), n, dtype, strided);
  normal_noise({.seeds = seeds.data(), .draw = draw, .out = out.view()}, exec);
  CHECK(out.guards_intact());
  return out.values();
}

// ---- Ragged images: the samples of a run, and the model's batch of some of them with and without their labels.

constexpr int64_t kChannels = 3, kPatch = 2, kArea = kPatch * kPatch;
const naive::Grids kGrids = {{1, 3, 5}, {1, 1, 1}, {1, 9, 8}, {2, 2, 3}};
// Samples of the model's batch, in no order: sample 1 has no unconditional twin.
const std::vector<int32_t> kSamples = {2, 0, 3, 2, 1, 0, 3};

struct Setup {
  std::vector<StepNumbers> numbers;
  int64_t out_channels = kChannels, guided_channels = 2, spare = 0;
};
naive::Grids model_grids() {
  naive::Grids out;
  for (const int32_t s : kSamples) out.push_back(kGrids[size_t(s)]);
  return out;
}
int64_t first_value(const naive::Grids& grids, int64_t sample, int64_t channels) {
  return naive::total({grids.begin(), grids.begin() + sample}) * channels * kArea;
}

// Sample b's numbers: every sample something else.
StepNumbers numbers_of(int64_t b, bool learned) {
  StepNumbers c{.x0_from_x = 1.25, .x0_from_output = -0.75, .x_coef = 0.5, .x0_coef = 0.625, .guidance = 1};
  c.conditional = std::vector<int32_t>{1, 4, 0, 2}[size_t(b)];
  c.unconditional = std::vector<int32_t>{5, -1, 3, 6}[size_t(b)];
  c.guidance = std::vector<double>{4, 1.5, 1, 0.25}[size_t(b)];
  c.x0_previous_coef = b % 2 ? -0.125 : 0;
  c.noise_coef = b == 0 ? 0 : 0.375 + 0.125 * double(b);
  c.log_variance_small = -3 - double(b), c.log_variance_large = -1;
  c.seed = uint64_t(b) * 0x123456789abcdefull + 7, c.draw = uint32_t(3 * b);
  c.clip_x0 = b >= 2, c.learned_variance = learned;
  return c;
}

struct State {
  Values x, x0;
};

State naive_denoise(const Setup& s, const Values& output, const State& before) {
  State after = before;
  const naive::Grids of_model = model_grids();
  for (size_t b = 0; b < kGrids.size(); ++b) {
    const StepNumbers& c = s.numbers[b];
    const int64_t pixels = kGrids[b].tokens() * kArea, begin = first_value(kGrids, int64_t(b), kChannels);
    const auto model = [&](int64_t sample, int64_t channel, int64_t pixel) {
      return output(0, first_value(of_model, sample, s.out_channels) + channel * pixels + pixel);
    };
    for (int64_t i = 0; i < kChannels * pixels; ++i) {
      const int64_t channel = i / pixels, pixel = i % pixels;
      const double cond = model(c.conditional, channel, pixel);
      double prediction = cond;
      if (c.unconditional >= 0 && channel < s.guided_channels) {
        const double uncond = model(c.unconditional, channel, pixel);
        prediction = uncond + c.guidance * (cond - uncond);
      }
      const double x = before.x(0, begin + i);
      double x0 = c.x0_from_x * x + c.x0_from_output * prediction, factor = c.noise_coef;
      if (c.clip_x0) x0 = std::min(1.0, std::max(-1.0, x0));
      double next = c.x_coef * x + c.x0_coef * x0;
      if (c.x0_previous_coef != 0) next += c.x0_previous_coef * before.x0(0, begin + i);
      if (c.noise_coef > 0 && c.learned_variance) {
        const double f = (model(c.conditional, kChannels + channel, pixel) + 1) / 2;
        factor = std::exp(((1 - f) * c.log_variance_small + f * c.log_variance_large) / 2);
      }
      if (c.noise_coef > 0) next += factor * naive_noise(c.seed, c.draw, i);
      after.x(0, begin + i) = next;
      after.x0(0, begin + i) = x0;
    }
  }
  return after;
}

State denoise(const Setup& s, const Values& output, const State& before, DType dtype, DType state,
              const Execution& exec) {
  const HostLayout layout(kGrids), model_layout(model_grids());
  Tensor out(output, dtype), x(before.x, state), x0(before.x0, state);
  denoise_step({.numbers = s.numbers.data(),
                .layout = layout.view(),
                .model_layout = model_layout.view(),
                .rows = naive::total(kGrids) + s.spare,
                .channels = kChannels,
                .out_channels = s.out_channels,
                .patch = kPatch,
                .guided_channels = s.guided_channels,
                .dtype = dtype,
                .output = out.data(),
                .state = state,
                .x = x.data(),
                .x0 = x0.data()},
               exec);
  CHECK(x.guards_intact() && x0.guards_intact() && out.guards_intact());
  return {x.values(), x0.values()};
}

Setup setup_of(bool learned) {
  Setup s{.out_channels = learned ? 2 * kChannels : kChannels};
  for (int64_t b = 0; b < int64_t(kGrids.size()); ++b) s.numbers.push_back(numbers_of(b, learned));
  return s;
}
Values output_of(const Setup& s, Random& random) {
  return random_values(1, naive::total(model_grids()) * s.out_channels * kArea, random);
}
State state_of(Random& random) {
  const int64_t values = naive::total(kGrids) * kChannels * kArea;
  return {random_values(1, values, random), random_values(1, values, random)};
}

// Where a step computes: storage of the model's output and of the state.
struct Place {
  const Execution& exec;
  DType dtype, state;
};
const Place kPlaces[] = {{kCpu, DType::float64, DType::float64},   {kCpu, DType::float32, DType::float64},
                         {kCpu, DType::bfloat16, DType::float64},  {kCpu, DType::float32, DType::float32},
                         {kCpu, DType::bfloat16, DType::float32},  {kCuda, DType::float32, DType::float32},
                         {kCuda, DType::bfloat16, DType::float32}, {kCuda, DType::float16, DType::float32}};

}  // namespace

// Random123's kat_vectors, "philox4x32 10".
TEST_CASE(philox_known_answers) {
  constexpr struct {
    PhiloxWords counter;
    uint64_t key;
    PhiloxWords wanted;
  } kVectors[] = {{{{0, 0, 0, 0}}, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
                  {{{~0u, ~0u, ~0u, ~0u}}, ~uint64_t{0}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
                  {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                   0x299f31d0'a4093822,
                   {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
  for (const auto& [counter, key, wanted] : kVectors)
    for (int i = 0; i < 4; ++i) CHECK_EQ(philox4x32_10(counter, key).v[i], wanted.v[i]);
  static_assert(philox4x32_10({{0, 0, 0, 0}}, 0).v[0] == 0x6627e8d5);  // known to the compiler too
}

TEST_CASE(noise_is_as_defined) {
  const std::vector<uint64_t> seeds = {0, 1, ~uint64_t{0}, 0x9e3779b97f4a7c15};
  double worst = 0;
  for (const int64_t n : {1, 2, 7, 255, 256, 257, 1030})
    for (const uint32_t draw : {0u, 1u, 0xffffffffu}) {
      Values wanted(4, n);
      for (int64_t b = 0; b < 4; ++b)
        for (int64_t i = 0; i < n; ++i) wanted(b, i) = naive_noise(seeds[size_t(b)], draw, i);
      CHECK_NEAR(error(noise_of(seeds, draw, n, DType::float64, kCpu, true), wanted), 0.0, 1e-15);
      const Values single = noise_of(seeds, draw, n, DType::float32, kCpu, true);
      CHECK(identical(single, naive::map(wanted, [](double v) { return double(float(v)); })));
      const Values got = noise_of(seeds, draw, n, DType::float32, kCuda, true);
      for (size_t i = 0; i < got.v.size(); ++i) worst = std::max(worst, std::abs(got.v[i] - wanted.v[i]));
      CHECK(identical(noise_of({seeds[2]}, draw, n, DType::float32, kCuda), rows_of(got, 2, 1)));
    }
  std::printf("  largest error of a float32 kernel's normal value: %.1e\n", worst);
  CHECK_NEAR(worst, 0.0, bound(DType::float32));
}

// Of n independent standard normal values each sum below has the standard deviation that divides it, and the largest
// gap between their distribution and the normal one exceeds 2 / sqrt(n) once in 1500 times (Kolmogorov).
TEST_CASE(noise_is_normal_and_independent) {
  constexpr int64_t n = 1 << 17;
  const std::vector<uint64_t> seeds = {42, 43};
  for (const Execution& exec : {kCpu, kCuda}) {
    const Values first = noise_of(seeds, 0, n, DType::float32, exec),
                 next = noise_of(seeds, 1, n, DType::float32, exec);
    const auto deviations = [&](auto&& term, double variance) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += term(i);
      return std::abs(sum) / std::sqrt(variance * double(n));
    };
    const auto x = [&](int64_t i) { return first(0, i); };
    CHECK(deviations([&](int64_t i) { return x(i); }, 1) < 4);
    CHECK(deviations([&](int64_t i) { return x(i) * x(i) - 1; }, 2) < 4);
    CHECK(deviations([&](int64_t i) { return std::pow(x(i), 3); }, 15) < 4);
    CHECK(deviations([&](int64_t i) { return std::pow(x(i), 4) - 3; }, 96) < 4);
    for (const int64_t lag : {1, 2, 3, 4}) CHECK(deviations([&](int64_t i) { return x(i) * x((i + lag) % n); }, 1) < 4);
    CHECK(deviations([&](int64_t i) { return x(i) * first(1, i); }, 1) < 4);  // seeds
    CHECK(deviations([&](int64_t i) { return x(i) * next(0, i); }, 1) < 4);   // draws
    std::vector<double> sorted(first.v.begin(), first.v.begin() + n);
    std::sort(sorted.begin(), sorted.end());
    double gap = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double below = 0.5 * std::erfc(-sorted[size_t(i)] / std::sqrt(2.0));
      gap = std::max({gap, std::abs(below - double(i) / n), std::abs(below - double(i + 1) / n)});
    }
    CHECK_NOTE(gap < 2 / std::sqrt(double(n)), gap);
  }
}

TEST_CASE(denoising_steps) {
  double worst[2] = {};
  for (const bool learned : {false, true}) {
    Random random(learned);
    const Setup setup = setup_of(learned);
    const Values output = output_of(setup, random);
    const State before = state_of(random), wanted = naive_denoise(setup, output, before);
    for (const Place& place : kPlaces) {
      const State got = denoise(setup, output, before, place.dtype, place.state, place.exec);
      const double e = std::max(error(got.x, wanted.x), error(got.x0, wanted.x0));
      if (place.state == DType::float32) worst[&place.exec == &kCuda] = std::max(worst[&place.exec == &kCuda], e);
      CHECK_NOTE(e <= bound(place.state), name_of(place.dtype), " ", name_of(place.state), " error ", e);
      Setup roomy = setup;
      roomy.spare = 300;  // more than a block of threads has
      const State again = denoise(roomy, output, before, place.dtype, place.state, place.exec);
      CHECK(identical(again.x, got.x) && identical(again.x0, got.x0));
    }
  }
  std::printf("  largest error of a step in float32: %.1e on the CPU, %.1e on the emulator\n", worst[0], worst[1]);
}

// A guidance of 1 is no guidance, to the bit, and 0 is the null label's prediction; the first step reads nothing of x0.
TEST_CASE(exact_ends_of_a_step) {
  Random random(5);
  Setup setup = setup_of(true), plain = setup;
  for (StepNumbers& c : setup.numbers) c.guidance = 1, c.x0_previous_coef = 0;
  plain.numbers = setup.numbers;
  for (StepNumbers& c : plain.numbers) c.unconditional = -1;
  Setup null = setup, swapped = plain;
  null.guided_channels = kChannels;
  for (StepNumbers& c : null.numbers) c.guidance = 0, c.learned_variance = 0;
  for (size_t b = 0; b < kGrids.size(); ++b) {
    swapped.numbers[b].learned_variance = 0;
    if (setup.numbers[b].unconditional >= 0) swapped.numbers[b].conditional = setup.numbers[b].unconditional;
  }
  const Values output = output_of(setup, random);
  const State before = state_of(random);
  State poisoned = before;
  for (double& v : poisoned.x0.v) v = NAN;
  for (const Place& place : kPlaces) {
    const auto step = [&](const Setup& s, const State& from) {
      return denoise(s, output, from, place.dtype, place.state, place.exec);
    };
    const State guided = step(setup, before);
    CHECK(identical(guided.x, step(plain, before).x) && identical(guided.x0, step(plain, before).x0));
    CHECK(identical(guided.x, step(setup, poisoned).x) && identical(guided.x0, step(setup, poisoned).x0));
    CHECK(identical(step(null, before).x, step(swapped, before).x));
  }
}

TEST_CASE(model_inputs) {
  Random random(6);
  const HostLayout layout(kGrids), model_layout(model_grids());
  const int64_t values = kChannels * kArea, rows = naive::total(model_grids()), spare = 40;
  const State state = state_of(random);
  Values wanted(1, rows * values);
  for (size_t m = 0; m < kSamples.size(); ++m)
    for (int64_t i = 0; i < kGrids[size_t(kSamples[m])].tokens() * values; ++i)
      wanted(0, first_value(model_grids(), int64_t(m), kChannels) + i) =
          state.x(0, first_value(kGrids, kSamples[m], kChannels) + i);
  for (const Place& place : kPlaces) {
    Tensor x(state.x, place.state), input(rows + spare, values, place.dtype);
    model_input({.samples = kSamples.data(),
                 .layout = layout.view(),
                 .model_layout = model_layout.view(),
                 .rows = rows + spare,
                 .channels = kChannels,
                 .patch = kPatch,
                 .state = place.state,
                 .x = x.data(),
                 .dtype = place.dtype,
                 .input = input.data()},
                place.exec);
    const Values got = input.values(), used = rows_of(got, 0, rows), rest = rows_of(got, rows, spare);
    CHECK_NOTE(used.v == wanted.v, name_of(place.dtype));
    if (&place.exec == &kCuda) CHECK(identical(rest, Values(spare, values)));
    CHECK(input.guards_intact() && x.guards_intact());
  }
}

TEST_CASE(guided_pairs) {
  constexpr int64_t kPairs = 3, kPixels = 70, kAll = 4, kGuided = 3;
  Random random(8);
  const Values images = random_values(2 * kPairs, kAll * kPixels, random);
  for (const double scale : {0.0, 0.375, 1.0, 4.0}) {
    Values wanted = images;
    for (int64_t b = 0; b < kPairs; ++b)
      for (int64_t i = 0; i < kGuided * kPixels; ++i)
        wanted(b, i) = wanted(kPairs + b, i) = images(kPairs + b, i) + scale * (images(b, i) - images(kPairs + b, i));
    for (const Place& place : kPlaces)
      for (const bool strided : {false, true}) {
        Tensor got(images, place.dtype, strided);
        guidance_combine({.images = got.view(), .channels = kAll, .guided_channels = kGuided, .scale = scale},
                         place.exec);
        const double allowed = scale == 0 || scale == 1 ? 0 : bound(place.dtype);
        CHECK_NEAR(error(got.values(), wanted), 0.0, allowed);
        CHECK(got.guards_intact());
      }
  }
}

// Rows of two tables, in any order and more than once; odd widths leave the second table's rows unaligned.
TEST_CASE(rows_by_address) {
  Random random(9);
  for (const int64_t cols : {1, 7, 48, 6912})
    for (const Place& place : kPlaces)
      for (const bool strided : {false, true}) {
        Tensor a(random_values(3, cols, random), place.dtype, strided), b(random_values(4, cols, random), place.dtype);
        const std::vector<std::pair<Tensor*, int64_t>> wanted = {{&b, 3}, {&a, 0}, {&a, 2}, {&a, 0}, {&b, 1}};
        std::vector<const void*> rows;
        for (const auto& [table, row] : wanted) rows.push_back(table->view().row_range(row, 1).data);
        Tensor out(5, cols, place.dtype, strided);
        gather_rows({.rows = rows.data(), .out = out.view()}, place.exec);
        const Values got = out.values();
        for (int64_t i = 0; i < 5; ++i)
          CHECK(identical(rows_of(got, i, 1), rows_of(wanted[i].first->values(), wanted[i].second, 1)));
        CHECK(out.guards_intact());
      }
}

TEST_CASE(nothing_to_do) {
  const HostLayout none{std::span<const Grid>()};
  for (const Execution& exec : {kCpu, kCuda}) {
    normal_noise({.out = {nullptr, 0, 16, 16, DType::float32}}, exec);
    denoise_step({.layout = none.view(), .model_layout = none.view(), .channels = 2, .out_channels = 2}, exec);
    model_input({.layout = none.view(), .model_layout = none.view(), .channels = 2}, exec);
    guidance_combine({.images = {nullptr, 0, 16, 16, DType::float32}, .channels = 4, .guided_channels = 3}, exec);
    gather_rows({.out = {nullptr, 0, 16, 16, DType::float32}}, exec);
  }
}

// On a device nobody can look before the kernel runs: what does not exist is NaN there.
TEST_CASE(samples_that_do_not_exist) {
  Random random(10);
  const Setup good = setup_of(true);
  const Values output = output_of(good, random);
  const State before = state_of(random);
  const auto check = [&](auto change, const std::string& message) {
    Setup bad = good;
    change(bad);
    CHECK_EQ(error_of([&] { denoise(bad, output, before, DType::float32, DType::float32, kCpu); }),
             "denoise_step: " + message);
    const State got = denoise(bad, output, before, DType::float32, DType::float32, kCuda);
    const int64_t begin = first_value(kGrids, 2, kChannels), end = first_value(kGrids, 3, kChannels);
    for (int64_t i = 0; i < got.x.cols; ++i)
      CHECK_EQ(std::isnan(got.x(0, i)), i >= begin && i < begin + bad.guided_channels * (end - begin) / kChannels);
  };
  const auto all = [](Setup& s) -> StepNumbers& { return s.guided_channels = kChannels, s.numbers[2]; };
  check([&](Setup& s) { all(s).conditional = 7; }, "numbers[2].conditional is 7, must lie in [0, 7)");
  check([&](Setup& s) { all(s).conditional = -1; }, "numbers[2].conditional is -1, must lie in [0, 7)");
  check([&](Setup& s) { s.numbers[2].unconditional = 1; },
        "numbers[2].unconditional is 1, a sample with grid [1, 3, 5], must be one with [1, 9, 8]");

  const HostLayout layout(kGrids), model_layout(model_grids());
  const int64_t values = kChannels * kArea, rows = naive::total(model_grids());
  std::vector<int32_t> samples = kSamples;
  samples[1] = 9;
  Tensor x(before.x, DType::float32), input(1, rows * values, DType::float32);
  ModelInput p{.samples = samples.data(),
               .layout = layout.view(),
               .model_layout = model_layout.view(),
               .rows = rows,
               .channels = kChannels,
               .patch = kPatch,
               .x = x.data(),
               .input = input.data()};
  CHECK_EQ(error_of([&] { model_input(p, {}); }), "model_input: samples[1] is 9, must lie in [0, 4)");
  model_input(p, kCuda);
  const Values got = input.values();
  const int64_t begin = first_value(model_grids(), 1, kChannels), end = first_value(model_grids(), 2, kChannels);
  for (int64_t i = 0; i < got.cols; ++i) CHECK_EQ(std::isnan(got(0, i)), i >= begin && i < end);
}

TEST_CASE(arguments) {
  const HostLayout layout(2, Grid{1, 2, 2});
  Tensor data(Values(16, 64), DType::float32), wide(2, 8, DType::float64), half(2, 8, DType::float16);
  const std::vector<uint64_t> seeds = {1, 2};
  const auto noise = [&](Tensor& t, const Execution& exec) {
    return error_of([&] { normal_noise({.seeds = seeds.data(), .out = t.view()}, exec); });
  };
  Tensor brain(2, 8, DType::bfloat16);
  CHECK_EQ(noise(brain, {}), "normal_noise: out is bfloat16, must be float32 or float64");
  CHECK_EQ(noise(half, kCuda), "normal_noise: out is float16, must be float32 or float64");
  CHECK_EQ(noise(wide, kCuda), "normal_noise: out is float64, which the CUDA backend does not compute with");
  CHECK_EQ(error_of([&] { normal_noise({.out = data.view()}, {}); }), "normal_noise: seeds is missing");

  const std::vector<StepNumbers> numbers(2);
  const DenoiseStep step{.numbers = numbers.data(),
                         .layout = layout.view(),
                         .model_layout = layout.view(),
                         .rows = 8,
                         .channels = 2,
                         .out_channels = 2,
                         .output = data.data(),
                         .x = data.data(),
                         .x0 = data.data()};
  const auto denoise_error = [&](auto change, const Execution& exec = {}) {
    DenoiseStep p = step;
    change(p);
    return error_of([&] { denoise_step(p, exec); });
  };
  CHECK_EQ(denoise_error([](auto&) {}), "");
  CHECK_EQ(denoise_error([](auto& p) { p.numbers = nullptr; }), "denoise_step: numbers is missing");
  CHECK_EQ(denoise_error([](auto& p) { p.layout = {}; }), "denoise_step: layout is missing");
  CHECK_EQ(denoise_error([](auto& p) { p.output = nullptr; }), "denoise_step: output is missing");
  CHECK_EQ(denoise_error([](auto& p) { p.x = nullptr; }), "denoise_step: x is missing");
  CHECK_EQ(denoise_error([](auto& p) { p.x0 = nullptr; }), "denoise_step: x0 is missing");
  CHECK_EQ(denoise_error([](auto& p) { p.channels = 0; }), "denoise_step: channels is 0, must be at least 1");
  CHECK_EQ(denoise_error([](auto& p) { p.patch = 0; }), "denoise_step: patch is 0, must be at least 1");
  CHECK_EQ(denoise_error([](auto& p) { p.rows = 7; }),
           "denoise_step: rows is 7, must be at least the 8 tokens of layout");
  CHECK_EQ(denoise_error([](auto& p) { p.out_channels = 1; }),
           "denoise_step: out_channels is 1, must be at least channels, 2");
  CHECK_EQ(denoise_error([](auto& p) { p.guided_channels = 3; }),
           "denoise_step: guided_channels is 3, must lie in [0, 2]");
  CHECK_EQ(denoise_error([](auto& p) { p.dtype = DType::float16; }),
           "denoise_step: output is float16, which the CPU backend does not compute with");
  CHECK_EQ(denoise_error([](auto& p) { p.state = DType::bfloat16; }),
           "denoise_step: state is bfloat16, must be float32 or float64");
  CHECK_EQ(denoise_error([](auto& p) { p.state = DType::float64; }, kCuda),
           "denoise_step: state is float64, which the CUDA backend does not compute with");
  std::vector<StepNumbers> learned(2);
  learned[1].learned_variance = 1;
  CHECK_EQ(denoise_error([&](auto& p) { p.numbers = learned.data(); }),
           "denoise_step: numbers[1].learned_variance needs out_channels of at least 4, it is 2");

  const auto guidance = [&](const GuidanceCombine& p) { return error_of([&] { guidance_combine(p, {}); }); };
  CHECK_EQ(guidance({.images = data.view().row_range(0, 3), .channels = 4}),
           "guidance_combine: images has 3 rows, must be even");
  CHECK_EQ(guidance({.images = data.view(), .channels = 5}),
           "guidance_combine: channels is 5, must divide the 64 columns of images");
  CHECK_EQ(guidance({.images = data.view(), .channels = 4, .guided_channels = 5}),
           "guidance_combine: guided_channels is 5, must lie in [0, 4]");
  CHECK_EQ(error_of([&] { gather_rows({.out = data.view()}, {}); }), "gather_rows: rows is missing");
  const void* const missing[16] = {};
  CHECK_EQ(error_of([&] { gather_rows({.rows = missing, .out = data.view()}, {}); }), "gather_rows: rows[0] is missing");
}
