# SPDX-License-Identifier: Apache-2.0
"""What users may set, how they write it, and what is accepted."""
