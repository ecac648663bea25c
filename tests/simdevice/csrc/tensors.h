// Device tensors and one operator's work on them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include "machine.h"

namespace sim {

c10::Allocator* device_allocator();
void register_backend();

// Refuses types the real device does not compute in.
void check_dtype(c10::ScalarType type);
at::Tensor new_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, c10::ScalarType type);
void resize_storage(const c10::Storage& storage, size_t bytes);
void resize_tensor(const at::Tensor& tensor, at::IntArrayRef sizes);

// The same bytes as a CPU tensor.
at::Tensor host_view(const at::Tensor& tensor);
// The memory a tensor covers: its contiguous runs, or all from first to last where they are many.
Spans spans_of(const at::Tensor& tensor);

// One task of the current stream: what it touches, and what it costs.
class Work {
 public:
  explicit Work(const std::string& what);
  void reads(const at::Tensor& tensor) { touch(tensor, false); }
  void writes(const at::Tensor& tensor) { touch(tensor, true); }
  // A result computed on the CPU, as new memory of the device.
  at::Tensor result(const at::Tensor& computed);
  void finish(double flops = 0);
  void finish_copy(Engine engine, double seconds);
  const Task& task() const { return task_; }
  // The host waits for this task.
  void host_waits();

 private:
  void touch(const at::Tensor& tensor, bool write);

  std::lock_guard<Mutex> lock_;
  const std::string* what_;
  Task task_;
  double bytes_ = 0;
};

// Bytes between host and device, of two contiguous tensors of one type.
void copy_between(const at::Tensor& from, const at::Tensor& to, bool non_blocking);

}  // namespace sim
