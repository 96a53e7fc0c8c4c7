# SPDX-License-Identifier: Apache-2.0
"""What came of it, for metrics, responses and the live page."""
