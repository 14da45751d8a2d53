// Named test cases and checks that report the failing expression, its values and its place. Each test program
// includes this header once and has its main from it; an argument runs only the cases whose names contain it.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*body)();
};
inline std::vector<Case> cases;
struct Register {
  Register(const char* name, void (*body)()) { cases.push_back({name, body}); }
};

inline int failures = 0;
inline bool skipped = false;  // set by a case that this machine cannot run; ctest then reports the program as skipped

inline bool report(bool holds, const char* file, int line, const std::string& message) {
  if (!holds && ++failures <= 40) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
  return holds;
}

template <class... Values>
std::string text(const Values&... values) {
  std::ostringstream out;
  out.precision(17);
  (out << ... << values);
  return out.str();
}

template <class A, class B>
bool equal(const A& a, const B& b, const char* file, int line, const char* what) {
  return report(a == b, file, line, text(what, a, ", must be ", b));
}
inline bool near(double a, double b, double most, const char* file, int line, const char* what) {
  return report(std::abs(a - b) <= most, file, line, text(what, a, ", must be ", b, " within ", most));
}

}  // namespace check

#define CHECK(holds) check::report((holds), __FILE__, __LINE__, #holds)
#define CHECK_NOTE(holds, ...) check::report((holds), __FILE__, __LINE__, check::text(#holds ": ", __VA_ARGS__))
#define CHECK_EQ(a, b) check::equal((a), (b), __FILE__, __LINE__, #a " = ")
#define CHECK_NEAR(a, b, tolerance) check::near((a), (b), (tolerance), __FILE__, __LINE__, #a " = ")
#define TEST_CASE(name)                                      \
  static void name();                                        \
  static const check::Register register_##name{#name, name}; \
  static void name()

int main(int argc, char** argv) {
  for (const auto& [name, body] : check::cases) {
    if (argc > 1 && std::string(name).find(argv[1]) == std::string::npos) continue;
    const int before = check::failures;
    try {
      body();
    } catch (const std::exception& error) {
      check::report(false, name, 0, std::string("threw ") + error.what());
    }
    std::printf("%s %s\n", check::failures == before ? "ok    " : "FAILED", name);
  }
  if (check::failures) std::fprintf(stderr, "%d checks failed\n", check::failures);
  return check::failures ? 1 : check::skipped ? 77 : 0;
}
