// Point-to-point transfers that make progress while the rank computes.
//
// Small transfers are copied to a free chunk when they are posted and read when they are waited for. Larger ones
// are moved by a helper thread: straight into the receiver's buffers where these lie in the segment (one copy,
// by the sender's helper alone), else through a ring of chunks (the sender's helper writes, the receiver's
// reads). The helper sleeps unless it has something to move. A rank that waits moves its transfers itself.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <deque>
#include <initializer_list>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "group.h"

namespace anabranch {

struct Part {
  char* data;
  uint64_t bytes;
};

// A position in a list of buffers.
struct Cursor {
  const std::vector<Part>* parts;
  size_t index = 0;
  uint64_t offset = 0;

  // The next piece, at most `most` long; false at the end.
  bool next(uint64_t most, Part& piece) {
    while (index < parts->size() && offset == (*parts)[index].bytes) {
      ++index;
      offset = 0;
    }
    if (index == parts->size()) return false;
    const Part& part = (*parts)[index];
    const uint64_t rest = part.bytes - offset;
    piece = {part.data + offset, rest < most ? rest : most};
    offset += piece.bytes;
    return true;
  }
};

struct Job {
  enum Way { kUnknown, kByChunks, kInPlace };

  bool sends;
  int peer;
  uint32_t number;  // of the transfers from one rank to another, from 1
  std::vector<Part> parts;
  std::vector<Part> targets;  // of a send in place: the receiver's buffers
  Cursor cursor{nullptr};
  Cursor target{nullptr};
  uint64_t total_bytes = 0;
  uint64_t moved_bytes = 0;
  Way way = kUnknown;
  bool announced = false;         // of a receive: its landing is written
  bool moved = false;             // all of it
  std::atomic<bool> done{false};  // its owner may free it

  bool eager() const { return total_bytes <= kEagerBytes; }
};

// A send and a receive that were posted together; either may be missing.
struct Transfer {
  Job* receive = nullptr;
  Job* send = nullptr;
  ~Transfer() {
    delete receive;
    delete send;
  }
};

struct Exchange {
  explicit Exchange(Group& group) : g(group) {}

  ~Exchange() {
    stop.store(true);
    wake_helper();
    if (helper.joinable()) helper.join();
  }

  // Queue a transfer and do what takes no time: announce it, or copy it when it is small.
  Transfer* post(const Part* send, int num_send, int to, const Part* receive, int num_receive, int source) {
    Transfer* transfer = new Transfer;
    bool needs_helper = false;
    {
      num_callers.fetch_add(1);
      std::lock_guard<std::mutex> guard(lock);
      num_callers.fetch_sub(1);
      if (num_receive) {
        Job* job = transfer->receive = queue(false, source, receive, num_receive);
        choose_landing(*job);
        needs_helper = (job->way == Job::kByChunks && !job->eager()) || lanes[0][source].jobs.size() > 2;
      }
      if (num_send) transfer->send = queue(true, to, send, num_send);
      advance(true);
      needs_helper = needs_helper || (num_send && !transfer->send->done.load());
    }
    if (needs_helper) start_helper();
    return transfer;
  }

  int wait(Transfer* transfer, int64_t timeout_ns) {
    for (Job* job : {transfer->receive, transfer->send}) {
      if (!job) continue;
      if (const int code = wait(job, timeout_ns)) return code;
    }
    delete transfer;
    return kOk;
  }

  // Forget all transfers: after this, no buffer is touched.
  void cancel() {
    std::lock_guard<std::mutex> guard(lock);
    for (auto& side : lanes) {
      for (auto& lane : side) lane.jobs.clear();
    }
    num_jobs.store(0);
  }

 private:
  int wait(Job* job, int64_t timeout_ns) {
    const char* what = job->sends ? "a transfer's sending" : "a transfer's receiving";
    const int code = wait_until(
        g, g.mine().bell, job->peer, what, timeout_ns, [&] { return job->done.load(std::memory_order_acquire); },
        [&] { return try_advance(); });
    if (code) cancel();
    return code;
  }

  struct Lane {
    std::deque<Job*> jobs;
    uint32_t num_posted = 0;
    uint32_t num_done = 0;
  };

  Group& g;
  std::mutex lock;  // lanes and jobs
  Lane lanes[2][kMaxRanks];
  std::atomic<int> num_callers{0};
  std::atomic<uint32_t> num_jobs{0};
  std::atomic<uint32_t> kick{0};
  std::atomic<bool> idle{false};
  std::atomic<bool> stop{false};
  std::thread helper;

  Job* queue(bool sends, int peer, const Part* parts, int num_parts) {
    Job* job = new Job;
    job->sends = sends;
    job->peer = peer;
    job->parts.assign(parts, parts + num_parts);
    job->cursor.parts = &job->parts;
    for (const Part& part : job->parts) job->total_bytes += part.bytes;
    auto& lane = lanes[sends][peer];
    job->number = ++lane.num_posted;
    lane.jobs.push_back(job);
    return job;
  }

  bool in_segment(const Part& part) const {
    return part.data >= g.base && part.data + part.bytes <= g.base + g.layout.total;
  }

  void choose_landing(Job& job) {
    bool in_place = !job.eager() && job.parts.size() <= kMaxParts;
    for (const Part& part : job.parts) in_place = in_place && in_segment(part);
    job.way = in_place ? Job::kInPlace : Job::kByChunks;
  }

  bool try_advance() {
    std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
    return guard.owns_lock() && advance(false);
  }

  // One piece of each transfer that can move. `quick`: only what takes no time.
  bool advance(bool quick) {
    bool moved = false;
    uint32_t left = 0;
    for (int peer = 0; peer < g.size; ++peer) {
      moved |= advance_lane(lanes[0][peer], quick, left);
      moved |= advance_lane(lanes[1][peer], quick, left);
    }
    num_jobs.store(left);
    return moved;
  }

  bool advance_lane(Lane& lane, bool quick, uint32_t& left) {
    bool moved = false;
    while (!lane.jobs.empty()) {
      Job& job = *lane.jobs.front();
      if (!job.sends) moved |= announce(lane);
      moved |= job.sends ? send(job, quick) : receive(job, quick);
      if (!job.moved) break;
      lane.jobs.pop_front();
      ++lane.num_done;
      job.done.store(true, std::memory_order_release);
      ring(g.mine().bell);
    }
    left += lane.jobs.size();
    return moved;
  }

  // Tell the sender where the next transfers go: two at a time, as there are two landings.
  bool announce(Lane& lane) {
    bool moved = false;
    for (Job* job : lane.jobs) {
      if (job->number > lane.num_done + 2) break;
      if (job->announced) continue;
      Channel& channel = g.channel(job->peer, g.rank);
      Landing& landing = channel.landings[job->number & 1];
      landing.total_bytes = job->total_bytes;
      landing.in_place = job->way == Job::kInPlace;
      landing.num_spans = 0;
      if (landing.in_place) {
        for (const Part& part : job->parts) {
          landing.spans[landing.num_spans++] = {static_cast<uint64_t>(part.data - g.base), part.bytes};
        }
      }
      channel.wanted.store(job->number);
      if (!job->eager()) ring(g.state(job->peer).bell);
      job->announced = true;
      moved = true;
    }
    return moved;
  }

  bool send(Job& job, bool quick) {
    Channel& channel = g.channel(g.rank, job.peer);
    if (job.way == Job::kUnknown && !choose_way(job, channel)) return false;
    if (quick && !job.eager()) return false;
    if (job.way == Job::kInPlace) return send_in_place(job, channel);
    const uint32_t filled = channel.filled.load(std::memory_order_relaxed);
    if (filled - channel.drained.load(std::memory_order_acquire) == kNumChunks) return false;
    const uint64_t rest = job.total_bytes - job.moved_bytes;
    const uint64_t bytes = rest < kChunkBytes ? rest : kChunkBytes;
    char* to = g.chunk(g.rank, job.peer, filled);
    Part piece;
    for (uint64_t n = 0; n < bytes && job.cursor.next(bytes - n, piece); n += piece.bytes) {
      memcpy(to + n, piece.data, piece.bytes);
    }
    channel.chunks[filled % kNumChunks].bytes = bytes;
    channel.chunks[filled % kNumChunks].total_bytes = job.total_bytes;
    channel.filled.store(filled + 1);
    ring(g.state(job.peer).bell);
    job.moved_bytes += bytes;
    job.moved = job.moved_bytes == job.total_bytes;
    return true;
  }

  bool choose_way(Job& job, Channel& channel) {
    if (job.eager()) {
      job.way = Job::kByChunks;
      return true;
    }
    if (!reached(channel.wanted.load(std::memory_order_acquire), job.number)) return false;
    const Landing& landing = channel.landings[job.number & 1];
    if (landing.total_bytes != job.total_bytes) return disagree(g.rank, job.total_bytes, job.peer, landing.total_bytes);
    job.way = landing.in_place ? Job::kInPlace : Job::kByChunks;
    if (landing.in_place) {
      for (uint32_t i = 0; i < landing.num_spans && i < kMaxParts; ++i) {
        const Span& span = landing.spans[i];
        if (span.offset > g.layout.total || span.bytes > g.layout.total - span.offset) {
          return disagree(g.rank, job.total_bytes, job.peer, span.bytes);
        }
        job.targets.push_back({g.base + span.offset, span.bytes});
      }
      job.target.parts = &job.targets;
    }
    return true;
  }

  bool send_in_place(Job& job, Channel& channel) {
    Part to, from;
    uint64_t moved = 0;
    while (moved < kChunkBytes && job.target.next(kChunkBytes - moved, to)) {
      for (uint64_t n = 0; n < to.bytes && job.cursor.next(to.bytes - n, from); n += from.bytes) {
        memcpy(to.data + n, from.data, from.bytes);
      }
      moved += to.bytes;
    }
    job.moved_bytes += moved;
    job.moved = job.moved_bytes == job.total_bytes;
    if (job.moved) {
      channel.landed.store(job.number);
      ring(g.state(job.peer).bell);
    }
    return true;
  }

  bool receive(Job& job, bool quick) {
    if (!job.announced) return false;
    Channel& channel = g.channel(job.peer, g.rank);
    // In this order: a chunk that follows a landed transfer is seen only together with the landing.
    const uint32_t filled = channel.filled.load(std::memory_order_acquire);
    if (job.way == Job::kInPlace && reached(channel.landed.load(std::memory_order_acquire), job.number)) {
      job.moved = true;
      return true;
    }
    const uint32_t drained = channel.drained.load(std::memory_order_relaxed);
    if (quick || filled == drained) return false;
    const auto& chunk = channel.chunks[drained % kNumChunks];
    if (chunk.total_bytes != job.total_bytes) return disagree(job.peer, chunk.total_bytes, g.rank, job.total_bytes);
    const char* from = g.chunk(job.peer, g.rank, drained);
    Part piece;
    for (uint64_t n = 0; n < chunk.bytes && job.cursor.next(chunk.bytes - n, piece); n += piece.bytes) {
      memcpy(piece.data, from + n, piece.bytes);
    }
    job.moved_bytes += chunk.bytes;
    job.moved = job.moved_bytes == job.total_bytes;
    channel.drained.store(drained + 1);
    ring(g.state(job.peer).bell);
    return true;
  }

  bool disagree(int source, uint64_t sent, int to, uint64_t expected) {
    fail(g, kDisagree, "rank %d sends %llu bytes where rank %d expects %llu", source,
         static_cast<unsigned long long>(sent), to, static_cast<unsigned long long>(expected));
    return false;
  }

  void start_helper() {
    if (!helper.joinable()) {
      try {
        helper = std::thread([this] { run_helper(); });
      } catch (const std::system_error&) {
        return;  // no thread to be had: the transfer moves when it is waited for
      }
    }
    wake_helper();
  }

  void wake_helper() {
    kick.fetch_add(1);
    if (idle.load()) futex_wake(kick);
    ring(g.mine().bell);
  }

  void run_helper() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals are for the threads of Python
    wait_for_a_turn();
    Word& bell = g.mine().bell;
    while (!stop.load()) {
      if (g.header().failed.load()) cancel();
      const uint32_t kicked = kick.load();
      if (num_jobs.load() == 0) {
        idle.store(true);
        if (kick.load() == kicked && !stop.load()) futex_sleep(kick, kicked, 1'000'000'000);
        idle.store(false);
        continue;
      }
      if (give_way_and_advance()) continue;
      bell.sleepers.fetch_add(1);
      const uint32_t seen = bell.value.load();
      const bool moved = give_way_and_advance();
      if (!moved && num_jobs.load() && !stop.load() && !g.header().failed.load()) {
        futex_sleep(bell.value, seen, kSliceNs);
      }
      bell.sleepers.fetch_sub(1);
      int lost = 0;
      if (bell.value.load() == seen && look_around(g, -1, lost)) fail_lost(g, lost, "a transfer");
    }
  }

  bool give_way_and_advance() {
    // A mutex may go to the same thread again and again; a rank that posts must not wait for a whole transfer.
    while (num_callers.load()) sched_yield();
    std::lock_guard<std::mutex> guard(lock);
    return advance(false);
  }

  // Where the rank computes on every core that it has, the helper takes its turn when the scheduler gives it one:
  // it does not push the rank off the core at the moment of the post.
  static void wait_for_a_turn() {
    const sched_param none{0};
    sched_setscheduler(0, SCHED_BATCH, &none);
  }
};

}  // namespace anabranch
