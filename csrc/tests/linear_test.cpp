// Linear layers on the CPU at sizes that are cut into pieces, chunks and shares, with values of all 24 bits: against
// sums in double; packed, strided, on other numbers of threads and in other company, where AVX-512 promises the same
// bits.
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"
#include "naive.h"
#include "support.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

// Values that the type holds; in float32 with bits in all three planes of a product on tiles.
Values full_values(int64_t rows, int64_t cols, DType dtype, Random& random) {
  Values out(rows, cols);
  for (double& x : out.v) {
    float value = static_cast<float>(std::ldexp(static_cast<double>(random.next() >> 11), -52) - 1);
    if (dtype == DType::bfloat16) write(&value, dtype, value), value = static_cast<float>(read(&value, dtype));
    x = value;
  }
  return out;
}

struct Case {
  int64_t m, n, k;
};
// One row, odd sizes, less than a tile, several pieces (over 512 rows), many chunks, a weight that float32 takes to
// tiles.
const Case kCases[] = {{1, 1, 1},     {1, 70, 33},     {3, 17, 2000}, {47, 32, 64},
                       {530, 33, 40}, {150, 40, 4608}, {0, 5, 7},     {20, 1030, 4608}};

// Forward. Seen: float32 2.3e-7 on tiles, which large weights get, 8.7e-7 of oneDNN; bfloat16 2.9e-3.
double bound_of(DType dtype, int64_t n, int64_t k) {
  const bool tiles = cpu::has_amx() && std::min(n, k) >= 1024;
  return dtype == DType::bfloat16 ? 4e-3 : tiles ? 4e-7 : 1.5e-6;
}
double backward_bound(DType dtype) { return bound_of(dtype, 0, 0); }

// The largest error, of the largest value.
double relative_error(const Values& got, const Values& wanted) {
  double largest = 0, scale = 1e-30;
  for (size_t i = 0; i < wanted.v.size(); ++i) {
    scale = std::max(scale, std::abs(wanted.v[i]));
    const double error = std::abs(got.v[i] - wanted.v[i]);
    largest = std::isnan(error) ? INFINITY : std::max(largest, error);
  }
  return largest / scale;
}

Values transposed(const Values& x) {
  Values y(x.cols, x.rows);
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < x.cols; ++j) y(j, i) = x(i, j);
  return y;
}

bool same(const Values& a, const Values& b) { return a.v == b.v; }
// oneDNN's code for AVX2 sums in an order that depends on shapes.
bool promises_bits() {
  const std::string set = cpu::instruction_set();
  return set == "avx512" || set == "amx";
}

struct Layer {
  Values x, weight, bias;
  DType dtype;

  Values forward(int64_t first, int64_t rows, int threads, bool strided, bool packed) const {
    Values part(rows, x.cols);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < x.cols; ++j) part(i, j) = x(first + i, j);
    Tensor in(part, dtype, strided), w(weight, dtype, strided), b(bias, dtype), y(rows, weight.rows, dtype, strided);
    const Execution exec{.threads = threads};
    const PackedWeightPointer tiles = packed ? pack_weight(w.view(), exec) : nullptr;
    linear({.x = in.view(), .weight = w.view(), .bias = b.view(), .y = y.view(), .packed = tiles.get()}, exec);
    CHECK(in.guards_intact() && y.guards_intact());
    return y.values();
  }

  std::vector<Values> backward(const Values& grad, int threads, bool strided, bool accumulate) const {
    Tensor in(x, dtype, strided), w(weight, dtype, strided), g(grad, dtype, strided);
    Tensor grad_x(x.rows, x.cols, dtype, strided), grad_w(weight.rows, weight.cols, dtype, strided);
    if (accumulate) grad_x.fill(x);
    std::vector<char> workspace(static_cast<size_t>(linear_backward_workspace(dtype, weight.rows, weight.cols)));
    linear_backward({.x = in.view(),
                     .weight = w.view(),
                     .grad_y = g.view(),
                     .grad_x = grad_x.view(),
                     .grad_weight = grad_w.view(),
                     .accumulate_grad_x = accumulate,
                     .workspace = workspace.data()},
                    {.threads = threads});
    CHECK(grad_x.guards_intact() && grad_w.guards_intact());
    return {grad_x.values(), grad_w.values()};
  }
};

Layer layer_of(const Case& c, DType dtype) {
  Random random(static_cast<uint64_t>(c.m * 7919 + c.n * 31 + c.k));
  return {full_values(c.m, c.k, dtype, random), full_values(c.n, c.k, dtype, random),
          full_values(1, c.n, dtype, random), dtype};
}

template <class Body>
void for_layers(Body&& body) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const Case& c : kCases) body(layer_of(c, dtype), check::text(name_of(dtype), " ", c.m, "x", c.n, "x", c.k));
}

}  // namespace

TEST_CASE(forward_is_close_to_double) {
  double worst[2] = {};
  for_layers([&](const Layer& l, const std::string& name) {
    const double error = relative_error(l.forward(0, l.x.rows, 2, false, false), naive::linear(l.x, l.weight, l.bias));
    CHECK_NOTE(error <= bound_of(l.dtype, l.weight.rows, l.weight.cols), name, ": ", error);
    double& seen = worst[l.dtype == DType::bfloat16];
    seen = std::max(seen, error);
  });
  std::printf("  instruction set %s: float32 %.1e, bfloat16 %.1e\n", cpu::instruction_set(), worst[0], worst[1]);
}

TEST_CASE(backward_is_close_to_double) {
  for_layers([](const Layer& l, const std::string& name) {
    Random random(5);
    const Values grad = full_values(l.x.rows, l.weight.rows, l.dtype, random);
    const Values none, grad_x = naive::linear(grad, transposed(l.weight), none),
                       grad_w = naive::linear(transposed(grad), transposed(l.x), none);
    for (const bool accumulate : {false, true}) {
      const auto got = l.backward(grad, 2, accumulate, accumulate);
      Values wanted = grad_x;
      for (size_t i = 0; accumulate && i < wanted.v.size(); ++i) wanted.v[i] += l.x.v[i];
      CHECK_NOTE(relative_error(got[0], wanted) <= backward_bound(l.dtype), name,
                 " grad_x: ", relative_error(got[0], wanted));
      CHECK_NOTE(relative_error(got[1], grad_w) <= backward_bound(l.dtype), name,
                 " grad_w: ", relative_error(got[1], grad_w));
    }
  });
}

TEST_CASE(rows_do_not_depend_on_threads_packing_or_company) {
  check::skipped = !promises_bits();
  if (check::skipped) return;
  for_layers([](const Layer& l, const std::string& name) {
    const Values whole = l.forward(0, l.x.rows, 1, false, false);
    for (const int threads : {1, 2, 5}) {
      CHECK_NOTE(same(l.forward(0, l.x.rows, threads, false, false), whole), name, ", threads ", threads);
      CHECK_NOTE(same(l.forward(0, l.x.rows, threads, false, true), whole), name, ", packed, threads ", threads);
    }
    for (const int64_t rows : {1, 2, 17, 40, 129})
      for (const int64_t first : {int64_t{0}, l.x.rows - rows}) {
        if (rows > l.x.rows) continue;
        const Values part = l.forward(first, rows, 2, false, true);
        bool equal = true;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < whole.cols; ++j) equal = equal && part(i, j) == whole(first + i, j);
        CHECK_NOTE(equal, name, ", rows ", first, " to ", first + rows);
      }
  });
}

TEST_CASE(what_is_not_finite_stays_so) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const double bad : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
      Layer l = layer_of({40, 35, 50}, dtype);
      l.x(33, 49) = bad;
      const Values y = l.forward(0, 40, 2, false, false);
      for (int64_t i = 0; i < 40; ++i)
        for (int64_t j = 0; j < 35; ++j)
          CHECK_NOTE(std::isfinite(y(i, j)) == (i != 33), name_of(dtype), " ", bad, ": y(", i, ", ", j, ") ", y(i, j));
    }
}
