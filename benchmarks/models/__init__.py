# SPDX-License-Identifier: Apache-2.0
"""Pretrained models and real text from PyPI, for measurements; nothing of them is in this project."""
