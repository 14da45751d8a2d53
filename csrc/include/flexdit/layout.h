// TokenLayout: which packed rows belong to which sample, and the grid they form.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flexdit {

// Tokens of one sample, frame by frame, each frame row by row. Images have one frame.
struct Grid {
  int32_t frames = 1;
  int32_t height = 1;
  int32_t width = 1;

  constexpr int64_t tokens() const { return int64_t{frames} * height * width; }
  bool operator==(const Grid&) const = default;
};

// One line of a layout's table; Python sees the table as an int32 tensor [batch + 1, 4].
struct LayoutRow {
  int32_t offset;  // first packed row of the sample; in the last line the number of rows in all
  Grid grid;       // in the last line (0, 0, 0)
};
static_assert(sizeof(LayoutRow) == 4 * sizeof(int32_t));

// A view of a table and perhaps a row map, on the host or on the device that computes with them. constexpr is what lets
// kernels call it.
struct TokenLayout {
  const LayoutRow* table = nullptr;
  int64_t batch = 0;
  // [rows], at least total() and as many as are asked for: search() of each row. Or null: then sample_of searches.
  const int32_t* row_map = nullptr;

  constexpr int64_t offset(int64_t sample) const { return table[sample].offset; }
  constexpr int64_t total() const { return table[batch].offset; }
  constexpr const Grid& grid(int64_t sample) const { return table[sample].grid; }
  // The sample that owns a packed row.
  constexpr int64_t sample_of(int64_t row) const { return row_map ? row_map[row] : search(row); }
  // The same from the table, O(log batch). Rows behind the total count to the last sample, without samples to sample 0.
  constexpr int64_t search(int64_t row) const {
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (table[middle].offset <= row ? low : high) = middle;
    }
    return low;
  }
};

// Fills batch + 1 lines from the samples' grids. Throws ArgumentError for a grid with an empty side
// or more than 2^31 - 1 rows in all.
void fill_layout(std::span<const Grid> grids, LayoutRow* table);

// Fills a row map from a layout's table: search() of each row.
void fill_row_map(const TokenLayout& layout, std::span<int32_t> row_map);

// A layout that owns its table and its row map on the host.
class HostLayout {
 public:
  explicit HostLayout(std::span<const Grid> grids) : table_(grids.size() + 1) {
    fill_layout(grids, table_.data());
    row_map_.resize(static_cast<size_t>(table_.back().offset));
    fill_row_map(view(), row_map_);
  }
  HostLayout(int64_t batch, Grid grid) : HostLayout(std::vector<Grid>(static_cast<size_t>(batch), grid)) {}
  TokenLayout view() const { return {table_.data(), static_cast<int64_t>(table_.size()) - 1, row_map_.data()}; }

 private:
  std::vector<LayoutRow> table_;
  std::vector<int32_t> row_map_;
};

// PyTorch's index rules (method.md, Blocks): pooling window i of n -> m, and nearest source of j.
constexpr int64_t window_begin(int64_t i, int64_t n, int64_t m) { return i * n / m; }
constexpr int64_t window_end(int64_t i, int64_t n, int64_t m) { return ((i + 1) * n + m - 1) / m; }
constexpr int64_t nearest_source(int64_t j, int64_t n, int64_t m) { return j * m / n; }

}  // namespace flexdit
