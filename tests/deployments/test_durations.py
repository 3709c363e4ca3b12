"""Durations on the command line and in tables."""

import pytest

from nestedfp.deployments.durations import parse, show


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("15m", 900.0), ("2h", 7200.0), ("0.5s", 0.5), ("1.5h", 5400.0)]
)
def test_a_number_and_its_unit(text: str, seconds: float) -> None:
    assert parse(text, 86_400.0) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "90",
        "s",
        "5x",
        "0s",
        "-5m",
        "1e3s",
        "25h",
        "86401s",
        " 5m",
        "5m ",
        "5M",
        "1h30m",
        "٣m",
        "9" * 400 + "s",
    ],
)
def test_anything_else_is_refused_with_the_value_and_the_remedy(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text, 86_400.0)
    assert str(caught.value).startswith(f"got {text!r}; give a number and its unit, such as 90s, 15m or 2h")
    assert str(caught.value).endswith("at most 24h")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1.0, "0.0s"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m"),
        (899.2, "14m59s"),
        (3599.7, "1h"),
        (7500.0, "2h05m"),
        (86_400.0, "24h"),
    ],
)
def test_two_units_at_most(seconds: float, shown: str) -> None:
    assert show(seconds) == shown
