// What torch asks of a device: allocators, streams and events, and the hooks of PrivateUse1.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "machine.h"
#include "tensors.h"

namespace sim {

namespace {

using Lock = std::lock_guard<Mutex>;
const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);

std::string gib(size_t bytes) {
  char text[32];
  const double mib = static_cast<double>(bytes) / (1 << 20);
  if (mib < 1024) std::snprintf(text, sizeof text, "%.2f MiB", mib);
  else std::snprintf(text, sizeof text, "%.2f GiB", mib / 1024);
  return text;
}

struct Allocator final : c10::DeviceAllocator {
  static void release(void* pointer) {
    Lock lock(machine().mutex);
    machine().release(pointer);
  }

  c10::DataPtr allocate(size_t bytes) override {
    Lock lock(machine().mutex);
    if (!bytes) return {nullptr, nullptr, &release, kDevice};
    void* pointer = machine().allocate(bytes);
    if (!pointer) {
      const Memory& m = machine().memory;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "NPU out of memory. Tried to allocate ", gib(bytes),
                       " (NPU 0; ", gib(m.total), " total capacity; ", gib(m.allocated),
                       " already allocated; ", gib(m.free_bytes()), " free; ", gib(m.reserved),
                       " reserved in total by PyTorch)");
    }
    return {pointer, pointer, &release, kDevice};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    Lock lock(machine().mutex);
    machine().memory.empty_cache();
  }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Lock lock(machine().mutex);
    auto block = machine().blocks.find(data.get_context());
    if (block != machine().blocks.end()) block->second.recorded.insert(stream.id() + 1);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    Lock lock(machine().mutex);
    const Memory& m = machine().memory;
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto set = [](auto& stat, size_t now, size_t peak) {
      stat[0].current = static_cast<int64_t>(now);
      stat[0].peak = static_cast<int64_t>(peak);
    };
    set(stats.allocated_bytes, m.allocated, m.max_allocated);
    set(stats.active_bytes, m.allocated, m.max_allocated);
    set(stats.reserved_bytes, m.reserved, m.max_reserved);
    stats.num_ooms = m.refusals;
    stats.num_device_alloc = m.allocations;
    stats.num_device_free = m.frees;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    Lock lock(machine().mutex);
    machine().memory.reset_peaks();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    Lock lock(machine().mutex);
    return {machine().memory.free_bytes(), machine().memory.total};
  }
} allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator)

struct HostAllocator final : at::HostAllocator {
  static void release(void* pointer) {
    Lock lock(machine().mutex);
    machine().pinned.free(pointer);
  }

  c10::DataPtr allocate(size_t bytes) override {
    Lock lock(machine().mutex);
    Memory& m = machine().memory;
    const bool fails = m.fail_pinned_in > 0 && --m.fail_pinned_in == 0;
    void* pointer = fails ? nullptr : machine().pinned.allocate(bytes);
    TORCH_CHECK(pointer, "pinning ", gib(bytes), " of host memory failed, error code is 207001");
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} host_allocator;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* pointer) const override {
    Lock lock(machine().mutex);
    return machine().pinned.contains(pointer);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  static Moment* moment(void* event) { return static_cast<Moment*>(event); }

  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(machine().clock.current()); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Lock lock(machine().mutex);
    return stream(machine().clock.new_stream());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    return stream(machine().clock.exchange(to.id()));
  }
  bool queryStream(const c10::Stream& of) const override {
    return reached(machine().clock.stream(of.id()));
  }
  void synchronizeStream(const c10::Stream& of) const override {
    Lock lock(machine().mutex);
    machine().host_waits(machine().clock.stream(of.id()));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    Lock lock(machine().mutex);
    machine().host_waits(machine().clock.everything());
  }

  void record(void** event, const c10::Stream& in, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    Lock lock(machine().mutex);
    if (!*event) *event = new Moment;
    *moment(*event) = machine().clock.record(in.id());
  }
  void block(void* event, const c10::Stream& waiting) const override {
    Lock lock(machine().mutex);
    if (event) machine().clock.wait(waiting.id(), *moment(event));
  }
  bool queryEvent(void* event) const override { return !event || reached(*moment(event)); }
  void synchronizeEvent(void* event) const override {
    Lock lock(machine().mutex);
    if (event) machine().host_waits(*moment(event));
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    return (moment(to)->time - moment(from)->time) * 1e3;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete moment(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    allocator.recordStream(data, stream);
  }

 private:
  // A host that has asked and heard "done" may rely on it.
  static bool reached(const Moment& moment) {
    Lock lock(machine().mutex);
    if (moment.time > machine().clock.host.time) return false;
    machine().host_waits(moment);
    return true;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

c10::Allocator* device_allocator() { return &allocator; }

void register_backend() {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  at::setHostAllocator(c10::DeviceType::PrivateUse1, &host_allocator);
}

}  // namespace sim
