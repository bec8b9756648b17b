// The operators: one kernel for all of them, which runs the CPU's kernel on the device's memory.
#include "sim.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/set_native.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>

namespace sim {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

// Kernels of the CPU are called without autograd and autocast: those have been applied already.
struct OnlyKernels {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{
      c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastPrivateUse1})};
};

// A CPU tensor over the memory of `t`, which does not own it.
Tensor host_view(const Tensor& t) {
  TORCH_CHECK(t.layout() == at::kStrided, "sim: only dense tensors are simulated, not ", t.layout());
  auto* data = const_cast<void*>(t.storage().data());
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), t.storage().nbytes(),
      c10::DataPtr(data, c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU),
      /*resizable=*/true);
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* impl = view.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number())
    impl->set_wrapped_number(true);
  return view;
}

Tensor device_tensor(const c10::Storage& storage, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The CPU's default generator holds the device's state meanwhile: kernels draw from it when they
// are given no generator.
class DrawFromDevice {
 public:
  DrawFromDevice()
      : host_(at::detail::getDefaultCPUGenerator()),
        device_(host_generator(default_generator())),
        kept_(host_.get_state()) {
    host_.set_state(device_.get_state());
  }
  ~DrawFromDevice() {
    device_.set_state(host_.get_state());
    host_.set_state(kept_);
  }
  DrawFromDevice(const DrawFromDevice&) = delete;
  DrawFromDevice& operator=(const DrawFromDevice&) = delete;

 private:
  at::Generator host_, device_;
  Tensor kept_;
};

[[noreturn]] void refuse(const Tensor& t, const std::string& name) {
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two devices, ",
      device(), " and ", t.device(), "! (when checking arguments of ", name, ")");
}

// One call of an operator: its arguments on the host's side, its results on the device's.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), name_(op.schema().name()) {}

  void run(Stack* stack) {
    const auto& arguments = op_.schema().arguments();
    const size_t first = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = arguments[i].alias_info();
      auto& value = (*stack)[first + i];
      value = to_host(value, arguments[i].name(), alias != nullptr && alias->isWrite());
    }
    Launch launch(name_);
    if (!is_view())
      for (const auto& argument : arguments_)
        launch.touch(argument.on_device, argument.write);
    {
      const OnlyKernels guard;
      std::optional<DrawFromDevice> draw;
      if (!has_generator_ && op_.hasTag(at::Tag::nondeterministic_seeded))
        draw.emplace();
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    }
    for (auto& argument : arguments_)
      take_over_changes(argument);
    for (auto value = stack->end() - op_.schema().returns().size(); value != stack->end(); ++value)
      *value = to_device(*value, launch);
  }

 private:
  struct Argument {
    Tensor on_device, on_host;
    bool write;
  };

  bool is_view() const {
    const auto& returns = op_.schema().returns();
    return !returns.empty() && std::all_of(returns.begin(), returns.end(), [](const auto& r) {
      return r.alias_info() != nullptr && !r.alias_info()->isWrite();
    });
  }

  Tensor to_host(const Tensor& t, bool is_index, bool write) {
    if (!t.defined() || t.device().is_meta())
      return t;
    if (on_device(t)) {
      arguments_.push_back({t, host_view(t), write});
      return arguments_.back().on_host;
    }
    if (t.dim() > 0 && is_index) { // which is allowed, and copied
      count("to_device_blocking", name_, t.nbytes());
      host_waits(stream_clock(current_stream()), "wait_copy", name_);
    } else if (t.dim() > 0 || write) {
      refuse(t, name_); // only numbers may lie on the host
    }
    return t;
  }

  IValue to_host(const IValue& value, const std::string& argument, bool write) {
    const bool is_index = argument == "indices" && name_.find("index") != std::string::npos;
    if (value.isTensor())
      return to_host(value.toTensor(), is_index, write);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector())
        list.push_back(to_host(t, is_index, write));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::make_optional(to_host(*t, is_index, write)) : t);
      return list;
    }
    if (value.isDevice())
      return c10::Device(c10::kCPU);
    if (value.isGenerator()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(
          generator.device().type() == kSim, "Expected a 'sim' device type for generator but found '",
          generator.device(), "'");
      has_generator_ = true;
      return host_generator(generator);
    }
    return value;
  }

  // A tensor that an operator writes to may have been resized or given new memory.
  void take_over_changes(Argument& argument) {
    if (!argument.write)
      return;
    auto* impl = argument.on_device.unsafeGetTensorImpl();
    auto* storage = argument.on_device.storage().unsafeGetStorageImpl();
    const auto& host = argument.on_host;
    if (host.storage().data() != storage->data()) {
      auto adopted = adopt(host.storage(), name_);
      storage->set_nbytes(adopted.nbytes());
      storage->set_data_ptr_noswap(std::move(adopted.mutable_data_ptr()));
    }
    if (impl->sizes() != host.sizes() || impl->strides() != host.strides() ||
        impl->storage_offset() != host.storage_offset())
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

  Tensor to_device(const Tensor& t, Launch& launch) {
    if (!t.defined() || !t.device().is_cpu())
      return t;
    for (const auto& argument : arguments_) {
      if (t.is_same(argument.on_host))
        return argument.on_device;
      if (t.storage().is_alias_of(argument.on_host.storage()))
        return device_tensor(argument.on_device.storage(), t);
    }
    TORCH_CHECK(t.layout() == at::kStrided, "sim: only dense tensors are simulated (", name_, ")");
    auto made = device_tensor(adopt(t.storage(), name_), t);
    launch.touch(made, true);
    arguments_.push_back({made, t, false}); // another result may share its memory
    return made;
  }

  IValue to_device(const IValue& value, Launch& launch) {
    if (value.isTensor())
      return to_device(value.toTensor(), launch);
    if (!value.isTensorList())
      return value;
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector())
      list.push_back(to_device(t, launch));
    return list;
  }

  const c10::OperatorHandle& op_;
  std::string name_;
  std::vector<Argument> arguments_;
  bool has_generator_ = false;
};

// Operators after which the host has to wait, since their result is a number or has a shape that
// depends on numbers.
const char* kind_of_wait(const std::string& name, bool by_mask) {
  static const std::set<std::string> shapes = {
      "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal", "aten::bincount",
      "aten::repeat_interleave", "aten::linalg_lstsq", "aten::_linalg_svd", "aten::_linalg_eigh",
      "aten::linalg_eig"};
  if (name == "aten::_local_scalar_dense")
    return "wait_item";
  return shapes.count(name) > 0 || by_mask ? "wait_shape" : nullptr;
}

bool has_mask(const c10::OperatorHandle& op, const Stack& stack) {
  if (op.schema().name().find("index") == std::string::npos)
    return false;
  const auto first = stack.end() - op.schema().arguments().size();
  return std::any_of(first, stack.end(), [](const IValue& value) {
    if (!value.isOptionalTensorList())
      return false;
    const auto indices = value.toOptionalTensorVector();
    return std::any_of(indices.begin(), indices.end(), [](const auto& t) {
      return t.has_value() && t->defined() && t->scalar_type() == at::kBool;
    });
  });
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& name = op.schema().name();
  const auto* wait = kind_of_wait(name, has_mask(op, *stack));
  Call(op).run(stack);
  if (wait != nullptr)
    host_waits(stream_clock(current_stream()), wait, name);
}

// ------------------------------------------------------------------ new tensors
Tensor empty(
    c10::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device>,
    std::optional<bool> pin,
    std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided, "sim: only dense tensors are simulated");
  return at::detail::empty_generic(
      size, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      at::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(
      size, stride, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      at::dtype_or_default(dtype));
}

// ------------------------------------------------------------------ copies
void transfer(const Tensor& source, const Tensor& destination, bool non_blocking) {
  if (destination.numel() == 0)
    return;
  const bool from = on_device(source), to = on_device(destination);
  const OnlyKernels guard;
  const Tensor source_view = from ? host_view(source) : source;
  Tensor destination_view = to ? host_view(destination) : destination;
  Launch launch(from ? (to ? "copy" : "copy from the device") : "copy to the device");
  if (from && to) {
    launch.touch(source, false);
    launch.touch(destination, true);
    destination_view.copy_(source_view);
    count("on_device", "copy_", destination.nbytes());
    return;
  }
  const bool pinned = is_pinned((from ? destination : source).const_data_ptr());
  // Anything else is staged by the driver, which the host waits for.
  const bool direct = non_blocking && pinned && source.scalar_type() == destination.scalar_type() &&
      source.sizes() == destination.sizes() && source.strides() == destination.strides() &&
      source.is_non_overlapping_and_dense();
  if (from || pinned)
    launch.touch(source, false);
  if (to || pinned)
    launch.touch(destination, true);
  if (direct)
    issue_copy(launch, source, destination);
  else
    destination_view.copy_(source_view);
  const std::string kind = from ? "from_device_" : "to_device_";
  const std::string how = !non_blocking ? "blocking" : direct ? "pinned" : "pageable";
  count(kind + how, "copy_", destination.nbytes());
  if (!non_blocking || (from && !direct))
    host_waits(stream_clock(current_stream()), "wait_copy", kind + how);
}

Tensor copy_from(const Tensor& self, const Tensor& destination, bool non_blocking) {
  transfer(self, destination, non_blocking);
  return destination;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& destination) {
  if (destination.sizes() != self.sizes())
    destination.resize_(self.sizes());
  transfer(self, destination, false);
  return destination;
}

void record_stream_of(Tensor& self, c10::Stream stream) {
  record_stream(self.storage().data(), stream.id());
}

// Whether `tensor.data = other` may change the device, as between the CPU and other accelerators.
bool can_take_data_of(const Tensor& self, const Tensor& other) {
  const auto dense = [](const Tensor& t) {
    return t.layout() == at::kStrided && (t.device().is_cpu() || on_device(t));
  };
  return dense(self) && dense(other);
}

// ------------------------------------------------------------------ attention
// Both of the accelerator's fused operators are the CPU's fused one, so that bits are the CPU's.
int64_t choose_attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& mask,
    double dropout,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  auto& context = at::globalContext();
  const bool flash = context.userEnabledFlashSDP(), math = context.userEnabledMathSDP();
  context.setSDPUseFlash(true);
  context.setSDPUseMath(true);
  const bool fits = at::native::_fused_sdp_choice_cpp(
                        query, key, value, mask, dropout, is_causal, scale, enable_gqa) ==
      static_cast<int64_t>(at::SDPBackend::flash_attention);
  context.setSDPUseFlash(flash);
  context.setSDPUseMath(math);
  const bool masked = mask.has_value() && mask->defined();
  const bool low_precision = query.scalar_type() != at::kFloat && query.scalar_type() != at::kDouble;
  const bool efficient = context.userEnabledMemEfficientSDP();
  if (fits && flash && !masked && (low_precision || !efficient))
    return static_cast<int64_t>(at::SDPBackend::flash_attention);
  if (fits && efficient)
    return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  TORCH_CHECK(math, "No available kernel. Aborting execution.");
  return static_cast<int64_t>(at::SDPBackend::math);
}

Tensor nothing(const Tensor& like) {
  return at::empty({0}, like.options().dtype(at::kLong));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& bias,
    bool,
    double dropout,
    bool is_causal,
    std::optional<double> scale) {
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, dropout, is_causal, bias, scale);
  return {out, lse, nothing(query), nothing(query)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& grad,
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const Tensor& bias,
    const Tensor& out,
    const Tensor& lse,
    const Tensor&,
    const Tensor&,
    double dropout,
    std::array<bool, 4>,
    bool is_causal,
    std::optional<double> scale) {
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad, query, key, value, out, lse, dropout, is_causal,
      bias.defined() ? std::make_optional(bias) : std::nullopt, scale);
  return {q, k, v, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    double dropout,
    bool is_causal,
    bool,
    std::optional<double> scale) {
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, dropout, is_causal, std::nullopt, scale);
  return {
      out, lse, Tensor(), Tensor(), query.sym_size(2), key.sym_size(2), nothing(query),
      nothing(query), nothing(query)};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& grad,
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const Tensor& out,
    const Tensor& lse,
    const Tensor&,
    const Tensor&,
    c10::SymInt,
    c10::SymInt,
    double dropout,
    bool is_causal,
    const Tensor&,
    const Tensor&,
    std::optional<double> scale) {
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad, query, key, value, out, lse, dropout, is_causal, std::nullopt, scale);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("record_stream", &record_stream_of);
  m.impl("_has_compatible_shallow_copy_type", &can_take_data_of);
  m.impl("_fused_sdp_choice", &choose_attention);
  m.impl("_scaled_dot_product_efficient_attention", &efficient);
  m.impl("_scaled_dot_product_efficient_attention_backward", &efficient_backward);
  m.impl("_scaled_dot_product_flash_attention", &flash);
  m.impl("_scaled_dot_product_flash_attention_backward", &flash_backward);
}

} // namespace

// Without a kernel of their own these operators would be taken apart, with other bits than the
// CPU's: those that have a kernel for the CPU, and the convolutions, which choose one themselves.
void register_operators() {
  static auto* library = new torch::Library(
      torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  auto names = dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CPU);
  names.emplace_back("aten::convolution", "");
  names.emplace_back("aten::convolution_backward", "");
  for (const auto& name : names) {
    const auto op = dispatcher.findSchema(name);
    if (name.getNamespace() != "aten" || !op.has_value() ||
        op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1))
      continue;
    const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

} // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::choose_attention)
} // namespace at::native
