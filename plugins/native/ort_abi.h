// The slice of ONNX Runtime's C ABI that the kernels call, so that they compile without its headers, which no wheel ships.
//
// The ABI is append-only: a function keeps its place in OrtApi, a field its offset in OrtCustomOp. Places were read from the
// public header of ONNX Runtime 1.21; everything here has been there since 1.17, which is the version asked for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trimtab::ort {

constexpr uint32_t kApiVersion = 17;

using Api = void* const*;  // OrtApi, a table of function pointers

struct ApiBase {
  Api (*get_api)(uint32_t version);
  const char* (*version)();
};

struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct ShapeInfo;

enum class Type : int32_t { any = 0, float32 = 1, uint8 = 2, int8 = 3, int32 = 6, int64 = 7, float16 = 10, bfloat16 = 16 };
enum class Presence : int32_t { required = 0, optional = 1 };
enum class Memory : int32_t { device = 0 };

// An input or output of an op. An input of type `any` may have several, which the kernel checks itself.
struct Argument {
  Type type = Type::any;
  Presence presence = Presence::required;
};

// OrtCustomOp: what the runtime asks of an op. Fields up to those of version 17.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create)(const CustomOp*, Api, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  Type (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  Type (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  Presence (*input_presence)(const CustomOp*, size_t) = nullptr;
  Presence (*output_presence)(const CustomOp*, size_t) = nullptr;
  Memory (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*input_min_arity)(const CustomOp*) = nullptr;
  int (*input_homogeneous)(const CustomOp*) = nullptr;
  int (*output_min_arity)(const CustomOp*) = nullptr;
  int (*output_homogeneous)(const CustomOp*) = nullptr;
  Status* (*create_v2)(const CustomOp*, Api, const KernelInfo*, void**) = nullptr;
  Status* (*compute_v2)(void*, KernelContext*) = nullptr;
  Status* (*infer_shape)(const CustomOp*, void*) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
};

// Calls into the runtime. One per process: every session has the same table.
class Runtime {
 public:
  explicit Runtime(Api api) : api_(api) {}

  Status* fail(const char* message) const { return at<Status*(int, const char*)>(0)(kInvalidArgument, message); }

  Status* make_domain(const char* name, CustomOpDomain** out) const {
    return at<Status*(const char*, CustomOpDomain**)>(26)(name, out);
  }
  Status* add_op(CustomOpDomain* domain, const CustomOp* op) const {
    return at<Status*(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status*(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }

  // Attributes. False where the node has none of that name.
  bool attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return ok(at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out));
  }
  bool attribute(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    return ok(at<Status*(const KernelInfo*, const char*, char*, size_t*)>(87)(info, name, out, size));
  }

  const Value* input(KernelContext* context, size_t index) const {
    const Value* value = nullptr;
    ok(at<Status*(KernelContext*, size_t, const Value**)>(90)(context, index, &value));
    return value;
  }
  // The constant that input `index` of a node is; nullptr where it is none.
  const Value* constant_input(const KernelInfo* info, size_t index) const {
    int constant = 0;
    const Value* value = nullptr;
    const bool found = ok(at<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, &constant, &value));
    return found && constant ? value : nullptr;
  }
  size_t input_count(KernelContext* context) const {
    size_t count = 0;
    ok(at<Status*(KernelContext*, size_t*)>(88)(context, &count));
    return count;
  }
  // Allocates an output; nullptr where the node leaves it unnamed.
  Value* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank) const {
    size_t count = 0;
    Value* value = nullptr;
    if (ok(at<Status*(KernelContext*, size_t*)>(89)(context, &count)) && index < count)
      ok(at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank, &value));
    return value;
  }

  void* data(const Value* value) const {
    void* found = nullptr;
    ok(at<Status*(const Value*, void**)>(51)(value, &found));
    return found;
  }

  // Type and shape of a tensor; returns its rank, at most `most`.
  size_t shape(const Value* value, Type* type, int64_t* dims, size_t most) const {
    ShapeInfo* info = nullptr;
    ok(at<Status*(const Value*, ShapeInfo**)>(65)(value, &info));
    size_t rank = 0;
    ok(at<Status*(const ShapeInfo*, Type*)>(60)(info, type));
    ok(at<Status*(const ShapeInfo*, size_t*)>(61)(info, &rank));
    if (rank <= most) ok(at<Status*(const ShapeInfo*, int64_t*, size_t)>(62)(info, dims, rank));
    at<void(ShapeInfo*)>(99)(info);
    return rank;
  }

  // Runs task(data, i) for i in [0, total) on the threads of the session.
  void parallel_for(KernelContext* context, void (*task)(void*, size_t), size_t total, void* data) const {
    ok(at<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, task, total, 0, data));
  }

 private:
  static constexpr int kInvalidArgument = 2;

  template <typename Signature>
  Signature* at(size_t place) const {
    return reinterpret_cast<Signature*>(api_[place]);
  }
  bool ok(Status* status) const {
    if (status == nullptr) return true;
    at<void(Status*)>(93)(status);
    return false;
  }

  Api api_;
};

}  // namespace trimtab::ort
