// The library that ONNX Runtime loads: registers every op of the domain `trimtab`.
#include <string>

#include "isa.h"
#include "ops.h"  // made by CMake: the cpu.h of every op, each of which registers its kernel

#if defined(_WIN32)
#define TRIMTAB_EXPORT extern "C" __declspec(dllexport)
#else
#define TRIMTAB_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The name that ONNX Runtime looks for in a custom-op library.
TRIMTAB_EXPORT trimtab::ort::Status* RegisterCustomOps(trimtab::ort::SessionOptions* options,
                                                       const trimtab::ort::ApiBase* base) {
  using namespace trimtab;
  const ort::Api api = base->get_api(ort::kApiVersion);
  if (api == nullptr) return nullptr;  // older than the ABI: the reference bodies serve
  const ort::Runtime runtime(api);
  ort::CustomOpDomain* domain = nullptr;
  if (ort::Status* status = runtime.make_domain("trimtab", &domain)) return status;
  for (const ort::CustomOp* op : registered_ops())
    if (ort::Status* status = runtime.add_op(domain, op)) return status;
  return runtime.add_domain(options, domain);
}

// Names of the ops that have kernels here, separated by commas.
TRIMTAB_EXPORT const char* trimtab_kernels() {
  static const std::string names = [] {
    std::string joined;
    for (const trimtab::ort::CustomOp* op : trimtab::registered_ops())
      joined.append(joined.empty() ? "" : ",").append(op->name(op));
    return joined;
  }();
  return names.c_str();
}

// The instruction set that kernels use here, for reports and tests.
TRIMTAB_EXPORT const char* trimtab_isa() { return trimtab::isa_name(trimtab::isa()); }
