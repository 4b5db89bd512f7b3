#include "decode_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "row_sweep.h"
#include "small_products.h"
#include "vector_math.h"

namespace rlvr {
namespace {

// Queries that go through the keys of their prompt together.
constexpr std::int64_t kQueries = 32;

// Tokens whose values are converted to float at a time.
constexpr std::int64_t kStrip = 4 * kTokens;

static_assert(kTokens == kLanes, "a block of keys is as wide as a product's columns");

using In = Rectangle<const float>;
using Out = Rectangle<float>;

// Memory of one thread.
struct Scratch {
  std::vector<float> query;    // [queries, d]
  std::vector<float> scores;   // [queries, blocks of the prompt and own ones, kTokens]
  std::vector<float> output;   // [queries, d]
  std::vector<float> numbers;  // [kStrip, d]

  void clear(std::int64_t queries, std::int64_t size, std::int64_t width) {
    query.resize(queries * size);
    scores.assign(queries * width, 0.0f);
    output.assign(queries * size, 0.0f);
    numbers.resize(kStrip * size);
  }
};

std::int64_t blocks_of(std::int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// One head's keys and values of a sequence, with as many tokens.
template <class T>
struct Sequence {
  T* keys;
  T* values;
  std::int64_t tokens;
};

template <class T>
Sequence<T> sequence(Cached<T> cached, std::int64_t place, std::int64_t head, DecodeShape shape,
                     std::int64_t tokens) {
  const std::int64_t begin =
      (place * shape.key_heads + head) * cached.blocks * kTokens * shape.size;
  return {cached.keys + begin, cached.values + begin, tokens};
}

// Scores of `count` queries; places past the last token get none of the softmax.
template <class T>
void score(Sequence<T> from, In query, std::int64_t count, std::int64_t size, Out scores,
           std::vector<float>& numbers) {
  const std::int64_t blocks = blocks_of(from.tokens);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const float* keys = as_floats(from.keys + b * kTokens * size, kTokens * size, numbers);
    multiply(query, {keys, kTokens}, {count, size, kTokens}, scores.from(b * kTokens));
  }
  for (std::int64_t q = 0; q < count; ++q) {
    float* const row = scores.row(q).data;
    std::fill(row + from.tokens, row + blocks * kTokens, -INFINITY);
  }
}

template <class T>
void add_values(Sequence<T> from, In weights, std::int64_t count, std::int64_t size, Out output,
                std::vector<float>& numbers) {
  for (std::int64_t t = 0; t < from.tokens; t += kStrip) {
    const std::int64_t depth = std::min(kStrip, from.tokens - t);
    const float* values = as_floats(from.values + t * size, depth * size, numbers);
    multiply(weights.from(t), {values, size}, {count, depth, size}, output);
  }
}

template <class T>
struct Work {
  Heads<const T> query, key, value;
  Cached<const T> prompts;
  Cached<T> own;
  DecodeRows where;
  DecodeShape shape;
  float scale;
  T* out;
};

template <class T>
void store_token(Sequence<T> own, const T* key, const T* value, std::int64_t size) {
  const std::int64_t last = own.tokens - 1;
  T* keys = own.keys + last / kTokens * kTokens * size + last % kTokens;
  for (std::int64_t c = 0; c < size; ++c) keys[c * kTokens] = key[c];
  std::copy(value, value + size, own.values + last * size);
}

// `count` rows of one prompt, and one key head.
struct Task {
  std::int64_t first;
  std::int64_t count;
  std::int64_t head;
};

template <class T>
RLVR_CLONES void read_queries(const Work<T>& work, Task task, float* query) {
  const std::int64_t size = work.shape.size, group = work.shape.heads / work.shape.key_heads;
  for (std::int64_t i = 0; i < task.count; ++i) {
    for (std::int64_t g = 0; g < group; ++g, query += size) {
      const T* x = work.query.at(task.first + i, task.head * group + g);
#pragma omp simd
      for (std::int64_t c = 0; c < size; ++c) query[c] = work.scale * to_float(x[c]);
    }
  }
}

template <class T>
void attend(const Work<T>& work, Task task, Scratch& scratch) {
  const DecodeShape& shape = work.shape;
  const std::int64_t size = shape.size, group = shape.heads / shape.key_heads;
  const std::int64_t queries = task.count * group;
  const std::int64_t place = work.where.prompt[task.first];
  const auto prompt = sequence(work.prompts, place, task.head, shape, work.where.length[place]);
  const auto own = [&](std::int64_t i) {
    return sequence(work.own, work.where.own[task.first + i], task.head, shape, shape.used);
  };
  const std::int64_t before = blocks_of(prompt.tokens) * kTokens;
  const std::int64_t width = before + blocks_of(shape.used) * kTokens;
  scratch.clear(queries, size, width);
  const Out query{scratch.query.data(), size}, scores{scratch.scores.data(), width};
  const Out output{scratch.output.data(), size};

  read_queries(work, task, query.data);
  score(prompt, query, queries, size, scores, scratch.numbers);
  for (std::int64_t i = 0; i < task.count; ++i) {
    store_token(own(i), work.key.at(task.first + i, task.head),
                work.value.at(task.first + i, task.head), size);
    score(own(i), query.row(i * group), group, size, scores.row(i * group).from(before),
          scratch.numbers);
  }
  softmax(scores, queries, width);
  add_values(prompt, scores, queries, size, output, scratch.numbers);
  for (std::int64_t i = 0; i < task.count; ++i) {
    const Out rows = output.row(i * group);
    add_values(own(i), scores.row(i * group).from(before), group, size, rows, scratch.numbers);
    write_block(rows.data, group * size,
                work.out + ((task.first + i) * shape.heads + task.head * group) * size);
  }
}

}  // namespace

template <class T>
void decode_attention(Heads<const T> query, Heads<const T> key, Heads<const T> value,
                      Cached<const T> prompts, Cached<T> own, DecodeRows where, DecodeShape shape,
                      float scale, T* out, int threads) {
  const Work<T> work{
      query, key, value, prompts, own, where, shape, static_cast<float>(scale * kLog2E), out};
  const std::int64_t most = std::max<std::int64_t>(1, kQueries * shape.key_heads / shape.heads);
  std::vector<std::int64_t> begins;
  for (std::int64_t t = 0; t < shape.rows; ++t) {
    const bool same = t > 0 && where.prompt[t] == where.prompt[t - 1];
    if (!same || t - begins.back() == most) begins.push_back(t);
  }
  const auto tasks = static_cast<std::int64_t>(begins.size()) * shape.key_heads;
  begins.push_back(shape.rows);
  const auto task = [&](std::int64_t i) {
    const std::int64_t* begin = &begins[i / shape.key_heads];
    return Task{begin[0], begin[1] - begin[0], i % shape.key_heads};
  };
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < tasks; ++i) {
      attend(work, task(i), scratch);
    }
  }
}

#define RLVR_INSTANTIATE(T)                                                                     \
  template void decode_attention<T>(Heads<const T>, Heads<const T>, Heads<const T>,             \
                                    Cached<const T>, Cached<T>, DecodeRows, DecodeShape, float, \
                                    T*, int)

RLVR_INSTANTIATE(float);
RLVR_INSTANTIATE(BFloat16);
RLVR_INSTANTIATE(Half);

}  // namespace rlvr
