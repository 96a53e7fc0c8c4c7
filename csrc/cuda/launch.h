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

#include <algorithm>
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

  // Shares that each of `heads` heads' keys are cut into, at most `most`, for about four rounds of
  // blocks on the device.
  template <typename Kernel>
  int64_t num_splits(Kernel kernel, int threads, int shared, int64_t heads, int64_t most) const {
    int per_processor = 0;
    STD_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared));
    KVC_CHECK(per_processor > 0, "the kernel does not fit this device");
    const int64_t blocks = 4ll * per_processor * attribute(cudaDevAttrMultiProcessorCount);
    return std::clamp<int64_t>(most, 1, std::max<int64_t>(1, blocks / heads));
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

// What the kernels that walk over the keys of all heads need, grid (splits, L * H, R).
inline void check_all_heads(const Tensor& pages, const PagedRows& rows, int64_t requests) {
  KVC_CHECK(rows.block_size >= 8 && (rows.block_size & (rows.block_size - 1)) == 0,
            "pages have a block size of ", rows.block_size, ", not a power of two from 8 on");
  KVC_CHECK(requests <= 65535, "block_table has ", requests, " rows; the most is 65535");
  KVC_CHECK(rows.slots <= 65535, "num_pages has ", rows.slots,
            " layers and heads; the most is 65535");
  KVC_CHECK(is_aligned(pages.const_data_ptr(), 16), "pages must be aligned to 16 bytes");
}

}  // namespace kvc::gpu
