// Sessions of FlexPixArt and FlexLatte, on the CPU and with the CUDA kernels on the emulator: images and clips from
// captions, labels or neither. That their numbers are the Python modules' own is tested in python_tests.
#include "arena_checker.h"
#include "company.h"
#include "message_of.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCpu{.threads = 2}, kCuda{.device = Device::cuda};

Config pixart_config() {
  Config c = tiny_config();
  c.family = ModelFamily::pixart, c.label_rows = 0, c.size_conditions = true, c.position_scale = 0.5;
  c.caption_channels = 20, c.max_caption_tokens = 6;
  return c;
}
// Of labels and captions; the temporal embedding comes between a pooling block and a module.
Config latte_config() {
  Config c = tiny_config();
  c.family = ModelFamily::latte, c.num_frames = 3, c.caption_channels = 12, c.max_caption_tokens = 5;
  return c;
}
// Of nothing; the temporal embedding comes before the module that holds the second block.
Config unconditional_config() {
  Config c = tiny_config();
  c.family = ModelFamily::latte, c.num_frames = 4, c.label_rows = 0, c.num_pooling_blocks = 0, c.sparse_blocks = 2;
  return c;
}
// The temporal embedding comes between two dense blocks.
Config dense_config() {
  Config c = latte_config();
  c.num_pooling_blocks = c.num_sdtm = 0, c.num_dense_blocks = 3, c.caption_channels = 0;
  return c;
}

const TestModel& pixart() {
  static const TestModel model(pixart_config(), std::nullopt);
  return model;
}
const TestModel& latte() {
  static const TestModel model(latte_config(), std::nullopt);
  return model;
}

SampleRequest request(const Config& c, uint64_t seed, int64_t steps = 3, double guidance = 2) {
  Random random(seed);
  SampleRequest r{.label = 0, .seed = seed, .steps = sampler_steps(SamplerKind::ddim, steps), .guidance = guidance};
  add_conditions(r, random, c);
  r.frames = 0;
  return r;
}

std::string refused(Session& session, const SampleRequest& r) {
  return message_of<ArgumentError>([&] { session.add(r); });
}

Run recorded(const TestModel& model, DType dtype, const Execution& exec) {
  ArenaRecorder recorder;
  {
    Session session(model.prepare(dtype, exec), {.max_batch = 3, .modulation_bytes = 1});
    Random random(9);
    for (int i = 0; i < 7; ++i) {
      SampleRequest r = random_request(random, model, 3);
      if (i == 2) r.caption = r.null_caption;
      const int64_t id = session.add(r);
      session.step();
      if (i == 3) session.cancel(id);
    }
    run_all(session);
    CHECK(session.take_all().size() >= 6);
  }
  return recorder.run;
}

}  // namespace

TEST_CASE(images_and_clips_do_not_depend_on_company) {
  for (const Config& c : {pixart_config(), latte_config(), unconditional_config(), dense_config()}) {
    const TestModel model(c, std::nullopt);
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      const auto prepared = model.prepare(dtype, kCpu);
      for (uint64_t seed = 0; seed < (dtype == DType::float32 ? 4 : 2); ++seed)
        CHECK_NOTE(difference_in_company(model, prepared, seed, {}) == 0, name_of(dtype), ", seed ", seed);
    }
    for (const DType dtype : {DType::float32, DType::bfloat16})
      CHECK_NOTE(difference_in_company(model, model.prepare(dtype, kCuda), 7, {.requests = 4, .most_steps = 3}) == 0,
                 name_of(dtype), " on the emulator");
  }
}

TEST_CASE(devices_agree) {
  for (const TestModel* model : {&pixart(), &latte()}) {
    SampleRequest r = request(model->config, 3);
    if (model == &pixart()) r.height = 10, r.width = 4;
    const Values wanted = alone(model->prepare(DType::float64, kCpu), r);
    CHECK_NEAR(relative_difference(alone(model->prepare(DType::float32, kCpu), r), wanted), 0.0, 1e-5);
    CHECK_NEAR(relative_difference(alone(model->prepare(DType::float32, kCuda), r), wanted), 0.0, 1e-5);
  }
}

// A caption's products are computed when it comes, those of equal ones once, and no step computes them again.
TEST_CASE(captions_are_computed_once) {
  const int64_t per_caption = 2 + 6;  // its embedding, and every block's keys and values
  const auto prepared = pixart().prepare(DType::float32, {.threads = 1});
  SampleRequest first = request(pixart().config, 1, 4), second = request(pixart().config, 2, 4), third = second;
  second.null_caption = first.null_caption, third.null_caption = first.caption;
  ArenaRecorder recorder;
  Session session(prepared);
  const auto products_of_step = [&] {
    const size_t before = recorder.run.events.size();
    session.step();
    int64_t count = 0;
    for (size_t i = before; i < recorder.run.events.size(); ++i) count += recorder.run.events[i].name == "linear";
    return count;
  };
  session.add(first);
  const int64_t alone_at_first = products_of_step(), later = products_of_step();
  const int64_t modulations = alone_at_first - later - 2 * per_caption;  // of all its steps
  CHECK_EQ(modulations, 3 * 2 + 1);  // timestep, resolution and aspect ratio, and the modulation layer
  session.add(second);
  CHECK_EQ(products_of_step(), later + modulations + per_caption);
  session.add(third);
  CHECK_EQ(products_of_step(), later + modulations);
  CHECK_EQ(products_of_step(), later);
  run_all(session);
  session.add(first);  // what is not needed stays until its place is
  CHECK_EQ(products_of_step(), later + modulations);
}

TEST_CASE(captions_change_images) {
  const auto prepared = pixart().prepare(DType::float64, kCpu);
  const SampleRequest r = request(pixart().config, 1);
  const Values image = alone(prepared, r);
  SampleRequest other = r;
  other.caption.rows[3] += 1;
  CHECK(relative_difference(alone(prepared, other), image) > 1e-6);
  other = r, other.null_caption.rows[3] += 1;
  CHECK(relative_difference(alone(prepared, other), image) > 1e-6);
  other = r, other.aspect_ratio *= 2;
  CHECK(relative_difference(alone(prepared, other), image) > 1e-6);
  other.guidance = 1;
  SampleRequest no_null = other;
  no_null.null_caption = {};
  CHECK(identical(alone(prepared, other), alone(prepared, no_null)));
}

TEST_CASE(schedules_of_other_sizes) {
  Config c = latte_config();
  c.num_frames = 8, c.input_height = c.input_width = 16;
  const DensitySchedule own({{2, 3, 2}, {1, 2, 2}});
  const TestModel by_default(c, std::nullopt), by_own(c, own);
  const auto defaults = by_default.prepare(DType::float64, kCpu), owns = by_own.prepare(DType::float64, kCpu);
  SampleRequest r = request(c, 5, 1);
  r.frames = 6, r.height = 24, r.width = 20;
  const double t = r.steps[0].timestep;
  const auto with = [&](const Grid& grid) {
    SampleRequest explicitly = r;
    explicitly.sparse_grid = grid;
    return alone(defaults, explicitly);
  };
  const Grid grid = default_schedule(c, {6, 12, 10}).grid(t);
  // (8, 6, 6) of 16 at the data end; 4.5 is rounded to even.
  CHECK(grid.frames == 3 && grid.height == 4 && grid.width == 4);
  CHECK(identical(alone(defaults, r), with(grid)));
  CHECK(identical(alone(owns, r), with(own.grid(t))));
  Session session(owns);
  r.width = 2;
  CHECK_EQ(refused(session, r),
           "sparse_grid is not given, and the schedule has (2, 3, 2), must lie within the dense grid (6, 12, 1)");
}

TEST_CASE(finished_clips) {
  Session session(latte().prepare(DType::float32, kCpu));
  SampleRequest r = request(latte().config, 2, 1);
  r.frames = 2, r.height = 4;
  const int64_t shorter = session.add(r);
  r.frames = 0, r.height = 0;
  const int64_t whole = session.add(r);
  run_all(session);
  const auto a = session.take(shorter), b = session.take(whole);
  CHECK(a && a->channels == 2 && a->frames == 2 && a->height == 4 && a->width == 8 && a->image.size() == 128);
  CHECK(b && b->channels == 2 && b->frames == 3 && b->height == 6 && b->width == 8 && b->image.size() == 288);
}

TEST_CASE(guided_channels) {
  // By default all of them: an image guided in the first channel alone is another.
  const auto prepared = latte().prepare(DType::float64, kCpu);
  const SampleRequest r = request(latte().config, 4);
  CHECK(identical(alone(prepared, r), alone(prepared, r, {.guided_channels = 2})));
  CHECK(!identical(alone(prepared, r), alone(prepared, r, {.guided_channels = 1})));
}

TEST_CASE(memory_runs_out_for_a_newcomer) {
  // Two are under way with all the memory that they need. The n-th allocation fails when a third comes with captions.
  for (const Execution& exec : {kCpu, kCuda}) {
    const auto prepared = pixart().prepare(DType::float32, exec);
    const SampleRequest first = request(pixart().config, 1, 4), second = request(pixart().config, 2, 4);
    const Values first_wanted = alone(prepared, first), second_wanted = alone(prepared, second);
    int64_t failed = 0, n = 0;
    for (bool enough = false; !enough; ++n) {
      Session session(prepared);
      const int64_t a = session.add(first);
      session.step();
      const int64_t b = session.add(second);
      bool threw = false;
      {
        const ScarceMemory scarce(n, 2);
        try {
          session.step();
        } catch (const std::bad_alloc&) {
          threw = true;
        }
        enough = scarce.left > 0;
      }
      const bool alive = session.state(a) == RequestState::active, entered = session.state(b) == RequestState::active;
      CHECK_NOTE(alive != threw, n);
      failed += alive && !entered;
      const int64_t again = session.add(second);
      run_all(session);
      if (alive) CHECK_NOTE(identical(image_of(*session.take(a)), first_wanted), n);
      if (entered) CHECK_NOTE(identical(image_of(*session.take(b)), second_wanted), n);
      CHECK_NOTE(identical(image_of(*session.take(again)), second_wanted), n);
    }
    std::printf("  the newcomer failed %d times of %d\n", int(failed), int(n));
    CHECK(failed > 6);
  }
}

TEST_CASE(captured_graphs_read_new_captions) {
  // Guests with captions of their own come at every other step, each into the place of the one before.
  const TestModel model(pixart_config(), DensitySchedule({{1, 2, 2}}));
  const auto prepared = model.prepare(DType::float32, kCuda);
  const SampleRequest r = request(model.config, 1, 9);
  std::vector<SampleRequest> guests;
  for (int i = 0; i < 4; ++i) guests.push_back(request(model.config, uint64_t(20 + i), 1));
  const Values wanted = alone(prepared, r);
  Session session(prepared);
  const int64_t id = session.add(r);
  std::vector<int64_t> ids;
  for (int i = 0; i < 9; ++i) {
    if (i % 2) ids.push_back(session.add(guests[size_t(i / 2)]));
    session.step();
  }
  CHECK(identical(image_of(*session.take(id)), wanted));
  for (size_t i = 0; i < ids.size(); ++i)
    CHECK_NOTE(identical(image_of(*session.take(ids[i])), alone(prepared, guests[i])), i);
}

TEST_CASE(sessions_are_clean) {
  for (const Config& c : {pixart_config(), latte_config(), unconditional_config(), dense_config()}) {
    const TestModel model(c, std::nullopt);
    for (const auto& [dtype, exec] :
         {std::pair(DType::float64, kCpu), std::pair(DType::float32, kCuda), std::pair(DType::bfloat16, kCuda)}) {
      const Run run = recorded(model, dtype, exec);
      const auto mistakes = mistakes_of(run);
      CHECK(run.events.size() > 200);
      for (size_t i = 0; i < mistakes.size() && i < 3; ++i) CHECK_NOTE(false, name_of(dtype), ": ", mistakes[i]);
    }
  }
}

TEST_CASE(bad_requests) {
  Session images(pixart().prepare(DType::float32, kCpu)), clips(latte().prepare(DType::float32, kCpu));
  const SampleRequest image = request(pixart().config, 1), clip = request(latte().config, 1);
  const auto wrong = [](Session& session, SampleRequest r, auto&& change, const std::string& wanted) {
    change(r);
    CHECK_EQ(refused(session, r), wanted);
  };
  const auto of_image = [&](auto&& change, const std::string& wanted) { wrong(images, image, change, wanted); };
  const auto of_clip = [&](auto&& change, const std::string& wanted) { wrong(clips, clip, change, wanted); };
  of_image([](auto& r) { r.caption = {}; }, "caption is missing, guidance is 2: the model reads captions");
  of_image([](auto& r) { r.caption = {}, r.guidance = 1; }, "caption is missing: the model reads captions");
  of_image([](auto& r) { r.null_caption = {}; }, "null_caption is missing, guidance is 2: the model reads captions");
  of_image([](auto& r) { r.caption.tokens = 7; }, "caption has 7 tokens, must have 1 to 6");
  of_image([](auto& r) { r.null_caption.tokens = -1; }, "null_caption has -1 tokens, must have 1 to 6");
  of_image([](auto& r) { r.caption.tokens = 0; }, "caption has 0 tokens, must have 1 to 6");
  of_image([](auto& r) { r.caption.tokens = 2, r.caption.rows.resize(39); },
           "caption.rows holds 39 values, must hold 2 tokens of 20");
  of_image([](auto& r) { r.caption.rows[1] = NAN; }, "caption.rows holds a value that is not finite");
  of_image([](auto& r) { r.label = 1; }, "label is 1, but the model has no labels: must be 0");
  of_image([](auto& r) { r.frames = 2; }, "frames is 2, but the model makes images: must be 0 or 1");
  of_image([](auto& r) { r.aspect_ratio = 0; }, "aspect_ratio is 0, must be finite and above 0");
  of_image([](auto& r) { r.resolution[1] = INFINITY; }, "resolution[1] is inf, must be finite and above 0");
  of_image([](auto& r) { r.sparse_grid = Grid{1, 4, 4}; },
           "sparse_grid is (4, 4), must lie within the dense grid (3, 4)");
  of_clip([](auto& r) { r.frames = 4; }, "frames is 4, must be 1 to 3");
  of_clip([](auto& r) { r.frames = -1; }, "frames is -1, must be 1 to 3");
  of_clip([](auto& r) { r.label = 5; }, "label is 5, must lie in [0, 5)");
  of_clip([](auto& r) { r.resolution[0] = 3; }, "resolution[0] is 3, but the model has no size_conditions: must be 0");
  of_clip([](auto& r) { r.frames = 2, r.sparse_grid = Grid{3, 1, 1}; },
          "sparse_grid is (3, 1, 1), must lie within the dense grid (2, 3, 4)");

  const TestModel plain(tiny_config(), tiny_schedule()), nothing(unconditional_config(), std::nullopt);
  Session labels(plain.prepare(DType::float32, kCpu)), free(nothing.prepare(DType::float32, kCpu));
  const SampleRequest label = request(tiny_config(), 1), none = request(unconditional_config(), 1, 3, 1);
  wrong(labels, label, [&](auto& r) { r.caption = image.caption; }, "caption is given, but the model reads none");
  wrong(
      labels, label, [](auto& r) { r.aspect_ratio = 1; },
      "aspect_ratio is 1, but the model has no size_conditions: must be 0");
  wrong(
      free, none, [](auto& r) { r.guidance = 2; }, "guidance is 2, but the model has no null class: only 1 is allowed");
}

TEST_CASE(bad_configs) {
  const auto bad = [](Config c, auto&& change, const std::string& wanted) {
    change(c);
    CHECK_EQ(message_of<ArgumentError>([&] { SamplingModel({.config = c}); }), "sampling model: config" + wanted);
  };
  bad(pixart_config(), [](auto& c) { c.num_frames = 2; }, ".num_frames is 2, must be 1");
  bad(latte_config(), [](auto& c) { c.num_frames = 0; }, ".num_frames is 0, must be at least 1");
  bad(latte_config(), [](auto& c) { c.hidden = 50; }, ".hidden is 50, must be a multiple of 4");
  bad(
      tiny_config(), [](auto& c) { c.caption_channels = 8; },
      ".caption_channels is 8, only FlexPixArt and FlexLatte read captions, with max_caption_tokens of at least 1");
  bad(
      pixart_config(), [](auto& c) { c.hidden = 40; },
      ".size_conditions is set, which only FlexPixArt and FlexLatte have, with hidden a multiple of 3");
  bad(pixart_config(), [](auto& c) { c.position_scale = 0; }, ".position_scale must be above 0");
  bad(dense_config(), [](auto& c) { c.num_dense_blocks = 0; }, " has no blocks");
}

TEST_CASE(only_inference_is_computed_here) {
  const Config c = pixart_config();
  std::vector<Matrix> parameters(model_parameters(c).size());
  ModelBackward p;
  p.config = c, p.parameters = parameters, p.batch = 1;
  const auto message = [](auto&& body) { return message_of<ArgumentError>(body); };
  const std::string trained =
      "model: config.family is FlexPixArt or FlexLatte, whose gradients Python's block ops compute";
  CHECK_EQ(message([&] { model_backward(p, kCpu); }), trained);
  CHECK_EQ(message([&] { model_context_bytes(p); }), trained);
  CHECK_EQ(message([&] { model_backward_workspace_bytes(p); }), trained);
  const HostLayout sparse(1, Grid{1, 1, 1});
  p.sparse_layout = sparse.view();
  CHECK_EQ(message([&] { model_forward(p, kCpu); }),
           "model: prepared.modulation is missing, FlexPixArt and FlexLatte need it");
}
