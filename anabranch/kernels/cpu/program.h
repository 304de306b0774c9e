// A recorded sequence of calls, run as one: without Python between them, and in one parallel region.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "team.h"

namespace ab {

constexpr int MAX_ARGUMENTS = 15;

// A call with the bits of its arguments; laid out as in program.py.
struct Op {
    int (*call)(const int64_t*);  // 0, or a code that ends the program
    int64_t arguments[MAX_ARGUMENTS];
};

template <class T>
T argument(int64_t bits) {
    static_assert(sizeof(T) <= sizeof bits, "");
    T value;
    memcpy(&value, &bits, sizeof value);  // the low bytes: all that run these kernels are little-endian
    return value;
}

// Calls F with arguments of its own types.
template <auto F>
struct Unpacked;

template <class R, class... P, R (*F)(P...)>
struct Unpacked<F> {
    static_assert(sizeof...(P) <= MAX_ARGUMENTS, "");

    static int call(const int64_t* arguments) { return call(arguments, std::index_sequence_for<P...>()); }

    template <size_t... I>
    static int call(const int64_t* arguments, std::index_sequence<I...>) {
        if constexpr (std::is_void_v<R>)
            F(argument<P>(arguments[I])...);
        else
            return int(F(argument<P>(arguments[I])...));
        return 0;
    }
};

// A sum over ranks: another library's function, for a tensor of `count` elements.
typedef int (*Reduce)(void* group, void* data, uint64_t count, int dtype);

inline int call_reduce(Reduce reduce, void* group, void* data, uint64_t count, int dtype) {
    return reduce(group, data, count, dtype);
}

// Runs ops in order on this thread, which leads the others. Returns the code of the op that ended it, and its place.
inline int run_program(const Op* ops, long count, int threads, long* place) {
    int code = 0;
    const auto run = [&] {
        for (long i = 0; i < count && !code; i++) {
            *place = i;
            code = ops[i].call(ops[i].arguments);
        }
    };
    if (threads <= 1) {
        run();
        return code;
    }
    Crew crew;
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num()) {
            crew.follow(omp_get_thread_num());
        } else {
            crew.size = omp_get_num_threads();
            if (crew.size > 1) led_crew() = &crew;
            run();
            led_crew() = nullptr;
            crew.dismiss();
        }
    }
    return code;
}

}  // namespace ab
