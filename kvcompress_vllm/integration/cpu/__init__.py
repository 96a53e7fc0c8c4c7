# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, as far as its CUDA wheel lacks it."""
