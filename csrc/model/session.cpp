#include "flexdit/session.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <mutex>
#include <string>

#include "model/engine.h"
#include "model/family.h"
#include "model/request.h"

namespace flexdit {
namespace {

// Rows of model_modulation for some steps of a request; requests that were computed together share the table.
struct Modulations {
  std::shared_ptr<Buffer> table;
  int64_t row = 0;            // of the first step
  size_t begin = 0, end = 0;  // steps
};

// What the passes of a request read, and its unconditional ones.
struct Captions {
  Caption own, null;
};

// Takes them out of the request.
Captions captions_of(SampleRequest& r) {
  const auto take = [](CaptionInput& caption) {
    return caption.tokens ? std::make_shared<const CaptionInput>(std::move(caption)) : Caption();
  };
  Captions captions{take(r.caption), take(r.null_caption)};
  if (r.guidance == 1) captions.null = nullptr;
  return captions;
}

struct Active {
  int64_t id;
  SampleRequest request;
  Grid dense;
  Captions captions = {};
  size_t next = 0;  // step
  Modulations modulations = {};

  bool done() const { return next == request.steps.size(); }
  bool guided(const SamplerStep& step) const {
    return request.guidance != 1 && step.timestep >= request.guidance_begin && step.timestep <= request.guidance_end;
  }
};

// What rows of model_modulation depend on.
struct ModulationInputs {
  std::vector<double> t, resolution, aspect_ratio;
  std::vector<int64_t> labels;

  int64_t rows() const { return std::ssize(t); }
  int64_t bytes() const { return rows() * 5 * 8; }
  void add(const SampleRequest& r, double timestep, int64_t label) {
    t.push_back(timestep), labels.push_back(label);
    resolution.insert(resolution.end(), {r.resolution[0], r.resolution[1]}), aspect_ratio.push_back(r.aspect_ratio);
  }
};

}  // namespace

class Session::Implementation {
 public:
  Implementation(std::shared_ptr<const SamplingModel> model, const SessionOptions& options)
      : model_(given(std::move(model))),
        prepared_(model_->prepared()),
        options_(checked(options)),
        engine_(model_, options.guided_channels ? options.guided_channels : guided_channels(prepared_.config)) {}

  int64_t add(SampleRequest request) {
    Active one{.id = 0, .request = std::move(request), .dense = {}};
    one.dense = check_request(prepared_, one.request);
    one.captions = captions_of(one.request);
    one.captions.null = shared(one.captions.null);
    const std::lock_guard lock(mutex_);
    if (static_cast<int64_t>(queue_.size()) >= options_.queue_capacity)
      throw QueueFull("the queue is full: " + std::to_string(options_.queue_capacity) +
                      " requests wait; step the session and add again");
    one.id = next_id_++;
    states_[one.id] = RequestState::queued;
    queue_.push_back(std::move(one));
    return queue_.back().id;
  }

  bool cancel(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto state = states_.find(id);
    if (state == states_.end() || finished_.count(id)) return false;
    if (state->second == RequestState::queued)
      queue_.erase(std::find_if(queue_.begin(), queue_.end(), [&](const Active& a) { return a.id == id; }));
    else
      cancelled_.push_back(id);  // the thread that steps takes it out
    states_.erase(state);
    return true;
  }

  int64_t step() {
    const std::lock_guard one_at_a_time(step_mutex_);
    try {
      admit();
      if (!active_.empty()) advance();
    } catch (const std::exception& error) {
      fail_all(reason(error));
      throw;
    }
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(active_.size() + queue_.size());
  }

  RequestState state(int64_t id) const {
    const std::lock_guard lock(mutex_);
    const auto found = states_.find(id);
    return found == states_.end() ? RequestState::unknown : found->second;
  }

  std::optional<Finished> take(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = finished_.find(id);
    if (found == finished_.end()) return std::nullopt;
    Finished out = std::move(found->second);
    finished_.erase(found), states_.erase(id);
    return out;
  }

  std::vector<Finished> take_all() {
    const std::lock_guard lock(mutex_);
    std::vector<Finished> out;
    for (auto& [id, finished] : finished_) states_.erase(id), out.push_back(std::move(finished));
    finished_.clear();
    return out;
  }

  int64_t active() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(active_.size());
  }
  int64_t queued() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(queue_.size());
  }

 private:
  static void require(bool holds, const std::string& message) {
    if (!holds) throw ArgumentError(message);
  }

  // Most requests have the same null caption: one copy is enough while they wait.
  Caption shared(const Caption& null) {
    Caption last;
    {
      const std::lock_guard lock(mutex_);
      last = last_null_.lock();
    }
    if (same(last, null)) return last;
    const std::lock_guard lock(mutex_);
    last_null_ = null;
    return null;
  }

  static int64_t guided_channels(const Config& c) {
    return c.family == ModelFamily::dit ? std::min<int64_t>(3, c.in_channels) : c.in_channels;
  }

  static std::shared_ptr<const SamplingModel> given(std::shared_ptr<const SamplingModel> model) {
    require(model != nullptr, "model is missing");
    return model;
  }

  const SessionOptions& checked(const SessionOptions& o) const {
    const int64_t channels = prepared_.config.in_channels;
    require(o.max_batch >= 1, "max_batch is " + std::to_string(o.max_batch) + ", must be at least 1");
    require(o.queue_capacity >= 1, "queue_capacity is " + std::to_string(o.queue_capacity) + ", must be at least 1");
    require(o.guided_channels >= 0 && o.guided_channels <= channels,
            "guided_channels is " + std::to_string(o.guided_channels) + ", must lie in [0, " +
                std::to_string(channels) + "]");
    require(o.modulation_bytes >= 0,
            "modulation_bytes is " + std::to_string(o.modulation_bytes) + ", must be at least 0");
    return o;
  }

  // Takes cancelled requests out and lets queued ones in. Who does not fit fails alone.
  void admit() {
    size_t staying;
    {
      const std::lock_guard lock(mutex_);
      std::erase_if(active_, [&](const Active& a) {
        return std::find(cancelled_.begin(), cancelled_.end(), a.id) != cancelled_.end();
      });
      cancelled_.clear();
      staying = active_.size();
      while (!queue_.empty() && static_cast<int64_t>(active_.size()) < options_.max_batch) {
        states_[queue_.front().id] = RequestState::active;
        active_.push_back(std::move(queue_.front()));
        queue_.pop_front();
      }
    }
    try {
      arrange();
    } catch (const std::exception&) {
      if (active_.size() == staying) throw;
      admit_singly(staying);
    }
  }

  // One by one, so that only those fail for whom there is no room.
  void admit_singly(size_t staying) {
    std::deque<Active> entering;
    for (size_t i = staying; i < active_.size(); ++i) entering.push_back(std::move(active_[i]));
    set_active(staying);
    const auto let_in = [&] {
      const std::lock_guard lock(mutex_);
      active_.push_back(std::move(entering.front()));
      entering.pop_front();
    };
    try {
      arrange();  // those who have left
    } catch (...) {
      while (!entering.empty()) let_in();  // they fail with the rest
      throw;
    }
    while (!entering.empty()) {
      let_in();
      try {
        arrange();
      } catch (const std::exception& error) {
        fail(active_.back(), reason(error));
        set_active(active_.size() - 1);
      }
    }
  }

  static std::string reason(const std::exception& error) {
    return dynamic_cast<const std::bad_alloc*>(&error) ? "not enough memory" : error.what();
  }

  void set_active(size_t count) {
    const std::lock_guard lock(mutex_);
    active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(count), active_.end());
  }

  void arrange() {
    const auto now = engine_.occupants();
    const bool same =
        now.size() == active_.size() && std::equal(now.begin(), now.end(), active_.begin(),
                                                   [](const Occupant& o, const Active& a) { return o.id == a.id; });
    if (same) return;
    std::vector<Occupant> occupants;
    for (const Active& a : active_)
      occupants.push_back({a.id, a.dense, a.request.seed, a.captions.own, a.captions.null});
    engine_.arrange(std::move(occupants));
  }

  void advance() {
    prepare_modulations();
    const int64_t columns = model_modulation_columns(prepared_.config) * size_of(prepared_.dtype);
    std::vector<StepOrder> orders;
    for (const Active& a : active_) {
      const SampleRequest& r = a.request;
      const SamplerStep& s = r.steps[a.next];
      const int64_t row = a.modulations.row + static_cast<int64_t>(a.next - a.modulations.begin) * modulation_rows(a);
      const char* at = a.modulations.table->as<char>() + row * columns;
      StepOrder order{.sparse = sparse_grid(a, s.timestep),
                      .numbers = {.x0_from_x = s.x0_from_x,
                                  .x0_from_output = s.x0_from_output,
                                  .x_coef = s.x_coef,
                                  .x0_coef = s.x0_coef,
                                  .x0_previous_coef = s.x0_previous_coef,
                                  .noise_coef = s.noise_coef,
                                  .log_variance_small = s.log_variance_small,
                                  .log_variance_large = s.log_variance_large,
                                  .guidance = r.guidance,
                                  .seed = r.seed,
                                  .draw = static_cast<uint32_t>(a.next + 1),
                                  .learned_variance = s.learned_variance,
                                  .clip_x0 = r.clip_x0},
                      .modulation = at,
                      .null_modulation = a.guided(s) ? at + (modulation_rows(a) - 1) * columns : nullptr};
      orders.push_back(order);
    }
    engine_.step(orders);
    for (Active& a : active_) ++a.next;
    finish();
  }

  // Of modulations: the unconditional pass has its own where it has a label of its own.
  int64_t modulation_rows(const Active& a) const { return a.request.guidance == 1 || prepared_.null_label < 0 ? 1 : 2; }

  Grid sparse_grid(const Active& a, double timestep) const {
    if (a.request.sparse_grid) return *a.request.sparse_grid;
    const Config& c = prepared_.config;
    if (c.num_sdtm == 0) return {1, 1, 1};
    const Grid dense = c.dense_grid();
    if (a.dense == dense || (shares_modulation(c) && prepared_.own_schedule)) return prepared_.schedule.grid(timestep);
    if (shares_modulation(c)) return default_schedule(c, a.dense).grid(timestep);
    // FlexDiT's is for the config's grid; other sizes get the same share of each side.
    const Grid grid = prepared_.schedule.grid(timestep);
    const auto side = [](int32_t sparse, int32_t own, int32_t other) {
      return std::clamp(static_cast<int32_t>(std::lround(double(sparse) * other / own)), 1, other);
    };
    return {1, side(grid.height, dense.height, a.dense.height), side(grid.width, dense.width, a.dense.width)};
  }

  // Those whose modulations have run out get those of the next steps, all in one product (identity 3 of method.md).
  void prepare_modulations() {
    std::vector<Active*> needy;
    int64_t rows_per_step = 0;
    for (Active& a : active_) {
      rows_per_step += modulation_rows(a);
      if (a.next == a.modulations.end) needy.push_back(&a);
    }
    if (needy.empty()) return;
    const Config& c = prepared_.config;
    const int64_t columns = model_modulation_columns(c);
    const int64_t step_bytes = rows_per_step * columns * size_of(prepared_.dtype);
    const auto ahead = static_cast<size_t>(std::max<int64_t>(1, options_.modulation_bytes / step_bytes));
    ModulationInputs in;
    std::vector<Modulations> made;
    for (const Active* a : needy) {
      const size_t end = std::min(a->next + ahead, a->request.steps.size());
      made.push_back({nullptr, in.rows(), a->next, end});
      for (size_t i = a->next; i < end; ++i) {
        in.add(a->request, a->request.steps[i].timestep, a->request.label);
        if (modulation_rows(*a) == 2) in.add(a->request, a->request.steps[i].timestep, prepared_.null_label);
      }
    }
    auto table = std::make_shared<Buffer>(in.rows() * columns * size_of(prepared_.dtype), prepared_.exec);
    compute_modulations(in, {table->data(), in.rows(), columns, columns, prepared_.dtype});
    for (size_t i = 0; i < needy.size(); ++i) made[i].table = table, needy[i]->modulations = made[i];
  }

  void compute_modulations(const ModulationInputs& in, const Matrix& out) {
    const Execution& exec = prepared_.exec;
    int64_t at = model_modulation_workspace_bytes(prepared_.config, out.rows, out.dtype);
    modulation_workspace_.reserve(at + in.bytes(), exec);
    modulation_workspace_.discard();
    const auto upload = [&](const auto& values) {
      char* to = modulation_workspace_.as<char>() + at;
      const auto bytes = static_cast<int64_t>(std::as_bytes(std::span(values)).size());
      uploader_.upload(to, values.data(), bytes, exec);
      at += bytes;
      return reinterpret_cast<decltype(values.data())>(to);
    };
    ModelModulation m{.config = prepared_.config,
                      .parameters = prepared_.parameters,
                      .weight = prepared_.modulation_weight,
                      .bias = prepared_.modulation_bias,
                      .tables = prepared_.modulation_tables,
                      .packed = prepared_.modulation_packed.get(),
                      .t = upload(in.t),
                      .out = out,
                      .workspace = modulation_workspace_.data()};
    if (prepared_.config.label_rows) m.labels = upload(in.labels);
    if (prepared_.config.size_conditions)
      m.resolution = upload(in.resolution), m.aspect_ratio = upload(in.aspect_ratio);
    model_modulation(m, exec);
  }

  void finish() {
    std::vector<Finished> done;
    for (const Active& a : active_)
      if (a.done())
        done.push_back({a.id, prepared_.config.in_channels, a.request.frames, a.request.height, a.request.width,
                        engine_.read(a.id), ""});
    if (done.empty()) return;
    const std::lock_guard lock(mutex_);
    std::erase_if(active_, [](const Active& a) { return a.done(); });
    for (Finished& one : done) {
      const auto state = states_.find(one.id);
      if (state == states_.end()) continue;  // cancelled in the last step
      state->second = RequestState::finished;
      finished_[one.id] = std::move(one);
    }
  }

  void fail(const Active& a, const std::string& why) {
    const std::lock_guard lock(mutex_);
    const auto state = states_.find(a.id);
    if (state == states_.end()) return;
    state->second = RequestState::failed;
    finished_[a.id] = {a.id, prepared_.config.in_channels, a.request.frames, a.request.height, a.request.width, {},
                       why};
  }

  void fail_all(const std::string& why) {
    for (const Active& a : active_) fail(a, why);
    set_active(0);
  }

  std::shared_ptr<const SamplingModel> model_;
  const SamplingModel::Prepared& prepared_;
  const SessionOptions options_;
  Engine engine_;
  Buffer modulation_workspace_;
  Uploader uploader_;
  // Of the thread that steps; its size is read by others, so it changes under the lock.
  std::vector<Active> active_;

  std::mutex step_mutex_;  // taken before mutex_
  mutable std::mutex mutex_;
  int64_t next_id_ = 0;
  std::deque<Active> queue_;
  std::weak_ptr<const CaptionInput> last_null_;
  std::vector<int64_t> cancelled_;  // active ones, to be taken out
  std::map<int64_t, RequestState> states_;
  std::map<int64_t, Finished> finished_;
};

Session::Session(std::shared_ptr<const SamplingModel> model, const SessionOptions& options)
    : implementation_(std::make_unique<Implementation>(std::move(model), options)) {}
Session::~Session() = default;
int64_t Session::add(SampleRequest request) { return implementation_->add(std::move(request)); }
bool Session::cancel(int64_t id) { return implementation_->cancel(id); }
int64_t Session::step() { return implementation_->step(); }
RequestState Session::state(int64_t id) const { return implementation_->state(id); }
std::optional<Finished> Session::take(int64_t id) { return implementation_->take(id); }
std::vector<Finished> Session::take_all() { return implementation_->take_all(); }
int64_t Session::active() const { return implementation_->active(); }
int64_t Session::queued() const { return implementation_->queued(); }

}  // namespace flexdit
