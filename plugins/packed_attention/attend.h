// What attention's inner loops are handed: some rows of queries that share their keys.
#pragma once

#include <cstdint>

namespace trimtab {

constexpr int64_t kKeyBlock = 256;     // keys that are packed and multiplied at a time
constexpr int64_t kMostQueries = 512;  // of a part: what is kept of each between two blocks of keys stays in the second cache

// Queries [first, last) of one sample and one head of keys. `group` heads of queries share that head of keys; their rows
// follow each other: row r is query r % tokens of head r / tokens.
struct AttentionPart {
  const float *q, *k, *v;  // at the sample's first token and the first head; heads are `dim` floats apart
  int64_t q_stride, k_stride, v_stride;  // floats from token to token
  int64_t tokens, dim, group, first, last;
  float scale;
  const float* bias;  // at the first head, [.., bias_stride] per query; nullptr: none
  int64_t bias_stride, bias_head;  // floats from query to query, and from head to head (0: all heads share one)
  float* context;  // as q
  int64_t context_stride;
  float* received;  // [tokens]: sums over the part's rows of what each token receives; nullptr: not wanted
};

// Context of the rows of a part; overwrites part.received, where it is wanted.
void attend(const AttentionPart& part);

// The same in one instruction set each.
void attend_portable(const AttentionPart& part);
#if defined(TRIMTAB_X86)
void attend_avx2(const AttentionPart& part);
void attend_avx512(const AttentionPart& part);
#endif

}  // namespace trimtab
