# SPDX-License-Identifier: Apache-2.0
"""Where keys lie: pages, state tables, invariants."""
