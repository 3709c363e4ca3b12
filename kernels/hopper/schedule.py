"""How the persistent CTAs share the work: whole tiles, and stream-K for what is left over.

A tile is a block of the output; a unit is two 64-wide steps of K of one tile. The first `stream_tiles` tiles
are cut into `grid` equal runs of units, one a CTA, whatever tiles they cross; the others go round whole.
A CTA walks a list of segments: (tile, first unit, last unit), its run first. A tile whose units lie in
several runs is summed by whoever finishes last (see `gemm_16bit`): nobody waits for anybody.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def run_start(cta, grid, units):
    """The first unit of the run of `cta`, where `units` are shared by `grid` CTAs."""
    return cta * units // grid


@gluon.jit
def run_owner(unit, grid, units):
    """The CTA whose run holds `unit`."""
    return ((unit + 1) * grid - 1) // units


@gluon.jit
def segment_count(cta, grid, tiles, stream_tiles, tile_units):
    """How many segments `cta` walks."""
    units = stream_tiles * tile_units
    begin = run_start(cta, grid, units)
    end = run_start(cta + 1, grid, units)
    streamed = 0
    if end > begin:
        streamed = (end - 1) // tile_units - begin // tile_units + 1
    whole = (tiles - stream_tiles - cta + grid - 1) // grid
    return streamed, streamed + whole


@gluon.jit
def segment(index, streamed, cta, grid, stream_tiles, tile_units):
    """Segment `index` of `cta`, as (tile, first unit in it, unit past the last)."""
    units = stream_tiles * tile_units
    begin = run_start(cta, grid, units)
    end = run_start(cta + 1, grid, units)
    tile = begin // tile_units + index
    first = gl.maximum(begin - tile * tile_units, 0)
    last = gl.minimum(end - tile * tile_units, tile_units)
    if index >= streamed:
        tile = stream_tiles + cta + (index - streamed) * grid
        first = 0
        last = tile_units
    return tile, first, last


@gluon.jit
def tile_position(tile, row_tiles, token_tiles, group: gl.constexpr):
    """(row tile, token tile) of a tile: token tiles run fastest inside groups of `group`.

    CTAs that run together then share few panels of both operands, which stay in the L2 cache.
    """
    per_group = group * row_tiles
    first = tile // per_group * group
    width = gl.minimum(token_tiles - first, group)
    inside = tile % per_group
    return inside // width, first + inside % width
