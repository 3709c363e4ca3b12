from collections.abc import Callable

import pytest

from nestedfp.kernels import timing


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Replaces graphs by names; returns (contender, timed replays, replays before them) of each."""
    log: list[tuple[str, int, int]] = []

    def replay(graph: str, calls: int, repeats: int, unmeasured: int = 1) -> float:
        log.append((graph, repeats, unmeasured))
        return float(len(log))

    def graph_of(contender: Callable[[int], str], sets: int, graph_us: float) -> tuple[str, int, float]:
        return contender(0), sets, graph_us

    monkeypatch.setattr(timing, "sized_graph", graph_of)
    monkeypatch.setattr(timing, "replay_us", replay)
    return log


CONTENDERS: dict[str, timing.Contender] = {name: lambda _, name=name: name for name in "abcdef"}  # type: ignore[misc]


def test_each_pass_visits_all_contenders_in_another_order(replayed: list[tuple[str, int, int]]) -> None:
    times = timing.measure(CONTENDERS, 4, passes=5)
    passes = ["".join(name for name, *_ in replayed[i : i + 6]) for i in range(0, 30, 6)]
    assert all(sorted(order) == list(CONTENDERS) for order in passes)
    assert len(set(passes)) == 5
    # A time belongs to the contender that was replayed then.
    at = {(name, turn // 6): turn + 1 for turn, (name, *_) in enumerate(replayed)}
    assert times == {name: [at[name, turn] for turn in range(5)] for name in CONTENDERS}


@pytest.mark.parametrize(("settle_us", "timed", "before"), [(0, 3, 1), (1000, 3, 3), (2100, 6, 6)])
def test_a_contender_settles_for_as_long_as_it_is_timed(
    settle_us: float, timed: int, before: int, replayed: list[tuple[str, int, int]]
) -> None:
    timing.measure(CONTENDERS, 4, passes=1, settle_us=settle_us)
    assert {(repeats, unmeasured) for _, repeats, unmeasured in replayed} == {(timed, before)}
