import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dysurgery.budget import best, limit
from dysurgery.errors import UsageError


@pytest.mark.parametrize(
    ("written", "total"),
    [
        ("2x", 2000), ("1.5x", 1500), ("3k", 3000), ("20M", 20_000_000), ("0.01G", 10_000_000), ("+3%", 1030),
        ("+0.1%", 1001), ("+1M", 1_001_000), ("+7", 1007), (1234, 1234), (" 1234 ", 1234), ("1x", 1000), (None, None),
        (1500.0, 1500),
    ],
)  # fmt: skip
def test_a_budget_is_a_multiple_a_total_or_an_addition(written, total):
    assert limit(written, 1000, "parameters") == total


@pytest.mark.parametrize(
    ("written", "words"),
    [("3%", "did you mean '\\+3%'"), ("abc", "'abc'"), ("+2x", "multiple"), ("0.5x", "less than the 1,000"),
     (999, "conversion only adds"), ("", "got ''"), ("2xx", "2xx"), ("-1%", "multiple"), (float("nan"), "nan")],
)  # fmt: skip
def test_a_budget_that_makes_no_sense_is_refused(written, words):
    with pytest.raises(UsageError, match=words):
        limit(written, 1000, "parameters")


items = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8
)
rooms = st.tuples(*[st.none() | st.integers(0, 30)] * 2)


def worth(found, given):
    return sum(given[index][0] for index in found)


@settings(max_examples=150, deadline=None)
@given(items, rooms)
def test_the_choice_is_the_best_there_is_and_never_over_the_room(given, room):
    values, costs = [value for value, *_ in given], [tuple(cost) for _, *cost in given]

    def fits(some):
        return all(size is None or sum(costs[i][p] for i in some) <= size for p, size in enumerate(room))

    found = best(values, costs, room)
    assert fits(found)
    every = (some for n in range(len(given) + 1) for some in itertools.combinations(range(len(given)), n))
    assert worth(found, given) == pytest.approx(max(worth(some, given) for some in every if fits(some)))
    assert all(values[index] > 0 for index in found)


@settings(max_examples=60, deadline=None)
@given(items, rooms, st.integers(0, 5))
def test_more_room_is_never_worth_less(given, room, more):
    values, costs = [value for value, *_ in given], [tuple(cost) for _, *cost in given]
    larger = [None if size is None else size + more for size in room]
    assert worth(best(values, costs, larger), given) >= worth(best(values, costs, room), given) - 1e-9


def test_of_equals_the_earliest_are_taken():
    assert best([1.0] * 6, [(3,)] * 6, [10]) == (0, 1, 2)


def test_many_items_of_many_sizes_are_quick():
    values = [(7 * i % 31 + 1) ** 0.5 for i in range(120)]
    costs = [(100 * (i % 17) + 37, 50 * (i % 13) + 11) for i in range(120)]
    found = best(values, costs, [40_000, 15_000])
    assert sum(costs[i][0] for i in found) <= 40_000
    assert sum(costs[i][1] for i in found) <= 15_000
