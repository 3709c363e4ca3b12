// How persistent workers (CTAs, or clusters that share panels) go through the tiles of a product together, a wave at a
// time, so that all tiles of a wave that share weight rows want the same stretch of K at about the same time.
//
// Tiles are grouped by `width` of them along the tokens, and a wave has as many rows of tiles of its group as there are
// workers for: it reads few tokens and few weights, which stay in the L2 cache. Every worker counts every wave, whether
// or not there is a tile for it.
#pragma once

struct Waves {
  int workers, row_tiles, token_tiles;
  int width, height;     // of this wave, in tiles
  int row = 0, token = 0;  // its first tile

  __device__ __forceinline__ Waves(int workers, int row_tiles, int token_tiles, int width)
      : workers(workers), row_tiles(row_tiles), token_tiles(token_tiles), width(width), height(workers / width) {}

  __device__ __forceinline__ bool more() const { return token < token_tiles; }

  __device__ __forceinline__ void advance() {
    row += height;
    if (row < row_tiles) return;
    row = 0;
    token += width;
    width = min(width, max(token_tiles - token, 1));
    height = workers / width;
  }

  // Whether `worker` has a tile in this wave, and which.
  __device__ __forceinline__ bool holds(int worker) const {
    return worker < width * height && row_of(worker) < row_tiles;
  }
  __device__ __forceinline__ int row_of(int worker) const { return row + worker / width; }
  __device__ __forceinline__ int token_of(int worker) const { return token + worker % width; }
};
