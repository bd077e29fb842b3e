import asyncio

from service.channel import MAX_UNREAD, SILENT_INGRESS_TURNS, Outbox


async def test_outputs_that_gather_while_nobody_takes_leave_as_one_item() -> None:
    outbox = Outbox()
    outbox.put([("a", [1], None, 0, None)])
    outbox.put([("a", [2], None, 0, None), ("b", [3], "length", 0, None)])
    assert await outbox.take() == [("a", [1], None, 0, None), ("a", [2], None, 0, None), ("b", [3], "length", 0, None)]


async def test_taking_waits_until_there_is_something() -> None:
    outbox = Outbox()
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    assert not taking.done()
    outbox.put([("a", [1], None, 0, None)])
    assert await taking == [("a", [1], None, 0, None)]


async def test_a_taken_item_is_not_given_twice() -> None:
    outbox = Outbox()
    outbox.put([("a", [1], None, 0, None)])
    await outbox.take()
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    assert not taking.done()
    taking.cancel()


async def test_a_closed_outbox_gives_what_it_holds_and_then_ends() -> None:
    outbox = Outbox()
    outbox.put([("a", [1], None, 0, None)])
    outbox.close()
    assert await outbox.take() == [("a", [1], None, 0, None)]
    assert await outbox.take() is None


async def test_a_call_that_another_has_followed_ends_and_takes_nothing_more() -> None:
    outbox = Outbox()
    first = outbox.answer()
    taking = asyncio.create_task(outbox.take(first))
    await asyncio.sleep(0)
    second = outbox.answer()
    outbox.put([("a", [1], None, 0, None)])
    assert await taking is None
    assert await outbox.take(first) is None
    assert await outbox.take(second) == [("a", [1], None, 0, None)]


async def test_a_beat_is_an_item_without_outputs() -> None:
    outbox = Outbox()
    outbox.turn(beat=True)
    assert await outbox.take() == []


async def test_an_ingress_that_does_not_ping_is_gone() -> None:
    outbox = Outbox()
    for _ in range(SILENT_INGRESS_TURNS):
        outbox.turn(beat=False)
    assert not outbox.is_forsaken(hears_pings=True)
    outbox.turn(beat=False)
    assert outbox.is_forsaken(hears_pings=True)
    outbox.heard(0)
    assert not outbox.is_forsaken(hears_pings=True)


async def test_where_no_pings_come_through_an_ingress_is_gone_when_it_has_long_had_nothing_left() -> None:
    outbox = Outbox()
    outbox.request_ids.add("a")
    for _ in range(2 * SILENT_INGRESS_TURNS):
        outbox.turn(beat=False)
    assert not outbox.is_forsaken(hears_pings=False)
    outbox.request_ids.clear()
    for _ in range(SILENT_INGRESS_TURNS + 1):
        outbox.turn(beat=False)
    assert outbox.is_forsaken(hears_pings=False)


async def test_what_ray_holds_for_an_ingress_that_does_not_read_counts_as_unread() -> None:
    outbox = Outbox()
    outbox.put([("a", [1], None, 0, None)] * MAX_UNREAD)
    await outbox.take()
    outbox.put([("a", [1], None, 0, None)])
    assert outbox.is_forsaken(hears_pings=True)
    outbox.heard(MAX_UNREAD)
    assert not outbox.is_forsaken(hears_pings=True)


async def test_a_session_that_is_given_up_keeps_nothing() -> None:
    outbox = Outbox()
    outbox.put([("a", [1], None, 0, None)])
    outbox.close(discard=True)
    assert await outbox.take() is None
