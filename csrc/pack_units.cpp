#include "pack_units.h"

#include <algorithm>
#include <utility>

#include "small_products.h"

namespace rlvr {
namespace {

// Scores of a batch, which its products read from the second cache.
constexpr std::int64_t kScores = 1 << 16;

// Queries of a piece at least, however many keys there are: they go through them together.
constexpr std::int64_t kQueries = 32;

// Rows of a piece, whose scores of later keys are computed in vain.
constexpr std::int64_t kPiece = 32;

// Units of a pack, all key heads together, where its trunks are fewer; each keeps the gradients of
// what it sees. With less work than kLeast pairs of tokens, the conversion of its keys would show.
constexpr std::int64_t kUnits = 32;
constexpr std::int64_t kLeast = 4096;

std::int64_t padded(std::int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

std::int64_t pairs(const Stretch& s, std::int64_t begin, std::int64_t count) {
  return count * (s.prefix_length + s.trunk_length + begin + (count + 1) / 2);
}

class Cutter {
 public:
  Cutter(PackShape shape, std::int64_t most) : shape_(shape), most_(most) {}

  void add(const Stretch& s) {
    const std::int64_t before = padded(s.prefix_length + s.trunk_length);
    for (std::int64_t begin = 0; begin < s.length;) {
      const std::int64_t width = (before + padded(begin + kPiece)) * shape_.group();
      const std::int64_t least = (kQueries + shape_.group() - 1) / shape_.group();
      const std::int64_t most = std::min(kPiece, std::max(least, kScores / width));
      const std::int64_t count = std::min(most, s.length - begin);
      add(s, begin, count);
      begin += count;
    }
  }

  std::vector<Unit> units;

 private:
  void add(const Stretch& s, std::int64_t begin, std::int64_t count) {
    if (units.empty() || trunk_ != s.trunk_start || work_ >= most_) {
      units.push_back({{{0, s.prefix_length}, {s.trunk_start, s.trunk_length}, {s.start, 0}}, {}});
      trunk_ = s.trunk_start;
      work_ = 0;
    }
    Unit& unit = units.back();
    work_ += pairs(s, begin, count);
    unit.runs[2].count = s.start + begin + count - unit.runs[2].row;
    const std::int64_t own = unit.runs[0].count + unit.runs[1].count + s.start - unit.runs[2].row;
    const std::int64_t seen = s.prefix_length + s.trunk_length;
    const std::int64_t width = padded(seen) + padded(begin + count);
    if (begin > 0 || unit.batches.empty() || !fits(unit.batches.back(), seen, count, width)) {
      unit.batches.push_back({seen, padded(seen), 0, 0, {}});
    }
    Batch& batch = unit.batches.back();
    batch.width = std::max(batch.width, width);
    batch.rows += count;
    batch.pieces.push_back({s.start + begin, count, begin, own});
  }

  bool fits(const Batch& batch, std::int64_t seen, std::int64_t count, std::int64_t width) const {
    const std::int64_t rows = (batch.rows + count) * shape_.group();
    return batch.seen == seen && rows * std::max(batch.width, width) <= kScores;
  }

  PackShape shape_;
  std::int64_t most_;
  std::int64_t trunk_ = 0;
  std::int64_t work_ = 0;
};

}  // namespace

std::vector<Unit> units_of(const Stretch* stretches, std::int64_t count, PackShape shape) {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < count; ++i) total += pairs(stretches[i], 0, stretches[i].length);
  const std::int64_t wanted = (kUnits + shape.key_heads - 1) / shape.key_heads;
  Cutter cutter(shape, std::max(kLeast, total / wanted));
  for (std::int64_t i = 0; i < count; ++i) cutter.add(stretches[i]);
  return std::move(cutter.units);
}

}  // namespace rlvr
