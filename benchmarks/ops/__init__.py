# SPDX-License-Identifier: Apache-2.0
"""Check the CUDA ops, then time them."""
