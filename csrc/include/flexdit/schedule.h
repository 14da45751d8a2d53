// DensitySchedule: the sparse grid of a diffusion timestep.
#pragma once

#include <cstdint>
#include <vector>

#include "flexdit/layout.h"

namespace flexdit {

// Grids from the data end (t = 0) to the noise end (t = num_timesteps). Segment i covers the timesteps
// begins[i] <= t < begins[i + 1]; the last one reaches num_timesteps. Looking a grid up only compares.
class DensitySchedule {
 public:
  // Equal segments of t.
  explicit DensitySchedule(std::vector<Grid> grids, int64_t num_timesteps = 1000);
  DensitySchedule(std::vector<Grid> grids, std::vector<int64_t> begins, int64_t num_timesteps);

  // Four equal segments, each at the pruning rate of its noisy end (method.md, Density schedule).
  static DensitySchedule from_pruning_rates(double r_min, double r_max, Grid dense, int64_t num_timesteps = 1000);
  // A segment for every grid that the continuous pruning rate passes through.
  static DensitySchedule continuous(double r_min, double r_max, Grid dense, int64_t num_timesteps = 1000);

  const Grid& grid(double t) const { return grids_[segment(t)]; }
  // 1 - M / N at timestep t. Source: method.md, Notation.
  double pruning_rate(double t, Grid dense) const;
  // Index of t's segment; throws ArgumentError unless 0 <= t <= num_timesteps.
  size_t segment(double t) const;

  const std::vector<Grid>& grids() const { return grids_; }
  const std::vector<int64_t>& begins() const { return begins_; }
  int64_t num_timesteps() const { return num_timesteps_; }
  bool operator==(const DensitySchedule&) const = default;

 private:
  std::vector<Grid> grids_;
  std::vector<int64_t> begins_;
  int64_t num_timesteps_;
};

// r(t) of the paper: r_min for t < T/4, then linear up to r_max at t = T.
// Source: arXiv 2412.06028, as written in method.md, Density schedule.
double pruning_rate_at(double t, double r_min, double r_max, int64_t num_timesteps);

// The sparse grid at a pruning rate. A side is floor(side * sqrt(1 - r)), where r, published with two decimals,
// counts as up to 0.005 smaller; dense sides that are multiples of 16 keep a multiple of side / 16. Both together
// give the published grids: [0.61, 0.86] -> 10, 8, 7, 6 of 16 and 20, 16, 14, 12 of 32.
Grid grid_at_pruning_rate(double rate, Grid dense);

}  // namespace flexdit
