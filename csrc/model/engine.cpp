#include "model/engine.h"

#include <algorithm>
#include <cmath>

#include "io/cast.h"
#include "model/family.h"

namespace flexdit {
namespace {

constexpr size_t kMaxPlans = 32;
// The frames of samples as samples of their own, and how many positions those have in all.
std::vector<Grid> frames_of(const std::vector<Grid>& grids) {
  std::vector<Grid> frames;
  for (const Grid& g : grids) frames.insert(frames.end(), static_cast<size_t>(g.frames), {1, g.height, g.width});
  return frames;
}
int64_t positions_of(const std::vector<Grid>& grids) {
  int64_t positions = 0;
  for (const Grid& g : grids) positions += int64_t{g.height} * g.width;
  return positions;
}

// Host tables, all int32, that go to the device at once.
class Tables {
 public:
  size_t add(const void* data, int64_t count) {
    const size_t at = all_.size();
    const auto* values = static_cast<const int32_t*>(data);
    all_.insert(all_.end(), values, values + count);
    return at;
  }
  size_t add(const std::vector<int32_t>& values) { return add(values.data(), std::ssize(values)); }
  struct Place {
    size_t table, row_map;
    int64_t batch;
  };
  Place add(const TokenLayout& l) { return {add(l.table, 4 * (l.batch + 1)), add(l.row_map, l.total()), l.batch}; }

  Buffer upload(Uploader& uploader, const Execution& exec) {
    const auto bytes = static_cast<int64_t>(all_.size() * sizeof(int32_t));
    Buffer buffer(bytes, exec);
    uploader.upload(buffer.data(), all_.data(), bytes, exec);
    return buffer;
  }
  static const int32_t* at(const Buffer& buffer, size_t place) { return buffer.as<const int32_t>() + place; }
  static TokenLayout at(const Buffer& buffer, const Place& p) {
    return {reinterpret_cast<const LayoutRow*>(at(buffer, p.table)), p.batch, at(buffer, p.row_map)};
  }

 private:
  std::vector<int32_t> all_;
};

}  // namespace

// What the device reads anew in every step: StepNumbers of the samples, then the addresses of the modulation rows, then
// where the captions lie. So a graph serves whoever comes.
struct Engine::Block {
  std::vector<StepNumbers> numbers;
  std::vector<const void*> rows;
  std::vector<LayoutRow> captions;

  static int64_t rows_at(int64_t samples) { return samples * int64_t{sizeof(StepNumbers)}; }
  static int64_t captions_at(int64_t samples, int64_t passes) {
    return rows_at(samples) + passes * int64_t{sizeof(void*)};
  }
  static int64_t bytes(int64_t samples, int64_t passes) {
    return captions_at(samples, passes) + (passes + 1) * int64_t{sizeof(LayoutRow)};
  }
};

struct Engine::Plan {
  Key key;
  int64_t samples = 0, passes = 0;  // passes: the model's batch
  int64_t rows = 0, model_rows = 0, sparse_rows = 0;
  Buffer tables;  // on the device:
  TokenLayout layout, model_layout, sparse_layout;
  TokenLayout frames, sparse_frames;  // of the model's layouts, for FlexLatte
  int64_t positions = 0, sparse_positions = 0;
  const int32_t *sample_of_pass = nullptr, *position_offsets = nullptr, *time_offsets = nullptr;
  Repeated work;
};

Engine::Engine(std::shared_ptr<const SamplingModel> model, int64_t guided_channels)
    : model_(std::move(model)),
      prepared_(model_->prepared()),
      exec_(prepared_.exec),
      state_(prepared_.dtype == DType::float64 ? DType::float64 : DType::float32),
      guided_channels_(guided_channels),
      patch_area_(prepared_.config.patch_size * prepared_.config.patch_size),
      positions_(prepared_),
      captions_(prepared_) {}

Engine::~Engine() = default;

void Engine::arrange(std::vector<Occupant> occupants) {
  const auto sizes = [](const std::vector<Occupant>& of) {
    std::vector<Grid> out;
    for (const Occupant& o : of) out.push_back(o.dense);
    return out;
  };
  reserve_model(occupants);
  if (captions_.reserve(occupants)) forget_graphs();
  if (positions_.add(sizes(occupants), sizes(occupants_))) plans_.clear();
  captions_.enter();
  place(occupants);
  occupants_ = std::move(occupants);
}

// Room for every step that these could take, so that memory moves when somebody enters and not later. A buffer is given
// back before its larger one is asked for, so a failure may leave some empty: then the next step begins here.
void Engine::reserve_model(const std::vector<Occupant>& occupants) {
  const Config& c = prepared_.config;
  Plan plan;
  plan.samples = static_cast<int64_t>(occupants.size()), plan.passes = 2 * plan.samples;
  int64_t values = 0, values_before = 0;
  for (const Occupant& o : occupants) plan.rows += o.dense.tokens(), values += values_of(o.dense);
  for (const Occupant& o : occupants_) values_before += values_of(o.dense);
  plan.model_rows = 2 * plan.rows, plan.sparse_rows = c.num_sdtm ? plan.model_rows : 0;
  const int64_t size = size_of(prepared_.dtype), state = values * size_of(state_);
  const int64_t output = plan.model_rows * c.out_channels * patch_area_ * size;
  const int64_t modulation = plan.passes * model_modulation_columns(c) * size;
  const int64_t block = Block::bytes(plan.samples, plan.passes);
  bool moved = false;
  const auto reserve = [&](Buffer& buffer, int64_t bytes) { moved |= buffer.reserve(bytes, exec_); };
  // States move with their contents; the rest holds nothing between steps.
  const auto extend = [&](Buffer& buffer) {
    if (buffer.data() && state <= buffer.bytes()) return;
    Buffer larger(state, exec_);
    if (buffer.data()) copy_bytes(larger.data(), buffer.data(), buffer.bytes(), exec_);
    synchronize(exec_);
    buffer = std::move(larger), moved = true;
  };
  reserved_ = false;
  try {
    extend(x_), extend(x0_), reserve(spare_, std::max(state, values_before * size_of(state_)));
    reserve(input_, 2 * values * size), reserve(output_, output);
    reserve(modulation_, modulation), reserve(block_, block);
    reserve(workspace_, model_workspace_bytes(forward_of(plan), false));
  } catch (...) {
    forget_graphs();
    throw;
  }
  reserved_ = true;
  if (moved) forget_graphs();
}

void Engine::forget_graphs() {
  for (Plan& plan : plans_) plan.work.forget();
}

// Moves the states of those who stay to their new places and fills in those who come.
void Engine::place(const std::vector<Occupant>& occupants) {
  const int64_t size = size_of(state_);
  int64_t offset = 0;
  std::vector<std::pair<int64_t, const Occupant*>> fresh;  // value offset
  std::map<int64_t, int64_t> before;                       // id -> value offset
  for (const Occupant& o : occupants_) before[o.id] = offset, offset += values_of(o.dense);
  const int64_t old_values = offset;
  bool moves = false;
  offset = 0;
  for (const Occupant& o : occupants) {
    const auto found = before.find(o.id);
    if (found == before.end())
      fresh.emplace_back(offset, &o);
    else
      moves |= found->second != offset;
    offset += values_of(o.dense);
  }
  if (moves)
    for (Buffer* buffer : {&x_, &x0_}) {
      spare_.discard();
      copy_bytes(spare_.data(), buffer->data(), old_values * size, exec_);  // reserve_model has made room
      buffer->discard();
      offset = 0;
      for (const Occupant& o : occupants) {
        if (const auto found = before.find(o.id); found != before.end())
          copy_bytes(buffer->as<char>() + offset * size, spare_.as<char>() + found->second * size,
                     values_of(o.dense) * size, exec_);
        offset += values_of(o.dense);
      }
    }
  for (const auto& [at, o] : fresh) {
    // The block is free between steps, and the stream keeps the order.
    block_.discard();
    uploader_.upload(block_.data(), &o->seed, sizeof o->seed, exec_);
    const int64_t values = values_of(o->dense);
    x_.discard(at * size, values * size), x0_.discard(at * size, values * size);
    normal_noise({.seeds = block_.as<const uint64_t>(),
                  .draw = 0,
                  .out = {x_.as<char>() + at * size, 1, values, values, state_}},
                 exec_);
  }
}

Engine::Plan& Engine::plan_for(Key key) {
  const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const Plan& plan) { return plan.key == key; });
  if (found != plans_.end()) {
    plans_.splice(plans_.begin(), plans_, found);
    return plans_.front();
  }
  Plan plan;
  plan.key = std::move(key);
  make_tables(plan);
  plans_.push_front(std::move(plan));
  if (plans_.size() > kMaxPlans) {
    synchronize(exec_);  // its tables may be in use
    plans_.pop_back();
  }
  return plans_.front();
}

// The model's batch: a pass for every sample's conditions, then an unconditional one for those that are guided.
void Engine::make_tables(Plan& plan) {
  const Key& key = plan.key;
  std::vector<Grid> dense = key.dense, sparse = key.sparse;
  std::vector<int32_t> samples, offsets, times;
  for (size_t b = 0; b < key.dense.size(); ++b) samples.push_back(static_cast<int32_t>(b));
  for (size_t b = 0; b < key.dense.size(); ++b)
    if (key.guided[b]) {
      samples.push_back(static_cast<int32_t>(b));
      dense.push_back(key.dense[b]), sparse.push_back(key.sparse[b]);
    }
  for (const Grid& grid : dense) offsets.push_back(positions_.position(grid)), times.push_back(positions_.time(grid));
  const HostLayout layout(key.dense), model_layout(dense), sparse_layout(sparse);
  plan.samples = std::ssize(key.dense), plan.passes = std::ssize(dense);
  plan.rows = layout.view().total(), plan.model_rows = model_layout.view().total();
  plan.sparse_rows = prepared_.config.num_sdtm ? sparse_layout.view().total() : 0;
  plan.positions = positions_of(dense), plan.sparse_positions = positions_of(sparse);
  const bool clips = prepared_.config.family == ModelFamily::latte;
  const HostLayout frames(clips ? frames_of(dense) : std::vector<Grid>());
  const HostLayout sparse_frames(clips ? frames_of(sparse) : std::vector<Grid>());

  Tables all;
  const auto at_layout = all.add(layout.view()), at_model = all.add(model_layout.view()),
             at_sparse = all.add(sparse_layout.view()), at_frames = all.add(frames.view()),
             at_sparse_frames = all.add(sparse_frames.view());
  const size_t at_samples = all.add(samples), at_offsets = all.add(offsets), at_times = all.add(times);
  plan.tables = all.upload(uploader_, exec_);
  plan.layout = Tables::at(plan.tables, at_layout);
  plan.model_layout = Tables::at(plan.tables, at_model), plan.sparse_layout = Tables::at(plan.tables, at_sparse);
  plan.frames = Tables::at(plan.tables, at_frames), plan.sparse_frames = Tables::at(plan.tables, at_sparse_frames);
  plan.sample_of_pass = Tables::at(plan.tables, at_samples);
  plan.position_offsets = Tables::at(plan.tables, at_offsets), plan.time_offsets = Tables::at(plan.tables, at_times);
}

ModelForward Engine::forward_of(const Plan& plan) const {
  const Config& c = prepared_.config;
  const int64_t columns = model_modulation_columns(c);
  ModelForward p{.config = c, .parameters = prepared_.parameters, .dtype = prepared_.dtype, .batch = plan.passes};
  p.x = input_.data(), p.out = output_.data(), p.workspace = workspace_.data();
  p.layout = plan.model_layout;
  if (c.num_sdtm) p.sparse_layout = plan.sparse_layout;
  p.rows = plan.model_rows, p.sparse_rows = plan.sparse_rows;
  p.positions = {positions_.rows(), plan.position_offsets};
  if (c.family == ModelFamily::latte) {
    p.frames = plan.frames, p.max_positions = plan.positions, p.times = {positions_.rows(), plan.time_offsets};
    if (c.num_sdtm) p.sparse_frames = plan.sparse_frames, p.max_sparse_positions = plan.sparse_positions;
  }
  p.prepared = {
      {modulation_.data(), plan.passes, columns, columns, prepared_.dtype}, prepared_.folded, prepared_.packed};
  p.prepared.caption_kv = captions_.keys_and_values();
  if (!p.prepared.caption_kv.empty()) {
    const char* at = block_.as<char>() + Block::captions_at(plan.samples, plan.passes);
    p.prepared.caption_layout = {reinterpret_cast<const LayoutRow*>(at), plan.passes};
  }
  return p;
}

void Engine::run(const Plan& plan, const Execution& exec) {
  const Config& c = prepared_.config;
  const ModelForward p = forward_of(plan);
  const auto* numbers = block_.as<const StepNumbers>();
  for (const Buffer* buffer : {&modulation_, &input_, &output_}) buffer->discard();
  const auto* rows = reinterpret_cast<const void* const*>(block_.as<char>() + Block::rows_at(plan.samples));
  gather_rows({.rows = rows, .out = p.prepared.modulation}, exec);
  model_input({.samples = plan.sample_of_pass,
               .layout = plan.layout,
               .model_layout = plan.model_layout,
               .rows = plan.model_rows,
               .channels = c.in_channels,
               .patch = c.patch_size,
               .state = state_,
               .x = x_.data(),
               .dtype = prepared_.dtype,
               .input = input_.data()},
              exec);
  model_forward(p, exec);
  denoise_step({.numbers = numbers,
                .layout = plan.layout,
                .model_layout = plan.model_layout,
                .rows = plan.rows,
                .channels = c.in_channels,
                .out_channels = c.out_channels,
                .patch = c.patch_size,
                .guided_channels = guided_channels_,
                .dtype = prepared_.dtype,
                .output = output_.data(),
                .state = state_,
                .x = x_.data(),
                .x0 = x0_.data()},
               exec);
}

// Where each pass of the model reads its caption.
std::vector<LayoutRow> Engine::caption_layout(std::span<const StepOrder> orders) const {
  if (captions_.keys_and_values().empty()) return {};
  std::vector<LayoutRow> layout;
  for (const Occupant& o : occupants_) layout.push_back(captions_.place(o, false));
  for (size_t b = 0; b < orders.size(); ++b)
    if (orders[b].null_modulation) layout.push_back(captions_.place(occupants_[b], true));
  layout.push_back(captions_.end());
  return layout;
}

void Engine::step(std::span<const StepOrder> orders) {
  if (orders.empty()) return;
  if (!reserved_) reserve_model(occupants_);
  Key key;
  Block block;
  int32_t passes = static_cast<int32_t>(orders.size());
  for (size_t b = 0; b < orders.size(); ++b) {
    const bool guided = orders[b].null_modulation != nullptr;
    key.dense.push_back(occupants_[b].dense), key.sparse.push_back(orders[b].sparse), key.guided.push_back(guided);
    block.numbers.push_back(orders[b].numbers);
    block.numbers.back().conditional = static_cast<int32_t>(b);
    block.numbers.back().unconditional = guided ? passes++ : -1;
    block.rows.push_back(orders[b].modulation);
  }
  for (const StepOrder& order : orders)
    if (order.null_modulation) block.rows.push_back(order.null_modulation);
  block.captions = caption_layout(orders);
  Plan& plan = plan_for(std::move(key));
  block_.discard();
  const auto upload = [&](int64_t at, const auto& values) {
    uploader_.upload(block_.as<char>() + at, values.data(),
                     static_cast<int64_t>(std::as_bytes(std::span(values)).size()), exec_);
  };
  upload(0, block.numbers), upload(Block::rows_at(plan.samples), block.rows);
  if (!block.captions.empty()) upload(Block::captions_at(plan.samples, plan.passes), block.captions);
  plan.work.run(exec_, [&](const Execution& exec) { run(plan, exec); });
}

std::vector<double> Engine::read(int64_t id) {
  int64_t offset = 0;
  for (const Occupant& o : occupants_) {
    if (o.id != id) {
      offset += values_of(o.dense);
      continue;
    }
    const int64_t count = values_of(o.dense), bytes = count * size_of(state_);
    std::vector<std::byte> raw(static_cast<size_t>(bytes));
    copy_bytes(raw.data(), x_.as<char>() + offset * size_of(state_), bytes, exec_);
    synchronize(exec_);
    std::vector<double> values(static_cast<size_t>(count));
    io::cast(raw.data(), state_, values.data(), DType::float64, count);
    return values;
  }
  throw ArgumentError("id is " + std::to_string(id) + ", which is not in the batch");
}

}  // namespace flexdit
