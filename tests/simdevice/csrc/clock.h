// Virtual time, and who provably knows that what is done.
//
// Every stream, and the host, is an actor whose tasks are numbered. A moment holds, for every
// actor, the number of the last task that is certain to be finished there (a vector clock): events,
// waits and enqueuing carry that knowledge from one actor to another. Virtual seconds go beside it
// and never decide what is certain.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sim {

struct Config {
  double h2d = 25e9, d2h = 25e9;  // bytes a second, from or to pinned memory
  double pageable = 0.45;         // share of that which unpinned memory reaches
  double hbm = 900e9;             // bytes a second
  double flops = 60e12;           // a second
  double launch = 5e-6;           // seconds of the host for every task
};

struct Moment {
  double time = 0;
  std::vector<uint64_t> seen;  // by actor: 0 is the host, 1 + i is stream i

  void join(const Moment& other);
  bool knows(size_t actor, uint64_t task) const {
    return actor < seen.size() && seen[actor] >= task;
  }
};

enum Engine { kCompute, kToDevice, kToHost, kEngines };

struct Task {
  int64_t stream;
  size_t actor;
  uint64_t number;
};

class Clock {
 public:
  Config config;
  Moment host;
  std::array<double, kEngines> busy{};  // seconds each engine has worked

  int64_t new_stream();
  int64_t current() const { return current_; }
  int64_t exchange(int64_t stream);
  Moment& stream(int64_t id) { return streams_[id]; }

  // The next task of the current stream: it comes after all that the host knows of.
  Task begin();
  // Puts the task on its engine, for which tasks of several streams queue in order of issue.
  void finish(const Task& task, Engine engine, double seconds);

  Moment record(int64_t stream);
  void wait(int64_t stream, const Moment& moment) { streams_[stream].join(moment); }
  Moment everything() const;  // when all that was issued is done
  void zero();                // virtual time starts again; the order of tasks stays

 private:
  std::vector<Moment> streams_{1};
  std::array<double, kEngines> engines_{};
  static thread_local int64_t current_;
};

}  // namespace sim
