// Feeds every file of the folders that are named to a fuzz target, so that what fuzzing found is tested without it.
#include <cstdio>

#include "files.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  int count = 0;
  for (int i = 1; i < argc; ++i)
    for (const auto& file : std::filesystem::directory_iterator(argv[i])) {
      const std::string bytes = flexdit::test::read_file(file.path());
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
      ++count;
    }
  std::printf("%d files\n", count);
  return count > 0 ? 0 : 1;
}
