// Collectives: each rank writes its part to its own slot, counts up, and reads the others' slots.
//
// Two slots alternate: step n writes slot n & 1. A rank writes it again for step n + 2 only after all others
// have counted to n + 1, and they do that after they have read step n: so no second counter is needed.
#pragma once

#include "group.h"
#include "sum.h"

namespace anabranch {

enum Kind : uint32_t { kAllReduce = 1, kAllGather = 2, kBarrier = 3 };

constexpr size_t kOneShotBytes = 32 << 10;  // above, each rank sums its share and the sums are gathered

inline const char* name_of(uint32_t kind) {
  static const char* const names[] = {"nothing", "all_reduce", "all_gather", "barrier"};
  return kind <= kBarrier ? names[kind] : "garbage";
}

// Count up and wait until all ranks have; all must be in the same call.
inline int meet(Group& g, const Call& call) {
  const uint32_t step = ++g.step;
  auto& mine = g.mine().step;
  mine.calls[step & 1] = call;
  publish(mine.posted, step);
  for (int r = 0; r < g.size; ++r) {
    if (r == g.rank) continue;
    auto& theirs = g.state(r).step;
    if (const int code = wait_word(g, theirs.posted, step, r, name_of(call.kind), g.timeout_ns)) return code;
    const Call& other = theirs.calls[step & 1];
    if (other.kind != call.kind || other.dtype != call.dtype || other.bytes != call.bytes) {
      return fail(g, kDisagree, "ranks disagree: rank %d is in %s of %llu bytes (type %u), rank %d in %s of %llu (type %u)",
                  g.rank, name_of(call.kind), static_cast<unsigned long long>(call.bytes), call.dtype, r,
                  name_of(other.kind), static_cast<unsigned long long>(other.bytes), other.dtype);
    }
  }
  return kOk;
}

inline size_t share_start(size_t count, int size, int r) { return count * r / size; }

// Which of the two slots the coming step's data goes to.
inline int slot_of(const Group& g) { return (g.step + 1) & 1; }

inline int all_reduce_small(Group& g, char* x, size_t count, int dtype) {
  const size_t bytes = count * element_bytes(dtype);
  const int which = slot_of(g);
  memcpy(g.slot(g.rank, which), x, bytes);
  if (const int code = meet(g, {kAllReduce, static_cast<uint32_t>(dtype), bytes})) return code;
  const void* parts[kMaxRanks];
  for (int r = 0; r < g.size; ++r) parts[r] = r == g.rank ? x : g.slot(r, which);
  sum(dtype, x, parts, g.size, count);
  return kOk;
}

// Two steps for each chunk: the parts that others sum, then the sums.
inline int all_reduce_large(Group& g, char* x, size_t count, int dtype) {
  const size_t element = element_bytes(dtype);
  const size_t most = kSlotBytes / element;
  for (size_t done = 0; done < count; done += most) {
    const size_t n = count - done < most ? count - done : most;
    char* chunk = x + done * element;
    const Call call{kAllReduce, static_cast<uint32_t>(dtype), n * element};
    const size_t from = share_start(n, g.size, g.rank) * element, to = share_start(n, g.size, g.rank + 1) * element;
    int which = slot_of(g);
    char* mine = g.slot(g.rank, which);
    memcpy(mine, chunk, from);
    memcpy(mine + to, chunk + to, n * element - to);
    if (const int code = meet(g, call)) return code;
    const void* parts[kMaxRanks];
    for (int r = 0; r < g.size; ++r) parts[r] = (r == g.rank ? chunk : g.slot(r, which)) + from;
    which = slot_of(g);
    sum(dtype, g.slot(g.rank, which) + from, parts, g.size, (to - from) / element);
    if (const int code = meet(g, call)) return code;
    for (int r = 0; r < g.size; ++r) {
      const size_t start = share_start(n, g.size, r) * element, end = share_start(n, g.size, r + 1) * element;
      memcpy(chunk + start, g.slot(r, which) + start, end - start);
    }
  }
  return kOk;
}

inline int all_reduce(Group& g, char* x, size_t count, int dtype) {
  if (g.size == 1) return kOk;
  const bool small = count * element_bytes(dtype) <= kOneShotBytes;
  return small ? all_reduce_small(g, x, count, dtype) : all_reduce_large(g, x, count, dtype);
}

// Bytes [from, to) of rank r's `rows x row_bytes`, to their places in `rows x (size * row_bytes)`.
inline void place(char* out, const char* in, size_t from, size_t to, size_t row_bytes, int size, int r) {
  while (from < to) {
    const size_t row = from / row_bytes, column = from % row_bytes;
    const size_t n = to - from < row_bytes - column ? to - from : row_bytes - column;
    memcpy(out + (row * size + r) * row_bytes + column, in, n);
    in += n;
    from += n;
  }
}

inline int all_gather(Group& g, const char* in, char* out, size_t rows, size_t row_bytes) {
  const size_t bytes = rows * row_bytes;
  for (size_t from = 0; from < bytes || from == 0; from += kSlotBytes) {
    const size_t to = bytes - from < kSlotBytes ? bytes : from + kSlotBytes;
    const int which = slot_of(g);
    if (g.size > 1) {
      if (to > from) memcpy(g.slot(g.rank, which), in + from, to - from);
      if (const int code = meet(g, {kAllGather, kBytes, bytes})) return code;
    }
    for (int r = 0; r < g.size; ++r) {
      place(out, r == g.rank ? in + from : g.slot(r, which), from, to, row_bytes, g.size, r);
    }
  }
  return kOk;
}

inline int barrier(Group& g) { return g.size == 1 ? kOk : meet(g, {kBarrier, kBytes, 0}); }

}  // namespace anabranch
