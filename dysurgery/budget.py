"""What a network may cost after its conversion, and the sites that are worth most within that.

A :class:`Budget` is read from what a person writes (``2x``, ``20M``, ``+3%``); :func:`best` solves the choice, a 0-1
knapsack with one or two limits. Called by :mod:`dysurgery.choose`; knows nothing of networks.
"""

import bisect
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from operator import gt, mul, sub

from dysurgery.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_WRITTEN = re.compile(r"(?P<more>\+?)(?P<number>\d+\.?\d*|\.\d+)(?P<unit>[kmg%x]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """The most that the whole network may have after the conversion; None is no limit.

    Attributes:
        params: parameters.
        mult_adds: Mult-Adds per image.
    """

    params: int | None = None
    mult_adds: int | None = None

    def holds(self, params: int, mult_adds: int) -> bool:
        """Whether a network of this cost is within the budget."""
        return (self.params is None or params <= self.params) and (
            self.mult_adds is None or mult_adds <= self.mult_adds
        )


def limit(written: str | int | float | None, before: int, what: str) -> int | None:
    """Return the limit that a person wrote down, as a number of parameters or Mult-Adds of the whole network.

    Args:
        written: ``2x`` the cost before; ``20M`` (or k, G, or a plain number) in all; ``+3%`` or ``+1M`` on top of the
            cost before. None is no limit.
        before: the cost before.
        what: ``parameters`` or ``Mult-Adds``, for errors.

    Raises:
        UsageError: if it is none of these, or less than the cost before.
    """
    if written is None:
        return None
    text = f"{written:.17g}" if isinstance(written, float) else str(written)
    found = _WRITTEN.fullmatch(text.strip())
    if found is None or (found["more"] and found["unit"] in ("x", "X")):
        raise UsageError(
            f"a budget of {what} is a multiple (2x), a total (20M) or an addition (+3%, +1M), got {str(written)!r}"
        )
    number, unit = Decimal(found["number"]), found["unit"].lower()
    if unit == "%" and not found["more"]:
        raise UsageError(f"a budget of {what} in percent is what comes on top: did you mean '+{text.strip()}'?")
    value = number * before / 100 if unit == "%" else number * (before if unit == "x" else _UNITS[unit])
    total = int(value) + (before if found["more"] else 0)
    if total < before:
        raise UsageError(
            f"a budget of {text.strip()} {what} is {total:,}, less than the {before:,} of the network as it is: "
            "conversion only adds"
        )
    return total


def best(values: Sequence[float], costs: Sequence[tuple[int, ...]], room: Sequence[int | None]) -> tuple[int, ...]:
    """Return the indices of the items whose values add up to the most within every room.

    By branch and bound, in whole numbers: the room is never exceeded, and the sum is the largest there is (values count
    to 12 digits of their sum). If an item costs no more and is worth no less than another, that other one is never
    taken without it, so that of equals the earliest are taken.

    Args:
        values: what each item is worth; one without a value above 0 is never taken.
        costs: what each costs, one whole number for each room, at least 0.
        room: how much there is; None is no limit.
    """
    places = [place for place, size in enumerate(room) if size is not None]
    rooms = [size for size in room if size is not None]
    total = sum(value for value in values if value > 0)
    worth = {index: round(value / total * 10**12) for index, value in enumerate(values) if value > 0}
    items = {
        index: _Item(index, value, tuple(costs[index][place] for place in places))
        for index, value in worth.items()
        if value and all(costs[index][place] <= size for place, size in zip(places, rooms, strict=True))
    }
    if all(sum(item.costs[place] for item in items.values()) <= size for place, size in enumerate(rooms)):
        return tuple(items)
    return tuple(sorted(_Search(list(items.values()), rooms).run()))


@dataclass(frozen=True)
class _Item:
    index: int
    value: int
    costs: tuple[int, ...]

    def before(self, other: "_Item") -> bool:
        """Whether the other is never taken without this one."""
        if self is other or self.value < other.value or any(map(gt, self.costs, other.costs)):
            return False
        return (self.value, self.costs) != (other.value, other.costs) or self.index < other.index


class _Search:
    """Depth first, the most valuable for its cost first, with the bound of the relaxed problem (Dantzig 1957).

    With two rooms the bound is that of one room, their weighted sum, at the weights where it is tightest.
    """

    def __init__(self, items: list[_Item], rooms: list[int]) -> None:
        self.rooms = rooms
        self.factors = min(_mixes(rooms), key=lambda factors: self._relaxed(items, factors))
        self.items = _sorted(items, self.factors)
        self.needs = [
            sum(1 << place for place, other in enumerate(self.items) if other.before(item)) for item in self.items
        ]
        weights = [_weight(item, self.factors) for item in self.items]
        self.weights = [0, *itertools.accumulate(weights)]
        self.values = [0, *itertools.accumulate(item.value for item in self.items)]
        self.nodes = 0

    def _relaxed(self, items: list[_Item], factors: tuple[int, ...]) -> float:
        left: int = sum(map(mul, factors, self.rooms))
        value = 0.0
        for item in _sorted(items, factors):
            weight = _weight(item, factors)
            if weight > left:
                return value + item.value * left / weight
            left, value = left - weight, value + item.value
        return value

    def _bound(self, place: int, left: int) -> int:
        """Return the most that the items from ``place`` on can be worth in the joint room ``left``."""
        end = bisect.bisect_right(self.weights, self.weights[place] + left) - 1
        value = self.values[end] - self.values[place]
        if end < len(self.items):
            rest = left - (self.weights[end] - self.weights[place])
            value += self.items[end].value * rest // (self.weights[end + 1] - self.weights[end])
        return value

    def run(self) -> list[int]:
        """Return the indices of the best items."""
        most, found = -1, 0
        todo = [(0, 0, 0, tuple(self.rooms))]
        while todo:
            place, taken, value, left = todo.pop()
            self.nodes += 1
            if value > most:
                most, found = value, taken
            if place == len(self.items) or value + self._bound(place, sum(map(mul, self.factors, left))) <= most:
                continue
            item = self.items[place]
            todo.append((place + 1, taken, value, left))
            after = tuple(map(sub, left, item.costs))
            if min(after) >= 0 and self.needs[place] & taken == self.needs[place]:
                todo.append((place + 1, taken | 1 << place, value + item.value, after))
        return [item.index for place, item in enumerate(self.items) if found >> place & 1]


def _mixes(rooms: list[int]) -> Iterable[tuple[int, ...]]:
    """Yield factors of the rooms in their weighted sum, in which each counts relative to its size."""
    if len(rooms) == 1:
        return [(1,)]
    first, second = rooms
    return [(share * max(second, 1), (_SHARES - share) * max(first, 1)) for share in range(_SHARES + 1)]


_SHARES = 64


def _weight(item: _Item, factors: tuple[int, ...]) -> int:
    return sum(map(mul, factors, item.costs))


def _sorted(items: list[_Item], factors: tuple[int, ...]) -> list[_Item]:
    """Return the items by value for their weight; one goes before those that are never taken without it."""

    def key(item: _Item) -> tuple[Fraction | float, int, tuple[int, ...], int]:
        weight = _weight(item, factors)
        return (Fraction(-item.value, weight) if weight else -math.inf, -item.value, item.costs, item.index)

    return sorted(items, key=key)
