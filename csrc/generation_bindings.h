// Bindings of what generates: sampling and attention of one token a row.
#pragma once

#include <pybind11/pybind11.h>

namespace rlvr {

void bind_generation(pybind11::module_& m);

}  // namespace rlvr
