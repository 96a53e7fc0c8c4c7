// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("write_kv", TORCH_BOX(&kvc::gpu::write_kv));
  m.impl("observe_queries", TORCH_BOX(&kvc::gpu::observe_queries));
  m.impl("paged_attention", TORCH_BOX(&kvc::gpu::paged_attention));
  m.impl("attention_statistics", TORCH_BOX(&kvc::gpu::attention_statistics));
  m.impl("key_statistics", TORCH_BOX(&kvc::gpu::key_statistics));
  m.impl("echo_scores", TORCH_BOX(&kvc::gpu::echo_scores));
  m.impl("select_pages", TORCH_BOX(&kvc::gpu::select_pages));
  m.impl("fit_scales", TORCH_BOX(&kvc::gpu::fit_scales));
  m.impl("compact_pages", TORCH_BOX(&kvc::gpu::compact_pages));
}
