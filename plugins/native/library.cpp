// The library that ONNX Runtime loads: registers every op of the domain `trimtab`.
#include "../select_blocks/cpu.h"
#include "../sparse_down/cpu.h"
#include "../sparse_head/cpu.h"
#include "../sparse_up/cpu.h"

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
  static const Op<SelectBlocks> select_blocks;
  static const Op<SparseUp> sparse_up;
  static const Op<SparseDown> sparse_down;
  static const Op<SparseHead> sparse_head;
  ort::CustomOpDomain* domain = nullptr;
  if (ort::Status* status = runtime.make_domain("trimtab", &domain)) return status;
  for (const ort::CustomOp* op : {static_cast<const ort::CustomOp*>(&select_blocks),
                                  static_cast<const ort::CustomOp*>(&sparse_up),
                                  static_cast<const ort::CustomOp*>(&sparse_down),
                                  static_cast<const ort::CustomOp*>(&sparse_head)})
    if (ort::Status* status = runtime.add_op(domain, op)) return status;
  return runtime.add_domain(options, domain);
}

// Which kernels this processor was given, for reports and tests.
TRIMTAB_EXPORT const char* trimtab_isa() { return trimtab::kernels().name; }
