// Patches, timesteps and labels.
#include "cpu/kernels.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

// Moves every element between image and rows; `to_rows` says which way.
template <class T>
void move_patches(const Patches& p, bool to_rows, int threads) {
  const int64_t patch = p.patch, total = p.layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < total; ++r) {
    const int64_t b = p.layout.sample_of(r), token = r - p.layout.offset(b);
    const Grid& grid = p.layout.grid(b);
    const int64_t top = token / grid.width * patch, left = token % grid.width * patch;
    const int64_t height = int64_t{grid.frames} * grid.height * patch, width = grid.width * patch;
    T* image = static_cast<T*>(p.image) + p.layout.offset(b) * p.channels * patch * patch;
    T* values = row<T>(p.rows, r);
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t y = 0; y < patch; ++y)
        for (int64_t x = 0; x < patch; ++x) {
          const int64_t column = p.channels_last ? (y * patch + x) * p.channels + c : (c * patch + y) * patch + x;
          T& pixel = image[(c * height + top + y) * width + left + x];
          if (to_rows)
            values[column] = pixel;
          else
            pixel = values[column];
        }
  }
}

}  // namespace

void patchify(const Patches& p, int threads) {
  with_type(p.rows.dtype, [&](auto tag) { move_patches<decltype(tag)>(p, true, threads); });
}
void unpatchify(const Patches& p, int threads) {
  with_type(p.rows.dtype, [&](auto tag) { move_patches<decltype(tag)>(p, false, threads); });
}

void timestep_embedding(const TimestepEmbedding& p, int threads) {
  with_type(p.out.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t half = p.out.cols / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < p.out.rows; ++b) {
      T* out = row<T>(p.out, b);
      for (int64_t i = 0; i < half; ++i) {
        const float exponent = -9.2103404f * float(i) / float(half - p.shift);  // -ln 10000
        const float angle = float(p.t[b]) * float(std::exp(double(exponent)));
        store(out, i, float(std::cos(double(angle))));
        store(out, half + i, float(std::sin(double(angle))));
      }
    }
  });
}

void label_embedding(const LabelEmbedding& p, int threads) {
  with_type(p.table.dtype, [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < p.x.rows; ++b) {
      const T* from = row<T>(p.table, p.labels[b]);
      T* x = row<T>(p.x, b);
#pragma omp simd
      for (int64_t i = 0; i < p.x.cols; ++i) store(x, i, load(x, i) + load(from, i));
    }
  });
}

void label_embedding_backward(const LabelEmbeddingBackward& p, int threads) {
  with_type(p.grad_table.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t label = 0; label < p.grad_table.rows; ++label) {
      T* grad = row<T>(p.grad_table, label);
      for (int64_t i = 0; i < p.grad_table.cols; ++i) {
        A sum = 0;
        for (int64_t b = 0; b < p.grad_out.rows; ++b)
          if (p.labels[b] == label) sum += load(row<T>(p.grad_out, b), i);
        store(grad, i, sum);
      }
    }
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
