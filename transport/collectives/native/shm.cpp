// The C interface of the shared-memory group; `shm.py` is its only caller.
//
// Every call that can wait gives a Code. A group without an address has been closed.
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
  g->spin_ns = static_cast<int64_t>(spin_s * 1e9);
  g->timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
  for (int& pidfd : g->pidfds) pidfd = -1;
  g->exchange = new (std::nothrow) Exchange(*g);
  g->mine().pid.store(getpid());
  publish(g->mine().attached, 1);
  return g;
}

// Wait until rank `r` has attached too; gives its process id, or minus a Code.
int anabranch_await_rank(Group* g, int r, double timeout_s) {
  const int64_t timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
  g->other_limit = "start_timeout_s";
  if (const int code = wait_word(*g, g->state(r).attached, 1, r, "attaching", timeout_ns)) return -code;
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
  return g ? all_reduce(*g, static_cast<char*>(x), count, dtype) : kClosed;
}

int anabranch_all_gather(Group* g, const void* in, void* out, uint64_t rows, uint64_t row_bytes) {
  return g ? all_gather(*g, static_cast<const char*>(in), static_cast<char*>(out), rows, row_bytes) : kClosed;
}

int anabranch_reduce_scatter(Group* g, const void* in, void* out, uint64_t count, int dtype) {
  return g ? reduce_scatter(*g, static_cast<const char*>(in), static_cast<char*>(out), count, dtype) : kClosed;
}

int anabranch_barrier(Group* g) { return g ? barrier(*g) : kClosed; }

int anabranch_notify(Group* g, const char* data, uint64_t bytes, double timeout_s) {
  return g ? notify(*g, data, bytes, static_cast<int64_t>(timeout_s * 1e9)) : kClosed;
}

int anabranch_await_notice(Group* g, int root, uint64_t* bytes, double timeout_s) {
  return g ? await_notice(*g, root, bytes, static_cast<int64_t>(timeout_s * 1e9)) : kClosed;
}

int anabranch_take_notice(Group* g, int root, char* data, uint64_t bytes) {
  return g ? take_notice(*g, root, data, bytes, g->timeout_ns) : kClosed;
}

Job* anabranch_post(Group* g, int sends, int peer, const Part* parts, int num_parts) {
  return g->exchange->post(sends != 0, peer, parts, num_parts);
}

int anabranch_wait(Group* g, Job* job) { return g ? g->exchange->wait(job, g->timeout_ns) : kClosed; }

void anabranch_free(Job* job) { delete job; }

int anabranch_failed(Group* g) { return g ? static_cast<int>(g->header().failed.load()) : kClosed; }

void anabranch_reason(Group* g, char* reason) { memcpy(reason, g->header().reason, kReasonBytes); }

void anabranch_abort(Group* g, const char* reason) { fail(*g, kPeerLost, "%s", reason); }

// Say farewell, end the helper and forget all transfers. The segment stays mapped.
void anabranch_close(Group* g) {
  g->mine().left.store(1);
  g->exchange->cancel();
  delete g->exchange;
  g->exchange = nullptr;
  wake_all(*g);
}

void anabranch_unmap(Group* g) {
  munmap(g->base, g->layout.total);
  delete g;
}

}  // extern "C"
