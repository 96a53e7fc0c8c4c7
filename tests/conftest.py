# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings

# A busy machine must not fail a test: no example has a time limit.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
