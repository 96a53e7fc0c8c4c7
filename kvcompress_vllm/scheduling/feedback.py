# SPDX-License-Identifier: Apache-2.0
"""What workers report of requests, one or two steps after the plan: loss curves and failures."""

from __future__ import annotations

from collections.abc import Mapping

from kvcompress_vllm.records.report import Report, Scored
from kvcompress_vllm.scheduling.budgets import Budgets
from kvcompress_vllm.scheduling.contexts import Contexts
from kvcompress_vllm.scheduling.course import Course
from kvcompress_vllm.scheduling.mass import decide, rounded_ratio
from kvcompress_vllm.scheduling.newcomers import Newcomers
from kvcompress_vllm.scheduling.request import Tracked


class Feedback:
    """Notes reports in what is known of the requests. Those that come too late change nothing.

    Args:
        requests: all that are tracked, by id; changed by the owner.
        contexts: packed prefixes that requests share.
        budgets: the sizes of all budgets.
        newcomers: learns what mass budgets come to.
        course: takes on a request that is not compressed this time.
    """

    def __init__(
        self,
        requests: Mapping[str, Tracked],
        contexts: Contexts,
        budgets: Budgets,
        newcomers: Newcomers,
        course: Course,
    ) -> None:
        self._requests, self._contexts, self._budgets = requests, contexts, budgets
        self._newcomers, self._course = newcomers, course

    def scored(self, scored: Scored) -> None:
        """Fix C of a request from its loss curve. One that has gone since, or has come back anew,
        is left alone. If there is nothing to gain, it is not compressed this time."""
        tracked = self._requests.get(scored.request_id)
        if (
            tracked is None
            or not tracked.awaits_curve
            or (tracked.state_slot, tracked.due_at) != (scored.state_slot, scored.num_tokens)
        ):
            return
        decided = decide(tracked, scored.curve)
        self._newcomers.learn(decided)
        expected = rounded_ratio(decided.covered / decided.kept)
        tracked.sizes = self._budgets.sizes(tracked.budget._replace(ratio=expected))
        if tracked.packing.gives_back(decided) > 0:
            tracked.decided = decided.kept
            return
        self._course.stop_computing(tracked)
        if tracked.due_at < tracked.prefill_end:
            sizes, packing = tracked.sizes, tracked.packing
            self._course.go_on(
                tracked, sizes.next_due(packing, tracked.due_at, tracked.prefill_end)
            )
        else:
            self._course.go_on(tracked, tracked.sizes.after_interval(tracked.due_at))

    def reported(self, report: Report) -> bool:
        """Learn the loss curve of a compression.

        Returns:
            Whether the request still is packed as the report says; if not, it came too late.
        """
        tracked = self._requests.get(report.request_id)
        if (
            tracked is None
            or not tracked.kept
            or (tracked.packed_slot, tracked.covered)
            != (report.state_slot, tracked.sizes.covered(report.num_tokens))
        ):
            return False
        tracked.curve = report.curve
        if tracked.context is not None:
            tracked.context.curve = report.curve
            for user in tracked.context.users & self._requests.keys():
                self._requests[user].curve = report.curve
        return True

    def spoiled(self, report: Report | Scored) -> set[str]:
        """Who else has the keys that a policy chose which failed: users of the context that they
        went into. Nobody takes it from now on."""
        for context in self._contexts.described:
            if (context.slot, context.owner) == (report.state_slot, report.request_id):
                users = set(context.users)
                self._contexts.retire(context)
                return users
        return set()
