// Sessions with the CUDA kernels on the emulator. From a composition's second step on its captured graph is launched:
// the list of what was launched, run again. Fresh device memory is NaN there.
#include "company.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCuda{.device = Device::cuda};

Config small_config() {
  Config c = tiny_config();
  c.hidden = 32, c.mlp_hidden = 64, c.num_heads = 2;
  return c;
}

}  // namespace

TEST_CASE(samplers_against_their_papers) {
  // Largest allowed error over the largest magnitude of the image against the loops in double. Seen on the emulator,
  // 2026-11-25: 2.8e-7, 5.7e-3, 7.2e-4.
  const struct {
    DType dtype;
    double error;
  } bounds[] = {{DType::float32, 2e-6}, {DType::bfloat16, 4e-2}, {DType::float16, 5e-3}};
  Config config = small_config();
  config.reinject_position = true;
  const TestModel model(config, tiny_schedule());
  for (const auto& [dtype, most] : bounds) {
    double worst = 0;
    const auto prepared = model.prepare(dtype, kCuda);
    for (int kind = 0; kind < 5; ++kind) {
      const bool ddpm = static_cast<SamplerKind>(kind) == SamplerKind::ddpm;
      if (dtype != DType::float32 && kind % 3 != 1) continue;  // ddpm and Heun's
      const SamplerCase sampler{static_cast<SamplerKind>(kind), 4, kind == 0 ? 0.5 : 0, ddpm};
      SampleRequest r{.label = 3, .seed = 8, .steps = sampler.table(), .guidance = 2};
      if (kind % 2) r.height = 4, r.width = 10;
      const Values wanted = NaiveSampler(model, r, 2).run(sampler);
      worst = std::max(worst, relative_difference(alone(prepared, r), wanted));
    }
    std::printf("  %-8s %.1e\n", name_of(dtype), worst);
    CHECK_NOTE(worst <= most, name_of(dtype), ": ", worst);
  }
}

TEST_CASE(images_do_not_depend_on_company) {
  const TestModel model(small_config(), tiny_schedule());
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    const auto prepared = model.prepare(dtype, kCuda);
    for (uint64_t seed = 0; seed < 2; ++seed)
      CHECK_NOTE(difference_in_company(model, prepared, seed, {.requests = 5}) == 0, name_of(dtype), ", seed ", seed);
  }
}

TEST_CASE(captured_graphs_give_what_launches_give) {
  // One grid for all timesteps: all steps but the first are the graph's, in a session; the first alone in many.
  const TestModel model(small_config(), DensitySchedule({{1, 2, 2}}));
  const auto prepared = model.prepare(DType::float32, kCuda);
  SampleRequest r{.label = 1, .seed = 3, .steps = sampler_steps(SamplerKind::ddpm, 5, 0, true), .guidance = 3};
  const Values wanted = alone(prepared, r);
  // With somebody else at every other step, each composition is launched twice and then replayed.
  Session session(prepared);
  const int64_t id = session.add(r);
  for (int i = 0; i < 5; ++i) {
    if (i % 2) session.add({.label = 0, .seed = 1, .steps = sampler_steps(SamplerKind::ddim, 1)});
    session.step();
  }
  const auto done = session.take(id);
  CHECK(done && identical(image_of(*done), wanted));
}

TEST_CASE(memory_moves_under_captured_graphs) {
  // A request is alone at even steps, at odd ones there are guests for whom buffers grow, or, in buffers that are large
  // enough already, of sizes for which position tables move. Its graph must not go on with the old memory.
  const TestModel model(small_config(), DensitySchedule({{1, 2, 2}}));
  const auto prepared = model.prepare(DType::float32, kCuda);
  const SampleRequest r{.label = 1, .seed = 3, .steps = sampler_steps(SamplerKind::ddim, 9)};
  const Values wanted = alone(prepared, r);
  for (const bool grows : {true, false}) {
    Session session(prepared);
    const auto invite = [&](int count, int64_t side) {
      SampleRequest guest{.label = 0, .seed = 1, .steps = sampler_steps(SamplerKind::ddim, 1)};
      guest.height = guest.width = side;
      for (int i = 0; i < count; ++i) session.add(guest);
    };
    if (!grows) invite(1, 12), session.step();
    const int64_t id = session.add(r);
    for (int i = 0; i < 9; ++i) {
      if (i > 2 && i % 2) grows ? invite(i - 2, 0) : invite(1, i - 1);  // 0: the model's size
      session.step();
    }
    const auto done = session.take(id);
    CHECK_NOTE(done && identical(image_of(*done), wanted), grows ? "buffers" : "position tables");
  }
}

TEST_CASE(memory_runs_out_for_a_newcomer) {
  const TestModel model(small_config(), DensitySchedule({{1, 2, 2}}));
  const auto prepared = model.prepare(DType::float32, kCuda);
  const SampleRequest r{.label = 1, .seed = 3, .steps = sampler_steps(SamplerKind::ddim, 6)};
  SampleRequest large = r;
  large.height = large.width = 12;
  const Values wanted = alone(prepared, r);
  int64_t failed = 0, n = 0;
  for (bool enough = false; !enough; ++n) {
    Session session(prepared);
    const int64_t id = session.add(r);
    for (int i = 0; i < 3; ++i) session.step();  // the graph is there
    const int64_t other = session.add(large);
    {
      const ScarceMemory scarce(n, 2);
      try {
        session.step();
      } catch (const std::bad_alloc&) {
        CHECK_NOTE(session.state(id) == RequestState::failed, n);
      }
      enough = scarce.left > 0;
    }
    const bool alive = session.state(id) == RequestState::active;
    failed += session.state(other) == RequestState::failed;
    run_all(session);
    const auto done = session.take(id);
    if (alive) CHECK_NOTE(identical(image_of(*done), wanted), n);
  }
  std::printf("  the newcomer failed %d times of %d\n", int(failed), int(n));
  CHECK(failed > 6);
}
