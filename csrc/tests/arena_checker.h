// The arena checker: records what a run does to memory (ops/trace.h) and says who reads what nobody has written, what
// somebody else has written over, or what was given back. Launches, captured graphs and their replays are recorded in
// the order of the stream.
//
// Every piece that an arena carves lies in memory of its own here, so that its address tells whose it is; where the
// arena meant it to be is only accounted. So a run computes the right thing whatever the plan, and the checker judges
// the plan.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <compare>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "flexdit/ops.h"
#include "ops/trace.h"

namespace flexdit::test {

struct Event {
  std::string name;
  std::vector<trace::View> views;
};
inline constexpr const char *kCarve = "carve", *kAllocate = "allocate", *kRelease = "release", *kDiscard = "discard",
                            *kCopyBytes = "copy";

inline bool is_operation(const Event& e) {
  return e.name != kCarve && e.name != kAllocate && e.name != kRelease && e.name != kDiscard && e.name != kCopyBytes;
}

struct Piece {
  uintptr_t end, planned, base;  // base: of its arena
};

// A run: what happened, and where the pieces are planned, by their beginnings. Tests change it to plant mistakes.
struct Run {
  std::vector<Event> events;
  std::map<uintptr_t, Piece> pieces;

  const std::pair<const uintptr_t, Piece>* piece_of(uintptr_t address) const {
    auto after = pieces.upper_bound(address);
    return after != pieces.begin() && address < (--after)->second.end ? &*after : nullptr;
  }
  // Pieces may lie in pieces.
  uintptr_t planned(uintptr_t address) const {
    while (const auto* piece = piece_of(address)) address = piece->second.planned + (address - piece->first);
    return address;
  }
};

// Records while it lives, for the calling thread. What was made meanwhile must not outlive it.
class ArenaRecorder : public trace::Recorder {
 public:
  ArenaRecorder() {
    void* pool = mmap(nullptr, kPool, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pool == MAP_FAILED) throw std::bad_alloc();
    pool_ = static_cast<char*>(pool);
    trace::current = this;
  }
  ~ArenaRecorder() override {
    trace::current = nullptr;
    munmap(pool_, kPool);
  }
  ArenaRecorder(const ArenaRecorder&) = delete;

  Run run;

  void operation(const char* name, const std::vector<trace::View>& views) override {
    emulator::submit([this, name, views] { run.events.push_back({name, resolved(name, views)}); });
  }
  void* piece(char* base, int64_t used, int64_t bytes, bool fresh) override {
    void* planned = base + used;
    if (bytes == 0) return planned;
    void*& here = latest_[planned];
    if (fresh || !here) {
      here = own(bytes);
      const auto begin = reinterpret_cast<uintptr_t>(here);
      run.pieces[begin] = {begin + static_cast<uintptr_t>(bytes), reinterpret_cast<uintptr_t>(planned),
                           reinterpret_cast<uintptr_t>(base)};
      if (fresh) operation(kCarve, {whole("piece", here, bytes)});
    }
    return here;
  }
  void allocated(void* memory, int64_t bytes) override {
    sizes_[memory] = bytes;
    operation(kAllocate, {whole("buffer", memory, bytes)});
  }
  // Kept to the end: nothing else shall have its address.
  bool keeps(void* memory) override {
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) return false;
    operation(kRelease, {whole("buffer", memory, found->second)});
    memory_.emplace_back(memory, std::free);
    return true;
  }

 private:
  // Where the heap never comes: what lay elsewhere before cannot be taken for a piece.
  void* own(int64_t bytes) {
    void* here = pool_ + used_;
    used_ += static_cast<size_t>((bytes + 127) / 128 * 128);
    if (used_ > kPool) throw std::bad_alloc();
    return std::memset(here, 0xff, static_cast<size_t>(bytes));
  }
  static trace::View whole(const char* field, void* data, int64_t bytes) {
    return {field, data, 1, bytes, bytes, Access::scratch};
  }

  // What can be known only when the operation runs: the rows that a table of addresses names, which samples read the x0
  // of the step before, and where the keys lie.
  static std::vector<trace::View> resolved(const std::string& name, const std::vector<trace::View>& views) {
    std::vector<trace::View> out;
    for (const trace::View& v : views) {
      if (v.access == Access::indirect) {
        out.push_back({v.field, v.data, 1, v.rows * int64_t{sizeof(void*)}, 0, Access::read});
        for (int64_t b = 0; b < v.rows; ++b)
          out.push_back({v.field, static_cast<const void* const*>(v.data)[b], 1, v.row_bytes, 0, Access::read});
      } else if (name == "denoise_step" && v.field == std::string("x0")) {
        const auto* table = static_cast<const LayoutRow*>(find(views, "layout").data);
        const auto* numbers = static_cast<const StepNumbers*>(find(views, "numbers").data);
        for (int64_t b = 0; table[b].offset < v.rows; ++b)
          out.push_back({v.field, static_cast<const char*>(v.data) + table[b].offset * v.stride_bytes,
                         table[b + 1].offset - table[b].offset, v.row_bytes, v.stride_bytes,
                         written(numbers[b].x0_previous_coef != 0)});
      } else if (name == "attention" && (v.field == std::string("k") || v.field == std::string("v"))) {
        const trace::View& layout = find(views, "layout_k");
        const auto* table = static_cast<const LayoutRow*>(layout.data);
        for (int64_t b = 0; b + 1 < layout.row_bytes / int64_t{sizeof(LayoutRow)}; ++b)
          out.push_back({v.field, static_cast<const char*>(v.data) + table[b].offset * v.stride_bytes,
                         table[b].grid.tokens(), v.row_bytes, v.stride_bytes, Access::read});
      } else {
        out.push_back(v);
      }
    }
    return out;
  }
  static const trace::View& find(const std::vector<trace::View>& views, const std::string& field) {
    for (const trace::View& v : views)
      if (v.field == field) return v;
    throw std::runtime_error("no field " + field);
  }

  static constexpr size_t kPool = size_t{1} << 30;  // taken as it is used
  char* pool_ = nullptr;
  size_t used_ = 0;
  std::map<void*, void*> latest_;  // the last piece that was planned there
  std::map<void*, int64_t> sizes_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

// Who wrote each byte last, where that is known: in pieces and in buffers. Other memory is the caller's.
class Shadow {
 public:
  enum class State { empty, full, gone };
  struct Mark {
    State state;
    size_t event;  // that left it so
    const char* field;
    uintptr_t piece;  // through which it was written, 0 for a buffer itself
  };

  // Marks [begin, end), or what is known of it already.
  void set(uintptr_t begin, uintptr_t end, const Mark& mark, bool only_known) {
    split(begin), split(end);
    auto it = marks_.lower_bound(begin);
    if (only_known) {
      for (; it != marks_.end() && it->first < end; ++it) it->second.mark = mark;
      return;
    }
    while (it != marks_.end() && it->first < end) it = marks_.erase(it);
    marks_.emplace_hint(it, begin, Range{end, mark});
  }
  // body(begin, end, mark) for what is known of [begin, end), until it is false.
  template <class Body>
  void each(uintptr_t begin, uintptr_t end, Body&& body) const {
    auto it = marks_.upper_bound(begin);
    if (it != marks_.begin() && std::prev(it)->second.end > begin) --it;
    for (; it != marks_.end() && it->first < end; ++it)
      if (!body(std::max(begin, it->first), std::min(end, it->second.end), it->second.mark)) return;
  }
  // The first mark within [begin, end) that `wrong` holds for, or null.
  template <class Wrong>
  const Mark* find(uintptr_t begin, uintptr_t end, Wrong&& wrong) const {
    const Mark* found = nullptr;
    each(begin, end, [&](uintptr_t, uintptr_t, const Mark& m) { return !wrong(m) || (found = &m, false); });
    return found;
  }

 private:
  struct Range {
    uintptr_t end;
    Mark mark;
  };
  void split(uintptr_t at) {
    auto it = marks_.lower_bound(at);
    if (it == marks_.begin() || (--it)->second.end <= at || it->first == at) return;
    const Range whole = it->second;
    it->second.end = at;
    marks_.emplace_hint(std::next(it), at, whole);
  }

  std::map<uintptr_t, Range> marks_;
};

// Every mistake of a run, each with the operations, their places in the run, and the fields.
class ArenaChecker {
 public:
  explicit ArenaChecker(const Run& run) : run_(run) {
    for (now_ = 0; now_ < run.events.size(); ++now_) {
      const auto& views = run.events[now_].views;
      check_overlaps(views);
      if (run.events[now_].name == kCopyBytes && copies_within(views)) continue;
      for (const auto& v : views)
        if (v.access == Access::read || v.access == Access::update) check_read(v);
      for (const auto& v : views)
        if (v.access != Access::read) mark(v);
    }
  }

  std::vector<std::string> mistakes;
  struct Read {
    size_t reader;
    std::string field;
    size_t writer;
    auto operator<=>(const Read&) const = default;
  };
  std::set<Read> reads;  // which event reads what which other one has left

  // The same with the places that operations have among operations alone.
  std::set<Read> reads_by_place() const {
    std::vector<size_t> places;
    for (const Event& e : run_.events) places.push_back((places.empty() ? 0 : places.back()) + is_operation(e));
    std::set<Read> out;
    for (const Read& r : reads) out.insert({places[r.reader], r.field, places[r.writer]});
    return out;
  }

 private:
  using View = trace::View;

  std::string name(size_t event, const char* field) const {
    return run_.events[event].name + " (" + std::to_string(event) + ") " + field;
  }
  uintptr_t begin_of(const View& v) const { return run_.planned(reinterpret_cast<uintptr_t>(v.data)); }
  uintptr_t piece_of(const View& v) const {
    const auto* piece = run_.piece_of(reinterpret_cast<uintptr_t>(v.data));
    return piece ? piece->first : 0;
  }
  // body(begin, end) for every run of bytes, until it is false.
  template <class Body>
  void each_range(const View& v, Body&& body) const {
    const uintptr_t begin = begin_of(v);
    const auto row = static_cast<uintptr_t>(v.row_bytes), stride = static_cast<uintptr_t>(v.stride_bytes);
    if (v.rows <= 0 || row == 0) return;
    if (v.rows == 1 || row == stride) return (void)body(begin, begin + row * static_cast<uintptr_t>(v.rows));
    for (uintptr_t i = 0; i < static_cast<uintptr_t>(v.rows); ++i)
      if (!body(begin + i * stride, begin + i * stride + row)) return;
  }

  void check_read(const View& v, bool may_be_empty = false) {
    const uintptr_t piece = piece_of(v);
    each_range(v, [&](uintptr_t begin, uintptr_t end) {
      shadow_.each(begin, end, [&](uintptr_t, uintptr_t, const Shadow::Mark& m) {
        return reads.insert({now_, v.field, m.event}), true;
      });
      const auto* found = shadow_.find(begin, end, [&](const Shadow::Mark& m) {
        return m.state == Shadow::State::empty ? !may_be_empty : m.state == Shadow::State::gone || m.piece != piece;
      });
      if (!found) return true;
      const std::string last = name(found->event, found->field);
      report(name(now_, v.field) + (found->state == Shadow::State::gone ? " is read after " + last + " was given back"
                                    : found->state == Shadow::State::empty
                                        ? " is read, but nobody has written it since " + last
                                        : " is read, but " + last + " lies over it"));
      return false;
    });
  }

  // Copies may take along what nobody has written, when buffers move: it stays so. False: the copy leaves for the host.
  bool copies_within(const std::vector<View>& views) {
    const uintptr_t from = begin_of(views[0]), to = begin_of(views[1]);
    const uintptr_t bytes = static_cast<uintptr_t>(views[0].row_bytes);
    const auto empty = [](const Shadow::Mark& m) { return m.state == Shadow::State::empty; };
    if (!shadow_.find(from, from + bytes, empty)) return false;
    if (!shadow_.find(to, to + bytes, [](const auto&) { return true; })) return false;
    std::vector<std::pair<uintptr_t, uintptr_t>> holes;
    shadow_.each(from, from + bytes, [&](uintptr_t begin, uintptr_t end, const Shadow::Mark& m) {
      if (empty(m)) holes.emplace_back(begin - from, end - from);
      return true;
    });
    check_read(views[0], true), mark(views[1]);
    for (const auto& [begin, end] : holes)
      shadow_.set(to + begin, to + end, {Shadow::State::empty, now_, "from", piece_of(views[1])}, false);
    return true;
  }

  void mark(const View& v) {
    const std::string& event = run_.events[now_].name;
    const bool makes = event == kCarve || event == kAllocate;
    const auto state = event == kRelease             ? Shadow::State::gone
                       : v.access == Access::scratch ? Shadow::State::empty
                                                     : Shadow::State::full;
    const Shadow::Mark mark{state, now_, v.field, piece_of(v)};
    if (event == kAllocate) buffers_[begin_of(v)] = begin_of(v) + static_cast<uintptr_t>(v.row_bytes);
    if (event == kCarve) check_room(v);
    each_range(v, [&](uintptr_t begin, uintptr_t end) {
      const auto* gone = shadow_.find(begin, end, [&](const auto& m) { return m.state == Shadow::State::gone; });
      if (gone && event != kAllocate) {
        report(name(now_, v.field) + " is written after " + name(gone->event, gone->field) + " was given back");
        return false;
      }
      shadow_.set(begin, end, mark, !makes && mark.piece == 0);
      return true;
    });
  }

  // That an arena does not go beyond the buffer, or the piece, that it carves.
  void check_room(const View& v) {
    const Piece& piece = run_.piece_of(reinterpret_cast<uintptr_t>(v.data))->second;
    const uintptr_t base = run_.planned(piece.base), end = begin_of(v) + static_cast<uintptr_t>(v.row_bytes);
    const auto buffer = buffers_.upper_bound(base);
    uintptr_t room =
        buffer == buffers_.begin() || std::prev(buffer)->second <= base ? UINTPTR_MAX : std::prev(buffer)->second;
    if (const auto* outer = run_.piece_of(piece.base))
      room = std::min(room, run_.planned(outer->first) + outer->second.end - outer->first);
    if (end > room)
      report(name(now_, v.field) + " ends " + std::to_string(end - room) + " bytes behind what its arena has");
  }

  // Fields of ops.h that may be the same memory.
  static bool may_be_one(const std::string& operation, const std::string& output, const std::string& input) {
    static constexpr const char* kPairs[][3] = {
        {"gated_residual", "out", "x"},
        {"gather_sparse", "out", "x"},
        {"add_tables", "out", "x"},
        {"gelu", "y", "x"},
        {"silu", "y", "x"},
        {"gelu_backward", "grad_x", "grad_y"},
        {"silu_backward", "grad_x", "grad_y"},
        {"modulated_layer_norm_backward", "grad_x", "grad_residual"},
        {"modulated_mean_backward", "grad_x", "grad_residual"},
    };
    for (const auto& pair : kPairs)
      if (operation == pair[0] && output == pair[1] && input == pair[2]) return true;
    return false;
  }
  bool overlap(const View& a, const View& b) const {
    const auto reach = [](const View& v) {
      return static_cast<uintptr_t>((v.rows - 1) * v.stride_bytes + v.row_bytes);
    };
    const uintptr_t first = begin_of(a), second = begin_of(b);
    if (a.rows <= 0 || b.rows <= 0 || first + reach(a) <= second || second + reach(b) <= first) return false;
    Shadow bytes;
    each_range(a, [&](uintptr_t begin, uintptr_t end) { return bytes.set(begin, end, {}, false), true; });
    bool found = false;
    each_range(b, [&](uintptr_t begin, uintptr_t end) {
      return !(found = bytes.find(begin, end, [](const auto&) { return true; }) != nullptr);
    });
    return found;
  }
  void check_overlaps(const std::vector<View>& views) {
    for (const View& output : views) {
      if (output.access == Access::read) continue;
      for (const View& other : views) {
        const bool both_write = other.access != Access::read;
        if (&other == &output || (both_write && &other < &output) || !overlap(output, other)) continue;
        const bool same = output.data == other.data && output.stride_bytes == other.stride_bytes;
        if (same && may_be_one(run_.events[now_].name, output.field, other.field)) continue;
        report(name(now_, output.field) + " lies over its own " + other.field);
      }
    }
  }
  void report(const std::string& mistake) { mistakes.push_back(mistake); }

  const Run& run_;
  Shadow shadow_;
  std::map<uintptr_t, uintptr_t> buffers_;
  size_t now_ = 0;
};

inline std::vector<std::string> mistakes_of(const Run& run) { return ArenaChecker(run).mistakes; }

}  // namespace flexdit::test
