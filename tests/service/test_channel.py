import asyncio

from service.channel import Outbox


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
