// Automatic mixed precision by PyTorch's own lists of operators for accelerators.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

namespace sim {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

c10::ArrayRef<c10::Argument> arguments_of(const c10::OperatorHandle& op) {
  return op.schema().arguments();
}

void cast_arguments(const c10::OperatorHandle& op, Stack* stack, at::ScalarType dtype) {
  for (auto value = stack->end() - arguments_of(op).size(); value != stack->end(); ++value) {
    if (value->isTensor()) {
      *value = at::autocast::cached_cast(dtype, value->toTensor(), kDevice);
    } else if (value->isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value->toTensorVector())
        list.push_back(at::autocast::cached_cast(dtype, t, kDevice));
      *value = list;
    }
  }
}

void call(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard done(c10::DispatchKey::AutocastPrivateUse1);
  op.callBoxed(stack);
}

void lower_precision(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard done(c10::DispatchKey::AutocastPrivateUse1);
  cast_arguments(op, stack, at::autocast::get_autocast_dtype(kDevice));
  op.callBoxed(stack);
}

void float32(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard done(c10::DispatchKey::AutocastPrivateUse1);
  cast_arguments(op, stack, at::kFloat);
  op.callBoxed(stack);
}

// Operators with an optional dtype of the result, which becomes float32.
void float32_result(const c10::OperatorHandle& op, Stack* stack) {
  const auto first = stack->end() - arguments_of(op).size();
  if (first->isTensor() && at::autocast::is_eligible(first->toTensor(), kDevice))
    for (size_t i = 0; i < arguments_of(op).size(); ++i)
      if (arguments_of(op)[i].name() == "dtype" && first[i].isNone())
        first[i] = static_cast<int64_t>(at::kFloat);
  call(op, stack);
}

// A norm without a dtype of the result becomes that of the overload which has one.
void float32_norm(const c10::OperatorHandle& op, Stack* stack) {
  const auto first = stack->end() - arguments_of(op).size();
  if (!at::autocast::is_eligible(first->toTensor(), kDevice))
    return call(op, stack);
  const auto* overload = op.schema().overload_name() == "Scalar" ? "ScalarOpt_dtype"
                                                                 : "ScalarOpt_dim_dtype";
  stack->emplace_back(static_cast<int64_t>(at::kFloat));
  call(c10::Dispatcher::singleton().findSchemaOrThrow("aten::norm", overload), stack);
}

void widest(const c10::OperatorHandle& op, Stack* stack) {
  auto dtype = at::autocast::get_autocast_dtype(kDevice);
  for (auto value = stack->end() - arguments_of(op).size(); value != stack->end(); ++value) {
    if (value->isTensor())
      dtype = at::autocast::prioritize(dtype, value->toTensor(), kDevice);
    else if (value->isTensorList())
      for (const Tensor& t : value->toTensorVector())
        dtype = at::autocast::prioritize(dtype, t, kDevice);
  }
  const c10::impl::ExcludeDispatchKeyGuard done(c10::DispatchKey::AutocastPrivateUse1);
  cast_arguments(op, stack, dtype);
  op.callBoxed(stack);
}

std::string full_name(const char* name, const char* overload = "") {
  return *overload == 0 ? name : std::string(name) + "." + overload;
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

// The lists are macros, which call a macro with the names of an operator and of its overload.
#define SIM_TEXT_1(name) full_name(#name)
#define SIM_TEXT_2(name, overload) full_name(#name, #overload)
#define SIM_TEXT(first, second, chosen, ...) chosen
#define SIM_IMPL(kernel, ...)                                                               \
  m.impl(                                                                                   \
      SIM_TEXT(__VA_ARGS__, SIM_TEXT_2, SIM_TEXT_1)(__VA_ARGS__).c_str(),                   \
      torch::CppFunction::makeFromBoxedFunction<&kernel>());
#define SIM_LOWER(...) SIM_IMPL(lower_precision, __VA_ARGS__)
#define SIM_FLOAT32(...) SIM_IMPL(float32, __VA_ARGS__)
#define SIM_FLOAT32_RESULT(...) SIM_IMPL(float32_result, __VA_ARGS__)
#define SIM_WIDEST(...) SIM_IMPL(widest, __VA_ARGS__)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(SIM_LOWER)
  AT_FORALL_FP32(SIM_FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIM_FLOAT32_RESULT)
  AT_FORALL_PROMOTE(SIM_WIDEST)
  for (const char* norm : {"norm.Scalar", "norm.ScalarOpt_dim"})
    m.impl(norm, torch::CppFunction::makeFromBoxedFunction<&float32_norm>());
}

} // namespace
} // namespace sim
