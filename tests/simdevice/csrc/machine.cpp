#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace sim {

Machine& machine() {
  static auto* one = new Machine;  // outlives every tensor
  return *one;
}

bool Memory::take(size_t bytes) {
  const bool fails = fail_in > 0 && --fail_in == 0;
  const size_t wanted = allocated + bytes;
  const auto cap = static_cast<size_t>(share * static_cast<double>(total));
  if (fails || wanted > cap || wanted + context + others > total) {
    refusals++;
    return false;
  }
  allocations++;
  allocated = wanted;
  max_allocated = std::max(max_allocated, allocated);
  if (others + context + reserved > total) reserved = allocated;  // the cache had to go
  reserved = std::max(reserved, allocated);
  max_reserved = std::max(max_reserved, reserved);
  return true;
}

void Memory::give(size_t bytes) {
  frees++;
  allocated -= bytes;
}

void Memory::reset_peaks() {
  max_allocated = allocated;
  max_reserved = reserved;
}

size_t Memory::free_bytes() const {
  const size_t used = context + others + reserved;
  return used < total ? total - used : 0;
}

void* Machine::allocate(size_t bytes) {
  const size_t whole = (bytes + kAlign - 1) / kAlign * kAlign;
  if (!memory.take(whole)) return nullptr;
  void* pointer = nullptr;
  if (posix_memalign(&pointer, kAlign, whole)) std::abort();
  std::memset(pointer, 0xFF, whole);  // reading it before it is written gives no number
  const int64_t home = clock.current();
  blocks[pointer] = {whole, home, {}};
  static const std::string kBefore = "the last use of this memory";
  const auto& seen = clock.stream(home).seen;
  const size_t actor = home + 1;
  shadow.add(reinterpret_cast<uintptr_t>(pointer), whole,
             {actor, actor < seen.size() ? seen[actor] : 0, &kBefore});
  return pointer;
}

void Machine::release(void* pointer) {
  auto block = blocks.find(pointer);
  if (block == blocks.end()) return;
  shadow.remove(reinterpret_cast<uintptr_t>(pointer), clock.record(block->second.home),
                block->second.recorded);
  memory.give(block->second.size);
  blocks.erase(block);
  std::free(pointer);
}

void Machine::host_waits(const Moment& moment) {
  waits++;
  clock.host.join(moment);
  pinned.settle(clock.host);
}

}  // namespace sim
