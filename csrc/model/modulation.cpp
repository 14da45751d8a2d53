// The modulations of a trajectory.
#include <algorithm>

#include "model/arena.h"
#include "model/family.h"

namespace flexdit {
namespace {

struct Workspace {
  Matrix features, condition;  // [S, F], or with size conditions [2 S, F]; [S, C]
  Matrix activated, shared;    // of a shared modulation: [S, C], [S, 6C]
  Matrix sides, ratio;         // of size conditions: [2 S, C/3], [S, C/3]
  void* temporary;
};

Workspace plan(const Config& c, int64_t samples, DType dtype, Arena& arena) {
  const int64_t numbers = c.size_conditions ? 2 * samples : samples;
  Workspace w;
  w.features = arena.matrix(numbers, c.timestep_features, dtype);
  w.condition = arena.matrix(samples, c.hidden, dtype);
  if (shares_modulation(c)) {
    w.activated = arena.matrix(samples, c.hidden, dtype);
    w.shared = arena.matrix(samples, 6 * c.hidden, dtype);
  }
  if (c.size_conditions)
    w.sides = arena.matrix(numbers, c.hidden / 3, dtype), w.ratio = arena.matrix(samples, c.hidden / 3, dtype);
  int64_t temporary = condition_workspace_bytes(samples, c.hidden, c.timestep_features, dtype);
  if (c.size_conditions)
    temporary = std::max(temporary, condition_workspace_bytes(numbers, c.hidden / 3, c.timestep_features, dtype));
  w.temporary = arena.bytes(temporary);
  return w;
}

class Condition {
 public:
  Condition(const ModelModulation& p, const Workspace& w, const Execution& exec)
      : p_(p), w_(w), exec_(exec), places_(parameter_places(p.config)) {}

  void run() {
    embed(places_.timestep, p_.t, p_.config.timestep_shift, w_.condition);
    if (places_.label)
      label_embedding({.labels = p_.labels, .table = p_.parameters[*places_.label], .x = w_.condition}, exec_);
    if (!p_.config.size_conditions) return;
    const int64_t samples = w_.condition.rows, third = p_.config.hidden / 3;
    embed(*places_.resolution, p_.resolution, 0, w_.sides);
    add({w_.sides.data, samples, 2 * third, 2 * third, w_.sides.dtype}, 0);
    embed(*places_.aspect_ratio, p_.aspect_ratio, 0, w_.ratio);
    add(w_.ratio, 2 * third);
  }

 private:
  // W2 SiLU(W1 features + b1) + b2 of some numbers.
  void embed(size_t first_parameter, const double* numbers, int64_t shift, const Matrix& out) {
    const Matrix features = w_.features.row_range(0, out.rows);
    timestep_embedding({.t = numbers, .out = features, .shift = shift}, exec_);
    condition_forward({.parameters = p_.parameters.subspan(first_parameter, 4),
                       .features = features,
                       .out = out,
                       .workspace = w_.temporary},
                      exec_);
  }
  // To some columns of the condition.
  void add(const Matrix& part, int64_t first) {
    const Matrix columns = w_.condition.columns(first, part.cols);
    add_tables({.x = columns, .table = part, .out = columns, .own_tables = true}, exec_);
  }

  const ModelModulation& p_;
  const Workspace& w_;
  const Execution& exec_;
  const ParameterPlaces places_;
};

}  // namespace

int64_t model_modulation_columns(const Config& c) {
  return (6 * block_count(c) + 2) * c.hidden;
}

int64_t model_modulation_workspace_bytes(const Config& config, int64_t samples, DType dtype) {
  Arena arena;
  plan(config, samples, dtype, arena);
  return arena.used();
}

void model_modulation(const ModelModulation& p, const Execution& exec) {
  Arena arena(p.workspace);
  const Workspace w = plan(p.config, p.out.rows, p.out.dtype, arena);
  Condition(p, w, exec).run();
  if (!shares_modulation(p.config)) {
    silu({.x = w.condition, .y = w.condition}, exec);
    return linear({.x = w.condition, .weight = p.weight, .bias = p.bias, .y = p.out, .packed = p.packed}, exec);
  }
  silu({.x = w.condition, .y = w.activated}, exec);
  linear({.x = w.activated, .weight = p.weight, .bias = p.bias, .y = w.shared, .packed = p.packed}, exec);
  const int64_t c = p.config.hidden, blocks = p.tables.rows / 6;
  add_tables({.x = w.shared,
              .table = {p.tables.data, blocks, 6 * c, 6 * c, p.tables.dtype},
              .out = p.out.columns(0, 6 * c * blocks)},
             exec);
  add_tables(
      {.x = w.condition, .table = p.tables.row_range(6 * blocks, 2), .out = p.out.columns(6 * c * blocks, 2 * c)},
      exec);
}

}  // namespace flexdit
