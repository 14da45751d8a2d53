// Memory and order, as the arena checker sees them, of the model and of sessions on the CPU and on the emulator,
// captured graphs included: they are clean, and mistakes that are planted in them are found.
#include "model/arena.h"

#include "arena_checker.h"
#include "company.h"
#include "flexdit/model.h"
#include "ops/memory.h"
#include "run_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCpu{.threads = 1}, kCuda{.device = Device::cuda};

void check_clean(const Run& run, const std::string& name) {
  const auto mistakes = mistakes_of(run);
  for (size_t i = 0; i < mistakes.size() && i < 3; ++i) CHECK_NOTE(false, name, ": ", mistakes[i]);
}

// A ragged batch through every kind of block: forward without and with a context, then backward.
class ModelCase {
 public:
  ModelCase(DType dtype, const Execution& exec) : dtype_(dtype), exec_(exec) {
    config_ = tiny_config();
    config_.hidden = 16, config_.mlp_hidden = 32, config_.reinject_position = true;
    config_.num_sdtm = 2, config_.generation_blocks = 2, config_.recovery_blocks = 2, config_.num_pooling_blocks = 2;
    Random random(23);
    for (const ParameterSpec& spec : model_parameters(config_)) {
      parameters_.emplace_back(random_values(spec.rows, spec.cols, random, 0.5), dtype);
      gradients_.emplace_back(spec.rows, spec.cols, dtype);
    }
    const int64_t pixels = config_.input_height * config_.input_width;
    const auto values = [&](int64_t channels) { return random_values(kBatch, channels * pixels, random); };
    x_ = Tensor(values(config_.in_channels), dtype), grad_out_ = Tensor(values(config_.out_channels), dtype);
    out_ = Tensor(kBatch, config_.out_channels * pixels, dtype), grad_x_ = Tensor(kBatch, x_.view().cols, dtype);
    for (size_t i = 0; i < parameters_.size(); ++i) {
      views_.push_back(parameters_[i].view());
      grad_views_.push_back(i == 0 ? Matrix{} : gradients_[i].view());
    }
    p_.config = config_, p_.parameters = views_, p_.dtype = dtype, p_.batch = kBatch;
    p_.x = x_.data(), p_.t = t_, p_.labels = labels_;
    p_.layout = layout_.view(), p_.sparse_layout = sparse_layout_.view();
    if (exec.device == Device::cuda) p_.rows = p_.layout.total() + 5, p_.sparse_rows = p_.sparse_layout.total() + 9;
    p_.grad_out = grad_out_.data(), p_.grad_x = grad_x_.data(), p_.grad_parameters = grad_views_;
  }

  // The output, and with `trains` the gradients of x and of the parameters.
  std::vector<Values> run(bool trains) {
    GuardedBytes workspace(model_workspace_bytes(p_, trains)), context(model_context_bytes(p_));
    p_.out = out_.data(), p_.workspace = workspace.data(), p_.context = trains ? context.data() : nullptr;
    expect(out_);
    if (trains)
      for (Matrix& m : grad_views_) expect(m), expect(grad_x_);
    model_forward(p_, exec_);
    if (!trains) return look({&out_});
    GuardedBytes backward(model_backward_workspace_bytes(p_));
    p_.workspace = backward.data();
    model_backward(p_, exec_);
    std::vector<Tensor*> results = {&out_, &grad_x_};
    for (size_t i = 1; i < gradients_.size(); ++i) results.push_back(&gradients_[i]);
    return look(results);
  }

 private:
  static constexpr int64_t kBatch = 3;

  // What is to be written.
  static void expect(const Matrix& m) {
    if (m && trace::recorder()) trace::recorder()->allocated(m.data, m.rows * m.cols * size_of(m.dtype));
  }
  static void expect(Tensor& t) { expect(t.view()); }
  static std::vector<Values> look(const std::vector<Tensor*>& tensors) {
    std::vector<Values> out;
    for (Tensor* t : tensors) {
      const Matrix m = t->view();
      const int64_t bytes = m.rows * m.cols * size_of(m.dtype);
      if (trace::recorder())
        trace::recorder()->operation("caller", {{"result", m.data, 1, bytes, bytes, Access::read}});
      out.push_back(t->values());
    }
    return out;
  }

  DType dtype_;
  Execution exec_;
  Config config_;
  double t_[kBatch] = {3.5, 700, 999};
  int64_t labels_[kBatch] = {4, 0, 4};
  HostLayout layout_{std::vector<Grid>(kBatch, tiny_config().dense_grid())};
  HostLayout sparse_layout_{std::vector<Grid>{{1, 2, 2}, {1, 1, 1}, {1, 3, 4}}};
  std::vector<Tensor> parameters_, gradients_;
  std::vector<Matrix> views_, grad_views_;
  Tensor x_{0, 0, DType::float32}, grad_out_{0, 0, DType::float32}, out_{0, 0, DType::float32},
      grad_x_{0, 0, DType::float32};
  ModelBackward p_;
};

// Leaves pieces where arenas plan them, but one, which it puts over another: what really happens then.
class FaultyPlan : public trace::Recorder {
 public:
  FaultyPlan(size_t piece, size_t onto) : piece_(piece), onto_(onto) { trace::current = this; }
  ~FaultyPlan() override { trace::current = nullptr; }

  void operation(const char*, const std::vector<trace::View>&) override {}
  void* piece(char* base, int64_t used, int64_t bytes, bool fresh) override {
    void* planned = base + used;
    if (bytes == 0) return planned;
    if (fresh) {
      moved_.erase(planned);
      if (places_.size() == piece_) moved_[planned] = places_.at(onto_);
      places_.push_back(planned);
    }
    const auto found = moved_.find(planned);
    return found == moved_.end() ? planned : found->second;
  }
  void allocated(void*, int64_t) override {}
  bool keeps(void*) override { return false; }

 private:
  size_t piece_, onto_;
  std::vector<void*> places_;
  std::map<void*, void*> moved_;
};

// As if the plan had `piece` share memory with another one on purpose.
Run sharing(Run run, uintptr_t piece, uintptr_t with) {
  std::erase_if(run.events, [&](const Event& e) {
    return e.name == kCarve && reinterpret_cast<uintptr_t>(e.views[0].data) == piece;
  });
  const uintptr_t end = run.pieces.at(piece).end;
  for (Event& e : run.events)
    for (trace::View& v : e.views)
      if (const auto at = reinterpret_cast<uintptr_t>(v.data); at >= piece && at < end)
        v.data = reinterpret_cast<const void*>(at - piece + with);
  return run;
}

}  // namespace

TEST_CASE(model_is_clean) {
  for (const bool trains : {false, true})
    for (const auto& [dtype, exec] :
         {std::pair(DType::float64, kCpu), std::pair(DType::bfloat16, kCpu), std::pair(DType::bfloat16, kCuda)}) {
      const std::string name = check::text(name_of(dtype), exec.device == Device::cpu ? " CPU" : " CUDA");
      const auto wanted = ModelCase(dtype, exec).run(trains);
      ArenaRecorder recorder;
      check_identical(ModelCase(dtype, exec).run(trains), wanted, name);
      CHECK(recorder.run.events.size() > 100);
      check_clean(recorder.run, name);
    }
}

// Without a context blocks share memory on purpose; with one they do not. Both read what the same operations have
// written.
TEST_CASE(inference_reads_what_training_reads) {
  const auto reads_of = [](bool trains) {
    ArenaRecorder recorder;
    ModelCase(DType::float64, kCpu).run(trains);
    return ArenaChecker(recorder.run).reads_by_place();
  };
  const auto inference = reads_of(false), training = reads_of(true);
  const size_t end = inference.rbegin()->reader;  // of forward
  CHECK(end > 100);
  for (const auto* list : {&inference, &training})
    for (const auto& read : *list)
      if (read.reader < end)
        CHECK_NOTE((list == &inference ? training : inference).contains(read), read.field, " of operation ",
                   read.reader, " from ", read.writer);
}

// Whatever piece lies over whichever: where that changes a result it is reported, and where a piece is reported to be
// written over the result is another.
TEST_CASE(pieces_that_overlap) {
#ifdef __SANITIZE_ADDRESS__
  std::printf("  not under the address sanitizer: plans that are wrong on purpose reach out of their memory\n");
  return;
#endif
  for (const bool trains : {false, true}) {
    Run clean;
    {
      ArenaRecorder recorder;
      ModelCase(DType::float64, kCpu).run(trains);
      clean = recorder.run;
    }
    const auto wanted = ModelCase(DType::float64, kCpu).run(trains);
    std::vector<uintptr_t> pieces;  // in the order that they are carved
    for (const Event& e : clean.events)
      if (e.name == kCarve) pieces.push_back(reinterpret_cast<uintptr_t>(e.views[0].data));
    const auto reads = ArenaChecker(clean).reads_by_place();
    const auto size = [&](size_t i) { return clean.pieces.at(pieces[i]).end - pieces[i]; };
    int wrong = 0, harmless = 0, lucky = 0;
    Random random(1);
    for (size_t i = 1; i < pieces.size(); ++i)
      for (int attempt = 0; attempt < 2; ++attempt) {
        const size_t onto = i - 1 - size_t(random.below(int64_t(std::min<size_t>(i, 12))));
        if (size(i) > size(onto) || (trains && random.below(4))) continue;
        Run planted = clean;
        planted.pieces[pieces[i]].planned = clean.planned(pieces[onto]);
        const auto mistakes = mistakes_of(planted);
        const Run shared = sharing(clean, pieces[i], pieces[onto]);
        const FaultyPlan plan(i, onto);
        const auto got = ModelCase(DType::float64, kCpu).run(trains);
        bool differs = false;
        for (size_t k = 0; k < got.size(); ++k) differs |= !identical(got[k], wanted[k]);
        ++(differs ? wrong : mistakes.empty() ? harmless : lucky);
        CHECK_NOTE(!differs || !mistakes.empty(), "piece ", i, " over ", onto, " is not reported");
        for (const std::string& m : mistakes)
          CHECK_NOTE(differs || !m.ends_with(" lies over it"), "piece ", i, " over ", onto, ": ", m);
        const ArenaChecker checker(shared);
        CHECK_NOTE(!differs || !checker.mistakes.empty() || checker.reads_by_place() != reads, "piece ", i, " is ",
                   onto);
      }
    std::printf("  %s: %d wrong, %d harmless, %d lucky\n", trains ? "training" : "inference", wrong, harmless, lucky);
    CHECK(wrong > 20 && harmless > 20);
  }
}

namespace {

// Requests of every kind, joining and leaving: DDIM and Heun's, guided or not, sizes and grids of their own, memory
// that grows and position tables that move.
Run session_run(const TestModel& model, DType dtype, const Execution& exec) {
  ArenaRecorder recorder;
  {
    const auto prepared = model.prepare(dtype, exec);
    Session session(prepared, {.max_batch = 3, .modulation_bytes = 1});
    const auto add = [&](SamplerKind kind, int64_t steps, double guidance, int64_t height, int64_t width) {
      SampleRequest r{.label = 1, .seed = 4, .steps = sampler_steps(kind, steps), .guidance = guidance};
      r.height = height, r.width = width;
      if (width == 12) r.sparse_grid = Grid{1, 1, 2};
      return session.add(r);
    };
    add(SamplerKind::flow_heun, 4, 1, 0, 0);
    for (int i = 0; i < 3; ++i) session.step();
    add(SamplerKind::ddim, 3, 2, 0, 0);
    session.step();
    const int64_t doomed = add(SamplerKind::dpmpp, 9, 3, 4, 12);
    for (int i = 0; i < 4; ++i) session.step();
    session.cancel(doomed);
    add(SamplerKind::ddpm, 5, 1.5, 10, 6);
    run_all(session);
    CHECK(session.take_all().size() == 3);
  }
  return recorder.run;
}

Config session_config() {
  Config c = tiny_config();
  c.hidden = 16, c.mlp_hidden = 32, c.reinject_position = true, c.generation_blocks = c.recovery_blocks = 2;
  return c;
}

// Where a step's first operation is, for every step.
std::vector<size_t> steps_of(const Run& run) {
  std::vector<size_t> out;
  for (size_t i = 0; i < run.events.size(); ++i)
    if (run.events[i].name == "gather_rows") out.push_back(i);
  return out;
}

}  // namespace

TEST_CASE(sessions_are_clean) {
  const TestModel model(session_config(), tiny_schedule());
  for (const auto& [dtype, exec] : {std::pair(DType::float64, kCpu), std::pair(DType::float32, kCpu),
                                    std::pair(DType::float32, kCuda), std::pair(DType::bfloat16, kCuda)}) {
    const Run run = session_run(model, dtype, exec);
    CHECK(steps_of(run).size() > 10);
    check_clean(run, check::text(name_of(dtype), exec.device == Device::cpu ? " CPU" : " CUDA"));
  }
}

namespace {

// Whether an operation makes something that was not there before it. What is only changed in place is there without it,
// too, and so are the images that denoise_step changes.
bool makes(const Event& e) {
  return e.name != "denoise_step" && std::any_of(e.views.begin(), e.views.end(), [&](const trace::View& v) {
           return v.access == Access::write &&
                  std::none_of(e.views.begin(), e.views.end(), [&](const trace::View& other) {
                    return other.access == Access::read && other.data == v.data;
                  });
         });
}

// Events whose results an operation reads, perhaps after copies.
std::set<size_t> needed(const Run& run) {
  const auto reads = ArenaChecker(run).reads;
  std::set<size_t> out;
  for (auto r = reads.rbegin(); r != reads.rend(); ++r)
    if (is_operation(run.events[r->reader]) || out.contains(r->reader)) out.insert(r->writer);
  return out;
}

}  // namespace

TEST_CASE(skipped_operations) {
  const TestModel model(session_config(), tiny_schedule());
  const Run run = session_run(model, DType::float32, kCuda);
  Random random(3);
  int planted = 0;
  for (const size_t i : needed(run)) {
    const Event& e = run.events[i];
    if (!makes(e) || (is_operation(e) && random.below(6))) continue;
    Run without = run;
    without.events.erase(without.events.begin() + std::ptrdiff_t(i));
    ++planted;
    CHECK_NOTE(!mistakes_of(without).empty(), e.name, " (", i, ")");
  }
  std::printf("  %d of %zu events\n", planted, run.events.size());
  CHECK(planted > 200);
}

// Two operations in the wrong order, where the second reads what the first one makes.
TEST_CASE(operations_that_change_places) {
  const TestModel model(session_config(), tiny_schedule());
  const Run run = session_run(model, DType::float32, kCuda);
  std::vector<std::pair<size_t, size_t>> pairs;
  for (const auto& r : ArenaChecker(run).reads) {
    bool follows =
        is_operation(run.events[r.reader]) && is_operation(run.events[r.writer]) && makes(run.events[r.writer]);
    for (size_t k = r.writer + 1; k < r.reader; ++k) follows &= !is_operation(run.events[k]);
    if (follows) pairs.emplace_back(r.writer, r.reader);
  }
  Random random(5);
  int planted = 0;
  for (const auto& [first, second] : pairs) {
    if (random.below(8)) continue;
    Run swapped = run;
    std::swap(swapped.events[first], swapped.events[second]);
    ++planted;
    CHECK_NOTE(!mistakes_of(swapped).empty(), run.events[first].name, " (", first, ") and ", run.events[second].name);
  }
  std::printf("  %d of %zu pairs\n", planted, pairs.size());
  CHECK(planted > 50);
}

TEST_CASE(arenas_that_are_too_small) {
  ArenaRecorder recorder;
  const Buffer buffer(256, kCuda);
  Arena arena(buffer.data());
  Arena inner(arena.bytes(128));
  inner.bytes(64), inner.bytes(65);
  arena.bytes(128);
  const std::string inner_end = "carve (3) piece ends 1 bytes behind what its arena has";
  CHECK(mistakes_of(recorder.run) == std::vector{inner_end});
  arena.bytes(1);
  CHECK(mistakes_of(recorder.run) ==
        std::vector({inner_end, std::string("carve (5) piece ends 1 bytes behind what its arena has")}));
}

// A request alone on the emulator: its first step launches, the second one is captured, all later ones are replays.
TEST_CASE(graphs_replay_in_order) {
  const TestModel model(session_config(), DensitySchedule({{1, 2, 2}}));
  ArenaRecorder recorder;
  alone(model.prepare(DType::float32, kCuda), {.label = 1, .seed = 3, .steps = sampler_steps(SamplerKind::ddim, 4)});
  const auto& events = recorder.run.events;
  std::vector<std::vector<std::string>> steps;
  for (const size_t begin : steps_of(recorder.run)) {
    steps.emplace_back();
    for (size_t i = begin + 1; events[i - 1].name != "denoise_step"; ++i) {  // the rows to gather are others every time
      steps.back().push_back(events[i].name);
      for (const trace::View& v : events[i].views)
        steps.back().push_back(check::text(v.field, " ", v.data, " ", v.rows));
    }
  }
  CHECK(steps.size() == 4 && steps[1].size() > 200);
  CHECK(steps[2] == steps[1] && steps[3] == steps[1]);
  check_clean(recorder.run, "replays");
}

TEST_CASE(memory_that_moves) {
  // Work that is not told that its memory has moved, then work that is.
  for (const bool told : {false, true}) {
    ArenaRecorder recorder;
    Buffer buffer(64, kCuda);
    Tensor from(Values(1, 16), DType::float32), to(1, 16, DType::float32);
    Repeated work;
    const auto step = [&] {
      work.run(kCuda, [&](const Execution& exec) {
        const Matrix between{buffer.data(), 1, 16, 16, DType::float32};
        silu({.x = from.view(), .y = between}, exec);
        silu({.x = between, .y = to.view()}, exec);
      });
    };
    for (int i = 0; i < 3; ++i) step();
    check_clean(recorder.run, "before it moves");
    CHECK(buffer.reserve(128, kCuda));
    if (told) work.forget();
    step();
    const auto mistakes = mistakes_of(recorder.run);
    if (told) CHECK(mistakes.empty());
    if (!told)
      CHECK(mistakes.size() == 2 && mistakes[0].ends_with("y is written after release (7) buffer was given back") &&
            mistakes[1].ends_with("x is read after release (7) buffer was given back"));
  }
}

// A session whose buffers grow for a guest, or whose position tables move for one of another size when buffers are
// large enough already; then its old graph again, as if nobody had forgotten it.
TEST_CASE(memory_that_moves_under_sessions) {
  const TestModel model(session_config(), DensitySchedule({{1, 2, 2}}));
  for (const bool grows : {true, false}) {
    ArenaRecorder recorder;
    {
      Session session(model.prepare(DType::float32, kCuda));
      const auto invite = [&](int64_t steps, int64_t side) {
        SampleRequest r{.label = 1, .seed = 3, .steps = sampler_steps(SamplerKind::ddim, steps)};
        r.height = r.width = side;
        session.add(r);
      };
      if (!grows) invite(1, 12), invite(1, 12), session.step();
      invite(6, 0);
      for (int i = 0; i < 3; ++i) session.step();
      invite(1, grows ? 0 : 4);
      run_all(session);
    }
    const auto& events = recorder.run.events;
    check_clean(recorder.run, grows ? "buffers" : "position tables");
    auto steps = steps_of(recorder.run);
    if (!grows) steps.erase(steps.begin());
    CHECK(steps.size() == 6);
    const auto end_of = [&](size_t begin) {
      while (events[begin].name != "denoise_step") ++begin;
      return events.begin() + std::ptrdiff_t(begin) + 1;
    };
    Run planted = recorder.run;
    planted.events.erase(planted.events.begin() + std::ptrdiff_t(steps[4]), planted.events.end());
    planted.events.insert(planted.events.end(), events.begin() + std::ptrdiff_t(steps[2]), end_of(steps[2]));
    const auto mistakes = mistakes_of(planted);
    CHECK(std::any_of(mistakes.begin(), mistakes.end(), [](auto& m) { return m.ends_with("was given back"); }));
  }
}
