"""The kernel that rebuilds weights once for a wave, compiled for sm_90a without a GPU.

Its code, how it goes through its tiles, and the protocol of its ring.
"""

import random
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Backend, Mode, table
from nestedfp.kernels.hopper.cuda.gemm_16bit import SHARED_MEMORY
from nestedfp.kernels.hopper.cuda.gemm_16bit_once import Config, code, fits, plan
from nestedfp.kernels.hopper.linear_16bit import candidates, config_of
from nestedfp.kernels.hopper.workspace import SCRATCH_COUNTERS, SCRATCH_FLOATS

from .machine_code import assert_registers_suffice, disassemble

SOME = [
    Config(96, 1),
    Config(256, 8),
    Config(208, 3, cluster_tokens=2),
    Config(256, 8, cluster_rows=2),
    Config(320, 8, cluster_rows=2),
    Config(304, 4),
]


def tabled() -> list[Config]:
    rows = (config_of(**row.config) for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.BITS16)
    return sorted({config for config in rows if isinstance(config, Config)}, key=repr)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled()]), ids=repr)
def test_machine_code(config: Config, dtype: torch.dtype) -> None:
    sass = disassemble(code(config, dtype))
    products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(?:\.BF16)? R\d+, (\w+)", sass)
    # Two steps of 64 of K, four products each.
    assert len(products) == 8 * config.tile.products
    assert all(int(tokens) == config.tokens // config.tile.products for tokens, _ in products)
    assert all(operand.startswith("R") for _, operand in products), "weights must come from registers"
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
    assert sass.count("WARPGROUP.DEPBAR") <= 3, "ptxas runs products one at a time"
    # Sixteen bytes of each plane and unit, four weights each, in the warps that rebuild and nowhere else.
    fours = 4 * config.defines(dtype)["UNITS_AT_ONCE"]
    assert len(re.findall(r"LOP3\.LUT R\d+, [^;]*0x7e7e7e7e", sass)) == fours
    assert len(re.findall(r"PRMT R\d+, [^;]*0x(?:5140|7362)", sass)) == 2 * fours
    assert len(re.findall(r"STG\.E\.128\.STRONG\.GPU|STG\.E\.128", sass)) >= fours // 2
    assert ("UTMALDG.2D.MULTICAST" in sass) == (config.tile.cluster > 1)
    assert config.tile.shared_memory <= SHARED_MEMORY - 1024
    assert_registers_suffice(config.defines(dtype))


def walk(
    workers: int, along_rows: int, along_tokens: int, width: int
) -> Iterator[list[tuple[int, int] | None]]:
    """The (row, token) of each worker's tile, None without one, wave by wave, as waves.cuh counts them."""
    row = token = 0
    height = workers // width
    while token < along_tokens:
        at = [(row + worker // width, token + worker % width) for worker in range(workers)]
        yield [
            tile if worker < width * height and tile[0] < along_rows else None
            for worker, tile in enumerate(at)
        ]
        row += height
        if row >= along_rows:
            row, token = 0, token + width
            width = min(width, max(along_tokens - token, 1))
            height = workers // width


@given(
    st.sampled_from(SOME),
    st.integers(min_value=1, max_value=16384),
    st.integers(min_value=1, max_value=70000),
    st.sampled_from([144, 132, 114, 78, 16]),
)
def test_waves_cover_every_tile_once_and_fit_the_ring(
    config: Config, M: int, N: int, processors: int
) -> None:
    workers = processors // config.tile.cluster
    if not fits(config, M, N, 128):
        return
    work = plan(config, M, N, workers)
    along_rows = -(-N // (128 * config.cluster_rows))
    along_tokens = -(-M // (config.tokens * config.cluster_tokens))
    waves = list(walk(workers, along_rows, along_tokens, work.width))
    assert len(waves) == work.waves
    tiles = [tile for wave in waves for tile in wave if tile]
    assert len(tiles) == len(set(tiles)) == along_rows * along_tokens
    for wave in waves:
        rows = [tile[0] for tile in wave if tile]
        assert (max(rows) - min(rows) + 1) * 128 * config.cluster_rows <= work.rows
    macros = config.defines(torch.float16)
    assert macros["RING"] * macros["CHUNK"] * 2 * work.rows * 128 <= SCRATCH_FLOATS * 4
    assert (macros["RING"] + 1) * 32 <= SCRATCH_COUNTERS


@pytest.mark.parametrize("N", [4096, 5120, 28672])
def test_waves_are_as_few_as_whole_waves_of_tiles_where_tokens_fill_them(N: int) -> None:
    config = Config(256, 16, cluster_rows=2)
    for M in (4096, 8192):
        tiles = M // 256 * (N // 256)
        assert plan(config, M, N, 66).waves <= -(-tiles // 66) + 1


def test_the_tuner_tries_it_for_many_tokens_alone() -> None:
    def once(M: int) -> list[Config]:
        found = (config_of(**settings) for settings in candidates(M, 28672, 4096))
        return [config for config in found if isinstance(config, Config)]

    assert not once(1024)
    for M in (2048, 8192):
        assert once(M)
        assert all(plan(config, M, 28672, 66).width == config.once for config in once(M))


def test_few_tokens_and_huge_weights_do_not_fit() -> None:
    assert fits(Config(256, 8), 769, 4096, 4096)
    assert not fits(Config(256, 8), 768, 4096, 4096)
    assert not fits(Config(256, 8), 8192, 1 << 20, 1 << 13)


Wait = Callable[[], bool]


def at_any_time() -> bool:
    return True


def when_all(landed: list[bool], but: int | None = None) -> Wait:
    return lambda: all(done for stage, done in enumerate(landed) if stage != but)


def when_one(landed: list[bool], stage: int) -> Wait:
    return lambda: landed[stage]


class Ring:
    """The counters and slots of gemm_16bit_once.cu in Python.

    Agents yield what they wait for. Of a CTA these are two that rebuild, one that copies, and each of its
    copies, which end in any order.
    """

    def __init__(self, slots: int, ctas: int, chunks: int, units: int, idle: set[tuple[int, int]]) -> None:
        self.slots, self.ctas, self.chunks, self.units, self.idle = slots, ctas, chunks, units, idle
        self.counters = [0] * slots
        self.left = 0
        self.holds: list[list[int]] = [[-1] * ctas for _ in range(slots)]
        self.read: list[list[int]] = [[] for _ in range(ctas)]
        self.agents = [self.producer(cta, stages=2 + cta % 2) for cta in range(ctas)]
        self.agents += [self.rebuilder(cta, turn) for cta in range(ctas) for turn in range(2)]

    def leave(self) -> None:
        self.left += 1
        if self.left == 3 * self.ctas:
            self.counters, self.left = [0] * self.slots, 0

    def at_least(self, slot: int, count: int) -> Wait:
        return lambda: self.counters[slot] >= count

    def rebuilder(self, cta: int, turn: int) -> Iterator[Wait]:
        for chunk in range(turn, self.chunks, 2):
            slot, round_ = chunk % self.slots, chunk // self.slots
            yield self.at_least(slot, 2 * round_ * self.ctas)
            self.holds[slot][cta] = chunk
            yield at_any_time
            self.counters[slot] += 1
        self.leave()

    def copy(self, chunk: int, landed: list[bool], stage: int) -> Iterator[Wait]:
        yield at_any_time
        assert self.holds[chunk % self.slots] == [chunk] * self.ctas, "written over while it is read"
        landed[stage] = True

    def producer(self, cta: int, stages: int) -> Iterator[Wait]:
        """Hands a slot back once the next chunk's first copy is on its way, or when there is no next one."""
        taken: int | None = None
        landed = [True] * stages
        stage = 0
        for chunk in range(self.chunks):
            slot, round_ = chunk % self.slots, chunk // self.slots
            yield self.at_least(slot, (2 * round_ + 1) * self.ctas)
            if (cta, chunk) in self.idle:
                if taken is not None:
                    yield when_all(landed)
                    self.counters[taken] += 1
                    taken = None
                self.counters[slot] += 1
                continue
            for unit in range(self.units):
                yield when_one(landed, stage)
                landed[stage] = False
                self.agents.append(self.copy(chunk, landed, stage))
                if unit == 0 and taken is not None:
                    yield when_all(landed, but=stage)
                    self.counters[taken] += 1
                stage = (stage + 1) % stages
            self.read[cta].append(chunk)
            taken = slot
        self.leave()


@given(
    st.integers(min_value=2, max_value=4),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=0, max_value=1 << 30),
)
def test_the_ring_is_read_when_it_is_whole_in_any_order_of_events(
    slots: int, ctas: int, chunks: int, units: int, seed: int
) -> None:
    draw = random.Random(seed)
    idle = {(cta, chunk) for cta in range(ctas) for chunk in range(chunks) if draw.random() < 0.2}
    ring = Ring(slots, ctas, chunks, units, idle)
    waiting: dict[Iterator[Wait], Wait] = {}
    while ring.agents or waiting:
        waiting |= dict.fromkeys(ring.agents, at_any_time)
        ring.agents.clear()
        ready = [agent for agent, condition in waiting.items() if condition()]
        assert ready, "all wait for one another"
        agent = draw.choice(ready)
        following = next(agent, None)
        if following is None:
            del waiting[agent]
        else:
            waiting[agent] = following
    assert ring.counters == [0] * slots
    assert ring.left == 0
    for cta in range(ctas):
        assert ring.read[cta] == [chunk for chunk in range(chunks) if (cta, chunk) not in idle]
