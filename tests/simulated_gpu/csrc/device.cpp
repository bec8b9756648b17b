// What PyTorch's core asks of a device: guards, streams, events, generators, pinned memory.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

namespace sim {
namespace {

struct Event {
  Clock clock;
  std::chrono::steady_clock::time_point time;
  bool polled = false;
};

c10::Stream stream(int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, device(), id);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kSim;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return device();
  }
  c10::Device getDevice() const override {
    return device();
  }
  void setDevice(c10::Device wished) const override {
    TORCH_CHECK(wished.index() <= 0, "sim: there is one device, sim:0, not ", wished);
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }

  c10::Stream getStream(c10::Device) const override {
    return stream(current_stream());
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return stream(0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return stream(new_stream());
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return stream(new_stream());
  }
  c10::Stream exchangeStream(c10::Stream given) const override {
    return stream(exchange_stream(given.id()));
  }
  bool queryStream(const c10::Stream& given) const override {
    return host_polls(stream_clock(given.id()), /*again=*/false);
  }
  void synchronizeStream(const c10::Stream& given) const override {
    host_waits(stream_clock(given.id()), "wait_stream", "synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    host_waits(all_streams(), "wait_device", "synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& given) const override {
    record_stream(pointer.get(), given.id());
  }

  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void record(
      void** event,
      const c10::Stream& given,
      const c10::DeviceIndex,
      const c10::EventFlag) const override {
    if (*event == nullptr)
      *event = new Event();
    *static_cast<Event*>(*event) = {stream_clock(given.id()), std::chrono::steady_clock::now()};
  }
  void block(void* event, const c10::Stream& given) const override {
    if (event != nullptr) // one that was never recorded is no reason to wait
      stream_waits(given.id(), static_cast<Event*>(event)->clock);
  }
  bool queryEvent(void* event) const override {
    auto* e = static_cast<Event*>(event);
    return e == nullptr || host_polls(e->clock, std::exchange(e->polled, true));
  }
  void synchronizeEvent(void* event) const override {
    host_waits(event ? static_cast<Event*>(event)->clock : Clock(), "wait_event", "synchronize");
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    TORCH_CHECK(first && second, "sim: both events must be recorded before their time is read");
    const auto span = static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Random numbers of the device: those of a generator of the CPU with the same seed.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(uint64_t seed = c10::default_rng_seed_val)
      : c10::GeneratorImpl(sim::device(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_offset(uint64_t) override {
    TORCH_CHECK(false, "sim: its generators have no offset");
  }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "sim: its generators have no offset");
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* made = new Generator();
    made->set_state(*get_state());
    return made;
  }
  at::Generator host;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  c10::Device getDeviceFromPtr(void*) const override {
    return device();
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    if (bytes > 0) {
      at::native::resize_bytes_cpu(impl, bytes);
      return;
    }
    impl->set_data_ptr_noswap(c10::DataPtr(nullptr, device()));
    impl->set_nbytes(0);
  }
};

[[maybe_unused]] const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

} // namespace

const at::Generator& default_generator() {
  static auto* made = new at::Generator(at::make_generator<Generator>());
  return *made;
}

at::Generator host_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

} // namespace sim
