// Pinned host memory, and copies out of and into it that the host has not yet waited for.
//
// A source is hashed when its copy is issued and again when the host knows the copy done: if it
// differs, the host overwrote it too early. A target keeps a poison until then, and whole pages of
// it are locked: the first host access to them is caught, noted, and let through to the poison.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "shadow.h"

namespace sim {

class PinnedMemory {
 public:
  explicit PinnedMemory(Races& races) : races_(races) {}

  void* allocate(size_t size);  // nullptr where the system has none
  void free(void* pointer);
  bool contains(const void* pointer) const;
  size_t bytes() const { return bytes_; }

  // `source` goes to the device by that task; its bytes must be readable now.
  void leaving(const void* source, size_t size, const Task& task);
  // `bytes` are in `target` once the host knows that task done.
  void arriving(void* target, const void* bytes, size_t size, const Task& task);
  // The device itself reads or overwrites these bytes next.
  void yield_to_device(const void* pointer, size_t size, bool overwrites);
  // What the host now knows done is delivered and checked.
  void settle(const Moment& host);
  // What can be said of copies still under way.
  void inspect();

 private:
  struct Flight {
    uintptr_t begin, end;
    size_t actor;
    uint64_t task;
    bool to_device;
    uint64_t hash;
    std::vector<char> bytes;
    int lock;
  };

  void land(Flight& flight);

  Races& races_;
  std::map<uintptr_t, size_t> blocks_;
  std::vector<Flight> flights_;  // in order of issue
  size_t bytes_ = 0;
};

}  // namespace sim
