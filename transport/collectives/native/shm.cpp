// The C interface of the shared-memory group; `shm.py` is its only caller.
//
// Every call that can wait gives a Code.
#include <sys/mman.h>
#include <sys/stat.h>

#include <new>

#include "collectives.h"
#include "exchange.h"
#include "group.h"

using namespace anabranch;

namespace {

void populate(void* start, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  madvise(start, bytes, MADV_POPULATE_WRITE);  // best effort: else the first use takes the page faults
#endif
}

int64_t nanoseconds(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

}  // namespace

extern "C" {

uint64_t anabranch_segment_bytes(int size, uint64_t arena_bytes) { return Layout(size, arena_bytes).total; }

// Map the segment behind `fd`. The creator writes the header first; the others must find its token there.
Group* anabranch_attach(int fd, int rank, int size, uint64_t arena_bytes, const uint8_t* token, int creates,
                        double spin_s, double timeout_s) {
  const Layout layout(size, arena_bytes);
  struct stat info;
  if (fstat(fd, &info) || static_cast<uint64_t>(info.st_size) != layout.total) return nullptr;
  void* base = mmap(nullptr, layout.total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return nullptr;
  Header& header = *static_cast<Header*>(base);
  if (creates) {
    header.version = kVersion;
    header.size = size;
    header.arena_bytes = arena_bytes;
    memcpy(header.token, token, sizeof header.token);
    header.magic = kMagic;
  } else if (header.magic != kMagic || header.version != kVersion || header.size != size ||
             header.arena_bytes != arena_bytes || memcmp(header.token, token, sizeof header.token)) {
    munmap(base, layout.total);
    return nullptr;
  }
  populate(base, layout.chunks < (32 << 20) ? layout.chunks : layout.slots);
  Group* g = new (std::nothrow) Group;
  if (!g) return nullptr;
  g->rank = rank;
  g->size = size;
  g->base = static_cast<char*>(base);
  g->layout = layout;
  g->spin_ns = nanoseconds(spin_s);
  g->timeout_ns = nanoseconds(timeout_s);
  for (int& pidfd : g->pidfds) pidfd = -1;
  g->exchange = new (std::nothrow) Exchange(*g);
  g->mine().pid.store(getpid());
  publish(g->mine().attached, 1);
  return g;
}

// Wait until rank `r` has attached too; gives its process id, or minus a Code.
int anabranch_await_rank(Group* g, int r, double timeout_s) {
  g->other_limit = "start_timeout_s";
  if (const int code = wait_word(*g, g->state(r).attached, 1, r, "attaching", nanoseconds(timeout_s))) return -code;
  g->other_limit = "timeout_s";
  return g->state(r).pid.load();
}

void anabranch_watch(Group* g, int r, int pidfd) { g->pidfds[r] = pidfd; }

// This rank's part of the segment for buffers that transfers are written to in place.
char* anabranch_arena(Group* g) { return g->arena(); }

void anabranch_populate(char* start, uint64_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(start) / kPage * kPage;
  populate(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(start) + bytes - first);
}

int anabranch_all_reduce(Group* g, void* x, uint64_t count, int dtype) {
  const Visit visit(*g);
  return visit.late() ? kClosed : all_reduce(*g, static_cast<char*>(x), count, dtype);
}

int anabranch_all_gather(Group* g, const void* in, void* out, uint64_t rows, uint64_t row_bytes) {
  const Visit visit(*g);
  return visit.late() ? kClosed : all_gather(*g, static_cast<const char*>(in), static_cast<char*>(out), rows, row_bytes);
}

int anabranch_barrier(Group* g) {
  const Visit visit(*g);
  return visit.late() ? kClosed : barrier(*g);
}

// `parts` are those to send, then those to receive. Gives the transfer, or minus a Code.
int64_t anabranch_post(Group* g, const Part* parts, int num_send, int to, int num_receive, int source) {
  const Visit visit(*g);
  if (visit.late()) return -kClosed;
  if (const uint32_t code = g->header().failed.load()) return -static_cast<int64_t>(code);
  return reinterpret_cast<int64_t>(g->exchange->post(parts, num_send, to, parts + num_send, num_receive, source));
}

// Wait for the whole transfer and free it; when that fails, it is to be freed after `close`.
int anabranch_wait(Group* g, Transfer* transfer) {
  const Visit visit(*g);
  return visit.late() ? kClosed : g->exchange->wait(transfer, g->timeout_ns);
}

void anabranch_free(Transfer* transfer) { delete transfer; }

// Gives 0 and no reason for a group that this rank has closed.
int anabranch_reason(Group* g, char* reason) {
  const Visit visit(*g);
  if (visit.late()) return 0;
  memcpy(reason, g->header().reason, kReasonBytes);
  return 1;
}

void anabranch_abort(Group* g, const char* reason) {
  const Visit visit(*g);
  if (!visit.late()) fail(*g, kPeerLost, "%s", reason);
}

// Say farewell, end the helper and forget all transfers. The segment stays mapped.
void anabranch_close(Group* g) {
  g->mine().left.store(1);
  g->closed.store(true);
  if (g->num_inside.load()) fail(*g, kPeerLost, "rank %d closed the group while it was in a call", g->rank);
  while (g->num_inside.load()) sched_yield();
  g->exchange->cancel();
  delete g->exchange;
  g->exchange = nullptr;
  wake_all(*g);
}

// The group itself, a few hundred bytes, stays: a thread may be just about to find it closed.
void anabranch_unmap(Group* g) { munmap(g->base, g->layout.total); }

}  // extern "C"
