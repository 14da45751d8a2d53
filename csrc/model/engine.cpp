#include "model/engine.h"

#include <algorithm>
#include <cmath>

#include "io/cast.h"

namespace flexdit {
namespace {

constexpr size_t kMaxPlans = 32;
constexpr int64_t kMaxPositionRows = 1 << 14;  // of tables that may be wanted again

// DiT's fixed sin-cos embedding of a grid: half of the columns for x, half for y, each as sines and cosines of
// w_i = 10000^(-i / (C / 4)). Source: DiT (after MAE), arXiv 2212.09748.
std::vector<double> sincos_positions(const Grid& grid, int64_t c) {
  const int64_t quarter = c / 4;
  std::vector<double> table(static_cast<size_t>(grid.tokens() * c));
  for (int64_t n = 0; n < grid.tokens(); ++n) {
    const double at[2] = {double(n % grid.width), double(n / grid.width % grid.height)};
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t i = 0; i < quarter; ++i) {
        const double angle = at[half] * std::pow(10000., -double(i) / double(quarter));
        double* to = table.data() + n * c + half * 2 * quarter + i;
        to[0] = std::sin(angle), to[quarter] = std::cos(angle);
      }
  }
  for (double& value : table) value = static_cast<float>(value);  // as the model's own buffer is made
  return table;
}

}  // namespace

// What the device reads anew in every step: StepNumbers of the samples, then the addresses of the modulation rows.
struct Engine::Block {
  std::vector<StepNumbers> numbers;
  std::vector<const void*> rows;

  int64_t numbers_bytes() const { return static_cast<int64_t>(numbers.size() * sizeof(StepNumbers)); }
  int64_t rows_bytes() const { return static_cast<int64_t>(rows.size() * sizeof(void*)); }
};

struct Engine::Plan {
  Key key;
  int64_t samples = 0, passes = 0;  // passes: the model's batch
  int64_t rows = 0, model_rows = 0, sparse_rows = 0;
  Buffer tables;  // on the device:
  TokenLayout layout, model_layout, sparse_layout;
  const int32_t *sample_of_pass = nullptr, *position_offsets = nullptr;
  Repeated work;
};

Engine::Engine(std::shared_ptr<const SamplingModel> model, int64_t guided_channels)
    : model_(std::move(model)),
      prepared_(model_->prepared()),
      exec_(prepared_.exec),
      state_(prepared_.dtype == DType::float64 ? DType::float64 : DType::float32),
      guided_channels_(guided_channels),
      patch_area_(prepared_.config.patch_size * prepared_.config.patch_size) {}

Engine::~Engine() = default;

void Engine::arrange(std::vector<Occupant> occupants) {
  reserve_model(occupants);
  if (add_positions(occupants)) plans_.clear();
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
  const int64_t block = plan.samples * int64_t{sizeof(StepNumbers)} + plan.passes * int64_t{sizeof(void*)};
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

// Tables of sizes that were not there before; true if all tables have moved. Those that nobody here has stay as long as
// there is little of them, whatever sizes come by.
bool Engine::add_positions(const std::vector<Occupant>& occupants) {
  const int64_t c = prepared_.config.hidden, row_bytes = c * size_of(prepared_.dtype);
  std::vector<Grid> sizes;
  int64_t rows = 0;
  const auto add = [&](const Grid& grid) {
    if (std::find(sizes.begin(), sizes.end(), grid) == sizes.end()) sizes.push_back(grid), rows += grid.tokens();
  };
  const auto known = [&](const Grid& grid) {
    return std::any_of(position_rows_.begin(), position_rows_.end(), [&](const auto& k) { return k.first == grid; });
  };
  for (const Occupant& o : occupants) add(o.dense);
  if (std::all_of(sizes.begin(), sizes.end(), known)) return false;
  for (const Occupant& o : occupants_) add(o.dense);
  for (const auto& [grid, row] : position_rows_)
    if (rows + grid.tokens() <= kMaxPositionRows) add(grid);
  Buffer tables(rows * row_bytes, exec_);
  std::vector<std::pair<Grid, int32_t>> places;
  int64_t row = 0;
  for (const Grid& grid : sizes) {
    char* to = tables.as<char>() + row * row_bytes;
    if (grid == prepared_.config.dense_grid()) {
      copy_bytes(to, prepared_.parameters[0].data, grid.tokens() * row_bytes, exec_);
    } else {
      const auto values = sincos_positions(grid, c);
      std::vector<std::byte> bytes(static_cast<size_t>(grid.tokens() * row_bytes));
      io::cast(values.data(), DType::float64, bytes.data(), prepared_.dtype, grid.tokens() * c);
      uploader_.upload(to, bytes.data(), grid.tokens() * row_bytes, exec_);
    }
    places.emplace_back(grid, static_cast<int32_t>(row));
    row += grid.tokens();
  }
  synchronize(exec_);  // the old tables may be in use
  positions_ = std::move(tables), position_rows_ = std::move(places), position_count_ = rows;
  return true;
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

// The model's batch: a pass for every sample's label, then one with the null label for those that are guided.
void Engine::make_tables(Plan& plan) {
  const Key& key = plan.key;
  std::vector<Grid> dense = key.dense, sparse = key.sparse;
  std::vector<int32_t> samples, offsets;
  for (size_t b = 0; b < key.dense.size(); ++b) samples.push_back(static_cast<int32_t>(b));
  for (size_t b = 0; b < key.dense.size(); ++b)
    if (key.guided[b]) {
      samples.push_back(static_cast<int32_t>(b));
      dense.push_back(key.dense[b]), sparse.push_back(key.sparse[b]);
    }
  for (const Grid& grid : dense)
    for (const auto& [size, row] : position_rows_)
      if (size == grid) offsets.push_back(row);
  const HostLayout layout(key.dense), model_layout(dense), sparse_layout(sparse);
  plan.samples = static_cast<int64_t>(key.dense.size()), plan.passes = static_cast<int64_t>(dense.size());
  plan.rows = layout.view().total(), plan.model_rows = model_layout.view().total();
  plan.sparse_rows = prepared_.config.num_sdtm ? sparse_layout.view().total() : 0;

  // All of it is int32 and goes to the device at once.
  std::vector<int32_t> all;
  const auto add = [&](const void* data, int64_t count) {
    const size_t at = all.size();
    all.resize(at + static_cast<size_t>(count));
    std::memcpy(all.data() + at, data, static_cast<size_t>(count) * sizeof(int32_t));
    return at;
  };
  const auto add_layout = [&](const TokenLayout& l) {
    const size_t table = add(l.table, 4 * (l.batch + 1));
    return std::pair(table, add(l.row_map, l.total()));
  };
  const auto at_layout = add_layout(layout.view()), at_model = add_layout(model_layout.view()),
             at_sparse = add_layout(sparse_layout.view());
  const size_t at_samples = add(samples.data(), std::ssize(samples)),
               at_offsets = add(offsets.data(), std::ssize(offsets));
  const auto bytes = static_cast<int64_t>(all.size() * sizeof(int32_t));
  plan.tables = Buffer(bytes, exec_);
  uploader_.upload(plan.tables.data(), all.data(), bytes, exec_);
  const auto* first = plan.tables.as<const int32_t>();
  const auto layout_at = [&](const auto& at, int64_t batch) -> TokenLayout {
    return {reinterpret_cast<const LayoutRow*>(first + at.first), batch, first + at.second};
  };
  plan.layout = layout_at(at_layout, plan.samples);
  plan.model_layout = layout_at(at_model, plan.passes), plan.sparse_layout = layout_at(at_sparse, plan.passes);
  plan.sample_of_pass = first + at_samples, plan.position_offsets = first + at_offsets;
}

ModelForward Engine::forward_of(const Plan& plan) const {
  const Config& c = prepared_.config;
  const int64_t columns = model_modulation_columns(c);
  ModelForward p{.config = c, .parameters = prepared_.parameters, .dtype = prepared_.dtype, .batch = plan.passes};
  p.x = input_.data(), p.out = output_.data(), p.workspace = workspace_.data();
  p.layout = plan.model_layout;
  if (c.num_sdtm) p.sparse_layout = plan.sparse_layout;
  p.rows = plan.model_rows, p.sparse_rows = plan.sparse_rows;
  p.positions = {{positions_.data(), position_count_, c.hidden, c.hidden, prepared_.dtype}, plan.position_offsets};
  p.prepared = {
      {modulation_.data(), plan.passes, columns, columns, prepared_.dtype}, prepared_.folded, prepared_.packed};
  return p;
}

void Engine::run(const Plan& plan, const Execution& exec) {
  const Config& c = prepared_.config;
  const ModelForward p = forward_of(plan);
  const auto* numbers = block_.as<const StepNumbers>();
  for (const Buffer* buffer : {&modulation_, &input_, &output_}) buffer->discard();
  gather_rows({.rows = reinterpret_cast<const void* const*>(numbers + plan.samples), .out = p.prepared.modulation},
              exec);
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
  Plan& plan = plan_for(std::move(key));
  block_.discard();
  uploader_.upload(block_.data(), block.numbers.data(), block.numbers_bytes(), exec_);
  uploader_.upload(block_.as<char>() + block.numbers_bytes(), block.rows.data(), block.rows_bytes(), exec_);
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
