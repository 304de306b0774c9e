// Work shared among the threads of torch's own OpenMP pool.
//
// A call on its own opens a parallel region for each piece of work. A program (program.h) opens one for all of its
// calls: the thread that runs them leads a crew, whose other threads wait for work by looking at a word in memory.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ab {

// Below this many elements a fork and a join cost more than they save, and a crew's meeting does.
constexpr long MIN_PARALLEL = 32768;
constexpr long MIN_CREW = 4096;
// Looks at a word before a thread sleeps or makes way for others: some 50 microseconds.
constexpr int MAX_LOOKS = 2000;

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Crew {
public:
    int size = 1;  // set by the leader before it runs anything

    // Has every thread run body(rank, size); the leader's part.
    template <class Body>
    void run(const Body& body) {
        run_ = [](const void* work, int rank, int of) { (*(const Body*)work)(rank, of); };
        body_ = &body;
        num_busy_.store(size - 1, std::memory_order_relaxed);
        post();
        body(0, size);
        for (int looks = 0; num_busy_.load(std::memory_order_acquire); looks++) {
            pause_core();
            if (looks > MAX_LOOKS) sched_yield();
        }
    }

    // Ends follow() of the others.
    void dismiss() {
        run_ = nullptr;
        post();
    }

    // What every other thread does until it is dismissed.
    void follow(int rank) {
        for (uint32_t seen = 0;; seen++) {
            for (int looks = 0; posted_.load(std::memory_order_acquire) == seen; looks++) {
                pause_core();
                if (looks > MAX_LOOKS) sleep(seen);
            }
            if (!run_) return;
            run_(body_, rank, size);
            num_busy_.fetch_sub(1, std::memory_order_release);
        }
    }

private:
    void post() {
        posted_.fetch_add(1);
#if defined(__linux__)
        if (num_asleep_.load()) syscall(SYS_futex, &posted_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
    }

    void sleep(uint32_t seen) {
#if defined(__linux__)
        num_asleep_.fetch_add(1);
        syscall(SYS_futex, &posted_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        num_asleep_.fetch_sub(1);
#else
        sched_yield();
#endif
    }

    alignas(64) std::atomic<uint32_t> posted_{0};
    std::atomic<int> num_asleep_{0};
    void (*run_)(const void*, int, int) = nullptr;
    const void* body_ = nullptr;
    alignas(64) std::atomic<int> num_busy_{0};
};

// The crew that this thread leads, while it does.
inline Crew*& led_crew() {
    static thread_local Crew* crew = nullptr;
    return crew;
}

// Runs body(rank, size) on `threads` threads, or here alone where the work is small. Barriers in a body meet the
// threads of one size.
template <class Body>
void parallel(int threads, long work, const Body& body) {
    Crew* const crew = led_crew();
    if (threads <= 1 || work < (crew ? MIN_CREW : MIN_PARALLEL)) {
        body(0, 1);
        return;
    }
    if (crew) return crew->run(body);
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace ab
