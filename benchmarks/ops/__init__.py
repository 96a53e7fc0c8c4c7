# SPDX-License-Identifier: Apache-2.0
"""Check the native ops against the reference on hostile inputs, then time them."""
