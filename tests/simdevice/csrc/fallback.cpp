// Every other operator: computed by the CPU's kernel on the device's own bytes, so that results are
// the CPU's, bit for bit, while memory, time and order are the device's.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <set>

#include "tensors.h"

namespace sim {

namespace {

using at::Tensor;
using c10::IValue;

constexpr const char* kShift = "torch_npu 2.7 sends it to the host; divide floats, or do it there";

// Ascend has no kernel, or none that keeps a static graph; the model code does without them.
const std::map<std::string, const char*> kRefused = {
    {"aten::masked_scatter", "how much it reads depends on data; use index_copy"},
    {"aten::masked_scatter_", "how much it reads depends on data; use index_copy_"},
    {"aten::masked_select", "its shape depends on data; use where"},
    {"aten::bitwise_left_shift", kShift},
    {"aten::bitwise_right_shift", kShift},
    {"aten::__lshift__", kShift},
    {"aten::__rshift__", kShift},
};

// No kernel either, but torch_npu sends them to the host and back by itself, which is slow.
const std::set<std::string> kOnHost = {"aten::isin"};

class Call {
 public:
  explicit Call(const c10::OperatorHandle& op)
      : op_(op), name_(op.schema().name()), work_(name_) {}

  void run(torch::jit::Stack& stack) {
    refuse();
    const auto& schema = op_.schema();
    const size_t count = schema.arguments().size();
    auto arguments = torch::jit::pop(stack, count);
    for (size_t i = 0; i < count; i++) {
      const auto* alias = schema.arguments()[i].alias_info();
      stack.push_back(take(arguments[i], alias && alias->isWrite()));
    }
    TORCH_CHECK(!strangers_ || passed_.empty(), name_, ": expected all tensors to be on the same ",
                "device, but found at least two devices, npu:0 and cpu!");
    check_types();
    {
      c10::impl::ExcludeDispatchKeyGuard below(
          c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView));
      op_.callBoxed(stack);
    }
    auto results = torch::jit::pop(stack, schema.returns().size());
    for (IValue& result : results) stack.push_back(give(result));
    settle();
  }

 private:
  struct Passed {
    Tensor device, host;
  };

  void refuse() const {
    auto found = kRefused.find(name_);
    TORCH_CHECK(found == kRefused.end(), "npu: ", name_, " is not supported: ", found->second);
  }

  void check_types() const {
    if (passed_.empty()) return;
    const auto type = passed_[0].device.scalar_type();
    const bool bfloat = type == c10::ScalarType::BFloat16;
    TORCH_CHECK(!bfloat || name_.rfind("aten::replication_pad", 0) != 0, "npu: ", name_,
                " has no bfloat16; pad in float32");
    if (name_ == "aten::native_layer_norm") {
      for (const Passed& p : passed_) {
        TORCH_CHECK(p.device.scalar_type() == type, "npu: ", name_, " does not mix ", type, " and ",
                    p.device.scalar_type(), "; keep activations and weights in one type");
      }
    }
  }

  Tensor take(const Tensor& tensor, bool write) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      strangers_ |= tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    if (write) work_.writes(tensor);
    else work_.reads(tensor);
    passed_.push_back({tensor, host_view(tensor)});
    return passed_.back().host;
  }

  IValue take(const IValue& value, bool write) {
    if (value.isTensor()) return take(value.toTensor(), write);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(take(tensor, write));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional<Tensor>(take(*tensor, write)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_privateuseone()) return at::Device(at::kCPU);
    return value;
  }

  Tensor give(const Tensor& computed) {
    if (!computed.defined()) return computed;
    for (const Passed& p : passed_) {
      if (computed.is_same(p.host)) return give_back(p);
      if (is_view_of(computed, p.host)) return view_on(p.device, computed);
    }
    return work_.result(computed);
  }

  IValue give(const IValue& value) {
    if (value.isTensor()) return give(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(give(tensor));
      return list;
    }
    return value;
  }

  // A written argument; an empty one may have been made larger on the way.
  Tensor give_back(const Passed& p) {
    if (p.device.sizes() != p.host.sizes()) {
      resize_tensor(p.device, p.host.sizes());
      work_.writes(p.device);
      host_view(p.device).copy_(p.host);
    }
    return p.device;
  }

  static bool is_view_of(const Tensor& computed, const Tensor& input) {
    return computed.numel() && computed.has_storage() &&
           computed.storage().data() == input.storage().data();
  }

  static Tensor view_on(const Tensor& device, const Tensor& computed) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(device.storage()),
        c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), computed.dtype());
    const auto* first = static_cast<const char*>(device.storage().data());
    const int64_t bytes = static_cast<const char*>(computed.data_ptr()) - first;
    view.unsafeGetTensorImpl()->set_storage_offset(bytes / int64_t(computed.element_size()));
    view.unsafeGetTensorImpl()->set_sizes_and_strides(computed.sizes(), computed.strides());
    return view;
  }

  void settle() {
    Machine& m = machine();
    if (!kOnHost.count(name_)) {
      work_.finish(flops());
      return;
    }
    m.on_host[name_]++;
    double bytes = 0;
    for (const Passed& p : passed_) bytes += static_cast<double>(p.device.nbytes());
    work_.finish_copy(kToHost, bytes / (m.clock.config.d2h * m.clock.config.pageable));
    work_.host_waits();
  }

  double flops() const {
    static const std::map<std::string, size_t> first_factor = {
        {"aten::mm", 0}, {"aten::bmm", 0}, {"aten::addmm", 1}, {"aten::baddbmm", 1}};
    const auto found = first_factor.find(name_);
    if (found == first_factor.end()) return 0;
    const Tensor &a = passed_[found->second].device, &b = passed_[found->second + 1].device;
    return 2.0 * static_cast<double>(a.numel()) * static_cast<double>(b.size(-1));
  }

  const c10::OperatorHandle& op_;
  const std::string name_;
  Work work_;
  std::vector<Passed> passed_;
  bool strangers_ = false;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op).run(*stack); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// Torch would compose this one from others before it asks the fallback; devices have it whole.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace sim
