// What ops_test's pattern does not fit: timesteps, selection of grids, in-place calls, constant rows, and errors other
// than a field of the wrong shape.
#include <limits>
#include <utility>

#include "check.h"
#include "op_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

constexpr DType kTypes[] = {DType::float64, DType::float32, DType::bfloat16};

bool says(const std::string& message, const std::string& op, const std::string& part) {
  return message.rfind(op + ": ", 0) == 0 && message.find(part) != std::string::npos;
}

}  // namespace

// The formula in float32 whatever the storage, so float64 and float32 agree to the bit; the angle t w is rounded to
// 2^-24 of up to 1000.
TEST_CASE(timesteps) {
  const double t[] = {0, 1, 0.25, 499.5, 999, 1000};
  const std::pair<int64_t, int64_t> cases[] = {{2, 0}, {6, 0}, {256, 0}, {256, 1}};
  for (const auto& [cols, shift] : cases) {
    Tensor wide(6, cols, DType::float64, true), single(6, cols, DType::float32, true), half(6, cols, DType::bfloat16);
    // An exponent of up to 9.2 is a product and a quotient, of which i / 128 is exact and i / 127 rounded.
    const double bound = shift ? 1.2e-6 : 4e-7;
    for (Tensor* out : {&wide, &single, &half})
      timestep_embedding({.t = t, .out = out->view(), .shift = shift}, {.threads = 2});
    CHECK(identical(wide.values(), single.values()));
    CHECK(error(half.values(), wide.values()) <= 1.0 / 256);
    for (int64_t b = 0; b < 6; ++b)
      for (int64_t i = 0; i < cols / 2; ++i) {
        const double angle = t[b] * std::pow(10000.0, -double(i) / double(cols / 2 - shift));
        CHECK_NEAR(wide.values()(b, i), std::cos(angle), bound + angle * bound);
        CHECK_NEAR(wide.values()(b, cols / 2 + i), std::sin(angle), bound + angle * bound);
      }
    CHECK(wide.guards_intact() && single.guards_intact() && half.guards_intact());
  }
}

TEST_CASE(labels_outside_the_table) {
  Tensor table(Values(5, 4), DType::float32), x(Values(2, 4), DType::float32);
  for (int64_t bad : {int64_t{-1}, int64_t{5}, std::numeric_limits<int64_t>::min()}) {
    const int64_t labels[] = {0, bad};
    const auto message =
        argument_error([&] { label_embedding({.labels = labels, .table = table.view(), .x = x.view()}, {}); });
    CHECK_NOTE(says(message, "label_embedding", "labels[1]"), message);
  }
}

TEST_CASE(selected_grids) {
  const DensitySchedule schedule({{1, 10, 10}, {2, 4, 4}, {1, 7, 7}});
  const std::vector<double> t = {0, 334, 999, 333, 1000};
  std::vector<LayoutRow> table(t.size() + 2, LayoutRow{-7, {-7, -7, -7}});
  select_tokens({.t = t.data(), .batch = int64_t(t.size()), .schedule = &schedule, .table = table.data()}, {});
  const TokenLayout layout{table.data(), int64_t(t.size())};
  for (size_t b = 0; b < t.size(); ++b) CHECK(layout.grid(int64_t(b)) == schedule.grid(t[b]));
  CHECK_EQ(layout.total(), 100 + 32 + 49 + 100 + 49);
  CHECK_EQ(table.back().offset, -7);
  std::vector<int32_t> map(size_t(layout.total()) + 4, -7);  // with three spare rows, and one that is not its
  select_tokens({.t = t.data(),
                 .batch = int64_t(t.size()),
                 .schedule = &schedule,
                 .table = table.data(),
                 .row_map = map.data(),
                 .rows = layout.total() + 3},
                {});
  for (int64_t r = 0; r < layout.total() + 3; ++r) CHECK_EQ(map[size_t(r)], layout.search(r));
  CHECK_EQ(map.back(), -7);
  const double bad[] = {0, std::nan("")};
  const auto message =
      argument_error([&] { select_tokens({.t = bad, .batch = 2, .schedule = &schedule, .table = table.data()}, {}); });
  CHECK_NOTE(message.find("t is nan") != std::string::npos, message);
}

TEST_CASE(in_place_and_without_lse) {
  Random random(5);
  const Values x = random_values(6, 12, random);
  const HostLayout layout(1, Grid{1, 2, 3});
  for (DType dtype : kTypes) {
    Tensor from(x, dtype), a(x, dtype), b(6, 12, dtype);
    gelu({.x = a.view(), .y = a.view()}, {}), gelu({.x = from.view(), .y = b.view()}, {});
    CHECK(identical(a.values(), b.values()));
    Tensor c(x, dtype), d(6, 12, dtype);
    silu({.x = c.view(), .y = c.view()}, {}), silu({.x = from.view(), .y = d.view()}, {});
    CHECK(identical(c.values(), d.values()));
    Tensor e(x, dtype), f(6, 12, dtype);
    silu_backward({.x = from.view(), .grad_y = e.view(), .grad_x = e.view()}, {});
    silu_backward({.x = from.view(), .grad_y = from.view(), .grad_x = f.view()}, {});
    CHECK(identical(e.values(), f.values()));
    Tensor with(6, 12, dtype), without(6, 12, dtype), lse(6, 3, accumulation_type(dtype));
    Attention p{.q = from.view(),
                .k = from.view(),
                .v = from.view(),
                .layout_q = layout.view(),
                .layout_k = layout.view(),
                .num_heads = 3,
                .out = without.view()};
    attention(p, {});
    p.out = with.view(), p.lse = lse.view();
    attention(p, {});
    CHECK(identical(with.values(), without.values()));
  }
}

// Where a row has no variance the layer norm is the shift alone; large scores must not overflow the softmax.
TEST_CASE(extreme_values) {
  const HostLayout layout(1, Grid{1, 1, 3});
  for (DType dtype : kTypes) {
    Random random(9);
    const Values shift = random_values(1, 8, random), scale = random_values(1, 8, random);
    Values flat(3, 8), large(3, 8);
    for (double& v : flat.v) v = 0.75;
    for (double& v : large.v) v = 96 * random.sign();
    Tensor x(flat, dtype), q(large, dtype), y(3, 8, dtype), out(3, 8, dtype);
    modulated_layer_norm({.x = x.view(),
                          .shift = Tensor(shift, dtype).view(),
                          .scale = Tensor(scale, dtype).view(),
                          .layout = layout.view(),
                          .y = y.view()},
                         {});
    for (int64_t r = 0; r < 3; ++r) CHECK(identical(rows_of(y.values(), r, 1), shift));
    attention({.q = q.view(),
               .k = q.view(),
               .v = q.view(),
               .layout_q = layout.view(),
               .layout_k = layout.view(),
               .num_heads = 1,
               .out = out.view()},
              {});
    const std::vector<Grid> grids = {{1, 1, 3}};
    CHECK_NEAR(error(out.values(), naive::attention(large, large, large, grids, grids, 1)[0]), 0.0, 1.0 / 256);
    Tensor g(large, dtype), s(3, 8, dtype);
    gelu({.x = g.view(), .y = g.view()}, {}), silu({.x = q.view(), .y = s.view()}, {});
    CHECK_NEAR(error(g.values(), naive::map(large, naive::gelu)), 0.0, 1e-6);
    CHECK_NEAR(error(s.values(), naive::map(large, naive::silu)), 0.0, 1e-6);
  }
}

TEST_CASE(other_arguments) {
  const HostLayout two(2, Grid{1, 2, 2}), three(3, Grid{1, 2, 2}), larger(2, Grid{1, 3, 2});
  Tensor x(Values(8, 6), DType::float32), y(12, 6, DType::float32), m(Values(2, 6), DType::float32);
  ModulatedLayerNorm norm{.x = x.view(), .shift = m.view(), .scale = m.view(), .layout = two.view(), .y = y.view()};
  const auto norm_error = [&](auto change) {
    ModulatedLayerNorm p = norm;
    change(p);
    return argument_error([&] { modulated_layer_norm(p, {}); });
  };
  const std::string op = "modulated_layer_norm";
  CHECK(norm_error([](auto&) {}).empty());
  CHECK(says(norm_error([](auto& p) { p.layout = {}; }), op, "layout is missing"));
  CHECK(says(norm_error([&](auto& p) { p.layout = three.view(); }), op, "x is [8, 6], must be at least [12, 6]"));
  CHECK(says(norm_error([](auto& p) { p.y.stride = 5; }), op, "y has rows that overlap: stride 5"));
  CHECK(says(norm_error([](auto& p) { p.scale.dtype = DType::float64; }), op, "scale is float64, must be float32"));
  CHECK(says(norm_error([](auto& p) { p.x.dtype = DType::float16; }), op, "x is float16"));
  CHECK(says(argument_error([&] { modulated_layer_norm(norm, {.device = Device::cuda}); }), op, "CUDA"));

  Tensor weight(Values(5, 6), DType::float32), product(8, 5, DType::float32), before(8, 5, DType::float32);
  const Linear layer{.x = x.view(), .weight = weight.view(), .y = product.view()};
  const auto linear_error = [&](auto change) {
    Linear p = layer;
    change(p);
    return argument_error([&] { linear(p, {}); });
  };
  CHECK(linear_error([](auto&) {}).empty());
  CHECK(says(linear_error([&](auto& p) { p.pre_activation = before.view(); }), "linear",
             "pre_activation needs an activation"));
  CHECK(says(linear_error([&](auto& p) {
               p.pre_activation = before.view().row_range(0, 7), p.activation = Activation::gelu_tanh;
             }),
             "linear", "pre_activation is [7, 5], must be [8, 5]"));
  CHECK(says(linear_error([](auto& p) { p.x.cols = p.weight.cols = 0; }), "linear", "weight is [5, 0], must have"));
  Tensor grad(8, 6, DType::float32);
  const LinearBackward back{
      .x = x.view(), .weight = weight.view(), .grad_y = product.view(), .grad_x = grad.view(), .gelu_input = x.view()};
  const auto backward_error = [&](auto change) {
    LinearBackward p = back;
    change(p);
    return argument_error([&] { linear_backward(p, {}); });
  };
  CHECK(backward_error([](auto&) {}).empty());
  CHECK(says(backward_error([](auto& p) { p.grad_x = {}; }), "linear_backward", "gelu_input needs grad_x"));
  CHECK(says(backward_error([](auto& p) { p.accumulate_grad_x = true; }), "linear_backward",
             "gelu_input does not go with accumulate_grad_x"));
  CHECK(says(backward_error([](auto& p) { p.gelu_input.cols = 5; }), "linear_backward",
             "gelu_input is [8, 5], must be [8, 6]"));

  PoolTokens pool{.x = y.view(), .layout = larger.view(), .sparse_layout = two.view(), .out = x.view()};
  pool.layout = two.view(), pool.sparse_layout = larger.view();
  CHECK(says(argument_error([&] { pool_tokens(pool, {}); }), "pool_tokens", "sparse grid of sample 0"));
  pool.sparse_layout = three.view();
  CHECK(
      says(argument_error([&] { pool_tokens(pool, {}); }), "pool_tokens", "sparse_layout has 3 samples, must have 2"));
  pool.sparse_layout = two.view(), pool.position = m.view();
  CHECK(says(argument_error([&] { pool_tokens(pool, {}); }), "pool_tokens", "position has 2 rows"));
  const int32_t offsets[] = {1, 5};
  pool.position = {y.view(), offsets};
  CHECK(argument_error([&] { pool_tokens(pool, {}); }).empty());
  pool.position.rows = y.view().row_range(0, 8);
  CHECK(says(argument_error([&] { pool_tokens(pool, {}); }), "pool_tokens",
             "position has 8 rows, sample 1 has 4 tokens from row 5 on"));
  pool.position = {}, pool.scale = m.view();
  CHECK(says(argument_error([&] { pool_tokens(pool, {}); }), "pool_tokens", "shift is missing"));

  Attention a{.q = x.view(),
              .k = x.view(),
              .v = x.view(),
              .layout_q = two.view(),
              .layout_k = two.view(),
              .num_heads = 4,
              .out = y.view()};
  CHECK(says(argument_error([&] { attention(a, {}); }), "attention", "num_heads is 4"));
  a.num_heads = 0;
  CHECK(says(argument_error([&] { attention(a, {}); }), "attention", "num_heads is 0"));
  a.num_heads = 3, a.layout_k = three.view();
  CHECK(says(argument_error([&] { attention(a, {}); }), "attention", "layout_k has 3 samples"));
  a.layout_k = two.view(), a.lse = Tensor(8, 3, DType::float64).view();
  CHECK(says(argument_error([&] { attention(a, {}); }), "attention", "lse is float64"));

  Patches patches{.image = x.data(), .rows = y.view(), .layout = two.view(), .channels = 1, .patch = 0};
  CHECK(says(argument_error([&] { patchify(patches, {}); }), "patchify", "patch is 0"));
  patches.patch = 2;
  CHECK(says(argument_error([&] { unpatchify(patches, {}); }), "unpatchify", "rows is "));
  const double t[] = {0, 1};
  Tensor odd(2, 5, DType::float32);
  CHECK(says(argument_error([&] { timestep_embedding({.t = t, .out = odd.view()}, {}); }), "timestep_embedding",
             "5 columns"));
  const TimestepEmbedding shifted{.t = t, .out = Tensor(2, 4, DType::float32).view(), .shift = 2};
  CHECK(says(argument_error([&] { timestep_embedding(shifted, {}); }), "timestep_embedding", "shift is 2"));
}

// Packing changes where a weight's values lie, not what is computed, from a single row to more than a piece of rows.
TEST_CASE(packed_weights) {
  Random random(31);
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const int64_t rows : {1, 3, 70, 1100}) {
      Tensor x(random_values(rows, 96, random), dtype), weight(random_values(40, 96, random), dtype);
      Tensor bias(random_values(1, 40, random), dtype), plain(rows, 40, dtype), packed(rows, 40, dtype);
      const PackedWeightPointer pack = pack_weight(weight.view(), {});
      Linear p{.x = x.view(), .weight = weight.view(), .bias = bias.view(), .y = plain.view()};
      linear(p, {});
      p.packed = pack.get(), p.y = packed.view();
      if (pack) p.weight.data = nullptr;  // its values are not read
      linear(p, {});
      CHECK_NEAR(error(packed.values(), plain.values()), 0.0, dtype == DType::float32 ? 1e-6 : 8e-3);
      CHECK(packed.guards_intact());
    }
  CHECK(!pack_weight(Tensor(2, 3, DType::float64).view(), {}));
}
