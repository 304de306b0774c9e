// The shared memory segment of one group: who writes which word, and where everything lies.
//
// Every word has one writer. A reader that sees a counter's new value sees all that was written before it.
// There is no lock across processes, so a rank that dies at any instruction leaves nothing locked.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace anabranch {

constexpr uint64_t kMagic = 0x616e616272616e63;
constexpr uint32_t kVersion = 2;
constexpr int kMaxRanks = 64;
constexpr size_t kPage = 4096;
constexpr size_t kSlotBytes = 256 << 10;    // one collective's chunk of one rank
constexpr size_t kChunkBytes = 128 << 10;   // one transfer's chunk
constexpr uint32_t kNumChunks = 8;          // chunks in flight from one rank to another
constexpr size_t kEagerBytes = 64 << 10;    // transfers up to here need no word from the receiver first
constexpr int kMaxParts = 16;               // buffers of one transfer that is written in place
constexpr size_t kReasonBytes = 512;

// A counter that others wait for. `sleepers` says whether a change needs a system call.
struct Word {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};

// What a rank does at one step of the group, so that ranks that disagree are told instead of hanging.
struct Call {
  uint32_t kind;
  uint32_t dtype;
  uint64_t bytes;
};

struct alignas(64) RankState {
  // Step `n`'s call is calls[n & 1]; it shares the counter's cache line.
  struct alignas(64) {
    Word posted;
    Call calls[2];
  } step;
  alignas(64) Word bell;      // something moved for this rank's transfers
  alignas(64) Word attached;  // 1 when mapped
  std::atomic<int32_t> pid;
  std::atomic<uint32_t> left;  // 1 after a clean close
};

struct Span {
  uint64_t offset;
  uint64_t bytes;
};

// Where a receiver wants a transfer: in place where all its buffers lie in the segment, else by chunks.
struct Landing {
  uint64_t total_bytes;
  uint32_t in_place;
  uint32_t num_spans;
  Span spans[kMaxParts];
};

// From one rank to another.
struct alignas(64) Channel {
  alignas(64) std::atomic<uint32_t> wanted;  // by the receiver: transfers whose landing is written
  std::atomic<uint32_t> drained;             // by the receiver: chunks read
  Landing landings[2];                       // transfer `n` at n & 1; two may be open
  alignas(64) std::atomic<uint32_t> filled;  // by the sender: chunks written
  std::atomic<uint32_t> landed;              // by the sender: number of the last transfer written in place
  struct {
    uint64_t bytes;
    uint64_t total_bytes;  // of the whole transfer
  } chunks[kNumChunks];
};

struct Header {
  uint64_t magic;
  uint32_t version;
  int32_t size;
  uint8_t token[16];
  uint64_t arena_bytes;
  std::atomic<uint32_t> failing;  // set by the rank that writes `reason`
  std::atomic<uint32_t> failed;   // a Code, once `reason` is there
  char reason[kReasonBytes];
};

static_assert(sizeof(Header) <= kPage);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

inline size_t up(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Offsets of everything, from the number of ranks.
struct Layout {
  size_t ranks, slots, channels, chunks, arenas, total;

  Layout(int size, size_t arena_bytes) {
    const size_t pairs = static_cast<size_t>(size) * size;
    ranks = kPage;
    slots = ranks + up(sizeof(RankState) * size);
    channels = slots + 2 * kSlotBytes * size;
    chunks = channels + up(sizeof(Channel) * pairs);
    arenas = chunks + pairs * kNumChunks * kChunkBytes;
    total = arenas + up(arena_bytes) * size;
  }
};

}  // namespace anabranch
