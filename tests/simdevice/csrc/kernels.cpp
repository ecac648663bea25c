// Operators that cannot be left to the fallback: new tensors, views, copies, and the two that torch
// asks a device to bring: convolution and attention.
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "tensors.h"

namespace sim {

namespace {

using at::Tensor;

using Type = std::optional<c10::ScalarType>;
using Layout = std::optional<c10::Layout>;
using Device = std::optional<c10::Device>;
using Format = std::optional<c10::MemoryFormat>;

Tensor empty(at::IntArrayRef sizes, Type type, Layout, Device, std::optional<bool>, Format format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  const auto dtype = c10::dtype_or_default(type);
  check_dtype(dtype);
  return at::detail::empty_generic(sizes, device_allocator(), keys, dtype, format);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, Type type, Layout, Device,
                     std::optional<bool>) {
  return new_tensor(sizes, strides, c10::dtype_or_default(type));
}

// As the real back ends do it: bytes cross only between contiguous tensors of one type. What is
// not so is converted first: on the host on the way in, in new device memory on the way out.
void copy_across(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool same_type = from.scalar_type() == to.scalar_type();
  if (same_type && from.is_contiguous() && to.is_contiguous()) {
    copy_between(from, to, non_blocking);
    return;
  }
  const bool in = to.is_privateuseone();
  Tensor source = in ? from.to(to.scalar_type()).contiguous() : from.contiguous();
  const auto type = in ? to.scalar_type() : from.scalar_type();
  const bool direct = to.is_contiguous() && (in || same_type);
  Tensor target = to;
  if (!direct) target = at::empty_like(to, to.options().dtype(type), at::MemoryFormat::Contiguous);
  copy_between(source, target, non_blocking && direct);
  if (!direct) to.copy_(target);
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  const Tensor from = self.expand_as(to);
  if (!from.is_privateuseone() || !to.is_privateuseone()) {
    copy_across(from, to, non_blocking);
    return to;
  }
  Work work("aten::copy_");
  work.reads(from);
  work.writes(to);
  host_view(to).copy_(host_view(from));
  work.finish();
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) resize_tensor(to, from.sizes());
  return copy_from(from, to, false);
}

c10::Scalar local_scalar(const Tensor& self) {
  Work work("aten::item");
  work.reads(self);
  work.finish();
  work.host_waits();
  return at::_local_scalar_dense(host_view(self));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef sizes, Format) {
  resize_tensor(self, C10_AS_INTARRAYREF_SLOW(sizes));
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, c10::SymInt offset,
                    c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  const auto shape = C10_AS_INTARRAYREF_SLOW(sizes);
  if (strides.empty()) impl->set_sizes_contiguous(shape);
  else impl->set_sizes_and_strides(shape, C10_AS_INTARRAYREF_SLOW(strides));
  return self;
}

Tensor view(const Tensor& self, c10::SymIntArrayRef sizes) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(sizes),
                                    C10_AS_INTARRAYREF_SLOW(strides));
}

void record_stream(Tensor& self, c10::Stream stream) {
  auto* allocator = static_cast<c10::DeviceAllocator*>(device_allocator());
  allocator->recordStream(self.storage().data_ptr(), stream);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                   c10::SymIntArrayRef dilation, bool transposed,
                   c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  TORCH_CHECK(input.dim() < 5 || input.scalar_type() == c10::ScalarType::Float,
              "npu: Conv3d in ", input.scalar_type(), " does not compile (E40021); use a linear");
  const size_t longest = machine().transposed, length = input.size(-1);
  TORCH_CHECK(!transposed || groups.expect_int() == 1 || !longest || length <= longest,
              "npu: a depthwise transposed convolution of ", length, " samples takes a long time; ",
              "do at most ", longest, " at once");
  Work work("aten::convolution");
  work.reads(input);
  work.reads(weight);
  std::optional<Tensor> own_bias;
  if (bias && bias->defined()) {
    work.reads(*bias);
    own_bias = host_view(*bias);
  }
  const Tensor computed =
      at::convolution_symint(host_view(input), host_view(weight), own_bias, stride, padding,
                             dilation, transposed, output_padding, groups);
  const Tensor made = work.result(computed);
  const Tensor& positions = transposed ? input : computed;
  work.finish(2.0 * positions.numel() * weight.numel() / weight.size(0));
  return made;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& mask, double dropout, bool causal,
                 std::optional<double> scale, bool grouped) {
  TORCH_CHECK(!mask && !causal && !grouped && dropout == 0,
              "npu: the simulated attention takes neither mask nor grouped heads nor dropout");
  Work work("aten::scaled_dot_product_attention");
  for (const Tensor* input : {&q, &k, &v}) work.reads(*input);
  const auto computed = at::_scaled_dot_product_flash_attention_for_cpu(
      host_view(q), host_view(k), host_view(v), 0.0, false, {}, scale);
  const Tensor made = work.result(std::get<0>(computed));
  work.finish(4.0 * q.numel() * k.size(-2));
  return made;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("record_stream", record_stream);
  m.impl("convolution_overrideable", convolution);
  m.impl("scaled_dot_product_attention", attention);
}

}  // namespace sim
