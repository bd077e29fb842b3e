"""What is set aside is of no more concern to the garbage collector; what comes later is."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from service.garbage import set_aside

pytestmark = pytest.mark.fast


class Ring:
    """Refers to itself, so that only a collection can free it."""

    def __init__(self) -> None:
        self.ring = self


@pytest.fixture(autouse=True)
def back_again() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_there_is_not_looked_at_again() -> None:
    loaded = [[number] for number in range(1000)]
    set_aside()
    assert gc.get_freeze_count() > len(loaded)
    assert not any(item is loaded for item in gc.get_objects())


def test_garbage_is_thrown_away_before_not_kept_for_ever() -> None:
    lost = weakref.ref(Ring())
    set_aside()
    assert lost() is None


def test_later_garbage_is_collected_as_ever() -> None:
    set_aside()
    lost = weakref.ref(Ring())
    gc.collect()
    assert lost() is None
