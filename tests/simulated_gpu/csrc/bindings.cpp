// What Python sees.
#include "sim.h"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Generator.h>

namespace py = pybind11;

namespace {

using Listener = std::function<void(const std::string&, const std::string&, uint64_t)>;
using Place = std::function<std::string()>;

void set_options(bool sanitize, bool late, bool trace, bool where) {
  sim::options = {sanitize, late, trace, where};
  sim::observe_host(sanitize);
}

// Never destroyed: other threads may still call them when Python ends.
void set_hooks(Listener listener, Place place) {
  sim::listener = [kept = new Listener(std::move(listener))](
                      const std::string& kind, const std::string& op, uint64_t bytes) {
    (*kept)(kind, op, bytes);
  };
  sim::place_in_python = [kept = new Place(std::move(place))] { return (*kept)(); };
}

std::vector<std::pair<uint64_t, std::string>> live_blocks() {
  std::vector<std::pair<uint64_t, std::string>> all;
  for (const auto& block : sim::device_blocks())
    all.emplace_back(block.bytes, block.what);
  return all;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register_operators", &sim::register_operators);
  m.def("set_options", &set_options);
  m.def("set_hooks", &set_hooks);
  m.def("counters", &sim::counters);
  m.def("reset_counters", &sim::reset_counters);
  m.def("finish_all", &sim::finish_all, py::call_guard<py::gil_scoped_release>());
  m.def("take_reports", &sim::take_reports);
  m.def("set_capacity", &sim::set_capacity);
  m.def("set_fraction", &sim::set_fraction);
  m.def("capacity", &sim::capacity);
  m.def("pinned_bytes", &sim::pinned_bytes);
  m.def("live_blocks", &live_blocks);
  m.def("default_generator", [] {
    return py::reinterpret_steal<py::object>(THPGenerator_Wrap(sim::default_generator()));
  });
}
