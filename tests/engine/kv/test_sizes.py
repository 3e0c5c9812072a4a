"""Where graphs are kept, room is of few sizes, however a batch has come to its rows."""

from __future__ import annotations

import pytest

from runner.engine.kv.positions import Positions
from runner.engine.kv.sizes import AS_NEEDED, FEW
from runner.inspect import memory


def batch(lengths: list[int], ends: list[int], slots: int = 0, capacity: int = 0) -> Positions:
    """Rows in a batch with so much room, or as much as they need."""
    positions = Positions(len(lengths), FEW)
    positions.restart([*lengths], [*lengths], ends)
    positions.reserve(positions.needed)
    positions.slots, positions.capacity = slots or positions.slots, capacity or positions.capacity
    return positions


def test_tokens_are_of_four_sizes_between_powers_of_two() -> None:
    sizes = [FEW.tokens(needed) for needed in range(1, 32_769)]
    assert sorted(set(sizes))[:8] == [256, 512, 768, 1024, 1280, 1536, 1792, 2048]
    assert len(set(sizes)) == 4 + 4 * 5
    assert all(needed <= size <= max(needed + 255, 1.25 * needed) for needed, size in enumerate(sizes, start=1))
    assert all(FEW.tokens(size) == size for size in sizes)


def test_slots_are_those_of_rows_that_join_one_by_one_and_no_more_than_a_budget_counts() -> None:
    for rows in range(1, 300):
        assert FEW.slots(rows, had=rows // 2) == FEW.slots(rows) == memory.slots(rows)
        assert rows <= FEW.slots(rows) <= rows + rows // 3
    assert (AS_NEEDED.slots(9, had=7), AS_NEEDED.slots(9, had=8)) == (9, 10)


@pytest.mark.parametrize("groups", [[1] * 9, [4, 5], [9], [2, 3, 4]])
def test_rows_have_the_same_room_however_they_come_together(groups: list[int]) -> None:
    positions = batch([40] * groups[0], [900] * groups[0])
    for more in groups[1:]:
        positions.extend(batch([40] * more, [300] * more))
    assert (positions.rows, positions.slots, positions.capacity) == (9, 10, 1024)


def test_slots_are_made_for_those_that_will_join_soon() -> None:
    positions = batch([40] * 3, [300] * 3, slots=4)
    positions.extend(batch([40], [300]), soon=30)
    assert positions.slots == 4, "if some are made"
    positions.extend(batch([40], [300]), soon=4)
    assert positions.slots == 10
    grows = Positions(3)
    grows.extend(Positions(1), soon=6)
    assert grows.slots == 4, "elsewhere, room grows with the rows"


def test_room_is_kept_while_rows_come_and_go() -> None:
    positions = batch([40] * 17, [300] * 17, capacity=1024)
    positions.take(list(range(4)))
    positions.fit()
    assert (positions.slots, positions.capacity) == (17, 1024)
    positions.take([0, 1])
    positions.fit()
    assert (positions.slots, positions.capacity) == (2, 1024)
    positions = batch([40] * 2, [300] * 2, capacity=2304)
    positions.fit()
    assert positions.capacity == 512


def test_where_all_is_copied_anyhow_only_twice_what_is_needed_is_kept() -> None:
    """A long row's room is not given to all that come later, nor many short ones' slots to a row that gets long."""
    longer = batch([40] * 5, [300] * 5, slots=10)
    longer.reserve(600)
    assert (longer.slots, longer.capacity) == (10, 768)
    longer = batch([40] * 4, [300] * 4, slots=10)
    longer.reserve(600)
    assert (longer.slots, longer.capacity) == (4, 768)
    more = batch([40] * 4, [300] * 4, capacity=2048)
    more.extend(batch([40], [300]))
    assert (more.slots, more.capacity) == (5, 512)
    more = batch([40] * 4, [600] * 4, capacity=1536)
    more.extend(batch([40], [300]))
    assert (more.slots, more.capacity) == (5, 1536)


def test_a_row_is_expected_to_come_to_its_end_and_beyond_it_where_it_was_passed() -> None:
    assert batch([40, 200], [900, 201]).needed == 900
    assert batch([900, 200], [900, 201]).needed == 900
    assert batch([901, 200], [900, 201]).needed == 901 + 256
    assert batch([40], [0]).needed == 40 + 256


def test_narrow_leaves_what_rows_need() -> None:
    positions = batch([40] * 4, [300] * 4, slots=10, capacity=1024)
    assert positions.narrow()
    assert (positions.slots, positions.capacity) == (4, 512)
    assert not positions.narrow()
    plain = Positions(1)
    plain.reserve(5000)
    assert not plain.narrow(), "elsewhere, no more is kept than rows need"
