// How persistent workers (CTAs, clusters, or halves of clusters) share the tiles of a product: whole tiles in turn, and
// tiles whose K is cut into equal parts, which are those that would not fill a wave.
//
// The first `cut` tiles are cut into `parts` stretches of their `tile_units` units of K; part p of tile t has number
// p * cut + t, so that workers side by side read the same stretch of K, which the L2 cache then serves. Whole tiles go
// round first, then parts, whose sums the L2 still holds when they are gathered: a worker writes each of its parts to
// scratch and counts it for its tile; after its last segment, of each tile that it computed a part of it adds a share
// of all parts. It waits there for parts alone, and no part waits for anything: waits end if all workers are resident,
// whatever the order in which they run.
//
// With CLUSTER_K = 2 the two parts of a tile belong to the two halves of a cluster, workers 2 c and 2 c + 1, which run
// them at the same time and exchange their sums directly (exchange_16bit.cuh).
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
    part_count = CLUSTER_K > 1 ? max(cut - worker / CLUSTER_K + workers / CLUSTER_K - 1, 0) / (workers / CLUSTER_K)
                               : max(cut * parts - worker + workers - 1, 0) / workers;
    count = whole_count + part_count;
  }

  __device__ __forceinline__ Segment segment(int index) const {
    if (index < whole_count) return {cut + worker + index * workers, -1, 0, tile_units};
    const int turn = index - whole_count, number = worker + turn * workers;
    const int part = CLUSTER_K > 1 ? worker % CLUSTER_K : number / cut;
    const int tile = CLUSTER_K > 1 ? (worker + turn * workers) / CLUSTER_K : number - part * cut;
    return {tile, part, tile_units * part / parts, tile_units * (part + 1) / parts};
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
