// The one simulated device: its memory, and what the operators do to it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "clock.h"
#include "pinned.h"
#include "shadow.h"

extern "C" {  // of Python, which is there whenever this library is
int PyGILState_Check();
struct _ts* PyEval_SaveThread();
void PyEval_RestoreThread(struct _ts*);
}

namespace sim {

// Whoever holds it may need Python's own lock, to let go of a tensor; so nobody waits for it who
// has that one.
class Mutex {
 public:
  void lock() {
    if (mutex_.try_lock()) return;
    if (!PyGILState_Check()) return mutex_.lock();
    struct _ts* state = PyEval_SaveThread();
    mutex_.lock();
    PyEval_RestoreThread(state);
  }
  void unlock() { mutex_.unlock(); }

 private:
  std::recursive_mutex mutex_;
};

constexpr size_t kAlign = 512;  // what the caching allocators of NPUs and GPUs round up to

// Bytes as the driver and the allocator count them. The allocator is a perfect one: it keeps what
// was freed, in the largest amount there was, and never fragments.
struct Memory {
  size_t total = size_t{32} << 30, context = 0, others = 0;
  double share = 1;  // of the total, that the allocator may take
  size_t allocated = 0, reserved = 0, max_allocated = 0, max_reserved = 0;
  int64_t allocations = 0, frees = 0, refusals = 0;
  int64_t fail_in = 0, fail_pinned_in = 0;  // the n-th allocation from now fails; 0: none

  bool take(size_t bytes);
  void give(size_t bytes);
  void empty_cache() { reserved = allocated; }
  void reset_peaks();
  size_t free_bytes() const;
};

struct Machine {
  Mutex mutex;
  Clock clock;
  Races races;
  Shadow shadow{races};
  PinnedMemory pinned{races};
  Memory memory;
  size_t transposed = 0;  // the longest input of a depthwise transposed convolution; 0: any
  int64_t waits = 0;  // times that the host waited for the device, or asked whether it is done
  std::map<std::string, int64_t> on_host;  // operators the real device has no kernel for

  struct Block {
    size_t size;
    int64_t home;              // the stream whose memory it is
    std::set<size_t> recorded;  // actors announced with record_stream
  };
  std::map<void*, Block> blocks;

  void* allocate(size_t bytes);  // nullptr where the limit forbids it
  void release(void* pointer);
  // The host waits for all that happened before the moment.
  void host_waits(const Moment& moment);
};

Machine& machine();

}  // namespace sim
