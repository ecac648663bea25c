#include "pinned.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace sim {

namespace {

constexpr int kLocks = 256;
constexpr unsigned char kPoison = 0xFF;  // not a number in every floating type

// Read by the signal handler, which may neither allocate nor lock.
struct PageLock {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> touched{false};
};
PageLock locks[kLocks];
struct sigaction previous;

size_t page() {
  static const size_t size = sysconf(_SC_PAGESIZE);
  return size;
}

uintptr_t page_end(uintptr_t address) { return (address + page() - 1) / page() * page(); }

void on_fault(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (PageLock& lock : locks) {
    const uintptr_t begin = lock.begin;
    if (begin && begin <= at && at < lock.end) {
      lock.touched = true;
      mprotect(reinterpret_cast<void*>(begin), lock.end - begin, PROT_READ | PROT_WRITE);
      return;
    }
  }
  sigaction(SIGSEGV, &previous, nullptr);  // a fault of someone else's: it happens again, there
}

void watch_faults() {
  static bool watching = false;
  if (watching) return;
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous);
  watching = true;
}

int lock_pages(uintptr_t begin, uintptr_t end) {
  begin = page_end(begin);
  end = end / page() * page();
  if (begin >= end) return -1;
  watch_faults();
  for (int i = 0; i < kLocks; i++) {
    if (locks[i].begin) continue;
    locks[i].touched = false;
    locks[i].end = end;
    locks[i].begin = begin;
    mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_NONE);
    return i;
  }
  return -1;
}

bool unlock_pages(int index) {  // whether anyone touched them
  if (index < 0) return false;
  PageLock& lock = locks[index];
  const uintptr_t begin = lock.begin;
  mprotect(reinterpret_cast<void*>(begin), lock.end - begin, PROT_READ | PROT_WRITE);
  lock.begin = 0;
  return lock.touched;
}

uint64_t hash_of(uintptr_t begin, uintptr_t end) {
  uint64_t hash = 1469598103934665603ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(begin);
  size_t left = end - begin;
  for (; left >= 8; left -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    hash = (hash ^ word) * 1099511628211ull;
    hash ^= hash >> 29;
  }
  for (; left; left--) hash = (hash ^ *bytes++) * 1099511628211ull;
  return hash;
}

}  // namespace

void* PinnedMemory::allocate(size_t size) {
  const size_t whole = page_end(std::max<size_t>(size, 1));
  void* pointer = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pointer == MAP_FAILED) return nullptr;
  blocks_[reinterpret_cast<uintptr_t>(pointer)] = whole;
  bytes_ += whole;
  return pointer;
}

void PinnedMemory::free(void* pointer) {
  auto block = blocks_.find(reinterpret_cast<uintptr_t>(pointer));
  if (block == blocks_.end()) return;
  // The real allocator keeps a block until the copies that use it are done: this is no race.
  yield_to_device(pointer, block->second, true);
  bytes_ -= block->second;
  munmap(pointer, block->second);
  blocks_.erase(block);
}

bool PinnedMemory::contains(const void* pointer) const {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  auto next = blocks_.upper_bound(at);
  if (next == blocks_.begin()) return false;
  --next;
  return at < next->first + next->second;
}

void PinnedMemory::leaving(const void* source, size_t size, const Task& task) {
  const auto begin = reinterpret_cast<uintptr_t>(source);
  flights_.push_back(
      {begin, begin + size, task.actor, task.number, true, hash_of(begin, begin + size), {}, -1});
}

void PinnedMemory::arriving(void* target, const void* bytes, size_t size, const Task& task) {
  const auto begin = reinterpret_cast<uintptr_t>(target);
  const auto end = begin + size;
  const auto* first = static_cast<const char*>(bytes);
  std::vector<char> kept(first, first + size);
  // A page that an earlier copy has locked is shared with it: what follows is not the host's doing.
  for (Flight& other : flights_) {
    if (other.lock < 0 || end <= locks[other.lock].begin || locks[other.lock].end <= begin) continue;
    if (locks[other.lock].touched) {
      land(other);
    } else {
      unlock_pages(other.lock);
      other.lock = -1;
    }
  }
  std::memset(target, kPoison, size);
  auto block = std::prev(blocks_.upper_bound(begin));
  // Nothing else lies between the end of a block's last tensor and the end of its page.
  const uintptr_t block_end = block->first + block->second;
  const int lock = lock_pages(begin, page_end(end) == block_end ? block_end : end);
  flights_.push_back({begin, end, task.actor, task.number, false, 0, std::move(kept), lock});
}

void PinnedMemory::yield_to_device(const void* pointer, size_t size, bool overwrites) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  const auto end = begin + size;
  auto meets = [&](const Flight& f) {
    return f.begin < end && begin < f.end && (overwrites || !f.to_device);
  };
  for (Flight& flight : flights_) {
    if (meets(flight)) land(flight);
  }
  flights_.erase(std::remove_if(flights_.begin(), flights_.end(), meets), flights_.end());
}

void PinnedMemory::settle(const Moment& host) {
  auto done = [&](const Flight& f) { return host.knows(f.actor, f.task); };
  for (Flight& flight : flights_) {
    if (done(flight)) land(flight);
  }
  flights_.erase(std::remove_if(flights_.begin(), flights_.end(), done), flights_.end());
}

void PinnedMemory::inspect() {
  for (Flight& flight : flights_) {
    if (flight.to_device && hash_of(flight.begin, flight.end) != flight.hash) land(flight);
    if (flight.lock >= 0 && locks[flight.lock].touched) land(flight);
  }
}

void PinnedMemory::land(Flight& flight) {
  const std::string stream = std::to_string(flight.actor - 1);
  if (flight.to_device) {
    if (hash_of(flight.begin, flight.end) != flight.hash) {
      races_.report("host overwrote: the source of a copy to the device on stream " + stream +
                    " changed before the host waited for it");
      flight.hash = hash_of(flight.begin, flight.end);
    }
    return;
  }
  if (unlock_pages(flight.lock)) {
    races_.report("host came early: the target of a copy from the device on stream " + stream +
                  " was used before the host waited for it");
  }
  flight.lock = -1;
  std::memcpy(reinterpret_cast<void*>(flight.begin), flight.bytes.data(), flight.bytes.size());
}

}  // namespace sim
