"""How long works take that go on at once."""

_EXPONENT = 4


def overlapped(*cycles: float) -> float:
    """Less than the sum of their `cycles`, none negative, and more than the most: what limits a step of a
    kernel waits at times for what nearly does. The exponent was chosen beside none, 6 and 10 by how well
    estimates rank configurations of weights that they were not fitted to."""
    return float(sum(work**_EXPONENT for work in cycles) ** (1 / _EXPONENT))
