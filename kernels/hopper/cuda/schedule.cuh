// How persistent workers (CTAs or clusters) share the tiles of a product: whole tiles in turn, and tiles whose K is
// cut into equal parts, which are those that would not fill a wave.
//
// The first `cut` tiles are cut into `parts` stretches of their `tile_units` units of K; part p of tile t has number
// p * cut + t, so that workers side by side read the same stretch of K, which the L2 cache then serves. Whole tiles go
// round first, then parts, whose sums the L2 still holds when they are gathered: a worker writes each of its parts to
// scratch and counts it for its tile; after its last segment, of each tile that it computed a part of it adds a share
// of all parts. It waits there for parts alone, and no part waits for anything: waits end if all workers are resident,
// whatever the order in which they run.
#pragma once

struct Segment {
  int tile, part, first, last;  // part is -1 for a whole tile
};

struct Schedule {
  int worker, workers, cut, parts, tile_units;
  int whole_count, part_count, count;

  __device__ __forceinline__ Schedule(int worker, int workers, int tiles, int cut, int parts, int tile_units)
      : worker(worker), workers(workers), cut(cut), parts(parts), tile_units(tile_units) {
    whole_count = max(tiles - cut - worker + workers - 1, 0) / workers;
    part_count = max(cut * parts - worker + workers - 1, 0) / workers;
    count = whole_count + part_count;
  }

  __device__ __forceinline__ Segment segment(int index) const {
    if (index < whole_count) return {cut + worker + index * workers, -1, 0, tile_units};
    const int number = worker + (index - whole_count) * workers;
    const int part = number / cut;
    return {number - part * cut, part, tile_units * part / parts, tile_units * (part + 1) / parts};
  }
};

struct Position {
  int row, token;
};

// Where tile number `tile` lies: token tiles run fastest inside groups of `group`. Workers that run together then
// share few panels of both operands, which stay in the L2 cache.
__device__ __forceinline__ Position position(int tile, int row_tiles, int token_tiles, int group) {
  int per_group = group * row_tiles;
  int first = tile / per_group * group;
  int width = min(token_tiles - first, group);
  int inside = tile - first * row_tiles;
  return {inside / width, first + inside % width};
}
