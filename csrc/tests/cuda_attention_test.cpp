// The CUDA attention kernels on the emulator against the CPU's in float64, from the same values.
#include "check.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "message_of.h"
#include "support.h"

namespace flexdit::test {
namespace {

using Lengths = std::vector<int>;

// Largest difference over the largest value (at least 1/4, for gradients that cancel to zero), of lse over at least 1.
// Beside each the worst that was measured in this program, on the emulator with g++ 12.
struct Bounds {
  DType dtype;
  double out, lse, grad_q, grad_k, grad_v;
};
constexpr Bounds kBounds[] = {
    {DType::float32, 1e-6, 3e-7, 1e-6, 5e-6, 2e-6},   // 3.2e-7 1.1e-7 2.0e-7 2.2e-6 8.3e-7
    {DType::bfloat16, 6e-3, 3e-7, 4e-3, 8e-3, 6e-3},  // 3.2e-3 1.2e-7 1.3e-3 3.8e-3 3.3e-3
    {DType::float16, 8e-4, 3e-7, 4e-4, 1e-3, 8e-4},   // 4.4e-4 1.2e-7 1.3e-4 6.7e-4 4.4e-4
};
Bounds worst[3] = {{DType::float32}, {DType::bfloat16}, {DType::float16}};

enum class Placement {
  packed,     // rows back to back
  columns,    // of a matrix three times as wide, as q, k and v lie in the product of a qkv layer
  unaligned,  // at an odd address with an odd stride
};

struct Case {
  const char* name;
  Lengths queries, keys;
  int heads, head_size;
  Placement placement = Placement::packed;
  int spare = 0;  // rows behind the layout's total
  bool dtypes[3] = {true, true, true};
};

int64_t total(const Lengths& lengths) {
  int64_t sum = 0;
  for (int n : lengths) sum += n;
  return sum;
}
HostLayout layout_of(const Lengths& lengths) {
  std::vector<Grid> grids;
  for (int n : lengths) grids.push_back({1, 1, n});
  return HostLayout(grids);
}

float decode(const unsigned char* p, DType dtype) {
  const auto as = [p](auto value) { return std::memcpy(&value, p, sizeof value), cuda::to_float(value); };
  return dtype == DType::float32 ? as(float{}) : dtype == DType::bfloat16 ? as(cuda::bfloat16{}) : as(cuda::float16{});
}
void encode(unsigned char* p, DType dtype, double x) {
  const auto single = static_cast<float>(x);
  const uint16_t half = dtype == DType::bfloat16 ? cuda::bfloat16_bits(single) : cuda::float16_bits(single);
  dtype == DType::float32 ? std::memcpy(p, &single, 4) : std::memcpy(p, &half, 2);
}

// Rows of a matrix as `placement` says, among bytes that must stay as they are.
class Device {
 public:
  Device(int64_t rows, int64_t cols, DType dtype, Placement placement)
      : rows_(rows), cols_(cols), dtype_(dtype), size_(size_of(dtype)) {
    stride_ = placement == Placement::columns ? 3 * cols : placement == Placement::unaligned ? cols + 3 : cols;
    first_ = placement == Placement::columns ? cols : placement == Placement::unaligned ? 1 : 0;
    bytes_ = static_cast<size_t>((rows * stride_ + first_ + 8) * size_);
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(128, (bytes_ + 127) / 128 * 128)));
    std::memset(memory_.get(), kPoison, bytes_);
  }
  Device(const Values& values, int64_t rows, DType dtype, Placement placement)
      : Device(rows, values.cols, dtype, placement) {
    for (int64_t i = 0; i < values.rows; ++i)
      for (int64_t j = 0; j < cols_; ++j) encode(at(i, j), dtype_, values(i, j));
  }
  Matrix view() { return {at(0, 0), rows_, cols_, stride_, dtype_}; }
  Values values() {
    Values out(rows_, cols_);
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < cols_; ++j) out(i, j) = decode(at(i, j), dtype_);
    return out;
  }
  bool guards_intact() const {
    const int64_t row = stride_ * size_, begin = first_ * size_;
    for (int64_t k = 0; k < static_cast<int64_t>(bytes_); ++k) {
      const int64_t r = (k - begin) / row, c = (k - begin) % row;
      const bool inside = k >= begin && r < rows_ && c < cols_ * size_;
      if (!inside && memory_.get()[k] != kPoison) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  unsigned char* at(int64_t i, int64_t j) { return memory_.get() + (i * stride_ + first_ + j) * size_; }

  int64_t rows_, cols_, stride_, first_;
  DType dtype_;
  int64_t size_;
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

struct Results {
  Values out, lse, grad_q, grad_k, grad_v;
};

struct Inputs {
  Values q, k, v, grad_out;
};
Inputs inputs_of(const Case& c) {
  Random random(7);
  const int64_t cols = int64_t{c.heads} * c.head_size;
  return {random_values(total(c.queries), cols, random, 4), random_values(total(c.keys), cols, random),
          random_values(total(c.keys), cols, random), random_values(total(c.queries), cols, random)};
}

Results expected(const Case& c, const Inputs& in) {
  const HostLayout queries = layout_of(c.queries), keys = layout_of(c.keys);
  const auto tensor = [](const Values& v) { return Tensor(v, DType::float64); };
  const auto empty = [](const Values& v) { return Tensor(v.rows, v.cols, DType::float64); };
  Tensor q = tensor(in.q), k = tensor(in.k), v = tensor(in.v), grad_out = tensor(in.grad_out), out = empty(in.q),
         lse(in.q.rows, c.heads, DType::float64), grad_q = empty(in.q), grad_k = empty(in.k), grad_v = empty(in.k);
  AttentionBackward p;
  static_cast<Attention&>(p) = {q.view(),    k.view(), v.view(),   queries.view(),
                                keys.view(), c.heads,  out.view(), lse.view()};
  p.grad_out = grad_out.view(), p.grad_q = grad_q.view(), p.grad_k = grad_k.view(), p.grad_v = grad_v.view();
  cpu::kernels().attention(p, 1);
  cpu::kernels().attention_backward(p, 1);
  return {out.values(), lse.values(), grad_q.values(), grad_k.values(), grad_v.values()};
}

Results computed(const Case& c, const Inputs& in, DType dtype) {
  const HostLayout queries = layout_of(c.queries), keys = layout_of(c.keys);
  const auto rows = [&](const Values& v) { return v.rows + c.spare; };
  const auto tensor = [&](const Values& v) { return Device(v, rows(v), dtype, c.placement); };
  const auto empty = [&](const Values& v) { return Device(rows(v), v.cols, dtype, c.placement); };
  Device q = tensor(in.q), k = tensor(in.k), v = tensor(in.v), grad_out = tensor(in.grad_out), out = empty(in.q),
         lse(rows(in.q), c.heads, DType::float32, c.placement), grad_q = empty(in.q), grad_k = empty(in.k),
         grad_v = empty(in.k);
  AttentionBackward p;
  static_cast<Attention&>(p) = {q.view(),    k.view(), v.view(),   queries.view(),
                                keys.view(), c.heads,  out.view(), lse.view()};
  p.grad_out = grad_out.view(), p.grad_q = grad_q.view(), p.grad_k = grad_k.view(), p.grad_v = grad_v.view();
  const Execution exec{.device = flexdit::Device::cuda};
  cuda::attention(p, exec);
  cuda::attention_backward(p, exec);
  for (const Device* m : {&out, &lse, &grad_q, &grad_k, &grad_v}) CHECK_NOTE(m->guards_intact(), c.name);
  return {out.values(), lse.values(), grad_q.values(), grad_k.values(), grad_v.values()};
}

// Of the rows that have a sample; those behind must be zero.
double difference(const Values& a, const Values& b, double floor) {
  double most = 0, largest = floor;
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.cols; ++j) {
      if (i >= b.rows && a(i, j) != 0) return INFINITY;
      if (i >= b.rows) continue;
      const double x = std::abs(a(i, j) - b(i, j));
      most = std::isnan(x) ? INFINITY : std::max(most, x);
      largest = std::max(largest, std::abs(b(i, j)));
    }
  return most / largest;
}

void check_close(const Case& c, size_t dtype, const char* what, const Values& a, const Values& b,
                 double Bounds::* bound) {
  const double e = difference(a, b, bound == &Bounds::lse ? 1 : 0.25);
  worst[dtype].*bound = std::max(worst[dtype].*bound, e);
  CHECK_NOTE(e <= kBounds[dtype].*bound, c.name, " ", what, " in ", name_of(kBounds[dtype].dtype), " is off by ", e);
}

void run(const Case& c) {
  const Inputs in = inputs_of(c);
  const Results right = expected(c, in);
  for (size_t i = 0; i < 3; ++i) {
    if (!c.dtypes[i]) continue;
    const Results r = computed(c, in, kBounds[i].dtype);
    check_close(c, i, "out", r.out, right.out, &Bounds::out);
    check_close(c, i, "lse", r.lse, right.lse, &Bounds::lse);
    check_close(c, i, "grad_q", r.grad_q, right.grad_q, &Bounds::grad_q);
    check_close(c, i, "grad_k", r.grad_k, right.grad_k, &Bounds::grad_k);
    check_close(c, i, "grad_v", r.grad_v, right.grad_v, &Bounds::grad_v);
  }
  CHECK_EQ(cuda::bank_conflicts, int64_t{0});
}

Lengths from_to(int first, int last, int step = 1) {
  Lengths lengths;
  for (int n = first; n <= last; n += step) lengths.push_back(n);
  return lengths;
}
Lengths reversed(Lengths lengths) {
  std::reverse(lengths.begin(), lengths.end());
  return lengths;
}

TEST_CASE(every_head_size) {
  for (int head_size : {8, 24, 40, 56, 64, 72, 80, 104, 128})
    run({"head sizes", {36, 1, 70}, {36, 1, 70}, 2, head_size, Placement::columns});
}

TEST_CASE(self_attention_of_every_length) {
  const Lengths lengths = from_to(1, 80);
  run({"1 to 80 tokens", lengths, lengths, 1, 8});
  const Lengths around = {95, 96, 97, 127, 128, 129, 144, 191, 192, 193, 256, 300};
  run({"up to 300 tokens", around, around, 1, 72, Placement::columns});
}

TEST_CASE(cross_attention) {
  run({"64 to 256", {64, 36, 49}, {256, 256, 256}, 1, 72, Placement::columns});
  run({"256 to 64", {256, 256, 256}, {64, 36, 49}, 1, 64, Placement::columns});
  const Lengths queries = from_to(1, 41, 5), keys = reversed(from_to(60, 68));
  run({"ragged both", queries, keys, 2, 24});
  run({"4096 to 49", {4096}, {49}, 1, 72, Placement::columns, 0, {false, true, false}});
  run({"49 to 4096", {49}, {4096}, 1, 72, Placement::columns, 0, {false, true, false}});
  run({"one key", {5, 200}, {1, 1}, 1, 72});
  run({"one query", {1, 1}, {5, 200}, 1, 128});
}

TEST_CASE(spare_rows) {
  run({"few", {10, 20}, {20, 10}, 2, 72, Placement::columns, 3});
  run({"many", {30, 100}, {64, 64}, 2, 64, Placement::packed, 150});
}

TEST_CASE(unaligned_views) {
  run({"unaligned 72", {30, 70}, {40, 66}, 2, 72, Placement::unaligned, 5});
  run({"unaligned 104", {30}, {66}, 2, 104, Placement::unaligned});
}

TEST_CASE(many_samples_and_rows) {
  // More than 32 lanes find in two steps.
  Lengths lengths;
  for (int i = 0; i < 1100; ++i) lengths.push_back(1 + i % 3);
  run({"1100 samples", lengths, lengths, 1, 8, Placement::packed, 0, {true, false, false}});
  // Spare rows count for the host, which cannot know better: it takes the blocks of 128 queries.
  run({"long blocks", {140, 90, 1, 64}, {64, 200, 1, 129}, 2, 72, Placement::columns, 16384, {false, true, true}});
  run({"long blocks", {129, 30}, {60, 190}, 4, 40, Placement::packed, 8192, {false, true, false}});
}

TEST_CASE(results_repeat_to_the_bit) {
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    const Case c{"repeat", {70, 140}, {130, 40}, 2, 72};
    const Inputs in = inputs_of(c);
    const Results a = computed(c, in, dtype);
    emulator::set_order(emulator::Order::backward);
    const Results b = computed(c, in, dtype);
    emulator::set_order(emulator::Order::forward);
    CHECK(identical(a.out, b.out) && identical(a.lse, b.lse));
    CHECK(identical(a.grad_q, b.grad_q) && identical(a.grad_k, b.grad_k) && identical(a.grad_v, b.grad_v));
  }
}

// Scores far beyond exp's range: the maximum must be subtracted first.
TEST_CASE(large_scores) {
  const Case c{"large", {100}, {100}, 1, 72};
  Inputs in = inputs_of(c);
  for (double& x : in.q.v) x *= 64;
  const Results right = expected(c, in);
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    const Results r = computed(c, in, dtype);
    CHECK_NEAR(difference(r.out, right.out, 1), 0, 8e-3);
    CHECK_NEAR(difference(r.lse, right.lse, 1), 0, 1e-6);
    CHECK_NEAR(difference(r.grad_v, right.grad_v, 1), 0, 2e-2);
  }
}

TEST_CASE(views_that_are_optional_or_empty) {
  const HostLayout layout = layout_of({5, 70}), none = layout_of({});
  Random random(3);
  const Values x = random_values(75, 72, random);
  Device q(x, 75, DType::bfloat16, Placement::packed), out(75, 72, DType::bfloat16, Placement::packed),
      with_lse(75, 72, DType::bfloat16, Placement::packed), lse(75, 1, DType::float32, Placement::packed);
  const Execution exec{.device = flexdit::Device::cuda};
  Attention p{q.view(), q.view(), q.view(), layout.view(), layout.view(), 1, out.view(), {}};
  cuda::attention(p, exec);
  p.out = with_lse.view(), p.lse = lse.view();
  cuda::attention(p, exec);
  CHECK(identical(out.values(), with_lse.values()));

  Device grad_v(75, 72, DType::bfloat16, Placement::packed);
  AttentionBackward b;
  static_cast<Attention&>(b) = p;
  b.grad_out = q.view(), b.grad_v = grad_v.view();
  cuda::attention_backward(b, exec);
  CHECK(std::isfinite(dot(grad_v.values(), grad_v.values())));

  Device nothing(0, 72, DType::float32, Placement::packed);
  p = {nothing.view(), nothing.view(), nothing.view(), none.view(), none.view(), 1, nothing.view(), {}};
  cuda::attention(p, exec);
}

// As captions lie in slots: apart, in any order, and several samples' the same.
TEST_CASE(keys_that_lie_apart) {
  const HostLayout queries = layout_of({70, 5, 33, 1}), packed = layout_of({90, 7, 90, 64});
  const LayoutRow table[] = {{70, {1, 1, 90}}, {0, {1, 1, 7}}, {70, {1, 1, 90}}, {5, {1, 2, 32}}, {160, {0, 0, 0}}};
  Random random(5);
  const Values q = random_values(109, 72, random), slots = random_values(160, 144, random);
  Values rows(251, 144);
  for (int64_t b = 0, row = 0; b < 4; ++b)
    for (int64_t i = 0; i < table[b].grid.tokens(); ++i, ++row)
      for (int64_t j = 0; j < 144; ++j) rows(row, j) = slots(table[b].offset + i, j);
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    Device q_view(q, 109, dtype, Placement::columns), kv(slots, 160, dtype, Placement::packed),
        packed_kv(rows, 251, dtype, Placement::packed), out(109, 72, dtype, Placement::packed),
        wanted(109, 72, dtype, Placement::packed);
    const Execution exec{.device = flexdit::Device::cuda};
    cuda::attention({q_view.view(),
                     packed_kv.view().columns(0, 72),
                     packed_kv.view().columns(72, 72),
                     queries.view(),
                     packed.view(),
                     1,
                     wanted.view(),
                     {}},
                    exec);
    cuda::attention({q_view.view(),
                     kv.view().columns(0, 72),
                     kv.view().columns(72, 72),
                     queries.view(),
                     {table, 4},
                     1,
                     out.view(),
                     {}},
                    exec);
    CHECK_NOTE(identical(out.values(), wanted.values()), name_of(dtype));
  }
}

TEST_CASE(refused_head_sizes) {
  const HostLayout layout = layout_of({5});
  for (int head_size : {4, 12, 71, 136}) {
    Device x(5, 2 * head_size, DType::bfloat16, Placement::packed);
    const Attention p{x.view(), x.view(), x.view(), layout.view(), layout.view(), 2, x.view(), {}};
    const std::string message = message_of<ArgumentError>([&] { cuda::attention(p, {}); });
    CHECK_NOTE(message.find("head size is " + std::to_string(head_size)) != std::string::npos &&
                   message.find("multiple of 8 from 8 to 128") != std::string::npos,
               message);
  }
}

TEST_CASE(zz_worst) {
  for (const Bounds& w : worst)
    std::printf("worst in %s: out %.2g, lse %.2g, grad_q %.2g, grad_k %.2g, grad_v %.2g\n", name_of(w.dtype), w.out,
                w.lse, w.grad_q, w.grad_k, w.grad_v);
}

}  // namespace
}  // namespace flexdit::test
