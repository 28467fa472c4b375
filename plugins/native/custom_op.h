// A class with a name, inputs and a compute function → an op that ONNX Runtime can register.
//
// Kernel needs:  static constexpr const char* kName;
//                static constexpr ort::Presence kInputs[];  static constexpr ort::Type kOutput;
//                const char* read(const Runtime&, const KernelInfo*);       attributes; an error message, or nullptr
//                const char* compute(const Runtime&, KernelContext*) const; likewise
// Kernels check types themselves: weights come in several.
#pragma once

#include <memory>

#include "ort_abi.h"

namespace trimtab {

template <typename Kernel>
struct Op : ort::CustomOp {
  struct Instance {
    ort::Runtime runtime;
    Kernel kernel;
  };

  Op() {
    name = [](const ort::CustomOp*) { return Kernel::kName; };
    provider = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
    input_count = [](const ort::CustomOp*) { return sizeof Kernel::kInputs / sizeof *Kernel::kInputs; };
    input_type = [](const ort::CustomOp*, size_t) { return ort::Type::any; };
    input_presence = [](const ort::CustomOp*, size_t i) { return Kernel::kInputs[i]; };
    input_memory = [](const ort::CustomOp*, size_t) { return ort::Memory::device; };
    output_count = [](const ort::CustomOp*) -> size_t { return 1; };
    output_type = [](const ort::CustomOp*, size_t) { return Kernel::kOutput; };
    output_presence = [](const ort::CustomOp*, size_t) { return ort::Presence::required; };
    input_min_arity = output_min_arity = [](const ort::CustomOp*) { return 1; };
    input_homogeneous = output_homogeneous = [](const ort::CustomOp*) { return 1; };
    start_version = [](const ort::CustomOp*) { return 1; };
    end_version = [](const ort::CustomOp*) { return INT32_MAX; };
    create_v2 = [](const ort::CustomOp*, ort::Api api, const ort::KernelInfo* info, void** out) -> ort::Status* {
      auto made = std::make_unique<Instance>(Instance{ort::Runtime(api), Kernel{}});
      if (const char* error = made->kernel.read(made->runtime, info)) return made->runtime.fail(error);
      *out = made.release();
      return nullptr;
    };
    compute_v2 = [](void* instance, ort::KernelContext* context) -> ort::Status* {
      const auto* it = static_cast<const Instance*>(instance);
      const char* error = it->kernel.compute(it->runtime, context);
      return error == nullptr ? nullptr : it->runtime.fail(error);
    };
    destroy = [](void* instance) { delete static_cast<Instance*>(instance); };
  }
};

// An input that may be absent.
struct Tensor {
  static constexpr size_t kMostDims = 8;

  const void* data = nullptr;
  ort::Type type = ort::Type::any;
  size_t rank = 0;
  int64_t dims[kMostDims] = {};

  explicit operator bool() const { return data != nullptr; }
  int64_t last() const { return dims[rank - 1]; }
  int64_t rows() const {  // all dimensions but the last
    int64_t count = 1;
    for (size_t i = 0; i + 1 < rank; i++) count *= dims[i];
    return count;
  }
  size_t element_bytes() const {
    switch (type) {
      case ort::Type::float16:
      case ort::Type::bfloat16: return 2;
      case ort::Type::int8:
      case ort::Type::uint8: return 1;
      case ort::Type::int64: return 8;
      default: return 4;
    }
  }
  const float* floats() const { return static_cast<const float*>(data); }
  const int32_t* ints() const { return static_cast<const int32_t*>(data); }
};

inline Tensor read_input(const ort::Runtime& runtime, ort::KernelContext* context, size_t index) {
  Tensor tensor;
  const ort::Value* value = index < runtime.input_count(context) ? runtime.input(context, index) : nullptr;
  if (value == nullptr) return tensor;
  tensor.rank = runtime.shape(value, &tensor.type, tensor.dims, Tensor::kMostDims);
  tensor.data = runtime.data(value);
  return tensor;
}

// Runs task(i) for i in [0, total) on the threads of the session.
template <typename Task>
void parallel(const ort::Runtime& runtime, ort::KernelContext* context, int64_t total, Task& task) {
  if (total == 1) return task(0);
  runtime.parallel_for(
      context, [](void* data, size_t i) { (*static_cast<Task*>(data))(static_cast<int64_t>(i)); },
      static_cast<size_t>(total), &task);
}

}  // namespace trimtab
