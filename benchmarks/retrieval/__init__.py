# SPDX-License-Identifier: Apache-2.0
"""Long-context retrieval tasks with exact answers, generated from a seed (see README.md)."""

from .tasks import TASKS, TaskGen

__all__ = ["TASKS", "TaskGen"]
