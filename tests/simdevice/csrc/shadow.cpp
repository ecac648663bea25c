#include "shadow.h"

#include <algorithm>

namespace sim {

namespace {

constexpr size_t kMostKept = 256;

std::string shown(const Access& access) {
  if (access.actor == 0) return *access.what + " of the host";
  return *access.what + " on stream " + std::to_string(access.actor - 1);
}

}  // namespace

void Races::report(const std::string& text) {
  if (found_.size() < kMostKept && known_.insert(text).second) found_.push_back(text);
}

void Races::clear() {
  found_.clear();
  known_.clear();
}

void Shadow::add(uintptr_t base, size_t size, Access birth) {
  blocks_[base] = Block{base + size, {{base, Cell{base + size, birth, {}}}}};
}

Shadow::Block* Shadow::find(uintptr_t address) {
  auto next = blocks_.upper_bound(address);
  if (next == blocks_.begin()) return nullptr;
  Block& block = std::prev(next)->second;
  return address < block.end ? &block : nullptr;
}

Shadow::Cells::iterator Shadow::cut(Cells& cells, uintptr_t at) {
  auto next = cells.upper_bound(at);
  auto here = std::prev(next);
  if (here->first == at || here->second.end <= at) return here->first == at ? here : next;
  Cell tail = here->second;
  here->second.end = at;
  return cells.emplace_hint(next, at, std::move(tail));
}

void Shadow::touch(const Spans& spans, bool write, const Moment& seen, const Access& by) {
  for (const auto& [begin, end] : spans) {
    Block* block = begin < end ? find(begin) : nullptr;
    if (!block) continue;
    auto first = cut(block->cells, begin);
    auto last = end < block->end ? cut(block->cells, end) : block->cells.end();
    for (auto cell = first; cell != last; ++cell) {
      if (write) this->write(cell->second, seen, by);
      else this->read(cell->second, seen, by);
    }
    if (write) {  // one owner again: what was cut for others is one cell
      first->second.end = std::prev(last)->second.end;
      block->cells.erase(std::next(first), last);
    }
  }
}

void Shadow::read(Cell& cell, const Moment& seen, const Access& by) {
  const Access& last = cell.write;
  if (!seen.knows(last.actor, last.task)) conflict("read before written", by, last);
  for (Access& reader : cell.reads) {
    if (reader.actor == by.actor) {
      reader = by;
      return;
    }
  }
  cell.reads.push_back(by);
}

void Shadow::write(Cell& cell, const Moment& seen, const Access& by) {
  const Access& last = cell.write;
  if (!seen.knows(last.actor, last.task)) conflict("written twice at once", by, last);
  for (const Access& reader : cell.reads) {
    if (!seen.knows(reader.actor, reader.task)) conflict("overwritten while read", by, reader);
  }
  cell.write = by;
  cell.reads.clear();
}

void Shadow::remove(uintptr_t base, const Moment& home, const std::set<size_t>& recorded) {
  static const std::string kFree = "give back";
  for (const auto& [_, cell] : blocks_[base].cells) {
    std::vector<Access> users = cell.reads;
    users.push_back(cell.write);
    for (const Access& user : users) {
      if (recorded.count(user.actor) || home.knows(user.actor, user.task)) continue;
      conflict("freed in use", Access{0, 0, &kFree}, user);
    }
  }
  blocks_.erase(base);
}

void Shadow::conflict(const char* kind, const Access& by, const Access& earlier) {
  races_.report(std::string(kind) + ": " + shown(by) + " does not wait for " + shown(earlier));
}

}  // namespace sim
