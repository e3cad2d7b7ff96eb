"""How the benchmarks sample and sum up. No test looks at a time."""

from dataclasses import replace

from benchmarks.timing import QUICK, Spread, interleave


def test_rounds_sample_every_row_once_in_changing_order() -> None:
    class Clock:
        def __init__(self) -> None:
            self.order: list[str] = []

        def sample(self, calls, first: int, count: int) -> float:
            self.order.append(calls[first % len(calls)]())
            return 1.0

    clock = Clock()
    names = [f"row {i}" for i in range(6)]
    calls = {name: [lambda name=name: name] for name in names}
    samples = interleave(calls, clock, replace(QUICK, seconds=0.0, min_rounds=5))
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys(names, 5)
    rounds = [tuple(clock.order[start : start + 6]) for start in range(len(clock.order) - 30, len(clock.order), 6)]
    assert all(sorted(one) == names for one in rounds)
    assert len(set(rounds)) > 1


def test_spread() -> None:
    assert Spread.of([[3.0]]) == Spread(3.0, 3.0, 3.0, (3.0,))
    assert Spread.of([[5.0, 1.0, 2.0], [3.0, 4.0, 6.0]]) == Spread(3.5, 2.0, 5.0, (2.0, 4.0))
