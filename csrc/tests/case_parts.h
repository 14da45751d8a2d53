// What the cases share: batches of grids, and memory for a call.
#pragma once

#include "op_case.h"

namespace flexdit::test {

// Frames, odd sides, single tokens, a window that overlaps its neighbours (5 -> 3), a grid that stays as it is.
inline const Batch kRagged{
    "ragged", {{1, 4, 4}, {1, 5, 3}, {1, 1, 1}, {1, 2, 3}}, {{1, 2, 3}, {1, 3, 2}, {1, 1, 1}, {1, 2, 3}}};
inline const Batch kVideo{"video", {{3, 2, 3}, {2, 4, 2}}, {{2, 1, 2}, {1, 3, 2}}};
inline const Batch kOneSample{"one sample", {{1, 5, 4}}, {{1, 3, 3}}};
inline const Batch kOneToken{"one token", {{1, 1, 1}}, {{1, 1, 1}}};
// The same number of tokens in every sample, so that one position table fits all.
inline const Batch kSameCount{"same count", {{1, 3, 4}, {1, 4, 3}, {2, 3, 2}}, {{1, 2, 2}, {1, 1, 3}, {2, 2, 1}}};
// Grids of their own: tables behind one another, of which the third sample has none but a row of the first's.
inline const Batch kTables{"tables", kRagged.dense, kRagged.sparse, {6, 22, 9, 0}};

struct Size {
  Batch batch;
  int64_t c;
};
inline const Size kSizes[] = {{kRagged, 48}, {kVideo, 7}, {kOneSample, 72}, {kOneToken, 7}, {kRagged, 300}};

// No samples at all.
inline const Batch kNone{"none", {}, {}};

inline std::string label(const Size& s, const std::string& variant = "") {
  return std::string(s.batch.name) + " C=" + std::to_string(s.c) + (variant.empty() ? "" : " " + variant);
}

inline void copy(const Matrix& from, const Matrix& to) {
  for (int64_t i = 0; i < from.rows; ++i)
    std::memcpy(to.row_range(i, 1).data, from.row_range(i, 1).data, size_t(from.cols * size_of(from.dtype)));
}

// Poisoned memory for one call, whose canaries are looked at afterwards.
template <class Call>
void with_workspace(int64_t bytes, Call&& call) {
  GuardedBytes workspace(bytes);
  call(workspace.data());
  if (!workspace.intact()) throw std::runtime_error("wrote behind its workspace");
}

}  // namespace flexdit::test
