// Fibers: functions that run on stacks of their own and can be left and gone on with, on one host thread.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  // `entry` will run on the calling host thread's stack number `index`, from its beginning; it must not return.
  void begin(size_t index, void (*entry)());
  // Lets the fiber go on until it suspends itself.
  void resume();
  // Called by the fiber: back to whoever resumed it. After the last time it is not resumed again.
  void suspend(bool last);
  // The first thing that `entry` calls.
  static void entered();

 private:
  size_t index_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace emulator
