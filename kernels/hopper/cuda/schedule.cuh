// How persistent workers (CTAs or clusters) share the work: stream-K for some tiles, the others whole.
//
// A unit is a fixed stretch of K of one tile; a tile has `tile_units`. The first `stream_tiles` tiles are cut into
// `workers` equal runs of units, one a worker, whatever tiles they cross (none is empty: stream_tiles * tile_units
// >= workers, or stream_tiles is 0); the other tiles go round whole. A worker walks its segments, its run first.
//
// A tile cut by runs belongs to the worker whose run holds its first unit; that worker keeps its own sum in
// registers and adds the others', in the order of K. Such a head is always the last segment of its run, and a part
// without the head the first of its: a part is written before its worker waits for anyone, so waits end.
#pragma once

struct Segment {
  int tile, first, last;
};

struct Schedule {
  int worker, workers, tiles, stream_tiles, tile_units;
  int run, longer;  // units of a run, and how many of the first runs have one more
  int begin, end, streamed, count;

  __device__ __forceinline__ Schedule(int worker, int workers, int tiles, int stream_tiles, int tile_units)
      : worker(worker), workers(workers), tiles(tiles), stream_tiles(stream_tiles), tile_units(tile_units) {
    run = stream_tiles * tile_units / workers;
    longer = stream_tiles * tile_units - run * workers;
    begin = run_start(worker);
    end = run_start(worker + 1);
    streamed = end > begin ? (end - 1) / tile_units - begin / tile_units + 1 : 0;
    count = streamed + (tiles - stream_tiles - worker + workers - 1) / workers;
  }

  __device__ __forceinline__ int run_start(int of) const {
    return of * run + min(of, longer);
  }

  __device__ __forceinline__ Segment segment(int index) const {
    if (index >= streamed) return {stream_tiles + worker + (index - streamed) * workers, 0, tile_units};
    int tile = begin / tile_units + index;
    return {tile, max(begin - tile * tile_units, 0), min(end - tile * tile_units, tile_units)};
  }

  // Whether `peer`, of the workers after the owner in turn, holds a part of `tile`.
  __device__ __forceinline__ bool holds_part(int peer, int tile) const {
    return peer < workers && run_start(peer) < (tile + 1) * tile_units;
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
