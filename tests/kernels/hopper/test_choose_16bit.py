"""The choice of configurations and the shares of work of the Hopper 16-bit kernel, without a GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.kernels.hopper.choose_16bit import (
    SHARED_MEMORY,
    STREAM_REST,
    UNIT,
    Config16,
    candidates,
    ceil_div,
    rule,
    share,
)

sizes = st.tuples(st.integers(1, 16384), st.integers(1, 70000), st.integers(1, 600).map(lambda k: 64 * k))


@given(sizes)
def test_every_candidate_fits_and_gives_every_tile_to_someone(size: tuple[int, int, int]) -> None:
    M, N, K = size
    for config in [rule(M, N, K, "float16"), *candidates(M, N, K, "float16")]:
        work = share(config, M, N, K, 132)
        assert config.shared_memory * config.occupancy <= SHARED_MEMORY
        assert 1 <= work.grid <= 132 * config.occupancy
        assert work.tiles * config.rows * config.consumers * config.columns >= M * N
        assert 0 <= work.stream_tiles <= work.tiles
        if work.stream_tiles:
            assert work.grid <= work.stream_tiles * ceil_div(K, UNIT)
        assert work.stream_tiles == work.tiles or work.grid <= work.tiles or work.stream_tiles == 0


@given(sizes)
def test_a_table_stores_and_returns_a_configuration(size: tuple[int, int, int]) -> None:
    config = rule(*size, "float16")
    assert Config16.from_mapping(config.to_mapping()) == config


def test_bad_configurations_name_the_field() -> None:
    with pytest.raises(ValueError, match="columns is 48"):
        Config16(64, 1, 48, 4)
    with pytest.raises(ValueError, match=r"stages is 9.*bytes"):
        Config16(128, 1, 256, 9)
    with pytest.raises(ValueError, match="depth"):
        Config16.from_mapping({"rows": 64, "consumers": 1, "columns": 16, "stages": 4, "depth": 1})


def test_many_whole_waves_are_not_split() -> None:
    assert rule(8192, 28672, 4096, "float16").split == 0
    assert share(Config16(128, 1, 256, 4, split=STREAM_REST), 1024, 16896, 4096, 132).stream_tiles == 0
