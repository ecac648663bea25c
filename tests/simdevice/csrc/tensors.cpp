#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorUtils.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/empty.h>

namespace sim {

namespace {

constexpr int64_t kMostRuns = 64;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void runs(const at::Tensor& t, int64_t dim, uintptr_t at, size_t run, Spans& found) {
  if (dim < 0) {
    found.emplace_back(at, at + run);
    return;
  }
  // Outermost first, so that runs come in order for ordinary layouts.
  std::vector<int64_t> index(dim + 1, 0);
  while (true) {
    uintptr_t place = at;
    for (int64_t d = 0; d <= dim; d++) place += index[d] * t.stride(d) * t.element_size();
    found.emplace_back(place, place + run);
    int64_t d = dim;
    while (d >= 0 && ++index[d] == t.size(d)) index[d--] = 0;
    if (d < 0) return;
  }
}

}  // namespace

void check_dtype(c10::ScalarType type) {
  TORCH_CHECK(type != c10::ScalarType::Double && !c10::isComplexType(type),
              "npu: tensors of type ", type, " are not supported; use float32 or less");
}

at::Tensor new_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, c10::ScalarType type) {
  check_dtype(type);
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(), kKeys, type);
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  c10::DataPtr fresh = device_allocator()->allocate(bytes);
  const size_t kept = std::min(bytes, storage.nbytes());
  if (kept) std::memcpy(fresh.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

void resize_tensor(const at::Tensor& tensor, at::IntArrayRef sizes) {
  const auto strides = at::detail::defaultStrides(sizes);
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, tensor.element_size(),
                                                        tensor.storage_offset());
  if (tensor.storage().nbytes() < bytes) resize_storage(tensor.storage(), bytes);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
}

at::Tensor host_view(const at::Tensor& tensor) {
  const auto options = at::TensorOptions(tensor.scalar_type()).device(at::kCPU);
  if (!tensor.numel()) return at::empty(tensor.sizes(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Spans spans_of(const at::Tensor& t) {
  Spans found;
  if (!t.numel()) return found;
  const auto at = reinterpret_cast<uintptr_t>(t.data_ptr());
  int64_t run = 1, inner = t.dim() - 1;  // elements side by side
  while (inner >= 0 && (t.size(inner) == 1 || t.stride(inner) == run)) run *= t.size(inner--);
  int64_t count = 1;
  for (int64_t d = 0; d <= inner; d++) count *= t.stride(d) ? t.size(d) : kMostRuns + 1;
  if (count <= kMostRuns) {
    runs(t, inner, at, run * t.element_size(), found);
    return found;
  }
  size_t last = 0;
  for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
  found.emplace_back(at, at + (last + 1) * t.element_size());
  return found;
}

Work::Work(const std::string& what)
    : lock_(machine().mutex), what_(machine().shadow.name(what)), task_(machine().clock.begin()) {}

void Work::touch(const at::Tensor& tensor, bool write) {
  if (!tensor.defined() || !tensor.numel()) return;
  const Spans spans = spans_of(tensor);
  size_t covered = 0;
  for (const auto& [begin, end] : spans) covered += end - begin;
  bytes_ += static_cast<double>(std::min<size_t>(covered, tensor.nbytes()));
  Machine& m = machine();
  m.shadow.touch(spans, write, m.clock.stream(task_.stream), {task_.actor, task_.number, what_});
}

at::Tensor Work::result(const at::Tensor& computed) {
  at::Tensor made = new_tensor(computed.sizes(), computed.strides(), computed.scalar_type());
  const size_t before = computed.storage_offset() * computed.element_size();
  const size_t bytes = std::min(made.storage().nbytes(), computed.storage().nbytes() - before);
  if (bytes) std::memcpy(made.data_ptr(), computed.data_ptr(), bytes);
  writes(made);
  return made;
}

void Work::finish(double flops) {
  Clock& clock = machine().clock;
  clock.finish(task_, kCompute, std::max(bytes_ / clock.config.hbm, flops / clock.config.flops));
}

void Work::finish_copy(Engine engine, double seconds) {
  machine().clock.finish(task_, engine, seconds);
}

void Work::host_waits() { machine().host_waits(machine().clock.stream(task_.stream)); }

void copy_between(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool in = to.is_privateuseone();
  Machine& m = machine();
  void* host = in ? from.data_ptr() : to.data_ptr();
  const size_t bytes = to.nbytes();
  const bool pinned = m.pinned.contains(host);
  Work work(in ? "copy to the device" : "copy from the device");
  const auto& c = m.clock.config;
  const double rate = (in ? c.h2d : c.d2h) * (pinned ? 1 : c.pageable);
  if (in) {
    work.writes(to);
    if (pinned) work.reads(from);
    if (pinned) m.pinned.yield_to_device(host, bytes, false);
    std::memcpy(to.data_ptr(), host, bytes);
  } else {
    work.reads(from);
    if (pinned) work.writes(to);
    if (pinned) m.pinned.yield_to_device(host, bytes, true);
  }
  work.finish_copy(in ? kToDevice : kToHost, static_cast<double>(bytes) / rate);
  const bool waits = !non_blocking || !pinned;
  if (waits) {
    work.host_waits();
    if (!in) std::memcpy(host, from.data_ptr(), bytes);
  } else if (in) {
    m.pinned.leaving(host, bytes, work.task());
  } else {
    m.pinned.arriving(host, from.data_ptr(), bytes, work.task());
  }
}

}  // namespace sim
