# SPDX-License-Identifier: Apache-2.0
"""Quality of answers under compression, through the real engine. See ``__main__``."""
