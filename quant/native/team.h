// Work shared between the threads of a team that somebody else keeps.

#pragma once

#include <atomic>
#include <cstdint>

using Work = void (*)(void*);
using Team = void (*)(Work, void*, unsigned, unsigned);

// Hands out the numbers 0 to `count` to the threads of a team, `step` at a time: a thread that is
// held up by another process then keeps nobody waiting.
template <class Body>
struct Shared {
    const Body& body;
    int64_t count, step;
    std::atomic<int64_t> next;

    static void run(void* self) {
        auto& work = *static_cast<Shared*>(self);
        for (;;) {
            const int64_t first = work.next.fetch_add(work.step);
            if (first >= work.count) return;
            const int64_t last = first + work.step;
            work.body(first, last < work.count ? last : work.count);
        }
    }
};

template <class Body>
void in_parallel(int64_t count, int64_t parts, unsigned threads, Team team, const Body& body) {
    if (threads < 2 || team == nullptr || count < 2) return body(int64_t{0}, count);
    const int64_t wanted = parts * threads;
    Shared<Body> work{body, count, count > wanted ? count / wanted : 1, {0}};
    team(&Shared<Body>::run, &work, threads, 0);
}
