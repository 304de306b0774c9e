// One link's segment: two rings of slot numbers, then the slots themselves.
//
//   Control | call slots | answer slots
//
// A slot has one writer, and one reader, which is told its number through a ring. A ring has one writer; its counter's
// new value shows all that was written before it, the slot's bytes too. The writer of calls fills a slot again when it
// has taken and dropped the answer to what was there, the writer of answers when a new call has come in that slot. So
// nothing is locked, and a process that dies at any instruction leaves nothing locked.
#pragma once

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace anabranch_m2n {

constexpr uint32_t kMaxSlots = 1024;  // a power of two: ring positions wrap with the counter
constexpr int kPauses = 50;           // between two looks at the sockets
constexpr size_t kAlignment = 8;      // of each part of a message

struct Ring {
  alignas(64) std::atomic<uint32_t> posted;    // by the writer: messages so far
  alignas(64) std::atomic<uint32_t> sleeping;  // by the reader: 1 while it needs a byte through the socket to wake
  alignas(64) uint32_t slots[kMaxSlots];       // by the writer: where message `n` lies, at n % kMaxSlots
};

struct Control {
  Ring calls;
  Ring answers;
};

static_assert(std::atomic<uint32_t>::is_always_lock_free);

// One process's end of a link.
struct End {
  Ring* in;
  Ring* out;
  char* out_slots;
  uint64_t out_bytes;  // of each slot
  uint32_t num_slots;
  uint32_t taken;      // messages read from `in`
  uint32_t posted;     // messages written to `out`
  int socket;
};

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

inline bool any_message(const End* const* ends, int num_ends) {
  for (int i = 0; i < num_ends; ++i) {
    if (ends[i]->in->posted.load() != ends[i]->taken) return true;
  }
  return false;
}

// Whether one of the sockets has something, at the latest after `ns`.
inline bool any_event(int epoll, int64_t ns) {
  pollfd p{epoll, POLLIN, 0};
  const timespec t{ns / 1'000'000'000, ns % 1'000'000'000};
  return ppoll(&p, 1, &t, nullptr) == 1;
}

}  // namespace anabranch_m2n
