// Attention within a pack, where branches share their trunk's keys, and its gradients.
#pragma once

#include <cstdint>

#include "any_heads.h"
#include "pack_units.h"

namespace rlvr {

struct PackInputs {
  AnyHeads query;  // [rows, heads, d]
  AnyHeads key;    // [rows, key_heads, d]
  AnyHeads value;
  const Stretch* stretches;  // every row is in exactly one
  std::int64_t count;
  PackShape shape;
  float scale;
};

// P = softmax(scale Q K^T) over what a row sees; out = P V, [rows, heads, d]. Sums are fp32.
void pack_attention_fwd(const PackInputs& inputs, AnyOut out, int threads);

struct PackGradients {
  AnyOut query;
  AnyOut key;
  AnyOut value;
};

// From P computed anew: dV = P^T dO, dS = P (dO V^T - rowsum(P dO V^T)), dQ = scale dS K and
// dK = scale dS^T Q. Same bits for any number of threads, as forward.
void pack_attention_bwd(const PackInputs& inputs, const AnyHeads& d_out, PackGradients gradients,
                        int threads);

}  // namespace rlvr
