"""The 16-bit kernel in CUDA C++ compiled for sm_90a without a GPU, and how it is planned."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Backend, Mode, table
from nestedfp.kernels.hopper.cuda.gemm_16bit import (
    SHARED_MEMORY,
    Config,
    Plan,
    cluster_tiles,
    code,
    plan,
)
from nestedfp.kernels.hopper.linear_16bit import RULE, candidates, estimated_cycles

from .machine_code import assert_registers_suffice, disassemble
from .plans import assert_covers_16bit

SOME = [
    Config(256),
    Config(256, cluster_tokens=2, cluster_rows=2),
    Config(272, cluster_rows=2),
    Config(352),
    Config(352, cluster_rows=2),
    Config(352, cluster_k=2),
    Config(144, warpgroups=3),
    Config(192, warpgroups=3, cluster_rows=2),
    Config(96, warpgroups=4, cluster_tokens=4),
    Config(64, warpgroups=1, ctas=2),
    Config(16, warpgroups=1),
    Config(64, sliced_k=2),
    Config(256, cluster_tokens=2, cluster_rows=2, sliced_k=2),
    Config(256, cluster_k=2),
    Config(256, cluster_rows=2, cluster_k=2),
    Config(128, cluster_tokens=2, sliced_k=2, cluster_k=2),
    Config(128, warpgroups=3, cluster_tokens=2, cluster_k=2),
    Config(176, warpgroups=3, cluster_k=2),
    Config(128, sliced_k=2, cluster_k=2),
    Config(16, warpgroups=1, cluster_k=2),
]
SHAPES = [(4096, 4096), (65536, 5120), (5120, 32768), (77, 128), (16, 256)]
TOKENS = [1, 2, 17, 64, 65, 128, 256, 300, 512, 1024, 4096, 16384]


def tabled() -> list[Config]:
    return distinct(
        [Config(**row.config) for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.BITS16]
    )


def ruled() -> list[Config]:
    """Of a weight that the table does not hold."""
    return distinct(RULE.all(8192, 3584, 18944))


def distinct(configs: list[Config]) -> list[Config]:
    return sorted({replace(config, split=1, waves=0, group=8) for config in configs}, key=repr)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled(), *ruled()]), ids=repr)
def test_machine_code(config: Config, dtype: torch.dtype) -> None:
    sass = disassemble(code(config, dtype))
    products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(?:\.BF16)? R\d+, (\w+)", sass)
    # The stages of x that a warpgroup multiplies in 128 of K, four 16-wide steps each.
    assert len(products) == 8 // config.sliced_k * config.products
    assert all(int(tokens) == config.tokens // config.products for tokens, _ in products)
    assert all(operand.startswith("R") for _, operand in products), "weights must come from registers"
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
    assert sass.count("WARPGROUP.DEPBAR") <= 3, "ptxas runs products one at a time"
    # Four weights take two instructions for their codes, two to join bytes and two subtractions.
    fours = 16 // config.sliced_k
    assert len(re.findall(r"LOP3\.LUT R\d+, [^;]*0x7e7e7e7e", sass)) == fours
    # Schedules halve numbers, too.
    assert len(re.findall(r"LEA\.HI R\d+, [^;]*0x1f", sass)) >= fours
    assert len(re.findall(r"PRMT R\d+, [^;]*0x(?:5140|7362)", sass)) == 2 * fours
    subtractions = re.findall(r"(\w+) R\d+, R\d+, (?:-0x3fbf3fbf|0xc040c041)", sass)
    assert len(subtractions) == 2 * fours
    assert set(subtractions) <= {"VIADD", "IADD3"}, "multiply-adds cost energy"
    assert ("UTMALDG.2D.MULTICAST" in sass) == (config.cluster > config.cluster_k)
    assert ("STAS" in sass) == (config.cluster_k > 1), "CTAs that share K store to one another"
    x, weights = config.stages
    assert x >= 3
    assert weights >= 2
    assert config.shared_memory <= SHARED_MEMORY // config.ctas - 1024


@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled()]), ids=repr)
def test_what_the_producer_gives_up_is_what_consumers_take(config: Config) -> None:
    assert_registers_suffice(config.defines(torch.float16))


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_candidates_and_plans_cover_any_shape(M: int, N: int, K: int) -> None:
    configs = [Config(**settings) for settings in candidates(M, N, K)]
    assert configs
    for config in configs:
        assert_covers_16bit(config, M, N, K)


@pytest.mark.parametrize(("N", "K"), [(3584, 18944), (37888, 3584), (1280, 8192), (77, 128)])
def test_rules_are_few_and_among_them_one_is_best_for_what_it_was_found_for(N: int, K: int) -> None:
    few = RULE.all(8192, N, K)
    assert len(few) <= 32
    for M in (1, 16, 100, 224, 1000, 4096, 16384):
        assert RULE.best(M, N, K) in few
    for M in (224, 4096):
        space = [Config(**settings) for settings in candidates(M, N, K)]
        own = [c for c in space if c.cluster <= 2 and c.split <= 4 and c.group == 8]
        best = min(estimated_cycles(config, M, N, K) for config in own)
        assert estimated_cycles(RULE.best(M, N, K), M, N, K) <= best


def test_only_tiles_beyond_full_waves_are_cut() -> None:
    config = Config(128, split=3)
    assert plan(config, 128, 4096, 4096, 132) == Plan(96, 32, 3)
    assert plan(config, 128, 4096, 128, 132) == Plan(32, 0, 1), "one unit of K has no parts"
    assert plan(config, 128, 132 * 128, 4096, 132) == Plan(132, 0, 1), "nothing is left of a full wave"
    assert plan(config, 128, 65536, 4096, 132) == Plan(132, 512 - 3 * 132, 3)
    assert plan(replace(config, waves=1), 128, 65536, 4096, 132).cut == 512 - 2 * 132
    assert plan(replace(config, split=1), 128, 65536, 4096, 132) == Plan(132, 0, 1)


def test_a_cluster_that_shares_k_takes_a_cut_tile_and_its_ctas_whole_ones() -> None:
    config = Config(256, cluster_k=2)
    assert plan(config, 512, 4096, 4096, 66) == Plan(64, 64, 2)
    assert plan(config, 1024, 5120, 4096, 66) == Plan(66, 28, 2)
    assert plan(config, 1024, 5120, 128, 66) == Plan(66, 0, 1), "one unit of K has no parts"
    assert plan(config, 1, 128, 128, 66) == Plan(1, 0, 1)
    assert plan(replace(config, waves=1), 1024, 5120, 4096, 66) == Plan(66, 160, 2)


def segments(config: Config, worker: int, work: Plan, tiles: int, units: int) -> list[tuple[int, ...]]:
    """(tile, part, first, last) in turn, as schedule.cuh walks them."""
    cut, parts, workers = work.cut, work.parts, work.clusters * config.cluster_k
    whole = [(tile, -1, 0, units) for tile in range(cut + worker, tiles, workers)]
    if config.cluster_k > 1:
        share = range(worker // config.cluster_k, cut, work.clusters)
        cuts = [(tile, worker % config.cluster_k) for tile in share]
    else:
        cuts = [(number % cut, number // cut) for number in range(worker, cut * parts, workers)]
    return whole + [(tile, p, units * p // parts, units * (p + 1) // parts) for tile, p in cuts]


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (1024, 5120, 4096, Config(256, split=4)),
        (300, 28672, 4096, Config(128, 3, split=5, waves=1)),
        (64, 4096, 14336, Config(64, 1, split=3, ctas=2)),
        (256, 4096, 4096, Config(128, cluster_tokens=2, split=2, sliced_k=2)),
        (512, 4096, 4096, Config(256, cluster_k=2)),
        (2048, 5120, 1408, Config(256, cluster_k=2, waves=1)),
        (1024, 28672, 128, Config(192, 3, cluster_k=2)),
    ],
)
def test_workers_cover_every_step_of_every_tile_once(M: int, N: int, K: int, config: Config) -> None:
    resident = 132 * config.ctas // config.cluster
    work, tiles = plan(config, M, N, K, resident), cluster_tiles(config, M, N)
    covered = [
        (tile, unit)
        for worker in range(work.clusters * config.cluster_k)
        for tile, _, first, last in segments(config, worker, work, tiles, K // 128)
        for unit in range(first, last)
    ]
    assert len(covered) == len(set(covered)) == tiles * (K // 128)
