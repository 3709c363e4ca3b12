"""Configurations of the 16-bit kernel and the rule that picks one: pure integers, no GPU, no Triton."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

UNIT = 128
"""Two 64-wide steps of K: what stream-K counts in."""

WHOLE_TILES = 0
STREAM_REST = -1
STREAM_REST_AND_WAVE = -2

SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Config16:
    """One way to run the 16-bit kernel.

    rows: weight rows of a consumer partition, 64 or 128 (one or two warpgroups in step).
    consumers: consumer partitions, 1 or 2; they run out of step; a tile has rows * consumers weight rows.
    columns: tokens of a tile, a power of two from 16 to 256.
    stages: depth of the ring, in 64-wide steps of K.
    occupancy: CTAs a multiprocessor.
    split: `WHOLE_TILES`; n > 0: K of each tile in n parts; `STREAM_REST`: the tiles that do not fill a wave
    by stream-K; `STREAM_REST_AND_WAVE`: these and one wave more.
    group: token tiles that run side by side.
    """

    rows: int
    consumers: int
    columns: int
    stages: int
    occupancy: int = 1
    split: int = WHOLE_TILES
    group: int = 8

    def __post_init__(self) -> None:
        self._expect("rows", self.rows in (64, 128), "64 or 128")
        self._expect("consumers", self.consumers in (1, 2), "1 or 2")
        self._expect("columns", self.columns in (16, 32, 64, 128, 256), "a power of two from 16 to 256")
        self._expect("occupancy", self.occupancy in (1, 2), "1 or 2")
        self._expect("split", self.split >= STREAM_REST_AND_WAVE, f"{STREAM_REST_AND_WAVE} or more")
        self._expect("group", self.group >= 1, "positive")
        fits = self.stages >= 2 and self.shared_memory * self.occupancy <= SHARED_MEMORY
        self._expect("stages", fits, f"2 or more, within {SHARED_MEMORY} bytes (takes {self.shared_memory})")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)} in {self.to_mapping()}, expected {expected}")

    @classmethod
    def from_mapping(cls, config: Mapping[str, int]) -> "Config16":
        """The inverse of `to_mapping`. Raises ValueError for names this kernel does not know."""
        unknown = set(config) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"configuration holds {sorted(unknown)}, expected fields of Config16")
        return cls(**config)

    def to_mapping(self) -> dict[str, int]:
        """As a table of tuned configurations stores it."""
        return asdict(self)

    @property
    def chunk(self) -> int:
        """Tokens that the epilogue stores at a time."""
        return min(self.columns, 64)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a CTA takes: the ring, two output buffers a consumer, barriers."""
        tile_rows = self.rows * self.consumers
        stage = 64 * (2 * self.columns + 2 * tile_rows)
        return self.stages * stage + 2 * tile_rows * self.chunk * 2 + 512


@dataclass(frozen=True)
class Work:
    """How a launch shares its tiles: `grid` CTAs; the first `stream_tiles` of `tiles` by stream-K."""

    grid: int
    tiles: int
    stream_tiles: int


def share(config: Config16, M: int, N: int, K: int, sms: int) -> Work:
    """The grid for a product of these sizes on a GPU with `sms` multiprocessors."""
    tiles = ceil_div(N, config.rows * config.consumers) * ceil_div(M, config.columns)
    units = ceil_div(K, UNIT)
    resident = sms * config.occupancy
    if config.split == WHOLE_TILES:
        return Work(min(tiles, resident), tiles, 0)
    if config.split > 0 and tiles * config.split <= resident:
        parts = min(config.split, units)
        return Work(tiles * parts, tiles, 0 if parts == 1 else tiles)
    rest = tiles % resident
    if tiles > resident and config.split == STREAM_REST_AND_WAVE and rest:
        rest += resident
    grid = min(resident, tiles * units)
    # Every run must hold a unit: the owners of a tile are found by division, which knows no empty runs.
    return Work(grid, tiles, rest if rest * units >= grid else 0)


def partial_floats(config: Config16, work: Work) -> int:
    """Floats of workspace that the split tiles of `work` take."""
    return 2 * work.grid * config.rows * config.consumers * config.columns if work.stream_tiles else 0


def candidates(M: int, N: int, K: int, dtype: str, sms: int = 132) -> list[Config16]:
    """Configurations worth timing for a product of these sizes, the rule's own first."""
    shapes: dict[int, list[tuple[int, ...]]] = {
        16: [(64, 1, 16, 12), (128, 1, 16, 11), (64, 2, 16, 11), (64, 1, 16, 5, 2)],
        32: [(64, 1, 32, 10), (128, 1, 32, 9), (64, 2, 32, 9), (64, 1, 32, 5, 2)],
        64: [(64, 1, 64, 8), (128, 1, 64, 7), (64, 2, 64, 7), (64, 1, 64, 5, 2)],
        128: [(128, 1, 128, 5), (64, 2, 128, 5), (64, 1, 128, 3, 2), (64, 1, 128, 7)],
        256: [(128, 1, 256, 4), (64, 1, 256, 4)],
    }
    columns = [c for c in shapes if c < 2 * M or c == 16]
    wanted = columns[-2:] if M > 64 else columns[-1:]
    found = [rule(M, N, K, dtype, sms)]
    for count in reversed(wanted):
        for rows, consumers, width, stages, *occupancy in shapes[count]:
            base = Config16(rows, consumers, width, stages, *occupancy)
            found += [replace(base, split=split) for split in splits(base, M, N, K, sms)]
    return list(dict.fromkeys(found))


def splits(config: Config16, M: int, N: int, K: int, sms: int) -> list[int]:
    """The values of `split` that give different work for this tile."""
    tiles = ceil_div(N, config.rows * config.consumers) * ceil_div(M, config.columns)
    resident = sms * config.occupancy
    if tiles * 2 <= resident:
        most = resident // tiles
        return sorted({STREAM_REST, most, max(most // 2, 1)})
    if tiles % resident == 0 or tiles > 16 * resident:
        return [WHOLE_TILES]
    return [WHOLE_TILES, STREAM_REST] + ([STREAM_REST_AND_WAVE] if tiles > resident else [])


def rule(M: int, N: int, K: int, dtype: str, sms: int = 132) -> Config16:
    """A configuration for any product, without a table: the best ones seen on an H100 for four shapes.

    Few tokens: tiles of 64 rows, K in two parts, one or two CTAs a multiprocessor. More: whole tiles, since
    adding parts of large ones costs more than an idle multiprocessor, except where K is long.
    """
    if M <= 64:
        columns = next(c for c in (16, 32, 64) if c >= M)
        if ceil_div(N, 64) * 2 <= sms:
            return Config16(64, 1, columns, {16: 12, 32: 10, 64: 8}[columns], split=2)
        if columns == 64 and ceil_div(N, 64) > 2 * sms:
            return Config16(64, 1, columns, 8, split=STREAM_REST)
        return Config16(64, 1, columns, 5, occupancy=2, split=2)
    narrow = Config16(64, 2, 128, 5)
    wide = Config16(128, 1, 256, 4)
    if _waves(narrow, M, N, sms) * _NARROW_COST < _waves(wide, M, N, sms):
        starved = ceil_div(N, 128) * ceil_div(M, 128) * 2 <= sms
        return replace(narrow, split=STREAM_REST) if starved and K >= _LONG_K else narrow
    return wide


# A wave of 128 x 128 tiles takes about this share of the time of one of 128 x 256.
_NARROW_COST = 0.68
_LONG_K = 8192


def _waves(config: Config16, M: int, N: int, sms: int) -> int:
    tiles = ceil_div(N, config.rows * config.consumers) * ceil_div(M, config.columns)
    return ceil_div(tiles, sms * config.occupancy)


def ceil_div(a: int, b: int) -> int:
    """The least integer not under a / b."""
    return -(-a // b)
