// Sessions on the CPU: images do not depend on their company, requests come and go, fail alone, and may be asked after
// by other threads.
#include <atomic>
#include <thread>

#include "company.h"
#include "message_of.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

Config wide_config() {
  Config c = tiny_config();
  c.input_height = c.input_width = 16, c.in_channels = 4, c.out_channels = 8;
  c.hidden = 192, c.mlp_hidden = 768, c.num_heads = 4;
  return c;
}

SampleRequest simple_request(int64_t steps = 3, uint64_t seed = 1) {
  return {.label = 1, .seed = seed, .steps = sampler_steps(SamplerKind::ddim, steps)};
}

std::string message(auto&& body) { return message_of<ArgumentError>(body); }

const TestModel& tiny_model() {
  static const TestModel model(tiny_config(), tiny_schedule());
  return model;
}
const std::shared_ptr<const SamplingModel>& tiny() {
  static const auto model = tiny_model().prepare(DType::float32);
  return model;
}

}  // namespace

TEST_CASE(images_do_not_depend_on_company) {
  const TestModel tiny(tiny_config(), tiny_schedule());
  Config other = tiny_config();
  other.num_sdtm = 2, other.num_pooling_blocks = 0, other.reinject_position = true, other.hidden = 36,
  other.mlp_hidden = 100;
  const TestModel reinjects(other, tiny_schedule());
  const TestModel wide(wide_config(), DensitySchedule({{1, 5, 5}, {1, 4, 4}, {1, 3, 3}}));
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    double worst = 0;
    const auto run = [&](const TestModel& model, uint64_t first, uint64_t count, const CompanyCase& c) {
      const auto prepared = model.prepare(dtype);
      for (uint64_t seed = first; seed < first + count; ++seed)
        worst = std::max(worst, difference_in_company(model, prepared, seed, c));
    };
    run(tiny, 0, 12, {});
    run(reinjects, 100, 6, {});
    run(wide, 200, 3, {.requests = 5});
    std::printf("  largest difference in %s: %.1e\n", name_of(dtype), worst);
    CHECK_NOTE(worst == 0, name_of(dtype));
  }
}

TEST_CASE(windows_of_modulations) {
  SampleRequest r = simple_request(7);
  r.guidance = 3;
  const Values wanted = alone(tiny(), r);
  const int64_t row = model_modulation_columns(tiny()->config()) * 4;
  for (const int64_t bytes : {int64_t{0}, row, 2 * row, 5 * row, 6 * row, 13 * row, 14 * row})
    CHECK_NOTE(identical(alone(tiny(), r, {.modulation_bytes = bytes}), wanted), bytes / row, " rows");
}

TEST_CASE(more_compositions_than_plans) {
  // Pairs of 12 sparse grids, the second one guided: 144 compositions, each twice, in a session.
  std::vector<SampleRequest> requests;
  std::vector<Values> wanted;
  for (int i = 0; i < 12; ++i) {
    requests.push_back(simple_request(1, static_cast<uint64_t>(i)));
    requests.back().sparse_grid = Grid{1, 1 + i / 4, 1 + i % 4};
  }
  std::vector<SampleRequest> guided = requests;
  for (SampleRequest& r : guided) r.guidance = 2;
  for (const auto* list : {&requests, &guided})
    for (const SampleRequest& r : *list) wanted.push_back(alone(tiny(), r));
  Session session(tiny());
  for (int i = 0; i < 288; ++i) {
    const size_t a = size_t(i) % 12, b = size_t(i) / 12 % 12;
    const int64_t first = session.add(requests[a]), second = session.add(guided[b]);
    run_all(session);
    CHECK(identical(image_of(*session.take(first)), wanted[a]));
    CHECK(identical(image_of(*session.take(second)), wanted[12 + b]));
  }
}

TEST_CASE(more_sizes_than_are_kept) {
  // 300 sizes of up to 100 x 100 tokens, of which not all position tables stay; the first ones come again.
  Config c = tiny_config();
  c.hidden = 4, c.num_heads = 1, c.mlp_hidden = 4, c.num_pooling_blocks = c.num_sdtm = 0, c.num_dense_blocks = 0;
  const TestModel model(c, tiny_schedule());
  const auto prepared = model.prepare(DType::float32);
  Session session(prepared);
  for (int i = 0; i < 310; ++i) {
    SampleRequest r = simple_request(1);
    r.height = 2 * (1 + i % 300 / 3), r.width = 2 * (1 + i % 100);
    const int64_t id = session.add(r);
    run_all(session);
    const Values got = image_of(*session.take(id));
    if (i % 20 == 0 || i >= 300) CHECK_NOTE(identical(got, alone(prepared, r)), r.height, " x ", r.width);
  }
}

TEST_CASE(queue_and_states) {
  Session session(tiny(), {.max_batch = 2, .queue_capacity = 3});
  CHECK_EQ(session.step(), 0);
  const int64_t a = session.add(simple_request(2)), b = session.add(simple_request(3)),
                c = session.add(simple_request(1));
  CHECK(a != b && b != c && session.queued() == 3 && session.active() == 0);
  CHECK(session.state(a) == RequestState::queued && session.state(c + 1) == RequestState::unknown);
  CHECK_EQ(message_of<QueueFull>([&] { session.add(simple_request()); }),
           "the queue is full: 3 requests wait; step the session and add again");
  CHECK_EQ(session.step(), 3);
  CHECK(session.active() == 2 && session.queued() == 1);
  CHECK(session.state(a) == RequestState::active && session.state(c) == RequestState::queued);
  CHECK(!session.take(a) && !session.take(c) && !session.take(12345) && session.take_all().empty());
  CHECK_EQ(session.step(), 2);  // a is done
  CHECK(session.state(a) == RequestState::finished && session.state(c) == RequestState::queued);
  CHECK(!session.cancel(a));
  CHECK_EQ(session.step(), 0);  // b and c
  CHECK(session.active() == 0 && session.queued() == 0);
  const auto first = session.take(a);
  CHECK(first && first->id == a && first->error.empty());
  CHECK(first->channels == 2 && first->height == 6 && first->width == 8 && first->image.size() == 96);
  CHECK(session.state(a) == RequestState::unknown && !session.take(a));
  const auto rest = session.take_all();
  CHECK(rest.size() == 2 && rest[0].id == b && rest[1].id == c && session.take_all().empty());
  CHECK_EQ(session.step(), 0);
  CHECK(identical(alone(tiny(), simple_request(2)), image_of(*first)));
}

TEST_CASE(cancelling) {
  Session session(tiny(), {.max_batch = 2});
  const SampleRequest stays = simple_request(4, 9);
  const int64_t a = session.add(simple_request(4)), b = session.add(stays), c = session.add(simple_request(4));
  session.step();
  CHECK(session.cancel(c) && !session.cancel(c) && session.state(c) == RequestState::unknown);
  CHECK(session.queued() == 0);
  CHECK(session.cancel(a) && !session.cancel(a) && session.state(a) == RequestState::unknown && !session.take(a));
  CHECK(!session.cancel(777));
  const int64_t d = session.add(simple_request(1));
  CHECK_EQ(session.step(), 1);  // a is gone, d has come and is done
  CHECK(session.state(d) == RequestState::finished && session.state(b) == RequestState::active);
  run_all(session);
  CHECK(identical(image_of(*session.take(b)), alone(tiny(), stays)));
  CHECK(session.take_all().size() == 1);
  const int64_t e = session.add(simple_request());
  session.step();
  session.cancel(e);
  CHECK(session.step() == 0 && session.take_all().empty());
}

TEST_CASE(bad_sessions) {
  CHECK_EQ(message([] { Session(nullptr); }), "model is missing");
  CHECK_EQ(message([] { Session(tiny(), {.max_batch = 0}); }), "max_batch is 0, must be at least 1");
  CHECK_EQ(message([] { Session(tiny(), {.queue_capacity = -1}); }), "queue_capacity is -1, must be at least 1");
  CHECK_EQ(message([] { Session(tiny(), {.guided_channels = 3}); }), "guided_channels is 3, must lie in [0, 2]");
  CHECK_EQ(message([] { Session(tiny(), {.guided_channels = -1}); }), "guided_channels is -1, must lie in [0, 2]");
  CHECK_EQ(message([] { Session(tiny(), {.modulation_bytes = -1}); }), "modulation_bytes is -1, must be at least 0");
}

TEST_CASE(bad_requests) {
  Session session(tiny());
  const auto refused = [&](auto&& change, const std::string& wanted) {
    SampleRequest r = simple_request();
    change(r);
    CHECK_EQ(message([&] { session.add(r); }), wanted);
  };
  refused([](auto& r) { r.label = 5; }, "label is 5, must lie in [0, 5)");
  refused([](auto& r) { r.label = -1; }, "label is -1, must lie in [0, 5)");
  refused([](auto& r) { r.steps.clear(); }, "steps is empty, must hold at least one step");
  refused([](auto& r) { r.steps[1].timestep = 1000.5; }, "a step's timestep is 1000.5, must lie in [0, 1000]");
  refused([](auto& r) { r.steps[1].timestep = NAN; }, "a step's timestep is nan, must lie in [0, 1000]");
  refused([](auto& r) { r.steps[0].x0_previous_coef = 1; }, "the first step reads the x0 of a step before it");
  refused([](auto& r) { r.guidance = -0.5; }, "guidance is -0.5, must be finite and at least 0");
  refused([](auto& r) { r.guidance = INFINITY; }, "guidance is inf, must be finite and at least 0");
  refused([](auto& r) { r.guidance_begin = 5, r.guidance_end = 4; },
          "guidance_begin is 5, must be at most guidance_end, 4");
  refused([](auto& r) { r.height = 7; }, "height is 7, must be a multiple of the patch size 2 from it to 16384");
  refused([](auto& r) { r.width = -2; }, "width is -2, must be a multiple of the patch size 2 from it to 16384");
  refused([](auto& r) { r.width = 16386; }, "width is 16386, must be a multiple of the patch size 2 from it to 16384");
  refused([](auto& r) { r.sparse_grid = Grid{1, 4, 4}; },
          "sparse_grid is (4, 4), must lie within the dense grid (3, 4)");
  refused([](auto& r) { r.sparse_grid = Grid{1, 0, 4}; },
          "sparse_grid is (0, 4), must lie within the dense grid (3, 4)");
  CHECK(session.queued() == 0);

  Config c = tiny_config();
  c.out_channels = c.in_channels, c.hidden = 42;
  const TestModel plain(c, tiny_schedule());
  std::vector<Matrix> views;
  for (const Values& v : plain.parameters)
    views.push_back({const_cast<double*>(v.v.data()), v.rows, v.cols, v.cols, DType::float64});
  SamplingModelOptions o{.config = c, .schedule = tiny_schedule(), .parameters = views, .dtype = DType::float64};
  Session unguided(std::make_shared<SamplingModel>(o));
  SampleRequest r = simple_request();
  r.guidance = 2;
  CHECK_EQ(message([&] { unguided.add(r); }), "guidance is 2, but the model has no null class: only 1 is allowed");
  r = {.steps = sampler_steps(SamplerKind::ddpm, 2, 0, true)};
  CHECK_EQ(message([&] { unguided.add(r); }), "learned_variance is set, but the model has no variance channels");
  r = simple_request(), r.height = 2;
  CHECK_EQ(message([&] { unguided.add(r); }),
           "height and width must be the model's: its hidden size is no multiple of 4, as position tables need");
}

TEST_CASE(bad_models) {
  const Config c = tiny_config();
  const TestModel model(c, tiny_schedule());
  std::vector<Matrix> good;
  for (const Values& v : model.parameters)
    good.push_back({const_cast<double*>(v.v.data()), v.rows, v.cols, v.cols, DType::float64});
  const auto refused = [&](auto&& change, const std::string& wanted) {
    std::vector<Matrix> views = good;
    SamplingModelOptions o{.config = c, .schedule = tiny_schedule(), .dtype = DType::float64};
    change(o, views);
    o.parameters = views;
    CHECK_EQ(message([&] { SamplingModel{o}; }), wanted);
  };
  refused([](auto&, auto& v) { v.pop_back(); },
          check::text("sampling model: parameters holds ", good.size() - 1, " tensors, must hold ", good.size()));
  refused([](auto&, auto& v) { v[2].data = nullptr; }, "sampling model: patch_embed.bias must be a contiguous [1, 48]");
  refused([](auto&, auto& v) { v[1].rows = 47; }, "sampling model: patch_embed.weight must be a contiguous [48, 8]");
  refused([](auto&, auto& v) { v[1].stride = 9; }, "sampling model: patch_embed.weight must be a contiguous [48, 8]");
  refused([](auto&, auto& v) { v[0].dtype = DType::float32; }, "sampling model: pos_embed is float32, must be float64");
  refused([](auto& o, auto&) { o.null_label = 5; },
          "sampling model: null_label is 5, must be -1 for none or lie in [0, 5)");
  refused([](auto& o, auto&) { o.null_label = -2; },
          "sampling model: null_label is -2, must be -1 for none or lie in [0, 5)");
  refused([](auto& o, auto&) { o.schedule = DensitySchedule({{1, 3, 5}}); },
          "sampling model: schedule has a grid that is larger than the dense one");
  if (message([&] { SamplingModel({.config = c, .exec = {.device = Device::cuda}}); }).find("CUDA") ==
      std::string::npos)
    CHECK(false);
}

TEST_CASE(memory_runs_out_for_a_newcomer) {
  // Two are under way. The third is larger, so that every buffer grows, and the n-th allocation from then on fails and
  // all that follow in that step, too. Whoever is still there afterwards has the image that is right.
  const SampleRequest first = simple_request(4, 1), second = simple_request(5, 2), small = simple_request(2, 3);
  SampleRequest large = simple_request(3, 4);
  large.height = 20, large.width = 24;
  const std::vector<SampleRequest> requests = {first, second, large, small};
  std::vector<Values> wanted;
  for (const SampleRequest& r : requests) wanted.push_back(alone(tiny(), r));
  // One failure: the second try works. Two: so does the newcomer's absence. Many: nothing works.
  for (const int64_t failures : {1, 2, 1000}) {
    int64_t none_failed = 0, one_failed = 0, all_failed = 0;
    for (bool enough = false; !enough;) {
      const int64_t n = none_failed + one_failed + all_failed;
      Session session(tiny());
      std::vector<int64_t> ids = {session.add(first), session.add(second)};
      session.step();
      ids.push_back(session.add(large));
      bool threw = false;
      {
        const ScarceMemory scarce(n, failures);
        try {
          session.step();
        } catch (const std::bad_alloc&) {
          threw = true;
        }
        enough = scarce.left > 0;
      }
      const bool failed = session.state(ids[2]) == RequestState::failed;
      CHECK_NOTE(!threw || failed, n);
      CHECK_NOTE((session.state(ids[0]) == RequestState::failed) == threw, n);
      ++(threw ? all_failed : failed ? one_failed : none_failed);
      ids.push_back(session.add(small));
      run_all(session);
      for (size_t i = 0; i < ids.size(); ++i) {
        const auto done = session.take(ids[i]);
        const bool fails = i == 2 ? failed : i < 2 && threw;
        CHECK_NOTE(done->error == (fails ? "not enough memory" : ""), n, " ", i, " ", done->error);
        if (!fails) CHECK_NOTE(identical(image_of(*done), wanted[i]), n, " ", i);
      }
    }
    std::printf("  %d failures: %d times nobody failed, %d times one, %d times all\n", int(failures), int(none_failed),
                int(one_failed), int(all_failed));
    CHECK(failures == 1 ? none_failed > 8 : failures == 2 ? one_failed > 8 : all_failed > 8);
  }
}

TEST_CASE(a_request_that_is_too_large_fails_alone) {
  const SampleRequest first = simple_request(4, 1), second = simple_request(5, 2);
  SampleRequest huge = simple_request(3, 4);
  huge.height = huge.width = 16384;
  const Values first_wanted = alone(tiny(), first), second_wanted = alone(tiny(), second);
  for (const size_t limit : {size_t{1} << 18, size_t{1} << 22, size_t{1} << 31}) {
    const ScarceMemory scarce(-1, 0, limit);
    Session session(tiny(), {.max_batch = 3});
    const int64_t a = session.add(first);
    session.step();
    const int64_t b = session.add(huge), c = session.add(second), d = session.add(huge);
    session.step();
    CHECK(session.state(a) == RequestState::active && session.state(c) == RequestState::active);
    CHECK(session.state(b) == RequestState::failed && !session.cancel(b));
    CHECK(session.state(d) == RequestState::queued);
    run_all(session);
    const auto failed = session.take(d);
    CHECK(failed && failed->error == "not enough memory" && failed->image.empty() && failed->height == 16384);
    CHECK(identical(image_of(*session.take(a)), first_wanted));
    CHECK(identical(image_of(*session.take(c)), second_wanted));
    CHECK(session.take_all().size() == 1);
  }
}

TEST_CASE(other_threads_while_one_steps) {
  constexpr int kThreads = 3, kRequests = 8;
  Session session(TestModel(tiny_config(), tiny_schedule()).prepare(DType::float32, {.threads = 1}),
                  {.max_batch = 3, .queue_capacity = 5});
  std::atomic<int> running = kThreads, finished = 0;
  std::vector<Values> wanted;
  for (int i = 0; i < kThreads * kRequests; ++i)
    wanted.push_back(alone(tiny(), simple_request(1 + i % 4, uint64_t(i))));
  std::vector<std::thread> clients;
  std::atomic<bool> good = true;
  for (int thread = 0; thread < kThreads; ++thread)
    clients.emplace_back([&, thread] {
      for (int i = thread * kRequests; i < (thread + 1) * kRequests; ++i) {
        int64_t id = -1;
        while (id < 0) try {
            id = session.add(simple_request(1 + i % 4, uint64_t(i)));
          } catch (const QueueFull&) {
            std::this_thread::yield();
          }
        if (i % 5 == 4) {
          while (session.state(id) == RequestState::queued && i % 2) std::this_thread::yield();
          if (session.cancel(id)) continue;
        }
        std::optional<Finished> done;
        while (!(done = session.take(id))) {
          if (session.active() > 3 || session.queued() > 5) good = false;
          std::this_thread::yield();
        }
        if (!identical(image_of(*done), wanted[size_t(i)])) good = false;
        ++finished;
      }
      --running;
    });
  while (running > 0)
    if (session.step() == 0) std::this_thread::yield();
  for (std::thread& client : clients) client.join();
  CHECK(good && finished >= kThreads * kRequests * 4 / 5);
  run_all(session);
  CHECK(session.take_all().empty() && session.active() == 0);
}
