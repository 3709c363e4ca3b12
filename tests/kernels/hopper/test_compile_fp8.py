"""The one-launch FP8 kernel compiled for sm_90a without a GPU, and how it is planned."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Backend, Mode, table
from nestedfp.kernels.hopper.cuda.gemm_fp8 import SHARED_MEMORY, Config, code, plan
from nestedfp.kernels.hopper.fp8 import RULE, candidates

from .machine_code import assert_registers_suffice, disassemble
from .plans import assert_covers_fp8

PER_PROGRAM = SHARED_MEMORY - 1024


def tabled() -> list[Config]:
    configs = [Config(**row.config) for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.FP8]
    return distinct(configs)


def ruled() -> list[Config]:
    """Of a weight that the table does not hold."""
    return distinct(RULE.all(8192, 3584, 18944))


def distinct(configs: list[Config]) -> list[Config]:
    # Machine code depends on whether there are parts, not on how many.
    return sorted({replace(config, split=min(config.split, 2), group=8) for config in configs}, key=repr)


SOME = [
    Config(256, cluster_tokens=2),
    Config(48, chunks=2, cluster_rows=2),
    Config(64, warpgroups=1, chunks=2),
    Config(128, promote=1),
    Config(256, cluster_tokens=2, split=2),
    Config(128, blocks=2, split=2),
    Config(128, blocks=2, cluster_tokens=2),
    Config(160, blocks=2, cluster_rows=2, split=2),
    Config(176, blocks=2, cluster_tokens=2),
    Config(192, blocks=2, cluster_rows=2),
    Config(256, cluster_tokens=2, deferred=1),
    Config(224, cluster_rows=2, split=2, deferred=1),
    Config(128, blocks=2, split=2, deferred=1),
]


@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled(), *ruled()]), ids=repr)
def test_machine_code(config: Config) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        sass = disassemble(code(config, dtype))
        products = re.findall(r"QGMMA\.64x(\d+)x32\.F32\.E4M3\.E4M3 R\d+, gdesc", sass)
        assert len(products) >= 4 * config.chunks * config.blocks
        assert all(int(rows) == config.rows for rows in products)
        assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
        # Before the first step and each other; after each and the last.
        assert sass.count("WARPGROUP.ARRIVE") <= 2, "ptxas runs products one at a time"
        assert sass.count("WARPGROUP.DEPBAR") <= 2, "ptxas runs products one at a time"
        assert ("UTMALDG.2D.MULTICAST" in sass) == (config.cluster > 1)
        assert ("UTMASTG.2D" in sass) == bool(config.deferred), (
            "outputs leave beside the next tile's products"
        )
    assert config.stages >= 2
    assert config.shared_memory <= PER_PROGRAM // config.ctas


def test_slices_are_staged_where_the_stages_leave_room() -> None:
    for config, stages, slices in (
        (Config(256, cluster_tokens=2), 4, 1),
        (Config(224, cluster_tokens=2), 4, 5),
        (Config(128, blocks=2), 4, 2),
        (Config(192, blocks=2), 3, 6),
        (Config(192), 5, 1),
        (Config(128), 6, 2),
    ):
        assert (config.stages, config.slices) == (stages, slices)


@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled()]), ids=repr)
def test_what_the_producer_gives_up_is_what_consumers_take(config: Config) -> None:
    assert_registers_suffice(config.defines(torch.float16))


@pytest.mark.parametrize("M", [1, 2, 17, 64, 65, 128, 256, 300, 512, 1024, 4096, 16384])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (65536, 5120), (5120, 32768), (77, 80), (16, 16)])
def test_candidates_and_plans_cover_any_shape(M: int, N: int, K: int) -> None:
    configs = candidates(M, N, K)
    assert 0 < len(configs) <= 24
    for config in (Config(**settings) for settings in configs):
        resident = 132 // config.cluster
        cut = plan(config, M, N, K, resident)
        assert not config.deferred or (config.deferrable and cut.units > resident)
        assert_covers_fp8(config, M, N, K)


def test_front_holds_every_token_of_the_first_tiles() -> None:
    M, N, K = 8192, 6144, 4096
    for config in (Config(**settings) for settings in candidates(M, N, K)):
        resident = 132 // config.cluster
        cut = plan(config, M, N, K, resident)
        for tile in range(min(cut.clusters, cut.whole)):
            first = tile // (config.group * cut.tiles_n) * config.group
            within = tile - first * cut.tiles_n
            row = first + within % min(cut.tiles_m - first, config.group)
            assert min(M, (row + 1) * config.tokens * config.cluster_tokens) <= cut.front


def test_parts_fill_the_last_wave() -> None:
    config = Config(128, split=4)
    cut = plan(config, 128, 4096, 4096, 132)
    assert (cut.whole, cut.split, cut.clusters) == (0, 4, 128)
    cut = plan(config, 1024, 5120, 4096, 132)
    assert (cut.whole, cut.split, cut.units) == (264, 2, 264 + 2 * 56)
    cut = plan(config, 128, 65536, 4096, 132)
    assert (cut.whole, cut.split) == (512, 1), "116 tiles are left: no parts for so few multiprocessors"
    assert plan(config, 128, 4096, 256, 132).split == 2, "no more parts than steps"


@pytest.mark.parametrize("K", [4096, 5120, 14336, 32768])
def test_tokens_are_held_in_registers_while_they_are_quantised(K: int) -> None:
    for M in (1024, 4096):
        config = Config(256, cluster_tokens=2, group=4)
        cut = plan(config, M, 5120, K, 66)
        assert cut.team_warps * 32 * 16 * config.held >= K


def test_all_tokens_of_a_program_are_quantised_at_once_where_registers_hold_them() -> None:
    config = Config(80, cluster_tokens=2)
    for M, K, team_warps in ((1024, 4096, 1), (1024, 5120, 1), (512, 5120, 2), (256, 5120, 4), (64, 5120, 8)):
        assert plan(config, M, 5120, K, 66).team_warps == team_warps
    assert plan(config, 1024, 5120, 14336, 66).team_warps == 2, "in two rounds"
