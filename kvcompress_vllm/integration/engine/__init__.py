# SPDX-License-Identifier: Apache-2.0
"""The engine's process: vLLM's scheduler and KV cache manager."""
