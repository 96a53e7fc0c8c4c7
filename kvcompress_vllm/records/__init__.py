# SPDX-License-Identifier: Apache-2.0
"""Plain data that crosses processes."""
