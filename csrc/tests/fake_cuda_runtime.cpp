// The few functions of the CUDA runtime that gemm_cuda.cpp calls, for a machine without a GPU.
#include <cuda_runtime_api.h>

#include <cstring>

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaMemset2DAsync(void* data, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(data) + i * pitch, value, width);
  return cudaSuccess;
}
