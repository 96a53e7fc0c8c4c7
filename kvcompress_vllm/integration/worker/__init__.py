# SPDX-License-Identifier: Apache-2.0
"""The workers' processes."""
