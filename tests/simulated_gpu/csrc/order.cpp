// Streams as vector clocks, accesses to memory compared by them, and copies that arrive late.
//
// Work on a stream comes after the earlier work of the stream, after the events that the stream
// waited for, and after whatever the host knew to be done when it queued the work. Two accesses to
// the same bytes, at least one of them a write, must be ordered by these rules.
#include "sim.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cstring>
#include <string_view>

namespace sim {

Options options;
std::function<void(const std::string&, const std::string&, uint64_t)> listener;
std::function<std::string()> place_in_python;

namespace {

// A copy whose end the host does not know of yet.
struct Copy {
  int64_t stream;
  uint64_t time;
  bool to_device;
  char* to;
  const char* from;
  size_t bytes;
  std::vector<char> device_data; // of a late copy from the device: what it read
  bool arrived = true;
  c10::Storage pinned; // kept alive, as PyTorch's allocator of pinned memory does
  size_t digest = 0; // of the host's bytes when a copy to the device was queued
  bool check_digest = false;
  std::string what;
};

struct State {
  std::vector<Clock> streams = std::vector<Clock>(1);
  Clock host;
  std::vector<Copy> copies;
  std::vector<std::string> reports;
  Counters counters;
};

State& state() {
  static auto* made = new State();
  return *made;
}

thread_local int64_t stream_of_thread = 0;
thread_local int launches = 0; // that are at work in this thread

size_t digest(const char* data, size_t bytes) {
  return std::hash<std::string_view>{}(std::string_view(data, bytes));
}

std::string named(const std::string& op) {
  const auto where = place();
  return where.empty() ? op : op + " at " + where;
}

bool meets(const void* begin, size_t bytes, uintptr_t other_begin, uintptr_t other_end) {
  const auto start = reinterpret_cast<uintptr_t>(begin);
  return start < other_end && other_begin < start + bytes;
}

std::pair<uintptr_t, uintptr_t> bytes_of(const at::Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d)
    last += (t.size(d) - 1) * t.stride(d);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * t.element_size())};
}

void arrive(Copy& copy) {
  if (!copy.arrived)
    std::memcpy(copy.to, copy.to_device ? copy.from : copy.device_data.data(), copy.bytes);
  copy.arrived = true;
  copy.device_data.clear();
}

// Writes that the operators' observer does not see, such as NumPy's, change the digest.
void check_source(Copy& copy) {
  if (copy.check_digest && digest(copy.from, copy.bytes) != copy.digest)
    report("pinned memory was changed by the host while a copy still read it (" + copy.what + ")");
  copy.check_digest = false;
}

// Before bytes are read or written by what comes after `clock`: the late copies that it comes after
// and whose result it meets, or whose source it overwrites, arrive.
void arrive_before(const Clock& clock, uintptr_t begin, uintptr_t end, bool write) {
  for (auto& copy : state().copies) {
    if (at_stream(clock, copy.stream) < copy.time)
      continue;
    const bool overwritten = write && copy.to_device && meets(copy.from, copy.bytes, begin, end);
    if (overwritten)
      check_source(copy);
    if (overwritten || meets(copy.to, copy.bytes, begin, end))
      arrive(copy);
  }
}

void host_learns(const Clock& clock) {
  auto& s = state();
  join(s.host, clock);
  std::vector<Copy> unknown;
  for (auto& copy : s.copies) {
    if (at_stream(s.host, copy.stream) < copy.time) {
      unknown.push_back(std::move(copy));
      continue;
    }
    check_source(copy);
    arrive(copy);
  }
  s.copies = std::move(unknown);
}

} // namespace

std::recursive_mutex& mutex() {
  static auto* made = new std::recursive_mutex();
  return *made;
}

std::string place() {
  return options.where && place_in_python ? place_in_python() : std::string();
}

// ------------------------------------------------------------------ counters and reports
void count(const std::string& kind, const std::string& op, uint64_t bytes) {
  {
    Lock lock(mutex());
    auto& counter = state().counters[kind];
    counter.first += 1;
    counter.second += bytes;
  }
  if (options.trace && listener)
    listener(kind, op, bytes);
}

Counters counters() {
  Lock lock(mutex());
  return state().counters;
}

void reset_counters() {
  Lock lock(mutex());
  state().counters.clear();
}

void report(const std::string& text) {
  Lock lock(mutex());
  auto& reports = state().reports;
  if (std::find(reports.begin(), reports.end(), text) == reports.end())
    reports.push_back(text);
}

std::vector<std::string> take_reports() {
  Lock lock(mutex());
  return std::exchange(state().reports, {});
}

// ------------------------------------------------------------------ clocks
void join(Clock& into, const Clock& other) {
  into.resize(std::max(into.size(), other.size()));
  for (size_t i = 0; i < other.size(); ++i)
    into[i] = std::max(into[i], other[i]);
}

uint64_t at_stream(const Clock& clock, int64_t stream) {
  return stream < static_cast<int64_t>(clock.size()) ? clock[stream] : 0;
}

int64_t current_stream() {
  return stream_of_thread;
}

int64_t exchange_stream(int64_t stream) {
  return std::exchange(stream_of_thread, stream);
}

int64_t new_stream() {
  Lock lock(mutex());
  state().streams.emplace_back();
  return static_cast<int64_t>(state().streams.size()) - 1;
}

Clock stream_clock(int64_t stream) {
  Lock lock(mutex());
  auto& clock = state().streams.at(stream);
  join(clock, state().host);
  return clock;
}

void stream_waits(int64_t stream, const Clock& clock) {
  Lock lock(mutex());
  join(state().streams.at(stream), clock);
}

void host_waits(const Clock& clock, const char* kind, const std::string& op) {
  count(kind, op);
  Lock lock(mutex());
  host_learns(clock);
}

bool host_polls(const Clock& clock, bool again) {
  Lock lock(mutex());
  for (const auto& copy : state().copies) // a late copy is done when it is asked for again
    if (options.late && !again && !copy.arrived && at_stream(clock, copy.stream) >= copy.time)
      return false;
  host_learns(clock);
  return true;
}

Clock all_streams() {
  Lock lock(mutex());
  Clock all;
  for (const auto& clock : state().streams)
    join(all, clock);
  return all;
}

void finish_all() {
  Lock lock(mutex());
  host_learns(all_streams());
}

// ------------------------------------------------------------------ accesses
Launch::Launch(const std::string& op)
    : what_(options.sanitize ? named(op) : op), stream_(current_stream()) {
  ++launches;
  Lock lock(mutex());
  auto& own = state().streams.at(stream_);
  join(own, state().host);
  own.resize(std::max<size_t>(own.size(), stream_ + 1));
  own[stream_] += 1;
  clock_ = own;
}

Launch::~Launch() {
  --launches;
}

void Launch::touch(const at::Tensor& tensor, bool write) {
  if (!(options.sanitize || options.late) || tensor.numel() == 0)
    return;
  const auto [begin, end] = bytes_of(tensor);
  Lock lock(mutex());
  arrive_before(clock_, begin, end, write);
  Block* block = find_block(begin);
  if (!options.sanitize || block == nullptr)
    return;
  std::vector<Access> kept;
  for (auto& access : block->accesses) {
    const bool overlaps = access.begin < end && begin < access.end;
    const bool ordered = at_stream(clock_, access.stream) >= access.time;
    if (overlaps && !ordered && (write || access.write))
      report(
          "stream " + std::to_string(stream_) + (write ? " writes" : " reads") + " memory (" +
          what_ + ") that stream " + std::to_string(access.stream) +
          (access.write ? " wrote (" : " reads (") + access.what + ") without a wait in between");
    // What comes after this access comes after those that it covers, which can be forgotten.
    const bool covered = begin <= access.begin && access.end <= end && ordered;
    if (!(covered && (write || (!access.write && access.stream == stream_))))
      kept.push_back(std::move(access));
  }
  kept.push_back({begin, end, stream_, clock_[stream_], write, what_});
  block->accesses = std::move(kept);
}

void issue_copy(const Launch& launch, const at::Tensor& source, const at::Tensor& destination) {
  Copy copy;
  copy.stream = launch.stream_;
  copy.time = launch.clock_[launch.stream_];
  copy.to_device = on_device(destination);
  copy.to = static_cast<char*>(destination.mutable_data_ptr());
  copy.from = static_cast<const char*>(source.const_data_ptr());
  copy.bytes = destination.nbytes();
  copy.pinned = copy.to_device ? source.storage() : destination.storage();
  copy.what = launch.what_;
  Lock lock(mutex());
  if (copy.to_device && options.sanitize) {
    copy.digest = digest(copy.from, copy.bytes);
    copy.check_digest = true;
  }
  if (!options.late) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    copy.arrived = false;
    if (!copy.to_device)
      copy.device_data.assign(copy.from, copy.from + copy.bytes);
    // All bits set is NaN in every floating-point type, also where bytes are viewed as one.
    std::memset(copy.to, destination.scalar_type() == at::kBool ? 1 : 0xff, copy.bytes);
  }
  if (options.late || options.sanitize)
    state().copies.push_back(std::move(copy));
}

void forget_copies_to(uintptr_t begin, uintptr_t end) {
  for (auto& copy : state().copies)
    if (copy.to_device && meets(copy.to, copy.bytes, begin, end))
      copy.arrived = true; // there is nowhere to go any more
}

// ------------------------------------------------------------------ the host's own accesses
namespace {

// Operators whose kernel for the CPU changes what a tensor is, not what its memory holds.
bool leaves_memory_alone(const c10::FunctionSchema& schema) {
  static const std::set<std::string> names = {"aten::set_", "aten::resize_", "aten::is_set_to"};
  if (names.count(schema.name()) > 0)
    return true;
  bool view = !schema.returns().empty();
  for (const auto& result : schema.returns())
    view = view && result.alias_info() != nullptr && !result.alias_info()->isWrite();
  return view;
}

void compare_with_copies(const at::Tensor& t, bool write, const std::string& op) {
  const auto what = named(op);
  const auto [begin, end] = bytes_of(t);
  Lock lock(mutex());
  const auto* block = find_block(begin);
  if (block == nullptr || !block->pinned)
    return;
  for (const auto& access : block->accesses)
    if (access.begin < end && begin < access.end && (write || access.write) &&
        at_stream(state().host, access.stream) < access.time)
      report(
          std::string("the host ") + (write ? "writes" : "reads") + " pinned memory (" + what +
          ") that a copy on stream " + std::to_string(access.stream) +
          (access.write ? " still writes (" : " still reads (") + access.what + ")");
}

std::unique_ptr<at::ObserverContext> observe(const at::RecordFunction& function) {
  const auto name = function.operator_name();
  if (launches > 0 || !options.sanitize || !name.has_value())
    return nullptr;
  const auto op = c10::Dispatcher::singleton().findSchema(*name);
  const bool touches = op.has_value() && // others are made of those that have a kernel
      (op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || name->name == "aten::copy_") &&
      !leaves_memory_alone(op->schema());
  if (!touches)
    return nullptr;
  const auto inputs = function.inputs();
  const auto& arguments = op->schema().arguments();
  std::vector<std::pair<at::Tensor, bool>> host;
  for (size_t i = 0; i < std::min(inputs.size(), arguments.size()); ++i) {
    const auto* alias = arguments[i].alias_info();
    const bool write = alias != nullptr && alias->isWrite();
    std::vector<at::Tensor> tensors;
    if (inputs[i].isTensor())
      tensors.push_back(inputs[i].toTensor());
    else if (inputs[i].isTensorList())
      tensors = inputs[i].toTensorVector();
    for (const auto& t : tensors) {
      if (on_device(t))
        return nullptr; // copies between host and device see to themselves
      if (t.defined() && t.device().is_cpu() && t.layout() == at::kStrided && t.has_storage() &&
          t.numel() > 0 && is_pinned(t.const_data_ptr()))
        host.emplace_back(t, write);
    }
  }
  for (const auto& [t, write] : host)
    compare_with_copies(t, write, name->name);
  return nullptr;
}

} // namespace

void observe_host(bool on) {
  static auto handle = at::INVALID_CALLBACK_HANDLE;
  if (on == (handle != at::INVALID_CALLBACK_HANDLE))
    return;
  if (!on) {
    at::removeCallback(std::exchange(handle, at::INVALID_CALLBACK_HANDLE));
    return;
  }
  auto callback = at::RecordFunctionCallback(&observe);
  callback.needsInputs(true).scopes({at::RecordScope::FUNCTION});
  handle = at::addGlobalCallback(callback);
}

} // namespace sim
