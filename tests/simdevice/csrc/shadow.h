// The race detector: for every byte the device can reach, who wrote it last and who read it since.
//
// An access is a race unless what it conflicts with is certain to be finished, whatever the virtual
// clock says. Memory is followed in cells that split where accesses begin and end.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "clock.h"

namespace sim {

using Spans = std::vector<std::pair<uintptr_t, uintptr_t>>;  // [begin, end) of touched memory

struct Access {
  size_t actor;
  uint64_t task;
  const std::string* what;
};

class Races {
 public:
  void report(const std::string& text);
  const std::vector<std::string>& found() const { return found_; }
  void clear();

 private:
  std::vector<std::string> found_;  // the first of each kind, up to a bound
  std::set<std::string> known_;
};

class Shadow {
 public:
  explicit Shadow(Races& races) : races_(races) {}

  // Names live as long as the process, so that accesses can point at them.
  const std::string* name(const std::string& what) { return &*names_.insert(what).first; }

  // New memory. `birth` is the last task that may have used it before it was given back.
  void add(uintptr_t base, size_t size, Access birth);
  void touch(const Spans& spans, bool write, const Moment& seen, const Access& by);
  // Memory given back to `home`, which may use it again at once.
  void remove(uintptr_t base, const Moment& home, const std::set<size_t>& recorded);

 private:
  struct Cell {
    uintptr_t end;
    Access write;
    std::vector<Access> reads;
  };
  using Cells = std::map<uintptr_t, Cell>;
  struct Block {
    uintptr_t end;
    Cells cells;
  };

  Block* find(uintptr_t address);
  static Cells::iterator cut(Cells& cells, uintptr_t at);
  void read(Cell& cell, const Moment& seen, const Access& by);
  void write(Cell& cell, const Moment& seen, const Access& by);
  void conflict(const char* kind, const Access& by, const Access& earlier);

  Races& races_;
  std::map<uintptr_t, Block> blocks_;
  std::set<std::string> names_;
};

}  // namespace sim
