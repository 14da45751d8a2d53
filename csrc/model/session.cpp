#include "flexdit/session.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <mutex>
#include <string>

#include "model/engine.h"

namespace flexdit {
namespace {

std::string text(double value) {
  char out[32];
  std::snprintf(out, sizeof out, "%g", value);
  return out;
}

// Rows of model_modulation for some steps of a request; requests that were computed together share the table.
struct Modulations {
  std::shared_ptr<Buffer> table;
  int64_t row = 0;            // of the first step
  size_t begin = 0, end = 0;  // steps
};

struct Active {
  int64_t id;
  SampleRequest request;
  Grid dense;
  size_t next = 0;  // step
  Modulations modulations;

  bool done() const { return next == request.steps.size(); }
  int64_t rows_per_step() const { return request.guidance == 1 ? 1 : 2; }
  bool guided(const SamplerStep& step) const {
    return request.guidance != 1 && step.timestep >= request.guidance_begin && step.timestep <= request.guidance_end;
  }
};

}  // namespace

class Session::Implementation {
 public:
  Implementation(std::shared_ptr<const SamplingModel> model, const SessionOptions& options)
      : model_(given(std::move(model))),
        prepared_(model_->prepared()),
        options_(checked(options)),
        engine_(model_, options.guided_channels ? options.guided_channels
                                                : std::min<int64_t>(3, prepared_.config.in_channels)) {}

  int64_t add(SampleRequest request) {
    Active one{.id = 0, .request = std::move(request), .dense = {}};
    one.dense = check(one.request);
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

  // Everything that could be wrong with a request; returns its dense grid.
  Grid check(SampleRequest& r) const {
    const Config& c = prepared_.config;
    require(r.label >= 0 && r.label < c.label_rows,
            "label is " + std::to_string(r.label) + ", must lie in [0, " + std::to_string(c.label_rows) + ")");
    require(!r.steps.empty(), "steps is empty, must hold at least one step");
    const double last = static_cast<double>(prepared_.schedule.num_timesteps());
    for (const SamplerStep& step : r.steps) {
      require(step.timestep >= 0 && step.timestep <= last,
              "a step's timestep is " + text(step.timestep) + ", must lie in [0, " + text(last) + "]");
      require(!step.learned_variance || c.learned_variance(),
              "learned_variance is set, but the model has no variance channels");
    }
    require(r.steps[0].x0_previous_coef == 0, "the first step reads the x0 of a step before it");
    require(r.guidance >= 0 && std::isfinite(r.guidance),
            "guidance is " + text(r.guidance) + ", must be finite and at least 0");
    require(r.guidance == 1 || prepared_.null_label >= 0,
            "guidance is " + text(r.guidance) + ", but the model has no null class: only 1 is allowed");
    require(r.guidance_begin <= r.guidance_end,
            "guidance_begin is " + text(r.guidance_begin) + ", must be at most guidance_end, " + text(r.guidance_end));
    if (r.height == 0) r.height = c.input_height;
    if (r.width == 0) r.width = c.input_width;
    constexpr int64_t kMaxSide = 1 << 14;
    for (const auto& [name, side] : {std::pair("height", r.height), std::pair("width", r.width)})
      require(side > 0 && side % c.patch_size == 0 && side <= kMaxSide,
              std::string(name) + " is " + std::to_string(side) + ", must be a multiple of the patch size " +
                  std::to_string(c.patch_size) + " from it to " + std::to_string(kMaxSide));
    const Grid dense{1, static_cast<int32_t>(r.height / c.patch_size), static_cast<int32_t>(r.width / c.patch_size)};
    require(dense == c.dense_grid() || c.hidden % 4 == 0,
            "height and width must be the model's: its hidden size is no multiple of 4, as position tables need");
    if (r.sparse_grid) {
      const Grid& g = *r.sparse_grid;
      require(g.frames == 1 && g.height >= 1 && g.width >= 1 && g.height <= dense.height && g.width <= dense.width,
              "sparse_grid is (" + std::to_string(g.height) + ", " + std::to_string(g.width) +
                  "), must lie within the dense grid (" + std::to_string(dense.height) + ", " +
                  std::to_string(dense.width) + ")");
    }
    return dense;
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
    for (const Active& a : active_) occupants.push_back({a.id, a.dense, a.request.seed});
    engine_.arrange(std::move(occupants));
  }

  void advance() {
    prepare_modulations();
    const int64_t columns = model_modulation_columns(prepared_.config) * size_of(prepared_.dtype);
    std::vector<StepOrder> orders;
    for (const Active& a : active_) {
      const SampleRequest& r = a.request;
      const SamplerStep& s = r.steps[a.next];
      const int64_t row = a.modulations.row + static_cast<int64_t>(a.next - a.modulations.begin) * a.rows_per_step();
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
                      .null_modulation = a.guided(s) ? at + columns : nullptr};
      orders.push_back(order);
    }
    engine_.step(orders);
    for (Active& a : active_) ++a.next;
    finish();
  }

  // The schedule is for the config's grid; other sizes get the same share of each side.
  Grid sparse_grid(const Active& a, double timestep) const {
    if (a.request.sparse_grid) return *a.request.sparse_grid;
    if (prepared_.config.num_sdtm == 0) return {1, 1, 1};
    const Grid grid = prepared_.schedule.grid(timestep), dense = prepared_.config.dense_grid();
    if (a.dense == dense) return grid;
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
      rows_per_step += a.rows_per_step();
      if (a.next == a.modulations.end) needy.push_back(&a);
    }
    if (needy.empty()) return;
    const Config& c = prepared_.config;
    const int64_t columns = model_modulation_columns(c);
    const int64_t step_bytes = rows_per_step * columns * size_of(prepared_.dtype);
    const auto ahead = static_cast<size_t>(std::max<int64_t>(1, options_.modulation_bytes / step_bytes));
    std::vector<double> t;
    std::vector<int64_t> labels;
    std::vector<Modulations> made;
    for (const Active* a : needy) {
      const size_t end = std::min(a->next + ahead, a->request.steps.size());
      made.push_back({nullptr, static_cast<int64_t>(t.size()), a->next, end});
      for (size_t i = a->next; i < end; ++i) {
        t.push_back(a->request.steps[i].timestep), labels.push_back(a->request.label);
        if (a->rows_per_step() == 2) t.push_back(t.back()), labels.push_back(prepared_.null_label);
      }
    }
    const auto rows = static_cast<int64_t>(t.size());
    auto table = std::make_shared<Buffer>(rows * columns * size_of(prepared_.dtype), prepared_.exec);
    compute_modulations(t, labels, {table->data(), rows, columns, columns, prepared_.dtype});
    for (size_t i = 0; i < needy.size(); ++i) made[i].table = table, needy[i]->modulations = made[i];
  }

  void compute_modulations(const std::vector<double>& t, const std::vector<int64_t>& labels, const Matrix& out) {
    const Execution& exec = prepared_.exec;
    const int64_t rows = out.rows, workspace = model_modulation_workspace_bytes(prepared_.config, rows, out.dtype);
    modulation_workspace_.reserve(workspace + rows * 16, exec);  // and t and labels
    char* inputs = modulation_workspace_.as<char>() + workspace;
    modulation_workspace_.discard();
    uploader_.upload(inputs, t.data(), rows * 8, exec);
    uploader_.upload(inputs + rows * 8, labels.data(), rows * 8, exec);
    model_modulation({.config = prepared_.config,
                      .parameters = prepared_.parameters,
                      .weight = prepared_.modulation_weight,
                      .bias = prepared_.modulation_bias,
                      .packed = prepared_.modulation_packed.get(),
                      .t = reinterpret_cast<const double*>(inputs),
                      .labels = reinterpret_cast<const int64_t*>(inputs + rows * 8),
                      .out = out,
                      .workspace = modulation_workspace_.data()},
                     exec);
  }

  void finish() {
    std::vector<Finished> done;
    for (const Active& a : active_)
      if (a.done())
        done.push_back({a.id, prepared_.config.in_channels, 1, a.request.height, a.request.width, engine_.read(a.id), ""});
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
    finished_[a.id] = {a.id, prepared_.config.in_channels, 1, a.request.height, a.request.width, {}, why};
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
