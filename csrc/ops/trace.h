// What a run does to memory, for the arena checker (csrc/tests/arena_checker.h): the fields of every operation, the
// pieces that arenas carve, buffers that come and go. Only the emulated library has a recorder; elsewhere there is
// none, and nothing is left of this.
#pragma once

#include <cstdint>
#include <vector>

namespace flexdit {

// What an operation does with a field.
enum class Access : uint8_t {
  none,
  read,
  write,     // all of it, whatever was there
  update,    // read and written
  scratch,   // written first, and left with nothing in it
  indirect,  // addresses on the device are read, and a row at each of them
};
constexpr Access written(bool accumulate) { return accumulate ? Access::update : Access::write; }

namespace trace {

struct View {
  const char* field;
  const void* data;
  int64_t rows, row_bytes, stride_bytes;
  Access access;
};

class Recorder {
 public:
  virtual ~Recorder() = default;
  // An operation that is launched, or captured, now.
  virtual void operation(const char* name, const std::vector<View>& views) = 0;
  // An arena has carved `bytes` behind the first `used` at `base`: where they shall really lie. Fresh ones hold
  // nothing, others were carved before at the same place.
  virtual void* piece(char* base, int64_t used, int64_t bytes, bool fresh) = 0;
  virtual void allocated(void* memory, int64_t bytes) = 0;
  virtual bool keeps(void* memory) = 0;  // memory that is given back; true: the recorder frees it
};

#ifdef FLEXDIT_EMULATED
inline thread_local Recorder* current = nullptr;
inline Recorder* recorder() { return current; }
#else
inline Recorder* recorder() { return nullptr; }
#endif

// What lies there is not to be read any more.
inline void discard(const void* data, int64_t bytes) {
  if (recorder() && data && bytes > 0)
    recorder()->operation("discard", {{"memory", data, 1, bytes, bytes, Access::scratch}});
}
inline void copy(const void* to, const void* from, int64_t bytes) {
  if (!recorder()) return;
  recorder()->operation("copy",
                        {{"from", from, 1, bytes, bytes, Access::read}, {"to", to, 1, bytes, bytes, Access::write}});
}

}  // namespace trace
}  // namespace flexdit
