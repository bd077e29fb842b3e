"""Is the engine's thread still getting on? A step that has begun and does not end is found here.

No fixed bound fits: a step of a small model takes a millisecond, a full chunk of a large one on a slow machine takes
half a minute, and a compiler may run inside the first. So the bound follows from what this engine's steps have taken.
"""

TURN_MEMORY = 0.99  # what a step leaves of the slowest before it
LEAST_S = 5.0
MARGIN = 3.0
MOST_S = 120.0  # also for the first step, of which nothing is known


class StepWatch:
    """Counts the turns of whoever watches, not seconds: a process that was stopped has not been stuck."""

    def __init__(self, turn_s: float) -> None:
        self._turn_s = turn_s
        self._seconds_per_token = 0.0
        self._rounds = -1
        self._turns = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step has ended. Called in the engine's thread."""
        self._seconds_per_token = max(self._seconds_per_token * TURN_MEMORY, seconds / num_tokens)

    def allowance(self, num_tokens: int) -> float:
        """Seconds that a step of so many tokens may take.

        The slowest time for a token is that of a step with few, so this is ample for a step with many.
        """
        if not self._seconds_per_token:
            return MOST_S
        return min(MOST_S, LEAST_S + MARGIN * num_tokens * self._seconds_per_token)

    def is_stuck(self, rounds: int, num_tokens: int, *, is_idle: bool) -> bool:
        """To be asked once a turn. rounds: of the engine's loop so far; num_tokens: of the step it is in."""
        if is_idle or rounds != self._rounds:
            self._rounds, self._turns = rounds, 0
            return False
        self._turns += 1
        return self._turns * self._turn_s > self.allowance(num_tokens)
