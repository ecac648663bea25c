// Work shared between the threads of a team that somebody else keeps.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>

using Work = void (*)(void*);
using Start = void (*)(Work, void*, unsigned, unsigned);

// Shares one piece of work after the other between threads that have come together once, so that
// none is waited for that is held up by another process: only what somebody has begun is.
class Crew {
   public:
    using Body = void (*)(const void*, int64_t, int64_t);

    explicit Crew(unsigned threads) : threads_(threads) {}

    // Has the numbers 0 to `count` worked on. Only the leader calls it.
    void share(int64_t count, Body body, const void* what) {
        body_ = body, what_ = what, count_ = count;
        next_.store(0, std::memory_order_relaxed);
        state_.store(++round_ << INSIDE_BITS, std::memory_order_release);
        take();
        // Nobody new comes in once all is taken, and nobody is inside.
        for (;;) {
            uint64_t empty = round_ << INSIDE_BITS;
            if (state_.compare_exchange_weak(empty, (round_ + 1) << INSIDE_BITS,
                                             std::memory_order_acq_rel))
                break;
            _mm_pause();
        }
        ++round_;
    }

    void dismiss() { over_.store(true, std::memory_order_release); }

    // What all the others do, until they are dismissed.
    void serve() {
        uint64_t seen = 0;
        while (!over_.load(std::memory_order_acquire)) {
            uint64_t state = state_.load(std::memory_order_acquire);
            const uint64_t round = state >> INSIDE_BITS;
            if (round == seen || !(round & 1)) {
                _mm_pause();
                continue;
            }
            if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel))
                continue;
            take();
            seen = round;
            state_.fetch_sub(1, std::memory_order_release);
        }
    }

   private:
    static constexpr int INSIDE_BITS = 16;  // of the state: how many are inside; above, the round

    // Large pieces first: each has a beginning that costs, and nobody should wait for the last.
    void take() {
        const int64_t all = threads_, least = count_ / (32 * all) + 1;
        int64_t first = next_.load(std::memory_order_relaxed);
        while (first < count_) {
            const int64_t share = (count_ - first) / (4 * all);
            const int64_t last = first + (share > least ? share : least);
            if (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
            body_(what_, first, last < count_ ? last : count_);
            first = next_.load(std::memory_order_relaxed);
        }
    }

    const unsigned threads_;
    Body body_ = nullptr;
    const void* what_ = nullptr;
    int64_t count_ = 0;
    uint64_t round_ = 0;  // odd while there is work
    std::atomic<bool> over_{false};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint64_t> state_{0};
};

// So many threads, and what has them run something; or the crew they are together in already.
struct Team {
    unsigned threads;
    Start start;
    Crew* crew = nullptr;

    bool alone() const { return threads < 2 || start == nullptr; }
};

// Runs `lead(team)` with the team's threads together in a crew: for many pieces of work in a row.
template <class Lead>
void together(const Team& team, const Lead& lead) {
    if (team.alone() || team.crew) return lead(team);
    struct Meeting {
        const Lead& lead;
        const Team& team;
        Crew crew;
        std::atomic<bool> led;

        static void run(void* self) {
            auto& meeting = *static_cast<Meeting*>(self);
            if (meeting.led.exchange(true)) return meeting.crew.serve();
            meeting.lead({meeting.team.threads, meeting.team.start, &meeting.crew});
            meeting.crew.dismiss();
        }
    } meeting{lead, team, Crew(team.threads), {false}};
    team.start(&Meeting::run, &meeting, team.threads, 0);
}

// Has the numbers 0 to `count` worked on by the team, some at a time.
template <class Body>
void in_parallel(int64_t count, const Team& team, const Body& body) {
    if (team.alone() || count < 2) return body(int64_t{0}, count);
    together(team, [&](const Team& crew) {
        crew.crew->share(count, [](const void* what, int64_t first, int64_t last) {
            (*static_cast<const Body*>(what))(first, last);
        }, &body);
    });
}
