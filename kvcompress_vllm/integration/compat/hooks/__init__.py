# SPDX-License-Identifier: Apache-2.0
"""Every vLLM name outside its public plugin interfaces that this package relies on, and why.

What is found by itself in our source (``ours.py``) need not be here, except for the releases that
have it (``since``, ``until``) and what is replaced at run time. ``contract.py`` checks all of it.

One file for each folder of ``integration/`` that relies on them.
"""

from __future__ import annotations

from kvcompress_vllm.integration.compat.hooks import cpu, engine, frontend, start, worker
from kvcompress_vllm.integration.compat.hooks.hook import Hook

__all__ = ["HOOKS", "Hook"]

HOOKS = (*start.HOOKS, *frontend.HOOKS, *engine.HOOKS, *worker.HOOKS, *cpu.HOOKS)
