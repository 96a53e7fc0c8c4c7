// SPDX-License-Identifier: Apache-2.0
// From a run-time dtype to a C++ type: fp32, fp16 and bf16.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <stdexcept>
#include <utility>

namespace kvc {

inline bool is_cache_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// Calls f with a value of the C++ type, to be read by decltype only.
template <typename F>
void dispatch_cache_dtype(torch::headeronly::ScalarType dtype, F&& f) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) {
    std::forward<F>(f)(float{});
  } else if (dtype == ScalarType::Half) {
    std::forward<F>(f)(torch::headeronly::Half{});
  } else if (dtype == ScalarType::BFloat16) {
    std::forward<F>(f)(torch::headeronly::BFloat16{});
  } else {
    throw std::runtime_error("dtype must be float32, float16 or bfloat16");
  }
}

}  // namespace kvc
