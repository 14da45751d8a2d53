// Linear layers in float32 and bfloat16: on the tiles of gemm_amx.cpp (on_tiles() says which), else by oneDNN.
// Creating a primitive of oneDNN's compiles code (about 1 ms), so they are cached, and long or ragged numbers of rows
// are cut into pieces of few different sizes. With AVX-512 and contiguous operands oneDNN sums over k in an order that
// depends neither on the number of rows nor on the threads, as long as k stays under its limit for splitting it over
// threads; python_tests check that. Its AVX2 code for float32 keeps no such order: there rows may differ in the last
// bits.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/product.h"

namespace flexdit {

// The weight [N, K] as the right operand [K, N] of x weight^T.
class PackedWeight {
 public:
  dnnl::memory memory;  // as oneDNN likes it, or
  std::unique_ptr<char, decltype(&std::free)> tiles{nullptr, std::free};
};
void PackedWeightDeleter::operator()(const PackedWeight* weight) const { delete weight; }

namespace cpu {
namespace {

constexpr int64_t kRowPiece = 1024;   // rows of one forward product
constexpr int64_t kSumPiece = 512;    // rows summed by one weight gradient product
constexpr int64_t kRowMultiple = 32;  // a remainder is split once more, at a multiple of this
constexpr size_t kCacheCapacity = 4096;

using dnnl::memory;

// Without oneDNN's products on tiles, whose sums depend on the number of rows; those of gemm_amx.cpp do not.
dnnl_cpu_isa_t onednn_isa() {
  static const dnnl_cpu_isa_t isa = [] {
    dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx512_core_bf16);  // refused once oneDNN has compiled something for others
    return dnnl_get_effective_cpu_isa();
  }();
  return isa;
}

const dnnl::engine& engine() {
  static const dnnl::engine cpu = (onednn_isa(), dnnl::engine(dnnl::engine::kind::cpu, 0));
  return cpu;
}

memory::data_type onednn_type(DType dtype) {
  return dtype == DType::bfloat16 ? memory::data_type::bf16 : memory::data_type::f32;
}

memory::desc descriptor(const Operand& o) {
  const int64_t stride = o.matrix.stride;
  return {{o.rows(), o.cols()},
          onednn_type(o.matrix.dtype),
          o.transposed ? memory::dims{1, stride} : memory::dims{stride, 1}};
}
memory::desc b_descriptor(const Product& p) { return p.packed ? p.packed->memory.get_desc() : descriptor(p.b); }

struct Key {
  int64_t m, n, k, lda, ldb, ldc;
  int flags, threads;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (int64_t v : {key.m, key.n, key.k, key.lda, key.ldb, key.ldc, int64_t{key.flags}, int64_t{key.threads}})
      hash = hash * 1000003 ^ static_cast<size_t>(v);
    return hash;
  }
};

Key key_of(const Product& p, int threads) {
  const int flags = p.a.transposed | p.b.transposed << 1 | p.gelu << 2 | p.accumulate << 3 | bool(p.bias) << 4 |
                    static_cast<int>(p.a.matrix.dtype) << 5 | static_cast<int>(p.c.matrix.dtype) << 8 |
                    (p.packed != nullptr) << 11;
  return {p.a.rows(), p.b.cols(), p.a.cols(), p.a.matrix.stride, p.b.matrix.stride, p.c.matrix.stride, flags, threads};
}

dnnl::matmul create(const Product& p) {
  dnnl::post_ops post;
  if (p.accumulate) post.append_sum();
  if (p.gelu) post.append_eltwise(dnnl::algorithm::eltwise_gelu_tanh, 0, 0);
  dnnl::primitive_attr attributes;
  attributes.set_post_ops(post);
  const auto a = descriptor(p.a), b = b_descriptor(p), c = descriptor(p.c);
  if (!p.bias) return dnnl::matmul({engine(), a, b, c, attributes});
  const memory::desc bias({1, p.bias.cols}, onednn_type(p.bias.dtype), memory::format_tag::ab);
  return dnnl::matmul({engine(), a, b, bias, c, attributes});
}

dnnl::matmul cached(const Product& p, int threads) {
  static std::mutex mutex;
  static std::unordered_map<Key, dnnl::matmul, KeyHash> cache;
  const Key key = key_of(p, threads);
  {
    const std::lock_guard lock(mutex);
    if (const auto found = cache.find(key); found != cache.end()) return found->second;
  }
  dnnl::matmul primitive = create(p);
  const std::lock_guard lock(mutex);
  if (cache.size() >= kCacheCapacity) cache.clear();
  return cache.emplace(key, std::move(primitive)).first->second;
}

void multiply(const Product& p, bool tiles, int threads) {
  if (p.c.rows() == 0 || p.c.cols() == 0) return;
  if (tiles) return amx::multiply(p, p.packed ? p.packed->tiles.get() : nullptr, threads);
  dnnl::stream stream(engine());
  const auto view = [](const Operand& o) { return memory(descriptor(o), engine(), o.matrix.data); };
  std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, view(p.a)},
                                            {DNNL_ARG_WEIGHTS, p.packed ? p.packed->memory : view(p.b)},
                                            {DNNL_ARG_DST, view(p.c)}};
  if (p.bias)
    arguments.emplace(DNNL_ARG_BIAS, memory({{1, p.bias.cols}, onednn_type(p.bias.dtype), memory::format_tag::ab},
                                            engine(), p.bias.data));
  cached(p, threads).execute(stream, arguments);
}

// oneDNN takes the number of threads from OpenMP, when a primitive is made and when it runs.
class OpenMPThreads {
 public:
  explicit OpenMPThreads(int threads) : before_(omp_get_max_threads()) { omp_set_num_threads(threads); }
  ~OpenMPThreads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

// Calls body(first, count) for pieces of `rows`: full pieces, a multiple of kRowMultiple, and what is left; or once for
// all, where products see to their own pieces.
template <class Body>
void for_pieces(int64_t rows, int64_t piece, bool whole, Body&& body) {
  if (whole && rows > 0) return body(int64_t{0}, rows);
  int64_t first = 0;
  for (; first + piece <= rows; first += piece) body(first, piece);
  const int64_t even = first > 0 || rows > piece / 2 ? (rows - first) / kRowMultiple * kRowMultiple : 0;
  if (even) body(first, even);
  if (first + even < rows) body(first + even, rows - first - even);
}

// Without the instructions oneDNN has no bfloat16 product (AVX2) or one whose sums depend on the threads (AVX-512).
bool has_bfloat16_products() { return has_amx() || onednn_isa() >= dnnl_cpu_isa_avx512_core_bf16; }

// Whether a weight [N, K] is multiplied on tiles. float32 gains by it from some size on, where packing is little beside
// the product. What is packed, and how many rows there are, must not decide: bits would hang on it.
bool on_tiles(const Matrix& weight) {
  constexpr int64_t kLarge = 256;
  return has_amx() && (weight.dtype == DType::bfloat16 || std::min(weight.rows, weight.cols) >= kLarge);
}

// A float32 copy of a bfloat16 matrix (or room for one), given back when asked.
class Widened {
 public:
  Widened(const Matrix& narrow, bool copy, int threads) : narrow_(narrow), values_(narrow.rows * narrow.cols) {
    if (copy && narrow) kernels().convert({.x = narrow, .y = wide()}, threads);
  }
  Matrix wide() {
    if (!narrow_) return {};
    return {values_.data(), narrow_.rows, narrow_.cols, narrow_.cols, DType::float32};
  }
  void narrow(int threads) {
    if (narrow_) kernels().convert({.x = wide(), .y = narrow_}, threads);
  }

 private:
  Matrix narrow_;
  std::vector<float> values_;
};

void linear_through_float32(const Linear& p, int threads) {
  Widened x(p.x, true, threads), weight(p.weight, true, threads), bias(p.bias, true, threads), y(p.y, false, threads);
  linear({.x = x.wide(), .weight = weight.wide(), .bias = bias.wide(), .y = y.wide(), .activation = p.activation},
         threads);
  y.narrow(threads);
}

void linear_backward_through_float32(const LinearBackward& p, int threads) {
  Widened x(p.x, true, threads), weight(p.weight, true, threads), grad_y(p.grad_y, true, threads);
  Widened grad_x(p.grad_x, p.accumulate_grad_x, threads), grad_weight(p.grad_weight, false, threads);
  Widened grad_bias(p.grad_bias, false, threads);
  LinearBackward wide = p;
  wide.x = x.wide(), wide.weight = weight.wide(), wide.grad_y = grad_y.wide();
  wide.grad_x = grad_x.wide(), wide.grad_weight = grad_weight.wide(), wide.grad_bias = grad_bias.wide();
  linear_backward(wide, threads);
  grad_x.narrow(threads), grad_weight.narrow(threads), grad_bias.narrow(threads);
}

}  // namespace

void linear(const Linear& p, int threads) {
  if (p.x.dtype == DType::bfloat16 && !has_bfloat16_products()) return linear_through_float32(p, threads);
  const OpenMPThreads scope(threads);
  const bool tiles = on_tiles(p.weight);
  for_pieces(p.x.rows, kRowPiece, tiles, [&](int64_t first, int64_t count) {
    multiply({.a = {p.x.row_range(first, count)},
              .b = {p.weight, true},
              .c = {p.y.row_range(first, count)},
              .bias = p.bias,
              .gelu = p.activation == Activation::gelu_tanh,
              .packed = p.packed},
             tiles, threads);
  });
}

void linear_backward(const LinearBackward& p, int threads) {
  if (p.x.dtype == DType::bfloat16 && !has_bfloat16_products()) return linear_backward_through_float32(p, threads);
  const OpenMPThreads scope(threads);
  constexpr int64_t kManyRows = 256;  // that pay for packing both sides in float32
  const bool tiles = on_tiles(p.weight) && (p.x.dtype == DType::bfloat16 || p.x.rows >= kManyRows);
  if (p.grad_x)
    for_pieces(p.x.rows, kRowPiece, tiles, [&](int64_t first, int64_t count) {
      multiply({.a = {p.grad_y.row_range(first, count)},
                .b = {p.weight},
                .c = {p.grad_x.row_range(first, count)},
                .accumulate = p.accumulate_grad_x},
               tiles, threads);
    });
  if (p.grad_weight) {
    const bool widen = p.grad_weight.dtype == DType::bfloat16;
    Matrix sum = p.grad_weight;
    if (widen) sum = {p.workspace, sum.rows, sum.cols, sum.cols, DType::float32};
    if (p.x.rows == 0)
      for (int64_t i = 0; i < sum.rows; ++i) std::memset(sum.row_range(i, 1).data, 0, sum.cols * size_of(sum.dtype));
    const bool whole = false;  // pieces serve tiles, too: both sides are long, and packed they would outgrow the caches
    for_pieces(p.x.rows, kSumPiece, whole, [&](int64_t first, int64_t count) {
      multiply({.a = {p.grad_y.row_range(first, count), true},
                .b = {p.x.row_range(first, count)},
                .c = {sum},
                .accumulate = first > 0},
               tiles, threads);
    });
    if (widen) kernels().convert({.x = sum, .y = p.grad_weight}, threads);
  }
  if (p.grad_bias) kernels().column_sums({.x = p.grad_y, .sums = p.grad_bias}, threads);
}

PackedWeightPointer pack_weight(const Matrix& weight, int threads) {
  constexpr int64_t kTypicalRows = 256;
  if (weight.dtype == DType::bfloat16 && !has_bfloat16_products()) return nullptr;
  const Operand b{weight, true};
  if (on_tiles(weight)) {
    constexpr int64_t kLine = 64;
    PackedWeight packed;
    packed.tiles.reset(static_cast<char*>(std::aligned_alloc(kLine, static_cast<size_t>(amx::packed_bytes(b)))));
    if (!packed.tiles) throw std::bad_alloc();
    amx::pack(b, packed.tiles.get(), threads);
    return PackedWeightPointer(new PackedWeight(std::move(packed)));
  }
  const OpenMPThreads scope(threads);
  const auto type = onednn_type(weight.dtype);
  const memory::desc a({kTypicalRows, b.rows()}, type, memory::format_tag::ab),
      c({kTypicalRows, b.cols()}, type, memory::format_tag::ab),
      any({b.rows(), b.cols()}, type, memory::format_tag::any);
  const dnnl::matmul::primitive_desc best(engine(), a, any, c);
  auto packed = PackedWeightPointer(new PackedWeight{.memory = memory(best.weights_desc(), engine())});
  memory from(descriptor(b), engine(), weight.data), to = packed->memory;
  dnnl::stream stream(engine());
  dnnl::reorder(from, to).execute(stream, from, to);
  stream.wait();
  return packed;
}

const char* onednn_version() {
  static const std::string version = [] {
    const dnnl_version_t* v = dnnl_version();
    return std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
  }();
  return version.c_str();
}

}  // namespace cpu
}  // namespace flexdit
