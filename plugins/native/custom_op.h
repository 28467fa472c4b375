// A class with a name, inputs, outputs and a compute function → an op that ONNX Runtime can register.
//
// Kernel needs:  static constexpr const char* kName;
//                static constexpr ort::Argument kInputs[], kOutputs[];
//                const char* read(const Runtime&, const KernelInfo*);       attributes; an error message, or nullptr
//                const char* compute(const Runtime&, KernelContext*) const; likewise
// One line behind it puts it into the library:  inline const Registered<Kernel> kKernel;
#pragma once

#include <initializer_list>
#include <memory>
#include <vector>

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
    input_type = [](const ort::CustomOp*, size_t i) { return Kernel::kInputs[i].type; };
    input_presence = [](const ort::CustomOp*, size_t i) { return Kernel::kInputs[i].presence; };
    input_memory = [](const ort::CustomOp*, size_t) { return ort::Memory::device; };
    output_count = [](const ort::CustomOp*) { return sizeof Kernel::kOutputs / sizeof *Kernel::kOutputs; };
    output_type = [](const ort::CustomOp*, size_t i) { return Kernel::kOutputs[i].type; };
    output_presence = [](const ort::CustomOp*, size_t i) { return Kernel::kOutputs[i].presence; };
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

// The ops of the library.
inline std::vector<const ort::CustomOp*>& registered_ops() {
  static std::vector<const ort::CustomOp*> ops;
  return ops;
}

template <typename Kernel>
struct Registered {
  Registered() {
    static const Op<Kernel> op;
    registered_ops().push_back(&op);
  }
};

// An input that may be absent.
struct Tensor {
  static constexpr size_t kMostDims = 8;

  bool given = false;
  const void* data = nullptr;  // of a tensor without elements, too
  ort::Type type = ort::Type::any;
  size_t rank = 0;
  int64_t dims[kMostDims] = {};

  explicit operator bool() const { return given; }
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

// Not given where `value` is nullptr.
inline Tensor tensor_of(const ort::Runtime& runtime, const ort::Value* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  tensor.given = true;
  tensor.rank = runtime.shape(value, &tensor.type, tensor.dims, Tensor::kMostDims);
  tensor.data = runtime.data(value);
  return tensor;
}

inline Tensor read_input(const ort::Runtime& runtime, ort::KernelContext* context, size_t index) {
  return tensor_of(runtime, index < runtime.input_count(context) ? runtime.input(context, index) : nullptr);
}

// The inputs of a node, of which constants are looked at once: each look is some calls into the runtime.
class Inputs {
 public:
  void take(const ort::Runtime& runtime, const ort::KernelInfo* info, size_t count) {
    for (size_t i = 0; i < count; i++) constants_.push_back(tensor_of(runtime, runtime.constant_input(info, i)));
  }

  Tensor read(const ort::Runtime& runtime, ort::KernelContext* context, size_t index) const {
    return index < constants_.size() && constants_[index] ? constants_[index] : read_input(runtime, context, index);
  }

 private:
  std::vector<Tensor> constants_;
};

// The memory of output `index`, which gets this shape; nullptr where the node leaves it unnamed. To be called once, and not
// before the kernel has counted what its sizes hang on.
template <typename T>
T* write_output(const ort::Runtime& runtime, ort::KernelContext* context, size_t index, const int64_t* shape, size_t rank) {
  const ort::Value* value = runtime.output(context, index, shape, rank);
  return value == nullptr ? nullptr : static_cast<T*>(runtime.data(value));
}

template <typename T>
T* write_output(const ort::Runtime& runtime, ort::KernelContext* context, size_t index, std::initializer_list<int64_t> shape) {
  return write_output<T>(runtime, context, index, shape.begin(), shape.size());
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
