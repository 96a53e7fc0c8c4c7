# SPDX-License-Identifier: Apache-2.0
"""A module of another package that wants to end the process when it is imported."""

import sys

sys.exit(3)
