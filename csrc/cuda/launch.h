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

  // Launches a kernel that waits by itself for the one before it (wait_for_kernel_before()), so
  // that starting it costs no time where the device can do that.
  template <typename Params>
  void chained(void (*kernel)(Params), int64_t blocks, int threads, int shared,
               const Params& params) const {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
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
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 80:
      return f(std::integral_constant<int, 80>{});
    case 96:
      return f(std::integral_constant<int, 96>{});
    case 112:
      return f(std::integral_constant<int, 112>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    case 160:
      return f(std::integral_constant<int, 160>{});
    case 192:
      return f(std::integral_constant<int, 192>{});
    case 256:
      return f(std::integral_constant<int, 256>{});
    default:
      KVC_CHECK(false, "head size must be 32, 64, 80, 96, 112, 128, 160, 192 or 256 on CUDA, not ",
                head_size);
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace kvc::gpu
