# SPDX-License-Identifier: Apache-2.0
"""Flags, wiring and refusals, before an engine starts."""
