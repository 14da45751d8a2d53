#include "flexdit/schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "flexdit/model.h"

namespace flexdit {
namespace {

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

void require(bool holds, const std::string& message) {
  if (!holds) throw ArgumentError(message);
}

std::string text(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

void require_rates(double r_min, double r_max) {
  require(r_min >= 0 && r_min < 1, "r_min is " + text(r_min) + ", must be at least 0 and below 1");
  require(r_max >= r_min && r_max < 1, "r_max is " + text(r_max) + ", must be at least r_min and below 1");
}

// Every side at least 1, and few enough tokens for int32 offsets.
void require_grid(const std::string& name, const Grid& g) {
  const std::string sides =
      "(" + std::to_string(g.frames) + ", " + std::to_string(g.height) + ", " + std::to_string(g.width) + ")";
  require(g.frames > 0 && g.height > 0 && g.width > 0, name + " is " + sides + ", every side must be at least 1");
  const int64_t frame_rows = int64_t{g.frames} * g.height;
  require(frame_rows <= kMaxTokens && frame_rows * g.width <= kMaxTokens,
          name + " is " + sides + ", at most 2^31 - 1 tokens are allowed");
}

std::vector<int64_t> equal_segments(size_t count, int64_t num_timesteps) {
  std::vector<int64_t> begins(count);
  const auto segments = static_cast<int64_t>(count);
  // The first integer t with t / num_timesteps >= i / count.
  for (int64_t i = 0; i < segments; ++i) begins[i] = (i * num_timesteps + segments - 1) / segments;
  return begins;
}

}  // namespace

void fill_layout(std::span<const Grid> grids, LayoutRow* table) {
  int64_t offset = 0;
  for (size_t b = 0; b < grids.size(); ++b) {
    const Grid& g = grids[b];
    require_grid("grid of sample " + std::to_string(b), g);
    table[b] = {static_cast<int32_t>(offset), g};
    offset += g.tokens();
    require(offset <= kMaxTokens, "grids hold more than 2^31 - 1 tokens in all");
  }
  table[grids.size()] = {static_cast<int32_t>(offset), {0, 0, 0}};
}

void fill_row_map(const TokenLayout& layout, std::span<int32_t> row_map) {
  const auto rows = static_cast<int64_t>(row_map.size());
  for (int64_t row = 0, sample = 0; row < rows; ++row) {
    while (sample + 1 < layout.batch && layout.offset(sample + 1) <= row) ++sample;
    row_map[static_cast<size_t>(row)] = static_cast<int32_t>(sample);
  }
}

DensitySchedule::DensitySchedule(std::vector<Grid> grids, int64_t num_timesteps)
    : DensitySchedule(grids, equal_segments(grids.size(), num_timesteps), num_timesteps) {}

DensitySchedule::DensitySchedule(std::vector<Grid> grids, std::vector<int64_t> begins, int64_t num_timesteps)
    : grids_(std::move(grids)), begins_(std::move(begins)), num_timesteps_(num_timesteps) {
  require(!grids_.empty(), "grids is empty, must hold at least one grid");
  require(num_timesteps_ >= 1, "num_timesteps is " + std::to_string(num_timesteps_) + ", must be at least 1");
  require(static_cast<int64_t>(grids_.size()) <= num_timesteps_ + 1,
          "grids holds " + std::to_string(grids_.size()) +
              " grids, at most num_timesteps + 1 = " + std::to_string(num_timesteps_ + 1) + " are allowed");
  require(begins_.size() == grids_.size(), "begins holds " + std::to_string(begins_.size()) +
                                               " timesteps, must hold one for each of the " +
                                               std::to_string(grids_.size()) + " grids");
  require(begins_[0] == 0, "begins starts with " + std::to_string(begins_[0]) + ", must start with 0");
  for (size_t i = 0; i < grids_.size(); ++i) {
    require_grid("grids[" + std::to_string(i) + "]", grids_[i]);
    require(i == 0 || begins_[i] > begins_[i - 1], "begins must ascend");
  }
  require(begins_.back() <= num_timesteps_, "begins ends with " + std::to_string(begins_.back()) +
                                                ", must be at most num_timesteps = " + std::to_string(num_timesteps_));
}

size_t DensitySchedule::segment(double t) const {
  require(t >= 0 && t <= static_cast<double>(num_timesteps_),  // false for NaN
          "t is " + text(t) + ", must lie in [0, " + std::to_string(num_timesteps_) + "]");
  const auto next = std::upper_bound(begins_.begin(), begins_.end(), t,
                                     [](double value, int64_t begin) { return value < static_cast<double>(begin); });
  return static_cast<size_t>(next - begins_.begin()) - 1;
}

double DensitySchedule::pruning_rate(double t, Grid dense) const {
  require_grid("dense_grid", dense);
  return 1 - static_cast<double>(grid(t).tokens()) / static_cast<double>(dense.tokens());
}

double pruning_rate_at(double t, double r_min, double r_max, int64_t num_timesteps) {
  const auto total = static_cast<double>(num_timesteps);
  if (t < total / 4) return r_min;
  return (4 * total - 4 * t) / (3 * total) * r_min + (4 * t - total) / (3 * total) * r_max;
}

Grid grid_at_pruning_rate(double rate, Grid dense) {
  constexpr double kPublishedRounding = 0.005;
  const double keep = std::sqrt(std::min(1., 1 - rate + kPublishedRounding));
  const auto side = [&](int32_t n) {
    const int32_t step = n % 16 == 0 ? n / 16 : 1;
    const auto scaled = static_cast<int32_t>(std::floor(keep * n / step + 1e-9));
    return std::clamp(scaled * step, step, n);
  };
  return {dense.frames, side(dense.height), side(dense.width)};
}

DensitySchedule DensitySchedule::from_pruning_rates(double r_min, double r_max, Grid dense, int64_t num_timesteps) {
  require_rates(r_min, r_max);
  require(num_timesteps >= 4, "num_timesteps is " + std::to_string(num_timesteps) + ", must be at least 4");
  require_grid("dense_grid", dense);
  std::vector<Grid> grids;
  for (int64_t segment = 1; segment <= 4; ++segment) {
    const double end = static_cast<double>(num_timesteps) * static_cast<double>(segment) / 4;
    grids.push_back(grid_at_pruning_rate(pruning_rate_at(end, r_min, r_max, num_timesteps), dense));
  }
  return DensitySchedule(std::move(grids), num_timesteps);
}

DensitySchedule DensitySchedule::continuous(double r_min, double r_max, Grid dense, int64_t num_timesteps) {
  require_rates(r_min, r_max);
  require(num_timesteps >= 1, "num_timesteps is " + std::to_string(num_timesteps) + ", must be at least 1");
  require_grid("dense_grid", dense);
  std::vector<Grid> grids;
  std::vector<int64_t> begins;
  for (int64_t t = 0; t <= num_timesteps; ++t) {  // t = T, pure noise, may have a grid of its own
    const Grid grid = grid_at_pruning_rate(pruning_rate_at(static_cast<double>(t), r_min, r_max, num_timesteps), dense);
    if (!grids.empty() && grid == grids.back()) continue;
    grids.push_back(grid);
    begins.push_back(t);
  }
  return DensitySchedule(std::move(grids), std::move(begins), num_timesteps);
}

DensitySchedule default_schedule(const Config& c, Grid dense) {
  if (c.family == ModelFamily::dit) throw ArgumentError("config has no schedule, and FlexDiT has no default one");
  const bool latte = c.family == ModelFamily::latte;
  // For 16 tokens, or frames, a side.
  std::vector<Grid> grids = {{16, 11, 11}, {16, 9, 9}, {16, 8, 8}, {16, 7, 7}};
  if (latte) grids = {{8, 6, 6}, {6, 6, 6}, {4, 6, 6}, {4, 6, 6}};
  const auto scaled = [](int32_t part, int32_t side) {  // halves to even, as Python rounds
    return std::max(1, static_cast<int32_t>(std::nearbyint(double(part) * side / 16)));
  };
  for (Grid& g : grids)
    g = {scaled(g.frames, dense.frames), scaled(g.height, dense.height), scaled(g.width, dense.width)};
  return DensitySchedule(std::move(grids));
}

}  // namespace flexdit
