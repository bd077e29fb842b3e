"""Keeps Python's garbage collector from what a process has loaded once and for all."""

import gc


def set_aside() -> None:
    """Leave out of all collections to come whatever there is now. To be called when a process has loaded what it needs.

    A full collection goes through every object, and no stream of the process goes on meanwhile.
    """
    gc.collect()
    gc.freeze()
