#include "clock.h"

#include <algorithm>

namespace sim {

thread_local int64_t Clock::current_ = 0;

void Moment::join(const Moment& other) {
  time = std::max(time, other.time);
  if (seen.size() < other.seen.size()) seen.resize(other.seen.size());
  for (size_t i = 0; i < other.seen.size(); i++) seen[i] = std::max(seen[i], other.seen[i]);
}

int64_t Clock::new_stream() {
  streams_.push_back(Moment{});
  return static_cast<int64_t>(streams_.size()) - 1;
}

int64_t Clock::exchange(int64_t stream) {
  std::swap(stream, current_);
  return stream;
}

Task Clock::begin() {
  Moment& stream = streams_[current_];
  stream.join(host);
  const size_t actor = current_ + 1;
  if (stream.seen.size() <= actor) stream.seen.resize(actor + 1);
  return {current_, actor, ++stream.seen[actor]};
}

void Clock::finish(const Task& task, Engine engine, double seconds) {
  Moment& stream = streams_[task.stream];
  const double start = std::max(stream.time, engines_[engine]);
  stream.time = engines_[engine] = start + seconds;
  busy[engine] += seconds;
  host.time += config.launch;
}

Moment Clock::record(int64_t stream) {
  Moment moment = streams_[stream];
  moment.join(host);
  return moment;
}

Moment Clock::everything() const {
  Moment all = host;
  for (const Moment& stream : streams_) all.join(stream);
  return all;
}

void Clock::zero() {
  for (Moment& stream : streams_) stream.time = 0;
  engines_.fill(0);
  busy.fill(0);
  host.time = 0;
}

}  // namespace sim
