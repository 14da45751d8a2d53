// What a test tells the fake cuBLASLt, and what it has seen.
#pragma once

struct FakeCublasLt {
  enum Refusal { nothing, status, no_algorithm, bad_state, at_run };
  Refusal refuses = nothing;  // products with an epilogue beyond the bias, each way that NVIDIA documents
  bool refuses_all = false;   // plain products too
  bool capturing = false;     // the stream
  float milliseconds = 0;     // that products have taken; algorithm i of n takes n - i
  int heuristics = 0, products = 0, epilogues = 0, last_algorithm = -1;
};
extern "C" FakeCublasLt* fake_cublaslt();
