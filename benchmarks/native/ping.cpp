// The bound that transfers within a host are compared with: bytes that go from one process to another through shared
// memory, in and out, with both sides spinning and no Python.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

// Both sides' counters, a cache line each; the data of side s begins at kData + s * bytes.
constexpr size_t kLine = 64;
constexpr size_t kData = 2 * kLine;

std::atomic<uint32_t>& counter(char* base, int side) {
  return *reinterpret_cast<std::atomic<uint32_t>*>(base + side * kLine);
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

uint64_t ping_segment_bytes(uint64_t bytes) { return kData + 2 * bytes; }

// Seconds one way, or -1 where the other side does not answer within `timeout_s`. Counters must be zero before.
double ping(char* base, int side, char* data, uint64_t bytes, int rounds, double timeout_s) {
  std::atomic<uint32_t>&mine = counter(base, side), &theirs = counter(base, 1 - side);
  char *out = base + kData + side * bytes, *in = base + kData + (1 - side) * bytes;
  const double start = now_s();
  for (int i = 1; i <= rounds; ++i) {
    if (side == 0) {
      memcpy(out, data, bytes);
      mine.store(i, std::memory_order_release);
    }
    for (uint32_t spins = 1; theirs.load(std::memory_order_acquire) < static_cast<uint32_t>(i); ++spins) {
      if (spins % 4096 == 0 && now_s() - start > timeout_s) return -1;
    }
    memcpy(data, in, bytes);
    if (side == 1) {
      memcpy(out, data, bytes);
      mine.store(i, std::memory_order_release);
    }
  }
  return (now_s() - start) / (2.0 * rounds);
}

}  // extern "C"
