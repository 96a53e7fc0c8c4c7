// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_outliers.distances on the CPU: one running sum per channel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace {

using torch::stable::Tensor;

// vectors [H, n, D] fp32, contiguous -> [H, n] fp32
Tensor distances(const Tensor& vectors, int64_t radius) {
  const int64_t heads = vectors.size(0), n = vectors.size(1), size = vectors.size(2);
  Tensor out = torch::stable::new_empty(vectors, {heads, n});
  const float* in = static_cast<const float*>(vectors.data_ptr());
  float* result = static_cast<float*>(out.data_ptr());
  std::vector<double> sum(size);
  for (int64_t head = 0; head < heads; ++head, in += n * size, result += n) {
    std::fill(sum.begin(), sum.end(), 0.0);
    int64_t first = 0, end = 0;  // the neighbours whose sum is there
    for (int64_t key = 0; key < n; ++key) {
      for (; end < std::min(n, key + radius + 1); ++end) {
        for (int64_t d = 0; d < size; ++d) sum[d] += in[end * size + d];
      }
      for (; first < key - radius; ++first) {
        for (int64_t d = 0; d < size; ++d) sum[d] -= in[first * size + d];
      }
      double square = 0;
      for (int64_t d = 0; d < size; ++d) {
        const double difference = in[key * size + d] - sum[d] / (end - first);
        square += difference * difference;
      }
      result[key] = static_cast<float>(square);
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kvcompress_outliers, CPU, m) { m.impl("distances", TORCH_BOX(&distances)); }
