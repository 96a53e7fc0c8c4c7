# SPDX-License-Identifier: Apache-2.0
"""What is relied on of vLLM."""
