# SPDX-License-Identifier: Apache-2.0
"""Which keys a pretrained model needs: questions about facts in real text, answered over the keys
that each score keeps. No engine; see docs/quality.md."""
