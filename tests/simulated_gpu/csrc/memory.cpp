// Device memory and pinned host memory: both are ordinary memory, with accounts.
#include "sim.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstring>

namespace sim {
namespace {

constexpr size_t kRounding = 512; // bytes, as CUDA's caching allocator
constexpr int64_t kNoLimit = int64_t(1) << 40;

struct State {
  std::map<uintptr_t, Block> blocks; // of both kinds, by address
  c10::CachingDeviceAllocator::DeviceStats stats;
  uint64_t pinned_bytes = 0;
  int64_t capacity = kNoLimit;
  double fraction = 1;
};

State& state() {
  static auto* made = new State(); // never destroyed: tensors may outlive static objects
  return *made;
}

int64_t allocated() {
  return state().stats.allocated_bytes[0].current;
}

void check_room(size_t charged) {
  auto& s = state();
  const auto limit = static_cast<int64_t>(s.fraction * static_cast<double>(s.capacity));
  if (allocated() + static_cast<int64_t>(charged) <= limit)
    return;
  s.stats.num_ooms += 1;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "sim out of memory: ", charged, " bytes were asked for, ",
      limit - allocated(), " of ", limit, " are free.");
}

void add(Block block) {
  auto& s = state();
  if (options.sanitize && !block.pinned) {
    // What it is made of may have been in use by earlier work of the stream, as in any caching
    // allocator: other streams have to come after that.
    const auto now = at_stream(stream_clock(block.stream), block.stream);
    block.accesses.push_back(
        {block.begin, block.begin + block.bytes, block.stream, now, true, block.what});
  }
  if (block.pinned) {
    s.pinned_bytes += block.bytes;
  } else {
    auto& stats = s.stats;
    stats.allocation[0].increase(1);
    stats.allocated_bytes[0].increase(block.charged);
    stats.active_bytes[0].increase(block.charged);
    stats.requested_bytes[0].increase(block.bytes);
    if (allocated() > stats.reserved_bytes[0].current)
      stats.reserved_bytes[0].increase(allocated() - stats.reserved_bytes[0].current);
  }
  s.blocks[block.begin] = std::move(block);
}

Block described(void* memory, size_t bytes, const std::string& what) {
  Block block;
  block.begin = reinterpret_cast<uintptr_t>(memory);
  block.bytes = bytes;
  block.charged = (bytes + kRounding - 1) / kRounding * kRounding;
  block.stream = current_stream();
  block.what = what;
  return block;
}

std::string what(const std::string& op) {
  const auto where = place();
  return where.empty() ? op : op + " at " + where;
}

// Takes device memory off the accounts. The memory may be given out again to the stream that it was
// allocated on; other streams must be known to be done with it by then.
void remove(void* memory) {
  const auto where = options.sanitize ? place() : std::string();
  Lock lock(mutex());
  auto& s = state();
  const auto found = s.blocks.find(reinterpret_cast<uintptr_t>(memory));
  if (found == s.blocks.end())
    return;
  const Block block = std::move(found->second);
  s.blocks.erase(found);
  s.stats.allocation[0].decrease(1);
  s.stats.allocated_bytes[0].decrease(block.charged);
  s.stats.active_bytes[0].decrease(block.charged);
  s.stats.requested_bytes[0].decrease(block.bytes);
  forget_copies_to(block.begin, block.begin + block.bytes);
  if (!options.sanitize)
    return;
  const auto known = stream_clock(block.stream);
  for (const auto& access : block.accesses)
    if (access.stream != block.stream && block.recorded.count(access.stream) == 0 &&
        at_stream(known, access.stream) < access.time)
      report(
          "memory of stream " + std::to_string(block.stream) + " (" + std::to_string(block.bytes) +
          " bytes, " + block.what + ") is freed" + (where.empty() ? "" : " at " + where) +
          " while stream " + std::to_string(access.stream) + " may still " +
          (access.write ? "write" : "read") + " it (" + access.what +
          "): Tensor.record_stream or a wait is missing");
}

void release_device(void* memory) {
  remove(memory);
  c10::free_cpu(memory);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0)
      return {nullptr, device()};
    const auto made_by = what("allocation");
    Lock lock(mutex());
    auto block = described(nullptr, bytes, made_by);
    check_room(block.charged);
    void* memory = c10::alloc_cpu(block.charged);
    block.begin = reinterpret_cast<uintptr_t>(memory);
    add(std::move(block));
    return {memory, memory, &release_device, device()};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release_device;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {
    Lock lock(mutex());
    auto& reserved = state().stats.reserved_bytes[0];
    reserved.decrease(reserved.current - allocated());
  }
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    record_stream(pointer.get(), stream.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    Lock lock(mutex());
    return state().stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    Lock lock(mutex());
    for (auto* stat : counted())
      stat->reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex) override {
    Lock lock(mutex());
    for (auto* stat : counted())
      stat->reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    Lock lock(mutex());
    const auto free = state().capacity - state().stats.reserved_bytes[0].current;
    return {static_cast<size_t>(std::max<int64_t>(free, 0)), state().capacity};
  }

 private:
  static std::vector<c10::CachingAllocator::Stat*> counted() {
    auto& s = state().stats;
    return {
        &s.allocation[0], &s.allocated_bytes[0], &s.reserved_bytes[0], &s.active_bytes[0],
        &s.requested_bytes[0]};
  }
};

void release_pinned(void* memory) {
  {
    Lock lock(mutex());
    auto& s = state();
    const auto found = s.blocks.find(reinterpret_cast<uintptr_t>(memory));
    s.pinned_bytes -= found->second.bytes;
    s.blocks.erase(found);
  }
  c10::free_cpu(memory);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0)
      return {nullptr, c10::Device(c10::kCPU)};
    void* memory = c10::alloc_cpu(bytes);
    auto block = described(memory, bytes, what("pinned memory"));
    block.pinned = true;
    Lock lock(mutex());
    add(std::move(block));
    return {memory, memory, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release_pinned;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

DeviceMemory the_device_memory;
PinnedMemory the_pinned_memory;

[[maybe_unused]] const bool registered = [] {
  c10::SetAllocator(kSim, &the_device_memory);
  return true;
}();

// Memory that a kernel of the CPU allocated for its result.
struct Adopted {
  c10::Storage cpu;
  void* memory;
};

void release_adopted(void* context) {
  auto* adopted = static_cast<Adopted*>(context);
  remove(adopted->memory);
  delete adopted;
}

} // namespace

c10::Storage adopt(const c10::Storage& cpu, const std::string& op) {
  const size_t bytes = cpu.nbytes();
  void* memory = cpu.mutable_data();
  c10::DataPtr pointer(nullptr, device());
  if (memory != nullptr && bytes > 0) {
    auto block = described(memory, bytes, what(op));
    Lock lock(mutex());
    check_room(block.charged);
    add(std::move(block));
    pointer = c10::DataPtr(memory, new Adopted{cpu, memory}, &release_adopted, device());
  }
  return c10::Storage(
      c10::Storage::use_byte_size_t(), bytes, std::move(pointer), &the_device_memory,
      /*resizable=*/true);
}

Block* find_block(uintptr_t address) {
  auto& blocks = state().blocks;
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin())
    return nullptr;
  auto& block = std::prev(next)->second;
  return address < block.begin + block.bytes ? &block : nullptr;
}

std::vector<Block> device_blocks() {
  Lock lock(mutex());
  std::vector<Block> found;
  for (const auto& [_, block] : state().blocks)
    if (!block.pinned)
      found.push_back(block);
  return found;
}

bool is_pinned(const void* pointer) {
  Lock lock(mutex());
  const auto* block = find_block(reinterpret_cast<uintptr_t>(pointer));
  return block != nullptr && block->pinned;
}

uint64_t pinned_bytes() {
  Lock lock(mutex());
  return state().pinned_bytes;
}

c10::Allocator* device_allocator() {
  return &the_device_memory;
}
c10::Allocator* pinned_allocator() {
  return &the_pinned_memory;
}

void record_stream(const void* pointer, int64_t stream) {
  Lock lock(mutex());
  if (auto* block = find_block(reinterpret_cast<uintptr_t>(pointer)))
    block->recorded.insert(stream);
}

void set_capacity(int64_t bytes) {
  the_device_memory.emptyCache({0, 0});
  Lock lock(mutex());
  state().capacity = bytes < 0 ? kNoLimit : bytes;
}
void set_fraction(double fraction) {
  Lock lock(mutex());
  state().fraction = fraction;
}
int64_t capacity() {
  Lock lock(mutex());
  return state().capacity;
}

} // namespace sim
