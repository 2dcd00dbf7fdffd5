// An operator by its name, to be called as the dispatcher has it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace fastokd {

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace fastokd
