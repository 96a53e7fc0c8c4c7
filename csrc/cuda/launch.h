// SPDX-License-Identifier: Apache-2.0
// What every launcher needs from torch: device, stream, and a C++ type per dtype and head size.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../checks.h"
#include "gpu.cuh"

namespace kvc::gpu {

using torch::stable::Tensor;

// Makes the tensor's device current for a scope and names its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }
  int device() const { return device_; }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  // Lets `kernel` use `bytes` of dynamic shared memory.
  template <typename Kernel>
  void reserve_shared(Kernel kernel, int bytes) const {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    KVC_CHECK(bytes <= most, "this shape needs ", bytes, " bytes of shared memory; the device has ",
              most);
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Calls f with a value of the device type, to be read by decltype only.
template <typename F>
void dispatch_dtype(torch::headeronly::ScalarType dtype, F&& f) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) {
    f(float{});
  } else if (dtype == ScalarType::Half) {
    f(__half{});
  } else {
    KVC_CHECK(dtype == ScalarType::BFloat16, "dtype must be float32, float16 or bfloat16, not ",
              dtype);
    f(__nv_bfloat16{});
  }
}

// Calls f with std::integral_constant<int, D>.
template <typename F>
void dispatch_head_size(int64_t head_size, F&& f) {
  switch (head_size) {
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 96:
      return f(std::integral_constant<int, 96>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    case 256:
      return f(std::integral_constant<int, 256>{});
    default:
      KVC_CHECK(false, "head size must be 64, 96, 128 or 256 on CUDA, not ", head_size);
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace kvc::gpu
