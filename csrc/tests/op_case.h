// One operation on one set of sizes: its fields, a naive twin, and how to call it. ops_test.cpp runs them all.
#pragma once

#include <functional>
#include <string>

#include "naive.h"

namespace flexdit::test {

struct Field {
  const char* name;
  int64_t rows, cols;
  bool differentiable = true;  // of an input: backward writes its gradient; of an output: it has one
  bool sizes = false;          // the operation takes its sizes from this field, so others are blamed when it is cut
  bool optional = false;
  bool accumulation = false;  // stored in the accumulation type
};

// Fields of a case that its operation does not have: the output that starts as a copy of it, and an output that is
// a copy of an input, whose gradient is what `+=` finds.
constexpr const char* kStart = "(start)";
constexpr const char* kCopy = "(copy)";
inline bool is_field(const Field& field) { return field.name[0] != '('; }

using Views = std::vector<Matrix>;

struct OpCase {
  std::string op, variant;
  std::vector<Field> inputs, outputs;
  std::function<std::vector<Values>(const std::vector<Values>& in)> naive;
  std::function<void(const Views& in, const Views& out, const Execution&)> forward;
  // grad_out and grad_in have a view for every output and input; those without a gradient are empty.
  std::function<void(const Views& in, const Views& grad_out, const Views& grad_in, const Execution&)> backward = {};
  bool in_place = false;  // backward copies between fields before it calls the operation
  bool large = false;     // so large that finite differences are taken in a few directions only
};

// Whether layouts of cases bring a row map along or have every row searched for.
inline bool row_maps = true;
struct CaseLayout : HostLayout {
  using HostLayout::HostLayout;
  TokenLayout view() const {
    TokenLayout layout = HostLayout::view();
    if (!row_maps) layout.row_map = nullptr;
    return layout;
  }
};

// A batch: dense grids, the sparse grids that they exchange tokens with, and where the dense grids' position tables
// begin (nothing: all at row 0).
struct Batch {
  const char* name;
  naive::Grids dense, sparse;
  std::vector<int32_t> position_offset = {};

  CaseLayout layout() const { return CaseLayout(dense); }
  CaseLayout sparse_layout() const { return CaseLayout(sparse); }
  int64_t size() const { return static_cast<int64_t>(dense.size()); }
  int64_t rows() const { return naive::total(dense); }
  int64_t sparse_rows() const { return naive::total(sparse); }
  int64_t position_rows() const {
    int64_t rows = dense[0].tokens();
    for (size_t b = 0; b < position_offset.size(); ++b) rows = std::max(rows, position_offset[b] + dense[b].tokens());
    return rows;
  }
  PositionTable positions(const Matrix& rows) const {
    return {rows, position_offset.empty() ? nullptr : position_offset.data()};
  }
};

std::vector<OpCase> linear_cases();
std::vector<OpCase> elementwise_cases();
std::vector<OpCase> norm_cases();
std::vector<OpCase> exchange_cases();
std::vector<OpCase> attention_cases();
std::vector<OpCase> end_cases();         // patches, labels
std::vector<OpCase> model_size_cases();  // of norms, residuals and exchange
std::vector<OpCase> empty_cases();       // no rows, no samples
std::vector<OpCase> empty_token_cases();

}  // namespace flexdit::test
