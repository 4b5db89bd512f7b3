// Bindings of sampling and of attention, of one token a row and within a pack.
#pragma once

#include <pybind11/pybind11.h>

namespace rlvr {

void bind_generation(pybind11::module_& m);

}  // namespace rlvr
