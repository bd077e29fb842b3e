"""Block tables in one array: they are those of the requests, whatever stood in their rows before."""

import random

import numpy as np
import pytest

from model.engine.tables import BlockTables

pytestmark = pytest.mark.fast


def padded(tables: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, tables))
    return [table + [0] * (longest - len(table)) for table in tables]


def test_tables_are_those_of_the_requests_through_growth_departures_and_new_requests_in_old_rows():
    rng = random.Random(3)
    kept, running, free = BlockTables(), {}, list(range(40))
    for _ in range(400):
        if running and (not free or rng.random() < 0.3):
            row = rng.choice(list(running))
            del running[row]
            kept.clear(row)
            free.append(row)
        else:
            row = free.pop(rng.randrange(len(free)))
            running[row] = rng.choices(range(1, 1000), k=rng.randint(1, 40))
        if not running:
            continue
        for table in running.values():
            table += rng.choices(range(1, 1000), k=rng.choice([0, 0, 0, 1, 3]))
        rows = rng.sample(list(running), rng.randint(1, len(running)))
        tables = [running[row] for row in rows]
        assert kept.of(rows, tables).tolist() == padded(tables)


def test_only_what_is_new_of_a_table_is_written():
    kept = BlockTables()
    kept.of([2], [[5, 6]])
    kept.of([2], [[None, None, 7]])  # what was written is not read again
    assert kept.of([2], [[5, 6, 7]]).tolist() == [[5, 6, 7]]


def test_what_is_handed_out_does_not_change_with_the_tables():
    kept = BlockTables()
    first = kept.of([0, 1], [[5], [6, 7]])
    kept.clear(0)
    kept.of([0], [[8, 9]])
    assert np.array_equal(first, [[5, 0], [6, 7]])
