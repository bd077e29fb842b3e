"""R9: scheduler, blocks and prefix cache under any order of events, counted: so many events, each with every invariant.

The machine is that of tests/invariants; here it runs longer, and says how long.
"""

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from tests.faults.conftest import scaled
from tests.invariants.test_scheduler_machine import SchedulerMachine

pytestmark = pytest.mark.faults

EVENTS = scaled(500, 10_000)


def test_every_invariant_holds_after_every_event() -> None:
    """A block that is freed twice, or a prefix that outlives its block, shows only after some rare order of events."""
    seen = 0

    class Counted(SchedulerMachine):
        @invariant()
        def count(self) -> None:
            nonlocal seen
            seen += 1

    run_state_machine_as_test(
        Counted, settings=settings(max_examples=EVENTS // 40, stateful_step_count=50, deadline=None)
    )
    print(f"{seen} events")
    assert seen >= EVENTS
