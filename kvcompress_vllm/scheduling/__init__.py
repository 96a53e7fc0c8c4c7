# SPDX-License-Identifier: Apache-2.0
"""Engine process: who is observed and compressed, and when. Integers only."""
