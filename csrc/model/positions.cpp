#include "model/positions.h"

#include <algorithm>
#include <cmath>

#include "io/cast.h"
#include "model/family.h"

namespace flexdit {
namespace {

constexpr int64_t kMaxPositionRows = 1 << 14;  // of tables that may be wanted again

// `count` sines of at w_i, then as many cosines, w_i = 10000^(-i / count).
void encode(double at, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    const double angle = at * std::pow(10000., -double(i) / double(count));
    out[i] = std::sin(angle), out[count + i] = std::cos(angle);
  }
}

// As the models' own tables are made.
void round_to_float(std::vector<double>& table) {
  for (double& value : table) value = static_cast<float>(value);
}

// The fixed sin-cos embedding of a grid: half of the columns for x, half for y. Source: DiT (after MAE), arXiv
// 2212.09748; for FlexPixArt and FlexLatte stretched to the config's grid and divided by position_scale, as in
// PixArt-alpha, arXiv 2310.00426.
std::vector<double> sincos_positions(const Config& c, const Grid& grid) {
  const Grid base = shares_modulation(c) ? c.dense_grid() : grid;
  const double x_step = double(grid.width) / base.width, y_step = double(grid.height) / base.height;
  std::vector<double> table(static_cast<size_t>(grid.tokens() * c.hidden));
  for (int64_t n = 0; n < grid.tokens(); ++n) {
    double* to = table.data() + n * c.hidden;
    encode(double(n % grid.width) / x_step / c.position_scale, c.hidden / 4, to);
    encode(double(n / grid.width % grid.height) / y_step / c.position_scale, c.hidden / 4, to + c.hidden / 2);
  }
  round_to_float(table);
  return table;
}

// Latte's temporal embedding of every token; a single frame has none (arXiv 2401.03048).
std::vector<double> sincos_times(const Config& c, const Grid& grid) {
  std::vector<double> table(static_cast<size_t>(grid.tokens() * c.hidden));
  if (grid.frames > 1)
    for (int64_t n = 0; n < grid.tokens(); ++n)
      encode(double(n / (int64_t{grid.height} * grid.width)), c.hidden / 2, table.data() + n * c.hidden);
  round_to_float(table);
  return table;
}

}  // namespace

Matrix PositionTables::rows() const {
  const int64_t c = prepared_.config.hidden;
  return {tables_.data(), count_, c, c, prepared_.dtype};
}

int32_t PositionTables::position(const Grid& dense) const {
  for (const auto& [grid, row] : places_)
    if (grid == dense) return row;
  throw ArgumentError("no position table for this size");
}

int64_t PositionTables::rows_of(const Grid& dense) const {
  return (time_place(prepared_.config) ? 2 : 1) * dense.tokens();
}

bool PositionTables::add(std::span<const Grid> coming, std::span<const Grid> staying) {
  const int64_t row_bytes = prepared_.config.hidden * size_of(prepared_.dtype);
  std::vector<Grid> sizes;
  int64_t rows = 0;
  const auto want = [&](const Grid& grid) {
    if (std::find(sizes.begin(), sizes.end(), grid) == sizes.end()) sizes.push_back(grid), rows += rows_of(grid);
  };
  const auto known = [&](const Grid& grid) {
    return std::any_of(places_.begin(), places_.end(), [&](const auto& k) { return k.first == grid; });
  };
  for (const Grid& grid : coming) want(grid);
  if (std::all_of(sizes.begin(), sizes.end(), known)) return false;
  for (const Grid& grid : staying) want(grid);
  for (const auto& [grid, row] : places_)
    if (rows + rows_of(grid) <= kMaxPositionRows) want(grid);
  Buffer tables(rows * row_bytes, prepared_.exec);
  std::vector<std::pair<Grid, int32_t>> places;
  int64_t row = 0;
  for (const Grid& grid : sizes) {
    fill(grid, tables.as<char>() + row * row_bytes);
    places.emplace_back(grid, static_cast<int32_t>(row));
    row += rows_of(grid);
  }
  synchronize(prepared_.exec);  // the old tables may be in use
  tables_ = std::move(tables), places_ = std::move(places), count_ = rows;
  return true;
}

void PositionTables::fill(const Grid& dense, char* to) {
  const Config& c = prepared_.config;
  const int64_t bytes = dense.tokens() * c.hidden * size_of(prepared_.dtype);
  const auto own = parameter_places(c).position;
  if (own && dense == c.dense_grid())
    copy_bytes(to, prepared_.parameters[*own].data, bytes, prepared_.exec);
  else
    upload(sincos_positions(c, dense), to);
  if (time_place(c)) upload(sincos_times(c, dense), to + bytes);
}

void PositionTables::upload(const std::vector<double>& values, void* to) {
  const int64_t count = std::ssize(values), bytes = count * size_of(prepared_.dtype);
  std::vector<std::byte> stored(static_cast<size_t>(bytes));
  io::cast(values.data(), DType::float64, stored.data(), prepared_.dtype, count);
  uploader_.upload(to, stored.data(), bytes, prepared_.exec);
}

}  // namespace flexdit
