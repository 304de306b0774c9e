// One rank's view of a group: addresses in the segment, waiting, failing.
#pragma once

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "segment.h"

namespace anabranch {

enum Code : int { kOk = 0, kDeadline = 1, kPeerLost = 2, kDisagree = 3, kClosed = 4 };

constexpr int64_t kSliceNs = 20'000'000;  // a sleeper looks around this often
constexpr int64_t kMaxGapNs = 300'000'000;  // most that counts between two looks, as in anabranch/system/clock.py
constexpr int kPauses = 100;              // before the core is first offered to others

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

inline void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void futex_sleep(std::atomic<uint32_t>& word, uint32_t seen, int64_t ns) {
  timespec t{ns / 1'000'000'000, ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Counters wrap; what counts is the distance.
inline bool reached(uint32_t value, uint32_t target) { return static_cast<int32_t>(value - target) >= 0; }

inline void publish(Word& word, uint32_t value) {
  word.value.store(value);  // sequentially consistent: either we see the sleeper, or it sees the value
  if (word.sleepers.load()) futex_wake(word.value);
}

inline void ring(Word& bell) {
  bell.value.fetch_add(1);
  if (bell.sleepers.load()) futex_wake(bell.value);
}

struct Exchange;

struct Group {
  int rank = 0;
  int size = 1;
  char* base = nullptr;
  Layout layout{1, 0};
  int64_t spin_ns = 0;
  int64_t timeout_ns = 0;
  const char* other_limit = "timeout_s";  // name of a limit that is not `collective_timeout_s`
  int pidfds[kMaxRanks];
  uint32_t step = 0;    // collectives done
  Exchange* exchange = nullptr;
  std::atomic<int> num_inside{0};    // threads in a call
  std::atomic<bool> closed{false};

  Header& header() const { return *reinterpret_cast<Header*>(base); }
  RankState& state(int r) const { return reinterpret_cast<RankState*>(base + layout.ranks)[r]; }
  RankState& mine() const { return state(rank); }
  char* slot(int r, int which) const { return base + layout.slots + (2 * static_cast<size_t>(r) + which) * kSlotBytes; }
  size_t pair(int from, int to) const { return static_cast<size_t>(from) * size + to; }
  Channel& channel(int from, int to) const {
    return reinterpret_cast<Channel*>(base + layout.channels)[pair(from, to)];
  }
  char* chunk(int from, int to, uint32_t index) const {
    return base + layout.chunks + (pair(from, to) * kNumChunks + index % kNumChunks) * kChunkBytes;
  }
  size_t arena_bytes() const { return header().arena_bytes; }
  char* arena() const { return base + layout.arenas + up(arena_bytes()) * rank; }
};

inline void wake_all(const Group& g) {
  for (int r = 0; r < g.size; ++r) {
    RankState& s = g.state(r);
    for (Word* word : {&s.step.posted, &s.attached}) futex_wake(word->value);
    ring(s.bell);
  }
}

// A call's stay in the group: `close` waits for its end, and calls that come later find the group closed.
struct Visit {
  Group& g;
  explicit Visit(Group& group) : g(group) { g.num_inside.fetch_add(1); }
  ~Visit() { g.num_inside.fetch_sub(1); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;
  bool late() const { return g.closed.load(); }
};

// Mark the group as failed, for all ranks and for good; the first reason stays.
template <class... Args>
int fail(const Group& g, Code code, const char* format, Args... args) {
  Header& h = g.header();
  uint32_t none = 0;
  if (h.failing.compare_exchange_strong(none, 1)) {
    snprintf(h.reason, kReasonBytes, format, args...);
    h.failed.store(code);
    wake_all(g);
    return code;
  }
  // Somebody is writing its reason; if it died at that, ours has to do.
  for (int i = 0; i < 10000 && !h.failed.load(); ++i) sched_yield();
  return h.failed.load() ? static_cast<int>(h.failed.load()) : code;
}

// Whether `peer` can still do its part, and whether any other rank died without a farewell.
// Gives kOk, or the code to fail with (and the rank in question), which the caller checks against its wait first.
inline int look_around(const Group& g, int peer, int& lost) {
  for (int r = 0; r < g.size; ++r) {
    if (r == g.rank) continue;
    const bool left = g.state(r).left.load() != 0;
    bool dead = false;
    if (g.pidfds[r] >= 0) {
      pollfd p{g.pidfds[r], POLLIN, 0};
      dead = poll(&p, 1, 0) == 1;
    }
    if ((dead && !left) || (r == peer && (left || dead))) {
      lost = r;
      return kPeerLost;
    }
  }
  return kOk;
}

inline int fail_lost(const Group& g, int lost, const char* what) {
  RankState& s = g.state(lost);
  const char* how = s.left.load() ? "left the group" : "died";
  return fail(g, kPeerLost, "rank %d (pid %d) %s; rank %d was in %s", lost, s.pid.load(), how, g.rank, what);
}

// How long a rank has waited. It looks at least every `kSliceNs`; where much more has passed between two looks, the
// process was stopped, perhaps with all its peers, and that time is not held against them.
class AwakeTime {
 public:
  int64_t ns() {
    const int64_t now = now_ns();
    sum_ += now - looked_ < kMaxGapNs ? now - looked_ : kMaxGapNs;
    looked_ = now;
    return sum_;
  }

 private:
  int64_t sum_ = 0;
  int64_t looked_ = now_ns();
};

// Wait until `ready()`, which a change of `word` makes true: spin, then offer the core, then sleep.
// `work()` is done at every turn and says whether it moved something. `peer` is whom we wait for.
template <class Ready, class Work>
int wait_until(const Group& g, Word& word, int peer, const char* what, int64_t timeout_ns, Ready ready, Work work) {
  for (int i = 0; i < kPauses; ++i) {
    work();
    if (ready()) return kOk;
    pause_core();
  }
  AwakeTime waited;
  for (;;) {
    if (const uint32_t code = g.header().failed.load()) return ready() ? kOk : static_cast<int>(code);
    const bool moved = work();
    if (ready()) return kOk;
    if (moved) continue;
    if (waited.ns() < g.spin_ns) {
      sched_yield();
      continue;
    }
    word.sleepers.fetch_add(1);
    const uint32_t seen = word.value.load();
    work();
    if (!ready() && !g.header().failed.load() && word.value.load() == seen) {
      const int64_t rest = timeout_ns - waited.ns();
      futex_sleep(word.value, seen, rest < kSliceNs ? (rest > 0 ? rest : 1) : kSliceNs);
    }
    word.sleepers.fetch_sub(1);
    if (word.value.load() != seen) continue;
    int lost = 0;
    const int code = look_around(g, peer, lost);
    work();
    if (ready()) return kOk;
    if (const uint32_t failed = g.header().failed.load()) return static_cast<int>(failed);
    if (code) return fail_lost(g, lost, what);
    if (waited.ns() >= timeout_ns) {
      const char* limit = timeout_ns == g.timeout_ns ? "collective_timeout_s" : g.other_limit;
      return fail(g, kDeadline, "rank %d waited for rank %d in %s longer than %s = %g s", g.rank, peer, what, limit,
                  timeout_ns * 1e-9);
    }
  }
}

inline int wait_word(const Group& g, Word& word, uint32_t target, int peer, const char* what, int64_t timeout_ns) {
  // A group that failed stays failed, also for a rank whose wait would be over at once.
  if (const uint32_t code = g.header().failed.load(std::memory_order_acquire)) return static_cast<int>(code);
  if (reached(word.value.load(std::memory_order_acquire), target)) return kOk;
  return wait_until(
      g, word, peer, what, timeout_ns, [&] { return reached(word.value.load(std::memory_order_acquire), target); },
      [] { return false; });
}

}  // namespace anabranch
