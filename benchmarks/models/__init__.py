# SPDX-License-Identifier: Apache-2.0
"""Pretrained models and real text from PyPI, for measurements; this project has none."""
