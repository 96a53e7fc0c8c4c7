# SPDX-License-Identifier: Apache-2.0
"""Worker process: what one step compresses, and how."""
