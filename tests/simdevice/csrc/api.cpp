// What Python calls, through ctypes: plain numbers and text, and nothing throws.
#include <cstring>

#include "tensors.h"

using sim::machine;
using Lock = std::lock_guard<sim::Mutex>;

namespace {

void put(const std::string& text, char* out, int64_t room) {
  const size_t length = std::min<size_t>(text.size(), room - 1);
  std::memcpy(out, text.data(), length);
  out[length] = 0;
}

}  // namespace

extern "C" {

void sim_register() { sim::register_backend(); }

// One named number; false where there is no such name.
bool sim_set(const char* name, double value) {
  Lock lock(machine().mutex);
  auto& memory = machine().memory;
  auto& config = machine().clock.config;
  const std::map<std::string, double*> rates = {
      {"h2d", &config.h2d}, {"d2h", &config.d2h},     {"pageable", &config.pageable},
      {"hbm", &config.hbm}, {"flops", &config.flops}, {"launch", &config.launch},
      {"share", &memory.share}};
  const std::map<std::string, size_t*> sizes = {
      {"limit", &memory.total}, {"context", &memory.context}, {"others", &memory.others},
      {"transposed", &machine().transposed}};
  const std::map<std::string, int64_t*> failures = {
      {"fail_device", &memory.fail_in}, {"fail_pinned", &memory.fail_pinned_in}};
  if (auto f = rates.find(name); f != rates.end()) *f->second = value;
  else if (auto f = sizes.find(name); f != sizes.end()) *f->second = static_cast<size_t>(value);
  else if (auto f = failures.find(name); f != failures.end()) *f->second = int64_t(value);
  else return false;
  return true;
}

// One named number; -1 where there is no such name.
double sim_get(const char* name) {
  Lock lock(machine().mutex);
  const auto& m = machine().memory;
  const auto& clock = machine().clock;
  const std::map<std::string, double> numbers = {
      {"now", clock.everything().time},
      {"host", clock.host.time},
      {"busy_compute", clock.busy[sim::kCompute]},
      {"busy_h2d", clock.busy[sim::kToDevice]},
      {"busy_d2h", clock.busy[sim::kToHost]},
      {"limit", m.total},
      {"free", m.free_bytes()},
      {"allocated", m.allocated},
      {"reserved", m.reserved},
      {"max_allocated", m.max_allocated},
      {"max_reserved", m.max_reserved},
      {"allocations", m.allocations},
      {"frees", m.frees},
      {"refusals", m.refusals},
      {"waits", machine().waits},
      {"pinned", machine().pinned.bytes()},
      {"blocks", machine().blocks.size()}};
  auto found = numbers.find(name);
  return found == numbers.end() ? -1 : found->second;
}

void sim_reset() {
  Lock lock(machine().mutex);
  machine().host_waits(machine().clock.everything());
  machine().clock.zero();
  machine().races.clear();
  machine().on_host.clear();
  machine().waits = 0;
  auto& memory = machine().memory;
  memory.allocations = memory.frees = memory.refusals = 0;
  memory.fail_in = memory.fail_pinned_in = 0;
  memory.empty_cache();
  memory.reset_peaks();
}

void sim_empty_cache() {
  Lock lock(machine().mutex);
  machine().memory.empty_cache();
}

void sim_reset_peaks() {
  Lock lock(machine().mutex);
  machine().memory.reset_peaks();
}

// One race a line.
void sim_races(char* out, int64_t room) {
  Lock lock(machine().mutex);
  machine().pinned.inspect();
  std::string text;
  for (const auto& race : machine().races.found()) text += race + "\n";
  put(text, out, room);
}

// "operator count" a line.
void sim_on_host(char* out, int64_t room) {
  Lock lock(machine().mutex);
  std::string text;
  for (const auto& [name, count] : machine().on_host) {
    text += name + " " + std::to_string(count) + "\n";
  }
  put(text, out, room);
}
}
