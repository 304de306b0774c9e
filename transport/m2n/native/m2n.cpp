// The C interface of the M2N channel's shared memory; `transport/m2n/shm_pipe.py` is its only caller.
#include <new>

#include "m2n.h"

using namespace anabranch_m2n;

extern "C" {

uint64_t anabranch_m2n_control_bytes() { return sizeof(Control); }

// Where the counter lies by which the end that answers, or the other one, sees that something has come.
uint64_t anabranch_m2n_posted_offset(int answers) {
  return (answers ? offsetof(Control, calls) : offsetof(Control, answers)) + offsetof(Ring, posted);
}

// An end of the link whose segment is mapped at `base`. `answers`: whether it is the end that answers.
End* anabranch_m2n_open(char* base, int answers, char* out_slots, uint64_t out_bytes, uint32_t num_slots, int socket) {
  if (num_slots > kMaxSlots) return nullptr;
  Control& control = *reinterpret_cast<Control*>(base);
  Ring *calls = &control.calls, *replies = &control.answers;
  return new (std::nothrow) End{
      answers ? calls : replies, answers ? replies : calls, out_slots, out_bytes, num_slots, 0, 0, socket};
}

void anabranch_m2n_close(End* end) { delete end; }

// Make a stretch's pages present; best effort: else the first use takes the page faults.
void anabranch_m2n_populate(char* start, uint64_t bytes) {
#ifdef MADV_POPULATE_WRITE
  madvise(start, bytes, MADV_POPULATE_WRITE);
#endif
}

// Copy a header and `num_parts` pairs of address and length to a slot, and tell the reader.
// Gives 0, or -1 where the reader is gone, or -2 where the message is larger than the slot.
int anabranch_m2n_send(End* end, uint32_t slot, const char* header, uint64_t header_bytes, const uint64_t* parts,
                       int num_parts) {
  uint64_t total = header_bytes;
  for (int i = 0; i < num_parts; ++i) total += (parts[2 * i + 1] + kAlignment - 1) / kAlignment * kAlignment;
  if (slot >= end->num_slots || total > end->out_bytes) return -2;
  char* to = end->out_slots + slot * end->out_bytes;
  memcpy(to, header, header_bytes);
  to += header_bytes;
  for (int i = 0; i < num_parts; ++i) {
    const uint64_t bytes = parts[2 * i + 1];
    memcpy(to, reinterpret_cast<const char*>(parts[2 * i]), bytes);
    to += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  Ring& ring = *end->out;
  ring.slots[end->posted % kMaxSlots] = slot;
  ring.posted.store(++end->posted);  // sequentially consistent: either we see the sleeper, or it sees the message
  if (ring.sleeping.load() && ring.sleeping.exchange(0)) {
    const char byte = 0;
    // A full buffer holds bytes that wake it as well.
    if (send(end->socket, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN && errno != EINTR) return -1;
  }
  return 0;
}

// The slot of the next message; -1 where there is none, -2 where the other end has written what none writes.
int anabranch_m2n_take(End* end) {
  const uint32_t posted = end->in->posted.load(std::memory_order_acquire);
  if (posted == end->taken) return -1;
  if (posted - end->taken > end->num_slots) return -2;
  const uint32_t slot = end->in->slots[end->taken++ % kMaxSlots];
  return slot < end->num_slots ? static_cast<int>(slot) : -2;
}

// Wait until a message has come for one of the ends (1) or `epoll` has an event (2), at the latest until the time is
// over (0): spin, then sleep. It never offers the core: where others compute, it would come back milliseconds later,
// while a sleeper that is woken runs at once.
int anabranch_m2n_wait(End* const* ends, int num_ends, int epoll, int64_t spin_ns, int64_t timeout_ns) {
  if (any_message(ends, num_ends)) return 1;
  const int64_t start = now_ns();
  const int64_t spin_end = start + (spin_ns < timeout_ns ? spin_ns : timeout_ns);
  do {
    if (any_event(epoll, 0)) return 2;
    for (int i = 0; i < kPauses; ++i) {
      if (any_message(ends, num_ends)) return 1;
      pause_core();
    }
  } while (now_ns() < spin_end);
  for (int i = 0; i < num_ends; ++i) ends[i]->in->sleeping.store(1);
  int result = any_message(ends, num_ends) ? 1 : 0;
  if (!result) {
    const int64_t left = timeout_ns - (now_ns() - start);
    result = any_event(epoll, left > 0 ? left : 0) ? 2 : 0;
  }
  for (int i = 0; i < num_ends; ++i) ends[i]->in->sleeping.store(0);
  return any_message(ends, num_ends) ? 1 : result;
}

}  // extern "C"
