// Work shared among the threads of torch's own OpenMP pool.
#pragma once

#include <omp.h>

namespace ab {

// Below this many elements a fork and a join cost more than they save.
constexpr long MIN_PARALLEL = 32768;

// Runs body(rank, size) on `threads` threads, or here alone where the work is small.
template <class Body>
void parallel(int threads, long work, const Body& body) {
    if (threads <= 1 || work < MIN_PARALLEL) {
        body(0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace ab
