// The attention of a pack cut into pieces of work.
#pragma once

#include <cstdint>
#include <vector>

namespace rlvr {

// rlvr_fast/attention_plans/layout.py, field by field; of one trunk's, those that see more first.
struct Stretch {
  std::int64_t length;
  std::int64_t trunk_length;
  std::int64_t start;
  std::int64_t trunk_start;
  std::int64_t prefix_length;
};

struct PackShape {
  std::int64_t rows;
  std::int64_t heads;      // of queries
  std::int64_t key_heads;  // each serves heads / key_heads neighbouring ones
  std::int64_t size;       // d
  std::int64_t group() const { return heads / key_heads; }
};

// Rows `row` to `row + count` of a stretch, and its `before` ones before them, whose keys begin at
// `own` among those of the unit.
struct Piece {
  std::int64_t row;
  std::int64_t count;
  std::int64_t before;
  std::int64_t own;
};

// Pieces that see the first `seen` keys of the unit, each besides its own. A row of scores has
// `width` places, the own keys' from `own` on.
struct Batch {
  std::int64_t seen;
  std::int64_t own;
  std::int64_t width;
  std::int64_t rows;
  std::vector<Piece> pieces;
};

struct Run {
  std::int64_t row;
  std::int64_t count;
};

// What one thread does for one key head. Its keys are three runs of rows, end to end: what all
// prompts begin with, the trunk unless it is in the last, and the stretches.
struct Unit {
  Run runs[3];
  std::vector<Batch> batches;
  std::int64_t keys() const { return runs[0].count + runs[1].count + runs[2].count; }
};

// Units of about equal work; they do not depend on the number of threads.
std::vector<Unit> units_of(const Stretch* stretches, std::int64_t count, PackShape shape);

}  // namespace rlvr
