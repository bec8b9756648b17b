// Declarations that the parts of the simulated accelerator share.
//
// One mutex protects all state. Python is never called while it is held: the other order (the
// interpreter's lock first, then this mutex) is the usual one, and mixing them would deadlock.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
inline c10::Device device() {
  return {kSim, 0}; // there is one
}
inline bool on_device(const at::Tensor& t) {
  return t.defined() && t.device().type() == kSim;
}

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();

// ---------------------------------------------------------------- what Python switches on
struct Options {
  bool sanitize = false; // check that accesses to memory are ordered
  bool late = false; // deliver asynchronous copies as late as their order allows
  bool trace = false; // tell Python of each copy and wait
  bool where = false; // ask Python for the places of allocations and accesses
};
extern Options options;
extern std::function<void(const std::string& kind, const std::string& op, uint64_t bytes)> listener;
extern std::function<std::string()> place_in_python;
std::string place(); // the line of the program that is at work, or nothing

using Counters = std::map<std::string, std::pair<uint64_t, uint64_t>>; // kind: number, bytes
void count(const std::string& kind, const std::string& op, uint64_t bytes = 0);
Counters counters();
void reset_counters();

// ---------------------------------------------------------------- order of streams (order.cpp)
// A vector clock: for each stream how much of its work is known to be done, or to be done before.
using Clock = std::vector<uint64_t>;
void join(Clock& into, const Clock& other);
uint64_t at_stream(const Clock& clock, int64_t stream);

int64_t current_stream(); // of this thread; 0 is the default stream
int64_t exchange_stream(int64_t stream);
int64_t new_stream();
Clock stream_clock(int64_t stream); // what comes before anything that is queued there now
void stream_waits(int64_t stream, const Clock& clock);
void host_waits(const Clock& clock, const char* kind, const std::string& op);
bool host_polls(const Clock& clock, bool again); // whether the work is done
Clock all_streams();

struct Access {
  uintptr_t begin, end;
  int64_t stream;
  uint64_t time; // of the stream's own clock
  bool write;
  std::string what; // operator and place
};

// Work that is queued on the current stream: its clock goes on, and what the work touches is
// compared with earlier accesses by other streams.
class Launch {
 public:
  explicit Launch(const std::string& op);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  void touch(const at::Tensor& tensor, bool write);

 private:
  friend void issue_copy(const Launch&, const at::Tensor&, const at::Tensor&);
  std::string what_;
  int64_t stream_;
  Clock clock_;
};
// A copy between pinned and device memory of the same layout, which the host does not wait for.
void issue_copy(const Launch& launch, const at::Tensor& source, const at::Tensor& destination);
void finish_all(); // the host waits for everything
void forget_copies_to(uintptr_t begin, uintptr_t end);
void observe_host(bool on); // compare the host's accesses to pinned memory with copies under way

void report(const std::string& text);
std::vector<std::string> take_reports();

// ---------------------------------------------------------------- memory (memory.cpp)
struct Block {
  uintptr_t begin = 0;
  size_t bytes = 0, charged = 0; // asked for, and with what an allocator rounds up to
  bool pinned = false; // host memory
  int64_t stream = 0; // that it was allocated on
  std::string what; // operator and place
  std::vector<Access> accesses;
  std::set<int64_t> recorded; // streams named by record_stream
};
Block* find_block(uintptr_t address); // with the mutex held
std::vector<Block> device_blocks();
bool is_pinned(const void* pointer);
uint64_t pinned_bytes();
c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
c10::Storage adopt(const c10::Storage& cpu, const std::string& op); // becomes device memory
void record_stream(const void* pointer, int64_t stream);
void set_capacity(int64_t bytes);
void set_fraction(double fraction);
int64_t capacity();

// ---------------------------------------------------------------- random numbers (device.cpp)
const at::Generator& default_generator();
at::Generator host_generator(const at::Generator& generator); // that the CPU's kernels draw from

void register_operators();

} // namespace sim
