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

// Values that the type holds; in float32 with bits in all three digits of a product on tiles.
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
// One row, odd sizes, less than a tile, several pieces (over 512 rows), many chunks, weights that float32 takes to
// tiles.
const Case kCases[] = {{1, 1, 1}, {1, 70, 33},     {3, 17, 2000}, {47, 32, 64},     {530, 33, 40},
                       {0, 5, 7}, {150, 40, 4608}, {0, 260, 256}, {20, 1030, 4608}, {530, 261, 259}};

// Seen: float32 2.2e-7 on tiles, which large weights get, 8.7e-7 of oneDNN; bfloat16 2.9e-3.
double bound_of(DType dtype, const Values& weight, bool few_rows_backward = false) {
  const bool tiles = cpu::has_amx() && std::min(weight.rows, weight.cols) >= 256 && !few_rows_backward;
  return dtype == DType::bfloat16 ? 4e-3 : tiles ? 4e-7 : 1.5e-6;
}

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
    CHECK_NOTE(error <= bound_of(l.dtype, l.weight), name, ": ", error);
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
      const double bound = bound_of(l.dtype, l.weight, l.x.rows < 256);
      CHECK_NOTE(relative_error(got[0], wanted) <= bound, name, " grad_x: ", relative_error(got[0], wanted));
      CHECK_NOTE(relative_error(got[1], grad_w) <= bound, name, " grad_w: ", relative_error(got[1], grad_w));
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

// Rows, columns and stretches of k of very different size: the error is small beside the row's and the column's own.
TEST_CASE(values_of_any_size_are_summed_closely) {
  for (const double tail : {1.0, 3.0}) {  // 3: a few are ten times the others
    Layer l = layer_of({70, 300, 1000}, DType::float32);
    const auto spread = [&](Values& x, int most) {
      for (int64_t i = 0; i < x.rows; ++i)
        for (int64_t k = 0; k < x.cols; ++k) {
          double& v = x(i, k);
          v = static_cast<float>(
              std::ldexp(v * std::pow(std::abs(v) + 1e-3, -tail / 2), static_cast<int>(i % 7 - 3) * most));
        }
    };
    spread(l.x, 12), spread(l.weight, 9);
    l.bias = Values(1, 300);
    const Values got = l.forward(0, 70, 2, false, true), wanted = naive::linear(l.x, l.weight, l.bias);
    double worst = 0;
    for (int64_t i = 0; i < 70; ++i)
      for (int64_t j = 0; j < 300; ++j) {
        double x = 0, w = 0;
        for (int64_t k = 0; k < 1000; ++k) x += l.x(i, k) * l.x(i, k), w += l.weight(j, k) * l.weight(j, k);
        worst = std::max(worst, std::abs(got(i, j) - wanted(i, j)) / std::sqrt(x * w));
      }
    std::printf("  tails %g: %.1e of the norms\n", tail, worst);
    CHECK_NOTE(worst <= (cpu::has_amx() ? 7e-8 : 1.5e-7), worst);  // seen: 4.5e-8 on tiles, 9.4e-8 of oneDNN
  }
  // A line of zeros, and values near both ends of float32.
  Layer l = layer_of({20, 260, 300}, DType::float32);
  for (int64_t k = 0; k < 300; ++k) l.x(3, k) = 0, l.x(4, k) *= 0x1p-126, l.x(5, k) *= 0x1p+118;
  const Values got = l.forward(0, 20, 1, false, false), wanted = naive::linear(l.x, l.weight, l.bias);
  for (int64_t j = 0; j < 260; ++j) {
    CHECK(std::abs(got(3, j) - wanted(3, j)) == 0 && std::abs(got(4, j) - wanted(4, j)) < 1e-30);
    CHECK_NOTE(std::abs(got(5, j) - wanted(5, j)) <= 1e-6 * 0x1p+122, got(5, j), " ", wanted(5, j));
  }
}

TEST_CASE(what_is_not_finite_stays_so) {
  const Case sizes[] = {{40, 35, 50}, {40, 264, 260}};  // float32 takes the second to tiles
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const Case& c : sizes)
      for (const double bad : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
        Layer l = layer_of(c, dtype);
        l.x(33, c.k - 1) = bad;
        const Values y = l.forward(0, c.m, 2, false, false);
        for (int64_t i = 0; i < c.m; ++i)
          for (int64_t j = 0; j < c.n; ++j)
            CHECK_NOTE(std::isfinite(y(i, j)) == (i != 33), name_of(dtype), " ", bad, ": y(", i, ", ", j, ") ",
                       y(i, j));
      }
}
