"""Combinations of factors in which every pair of levels meets: for tests whose whole product would take too long."""

import itertools
from collections import Counter
from collections.abc import Callable


def pairwise(factors: dict[str, list], allowed: Callable[[dict], bool] = lambda case: True) -> list[tuple]:
    """
    Few cases, the same every time, in which any two levels of any two factors meet where that is allowed.

    Args:
        factors: by name, its levels. Cases have the order of the names.
        allowed: whether levels may meet, given some or all of a case by name.

    Example:

        >>> pairwise(dict(batch=[1, 3], draw=["greedy", "sampled"], lookup=[False, True]))
        [(1, 'greedy', False), (1, 'sampled', True), (3, 'greedy', True), (3, 'sampled', False)]
    """
    names = list(factors)
    left = {
        (one, i, two, j): None
        for one, two in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[one])), range(len(factors[two])))
        if allowed({one: factors[one][i], two: factors[two][j]})
    }
    used, cases = Counter(), []
    while left:
        one, i, two, j = next(iter(left))
        case = {one: i, two: j}
        for name in sorted(names, key=lambda name: -len(factors[name])):  # the longest has the most pairs to make
            if name not in case:
                case[name] = _best(name, case, left, used, factors, allowed)
        used.update(case.items())
        for pair in itertools.combinations(names, 2):
            left.pop((pair[0], case[pair[0]], pair[1], case[pair[1]]), None)
        cases.append(tuple(factors[name][case[name]] for name in names))
    return cases


def _best(name: str, case: dict, left: dict, used: Counter, factors: dict[str, list], allowed: Callable) -> int:
    """The level that makes the most pairs which are left; of several, one that was used least."""
    names, given = list(factors), {other: factors[other][i] for other, i in case.items()}

    def new(level: int) -> int:
        pairs = 0
        for other, i in case.items():
            before = names.index(name) < names.index(other)
            pairs += ((name, level, other, i) if before else (other, i, name, level)) in left
        return pairs

    levels = [i for i, level in enumerate(factors[name]) if allowed(given | {name: level})]
    return max(levels, key=lambda level: (new(level), -used[name, level]))
