#pragma once

#include <pybind11/pybind11.h>

namespace rlvr {

// Adds the sweeps of decoder.h to the module.
void bind_decoder(pybind11::module_& m);

}  // namespace rlvr
