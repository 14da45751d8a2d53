// TokenLayout and DensitySchedule.
#include "flexdit/schedule.h"

#include <limits>

#include "check.h"
#include "support.h"

using namespace flexdit;
using flexdit::test::argument_error;

namespace {

bool names(const std::string& message, const char* field) { return message.find(field) != std::string::npos; }

const Grid kSquare16{1, 16, 16}, kSquare32{1, 32, 32};

std::vector<Grid> distinct_grids(size_t count) {
  std::vector<Grid> grids;
  for (size_t i = 0; i < count; ++i) grids.push_back({1, static_cast<int32_t>(20 - i), 3});
  return grids;
}

std::string sides(const DensitySchedule& schedule) {
  std::string text;
  for (const Grid& g : schedule.grids()) text += std::to_string(g.height) + (g.height == g.width ? " " : "! ");
  return text;
}

}  // namespace

TEST_CASE(layout_of_ragged_samples) {
  const std::vector<Grid> grids = {{1, 4, 3}, {1, 1, 1}, {2, 3, 5}, {1, 1, 7}};
  const HostLayout owner(grids);
  const TokenLayout layout = owner.view();
  CHECK_EQ(layout.batch, 4);
  CHECK_EQ(layout.total(), 12 + 1 + 30 + 7);
  int64_t row = 0;
  for (int64_t b = 0; b < layout.batch; ++b) {
    CHECK(layout.grid(b) == grids[static_cast<size_t>(b)]);
    CHECK_EQ(layout.offset(b), row);
    for (int64_t n = 0; n < grids[static_cast<size_t>(b)].tokens(); ++n) CHECK_EQ(layout.sample_of(row++), b);
  }
  CHECK((layout.table[4].grid == Grid{0, 0, 0}));
}

TEST_CASE(layout_of_equal_samples) {
  for (int64_t batch : {1, 2, 3, 31, 32, 33}) {
    const HostLayout owner(batch, Grid{1, 2, 3});
    const TokenLayout layout = owner.view();
    CHECK_EQ(layout.total(), 6 * batch);
    for (int64_t row = 0; row < layout.total(); ++row) CHECK_EQ(layout.sample_of(row), row / 6);
  }
  const HostLayout none(std::span<const Grid>{});
  CHECK_EQ(none.view().total(), 0);
}

// Rows behind the total count to the last sample, as in a search.
TEST_CASE(row_maps) {
  const std::vector<Grid> ragged = {{1, 4, 3}, {1, 1, 1}, {2, 3, 5}, {1, 1, 7}, {1, 1, 1}};
  for (const auto& grids :
       {ragged, std::vector<Grid>{{1, 2, 3}}, std::vector<Grid>{}, std::vector<Grid>(33, {1, 2, 2})}) {
    const HostLayout owner(grids);
    TokenLayout layout = owner.view();
    for (int64_t row = 0; row < layout.total(); ++row) CHECK_EQ(layout.row_map[row], layout.search(row));
    for (const int64_t spare : {-1, 0, 9}) {
      std::vector<int32_t> map(static_cast<size_t>(std::max<int64_t>(layout.total() + spare, 0)) + 1, -7);
      fill_row_map(layout, std::span(map).first(map.size() - 1));
      layout.row_map = map.data();
      for (size_t row = 0; row + 1 < map.size(); ++row)
        CHECK_EQ(layout.sample_of(static_cast<int64_t>(row)), layout.search(static_cast<int64_t>(row)));
      CHECK_EQ(map.back(), -7);
    }
  }
}

TEST_CASE(layout_refuses_empty_sides) {
  for (const Grid& bad : {Grid{0, 2, 2}, Grid{1, 0, 2}, Grid{1, 2, 0}, Grid{1, -2, -2}, Grid{-1, 2, -2}}) {
    const std::vector<Grid> grids = {{1, 1, 1}, bad};
    const auto message = argument_error([&] { HostLayout{grids}; });
    CHECK_NOTE(names(message, "sample 1"), message);
  }
}

TEST_CASE(layout_refuses_too_many_rows) {
  const int32_t largest = std::numeric_limits<int32_t>::max();
  const std::vector<Grid> full = {{1, 1, largest}};
  CHECK_EQ(HostLayout(full).view().total(), int64_t{largest});
  const auto refused = [](std::vector<Grid> grids) {
    return names(argument_error([&] { HostLayout{grids}; }), "2^31 - 1");
  };
  CHECK(refused({{1, 1, largest}, {1, 1, 1}}));
  CHECK(refused({{1, 1 << 16, 1 << 15}}));
  CHECK(refused({{1, largest, largest}}));
  CHECK(refused({{1 << 22, 1 << 21, 1 << 21}}));  // 2^64 tokens: a product of three sides in 64 bits would be 0
  CHECK(refused({{largest, largest, largest}}));
}

TEST_CASE(equal_segments_are_exact) {
  for (int64_t total : {1000, 999, 997, 50, 7, 4096}) {
    for (int64_t segments = 1; segments <= 7; ++segments) {
      const DensitySchedule schedule(distinct_grids(static_cast<size_t>(segments)), total);
      for (int64_t t = 0; t <= total; ++t) {
        const int64_t wanted = std::min(t * segments / total, segments - 1);
        CHECK_EQ(schedule.segment(static_cast<double>(t)), static_cast<size_t>(wanted));
      }
    }
  }
}

TEST_CASE(fractional_timesteps) {
  const DensitySchedule schedule(distinct_grids(4));
  CHECK_EQ(schedule.segment(249.999999), 0u);
  CHECK_EQ(schedule.segment(std::nextafter(250.0, 0.0)), 0u);
  CHECK_EQ(schedule.segment(250.0), 1u);
  CHECK_EQ(schedule.segment(std::nextafter(500.0, 1000.0)), 2u);
  CHECK_EQ(schedule.segment(-0.0), 0u);
  CHECK(schedule.grid(999.5) == schedule.grids()[3]);
}

TEST_CASE(timesteps_outside_throw) {
  const DensitySchedule schedule(distinct_grids(4));
  const double infinity = std::numeric_limits<double>::infinity();
  for (double t : {std::nan(""), -1e-9, -1.0, 1000.0000001, 1e300, infinity, -infinity}) {
    const auto message = argument_error([&] { schedule.segment(t); });
    CHECK_NOTE(message.rfind("t is ", 0) == 0, "t = ", t, ", message: ", message);
    CHECK(!argument_error([&] { schedule.pruning_rate(t, kSquare16); }).empty());
  }
}

TEST_CASE(published_grids) {
  CHECK_EQ(sides(DensitySchedule::from_pruning_rates(0.61, 0.86, kSquare16)), "10 8 7 6 ");
  CHECK_EQ(sides(DensitySchedule::from_pruning_rates(0.61, 0.86, kSquare32)), "20 16 14 12 ");
}

TEST_CASE(frames_and_oblong_grids) {
  const auto schedule = DensitySchedule::from_pruning_rates(0.61, 0.86, {16, 16, 32});
  CHECK((schedule.grids()[0] == Grid{16, 10, 20}));
  const auto everything = DensitySchedule::from_pruning_rates(0, 0, {2, 5, 7});
  for (const Grid& g : everything.grids()) CHECK((g == Grid{2, 5, 7}));
  const auto little = DensitySchedule::from_pruning_rates(0.999, 0.999, {2, 5, 7});
  for (const Grid& g : little.grids()) CHECK((g == Grid{2, 1, 1}));
}

TEST_CASE(own_segments) {
  const DensitySchedule schedule(distinct_grids(3), {0, 10, 999}, 1000);
  CHECK_EQ(schedule.segment(9.9), 0u);
  CHECK_EQ(schedule.segment(10), 1u);
  CHECK_EQ(schedule.segment(998), 1u);
  CHECK_EQ(schedule.segment(1000), 2u);
  CHECK_NEAR(schedule.pruning_rate(0, kSquare16), 1 - 60.0 / 256, 1e-15);
  CHECK(schedule == DensitySchedule(distinct_grids(3), {0, 10, 999}, 1000));
  CHECK(!(schedule == DensitySchedule(distinct_grids(3), {0, 11, 999}, 1000)));
}

// r(t) as method.md writes it.
TEST_CASE(pruning_rate_formula) {
  for (int t = 0; t <= 1000; ++t) {
    const double ramp = (4.0 * 1000 - 4.0 * t) / 3000 * 0.61 + (4.0 * t - 1000) / 3000 * 0.86;
    CHECK_NEAR(pruning_rate_at(t, 0.61, 0.86, 1000), t < 250 ? 0.61 : ramp, 1e-15);
  }
  CHECK_NEAR(pruning_rate_at(250, 0.61, 0.86, 1000), 0.61, 1e-15);
  CHECK_NEAR(pruning_rate_at(1000, 0.61, 0.86, 1000), 0.86, 1e-15);
}

TEST_CASE(continuous_follows_the_formula) {
  for (const Grid& dense : {kSquare16, kSquare32, Grid{1, 24, 40}, Grid{4, 9, 5}}) {
    for (int64_t total : {1000, 250, 1}) {
      const auto schedule = DensitySchedule::continuous(0.5, 0.9, dense, total);
      CHECK_EQ(schedule.begins()[0], 0);
      for (int64_t t = 0; t < total; ++t) {
        const double rate = pruning_rate_at(static_cast<double>(t), 0.5, 0.9, total);
        CHECK(schedule.grid(static_cast<double>(t)) == grid_at_pruning_rate(rate, dense));
      }
      for (size_t i = 1; i < schedule.grids().size(); ++i) {
        CHECK(!(schedule.grids()[i] == schedule.grids()[i - 1]));
        CHECK(schedule.grids()[i].tokens() < schedule.grids()[i - 1].tokens());
      }
    }
  }
}

TEST_CASE(schedule_arguments) {
  CHECK(names(argument_error([] { DensitySchedule({}); }), "grids"));
  CHECK(names(argument_error([] { DensitySchedule({}, {}, 10); }), "grids"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(2), 0); }), "num_timesteps"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(2), -5); }), "num_timesteps"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(4), 2); }), "grids"));
  CHECK(names(argument_error([] { DensitySchedule({{1, 2, 2}, {1, 0, 2}}); }), "grids[1]"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(2), {0}, 10); }), "begins"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(2), {1, 2}, 10); }), "begins"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(2), {0, 0}, 10); }), "begins"));
  CHECK(names(argument_error([] { DensitySchedule(distinct_grids(2), {0, 11}, 10); }), "begins"));
}

TEST_CASE(pruning_rate_arguments) {
  CHECK(names(argument_error([] { DensitySchedule::from_pruning_rates(-0.1, 0.5, kSquare16); }), "r_min"));
  CHECK(names(argument_error([] { DensitySchedule::from_pruning_rates(std::nan(""), 0.5, kSquare16); }), "r_min"));
  CHECK(names(argument_error([] { DensitySchedule::from_pruning_rates(0.5, 0.4, kSquare16); }), "r_max"));
  CHECK(names(argument_error([] { DensitySchedule::continuous(0.5, 1.0, kSquare16); }), "r_max"));
  CHECK(names(argument_error([] { DensitySchedule::continuous(0.5, std::nan(""), kSquare16); }), "r_max"));
  CHECK(names(argument_error([] { DensitySchedule::from_pruning_rates(0.5, 0.6, kSquare16, 3); }), "num_timesteps"));
  CHECK(names(argument_error([] { DensitySchedule::continuous(0.5, 0.6, kSquare16, 0); }), "num_timesteps"));
  CHECK(names(argument_error([] { DensitySchedule::continuous(0.5, 0.6, {1, 0, 4}); }), "dense_grid"));
  CHECK(names(argument_error([] { DensitySchedule::continuous(0.5, 0.6, {1, -4, -4}); }), "dense_grid"));
  CHECK(names(argument_error([] { DensitySchedule::from_pruning_rates(0.5, 0.6, {1, -4, -4}); }), "dense_grid"));
}
