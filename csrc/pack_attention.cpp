#include "pack_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "row_sweep.h"

namespace rlvr {
namespace {

using In = Rectangle<const float>;
using Out = Rectangle<float>;

// [stride, size] to [size, stride], `stride` a multiple of kLanes.
RLVR_CLONES void transpose(const float* from, std::int64_t size, Out to) {
  for (std::int64_t r = 0; r < to.stride; r += kLanes) {
    for (std::int64_t c = 0; c < size; ++c) {
#pragma omp simd
      for (std::int64_t i = r; i < r + kLanes; ++i) to.row(c).data[i] = from[i * size + c];
    }
  }
}

// Probabilities P and their gradient dP; the latter becomes that of the scores.
RLVR_CLONES void softmax_gradient(In weights, std::int64_t rows, std::int64_t width, Out gradient) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* p = weights.row(r).data;
    float* d = gradient.row(r).data;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < width; ++i) sum += p[i] * d[i];
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) d[i] = p[i] * (d[i] - sum);
  }
}

RLVR_CLONES void add(const float* from, std::int64_t size, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// Keys or values of a unit, as [keys, d] and as [d, keys], with any numbers after the last. In the
// latter a row is an odd number of cache lines long, so that a column is not all in one set of the
// cache.
struct Rows {
  std::vector<float> rows;
  std::vector<float> columns;
  std::int64_t size = 0;
  std::int64_t stride = 0;

  void read(const AnyHeads& from, const Unit& unit, std::int64_t head, std::int64_t d) {
    size = d;
    stride = (unit.keys() / kLanes + 2) / 2 * 2 * kLanes + kLanes;
    rows.resize(stride * size);
    columns.resize(stride * size);
    float* to = rows.data();
    for (const Run run : unit.runs) {
      read_heads(from, {run.row, run.count, head, 1, size}, 1.0f, to);
      to += run.count * size;
    }
    transpose(rows.data(), size, {columns.data(), stride});
  }
  In across() const { return {rows.data(), size}; }
  In along() const { return {columns.data(), stride}; }
};

// What one thread keeps while it works at a unit.
struct Scratch {
  Rows keys, values;
  std::vector<float> query, d_out, scores, d_scores, output;
};

class Work {
 public:
  Work(const PackInputs& inputs, const Unit& unit, std::int64_t head, Scratch& scratch)
      : inputs_(inputs), shape_(inputs.shape), unit_(unit), head_(head), scratch_(scratch) {
    scratch.keys.read(inputs.key, unit, head, shape_.size);
    scratch.values.read(inputs.value, unit, head, shape_.size);
  }

  void forward(const AnyOut& out) {
    for (const Batch& batch : unit_.batches) {
      const In weights = probabilities(batch);
      write(batch, mixed(batch, weights, scratch_.values.across()), 1.0f, out);
    }
  }

  // The unit's part of the gradients of its keys, in bits, and values; both begin as 0.
  void backward(const AnyHeads& d_out, const AnyOut& d_query, Out d_keys, Out d_values) {
    for (const Batch& batch : unit_.batches) {
      const In weights = probabilities(batch);
      const In upstream = read(batch, d_out, 1.0f, scratch_.d_out);
      const Out d_scores = against(batch, upstream, scratch_.values.along(), scratch_.d_scores);
      hide(batch, 0.0f, d_scores);
      softmax_gradient(weights, queries(batch), batch.width, d_scores);
      spread(batch, weights, upstream, d_values);
      spread(batch, d_scores, {scratch_.query.data(), shape_.size}, d_keys);
      const In d_rows = mixed(batch, d_scores, scratch_.keys.across());
      write(batch, d_rows, inputs_.scale, d_query);
    }
  }

 private:
  std::int64_t queries(const Batch& batch) const { return batch.rows * shape_.group(); }

  // `act(piece, first query, queries, own keys)` for the batch's pieces.
  template <class F>
  void each(const Batch& batch, F&& act) const {
    std::int64_t first = 0;
    for (const Piece& piece : batch.pieces) {
      const std::int64_t count = piece.count * shape_.group();
      act(piece, first, count, piece.before + piece.count);
      first += count;
    }
  }

  HeadRows rows_of(const Piece& piece) const {
    const std::int64_t group = shape_.group();
    return {piece.row, piece.count, head_ * group, group, shape_.size};
  }

  In read(const Batch& batch, const AnyHeads& from, float factor, std::vector<float>& to) const {
    to.resize(queries(batch) * shape_.size);
    each(batch, [&](const Piece& piece, auto first, auto, auto) {
      read_heads(from, rows_of(piece), factor, to.data() + first * shape_.size);
    });
    return {to.data(), shape_.size};
  }

  void write(const Batch& batch, In from, float factor, const AnyOut& to) const {
    each(batch, [&](const Piece& piece, auto first, auto, auto) {
      write_heads(from.row(first).data, rows_of(piece), factor, to);
    });
  }

  // [queries, d] with all that a query may see, [d, keys].
  Out against(const Batch& batch, In rows, In keys, std::vector<float>& to) const {
    const std::int64_t size = shape_.size;
    to.assign(queries(batch) * batch.width, 0.0f);
    const Out out{to.data(), batch.width};
    multiply(rows, keys, {queries(batch), size, batch.own}, out);
    each(batch, [&](const Piece& piece, auto first, auto count, auto own) {
      const std::int64_t columns = (own + kLanes - 1) / kLanes * kLanes;
      multiply(rows.row(first), keys.from(piece.own), {count, size, columns},
               out.row(first).from(batch.own));
    });
    return out;
  }

  // Where a query sees nothing.
  void hide(const Batch& batch, float value, Out scores) const {
    each(batch, [&](const Piece& piece, auto first, auto count, auto) {
      for (std::int64_t q = 0; q < count; ++q) {
        float* row = scores.row(first + q).data;
        const std::int64_t seen = piece.before + q / shape_.group() + 1;
        std::fill(row + batch.seen, row + batch.own, value);
        std::fill(row + batch.own + seen, row + batch.width, value);
      }
    });
  }

  In probabilities(const Batch& batch) const {
    const auto factor = static_cast<float>(inputs_.scale * kLog2E);
    const In query = read(batch, inputs_.query, factor, scratch_.query);
    const Out scores = against(batch, query, scratch_.keys.along(), scratch_.scores);
    hide(batch, -INFINITY, scores);
    softmax(scores, queries(batch), batch.width);
    return scores;
  }

  // weights [queries, keys] of rows [keys, d].
  In mixed(const Batch& batch, In weights, In rows) const {
    const std::int64_t size = shape_.size;
    scratch_.output.assign(queries(batch) * size, 0.0f);
    const Out out{scratch_.output.data(), size};
    multiply(weights, rows, {queries(batch), batch.seen, size}, out);
    each(batch, [&](const Piece& piece, auto first, auto count, auto own) {
      multiply(weights.row(first).from(batch.own), rows.row(piece.own), {count, own, size},
               out.row(first));
    });
    return out;
  }

  // The other way: weights [queries, keys] and rows [queries, d] are added to [keys, d].
  void spread(const Batch& batch, In weights, In rows, Out keys) const {
    const std::int64_t size = shape_.size;
    multiply_transposed(weights, rows, {batch.seen, queries(batch), size}, keys);
    each(batch, [&](const Piece& piece, auto first, auto count, auto own) {
      multiply_transposed(weights.row(first).from(batch.own), rows.row(first), {own, count, size},
                          keys.row(piece.own));
    });
  }

  const PackInputs& inputs_;
  const PackShape shape_;
  const Unit& unit_;
  const std::int64_t head_;
  Scratch& scratch_;
};

// Gradients of the units' keys and values, [units, key heads, keys and values, keys, d].
class Parts {
 public:
  Parts(const std::vector<Unit>& units, PackShape shape) : units_(units), shape_(shape) {
    std::int64_t keys = 0;
    for (const Unit& unit : units) {
      begins_.push_back(keys);
      keys += unit.keys();
    }
    data_.reset(new float[static_cast<std::size_t>(2 * shape.key_heads * keys * shape.size)]);
  }

  Out clear(std::int64_t unit, std::int64_t head, std::int64_t kind) const {
    const Out part = at(unit, head, kind);
    std::fill(part.data, part.row(units_[unit].keys()).data, 0.0f);
    return part;
  }

  // The sum over the units, in their order, for some rows of the pack.
  void sum(Run rows, std::int64_t head, std::int64_t kind, float* total) const {
    std::fill(total, total + rows.count * shape_.size, 0.0f);
    for (std::size_t u = 0; u < units_.size(); ++u) {
      In part = at(u, head, kind);
      for (const Run run : units_[u].runs) {
        const std::int64_t first = std::max(run.row, rows.row);
        const std::int64_t last = std::min(run.row + run.count, rows.row + rows.count);
        if (first < last) {
          add(part.row(first - run.row).data, (last - first) * shape_.size,
              total + (first - rows.row) * shape_.size);
        }
        part = part.row(run.count);
      }
    }
  }

 private:
  Out at(std::int64_t unit, std::int64_t head, std::int64_t kind) const {
    const std::int64_t begin = 2 * shape_.key_heads * begins_[unit];
    const std::int64_t place = begin + (2 * head + kind) * units_[unit].keys();
    return {data_.get() + place * shape_.size, shape_.size};
  }

  const std::vector<Unit>& units_;
  PackShape shape_;
  std::vector<std::int64_t> begins_;
  std::unique_ptr<float[]> data_;
};

// Rows of keys whose gradients are summed at a time.
constexpr std::int64_t kSummed = 64;

}  // namespace

void pack_attention_fwd(const PackInputs& inputs, AnyOut out, int threads) {
  const PackShape shape = inputs.shape;
  const std::vector<Unit> units = units_of(inputs.stretches, inputs.count, shape);
  const auto tasks = static_cast<std::int64_t>(units.size()) * shape.key_heads;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < tasks; ++i) {
      Work(inputs, units[i / shape.key_heads], i % shape.key_heads, scratch).forward(out);
    }
  }
}

void pack_attention_bwd(const PackInputs& inputs, const AnyHeads& d_out, PackGradients gradients,
                        int threads) {
  const PackShape shape = inputs.shape;
  const std::vector<Unit> units = units_of(inputs.stretches, inputs.count, shape);
  const Parts parts(units, shape);
  const auto tasks = static_cast<std::int64_t>(units.size()) * shape.key_heads;
  const std::int64_t chunks = (shape.rows + kSummed - 1) / kSummed;
  const auto log2 = static_cast<float>(kLog2);  // the queries were in bits
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < tasks; ++i) {
      const std::int64_t u = i / shape.key_heads, head = i % shape.key_heads;
      const Out d_keys = parts.clear(u, head, 0), d_values = parts.clear(u, head, 1);
      Work(inputs, units[u], head, scratch).backward(d_out, gradients.query, d_keys, d_values);
    }
    std::vector<float> total(kSummed * shape.size);
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < chunks * 2 * shape.key_heads; ++i) {
      const std::int64_t row = i / (2 * shape.key_heads) * kSummed, head = i / 2 % shape.key_heads;
      const std::int64_t count = std::min(kSummed, shape.rows - row);
      const bool of_keys = i % 2 == 0;
      parts.sum({row, count}, head, i % 2, total.data());
      write_heads(total.data(), {row, count, head, 1, shape.size}, of_keys ? log2 : 1.0f,
                  of_keys ? gradients.key : gradients.value);
    }
  }
}

}  // namespace rlvr
