// The forward kernels as custom operators of ONNX Runtime, in the same library.
//
// No package that pip installs has ONNX Runtime's headers, so the few parts of its C
// interface that are needed are declared here. The interface only grows at its end, and
// who asks for version 17 gets that one's layout for good: ONNX Runtime 1.17 and later.

#include <cstddef>
#include <vector>

#include "involution.h"

namespace {

// Of OrtApi, a table of function pointers, the positions of those in use.
enum Function {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kGetInputCount = 88,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kGetAttributeArrayInt64 = 163,
  kParallelFor = 274,
};
const uint32_t kApiVersion = 17;

struct ApiBase {
  void *const *(*get_api)(uint32_t version);
  const char *(*get_version)();
};

// OrtCustomOp as of version 16: later versions only add members, which ONNX Runtime does
// not read where `version` says 16. The first `create_kernel` and `compute`, which cannot
// fail, stay null.
struct CustomOp {
  uint32_t version;
  void *create_kernel;
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t);
  size_t (*input_count)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t);
  size_t (*output_count)(const CustomOp *);
  void *compute;
  void (*destroy)(void *kernel);
  int (*input_characteristic)(const CustomOp *, size_t);
  int (*output_characteristic)(const CustomOp *, size_t);
  int (*input_memory)(const CustomOp *, size_t);
  int (*input_arity)(const CustomOp *);
  int (*input_homogeneity)(const CustomOp *);
  int (*output_arity)(const CustomOp *);
  int (*output_homogeneity)(const CustomOp *);
  void *(*create_kernel_v2)(const CustomOp *, void *const *api, const void *info,
                            void **kernel);
  void *(*compute_v2)(void *kernel, void *context);
};

void *const *api;

template <typename Result = void *, typename... Arguments>
Result call(Function function, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(api[function])(arguments...);
}

std::vector<int64_t> shape(const void *value) {
  void *info;
  size_t rank;
  call(kGetTensorTypeAndShape, value, &info);
  call(kGetDimensionsCount, static_cast<const void *>(info), &rank);
  std::vector<int64_t> sizes(rank);
  call(kGetDimensions, static_cast<const void *>(info), sizes.data(), rank);
  call<void>(kReleaseTensorTypeAndShapeInfo, info);
  return sizes;
}

// What the kernels' parallel_for is to pass on: it has no argument for that.
thread_local const void *current_context;

struct Share {
  int64_t begin, end, grain;
  void (*body)(int64_t, int64_t, void *);
  void *context;
};

void run_share(void *data, size_t index) {
  const Share &share = *static_cast<const Share *>(data);
  const int64_t begin = share.begin + static_cast<int64_t>(index) * share.grain;
  const int64_t end = begin + share.grain < share.end ? begin + share.grain : share.end;
  share.body(begin, end, share.context);
}

int32_t parallel_for(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(int64_t, int64_t, void *), void *context) {
  Share share{begin, end, grain, body, context};
  const size_t shares = static_cast<size_t>((end - begin + grain - 1) / grain);
  if (shares == 1) {
    body(begin, end, context);
    return 0;
  }
  return call(kParallelFor, current_context, run_share, shares, size_t{0},
              static_cast<void *>(&share)) != nullptr;
}

struct Kernel {
  Problem problem{};  // the attributes; sizes come with each call

  // Returns a status, null for success.
  void *compute(void *context) const {
    size_t count;
    call(kGetInputCount, static_cast<const void *>(context), &count);
    const void *inputs[4] = {};
    std::vector<int64_t> shapes[4];
    for (size_t i = 0; i < count; ++i) {
      const void *value = nullptr;
      call(kGetInput, static_cast<const void *>(context), i, &value);
      if (!value) continue;
      shapes[i] = shape(value);
      void *data;
      call(kGetTensorMutableData, const_cast<void *>(value), &data);
      inputs[i] = data;
    }
    Problem p = problem;
    const std::vector<int64_t> &input = shapes[0], &second = shapes[1];
    const bool fused = second.size() == 4;  // a reduced map instead of kernels
    p.batch = input[0];
    p.channels = input[1];
    p.input[0] = input[2];
    p.input[1] = input[3];
    const size_t spatial = fused ? 2 : 4;
    p.output[0] = second[spatial];
    p.output[1] = second[spatial + 1];
    if (fused) {
      p.reduced = second[1];
      p.groups = shapes[2][0] / (p.kernel[0] * p.kernel[1]);
    } else {
      p.groups = second[1];
      p.kernel[0] = second[2];
      p.kernel[1] = second[3];
    }
    const int64_t sizes[4] = {p.batch, p.channels, p.output[0], p.output[1]};
    void *output, *data;
    call(kGetOutput, context, size_t{0}, static_cast<const int64_t *>(sizes), size_t{4},
         &output);
    call(kGetTensorMutableData, output, &data);
    current_context = context;
    if (involution(kForward, kFloat32, &p, inputs, data, parallel_for, 1) != 0)
      return call(kCreateStatus, 1, "mmcls_involution: no memory for an involution");
    return nullptr;
  }
};

template <size_t inputs>
void *create_kernel(const CustomOp *, void *const *, const void *info, void **out) {
  Kernel *kernel = new Kernel;
  *out = kernel;
  Problem &p = kernel->problem;
  struct {
    const char *name;
    int64_t *values;
  } attributes[] = {{"kernel_shape", p.kernel},
                    {"strides", p.stride},
                    {"pads", p.padding},
                    {"dilations", p.dilation}};
  for (auto &attribute : attributes) {
    // Kernels that are an input have their shape from it.
    if (inputs == 2 && attribute.values == p.kernel) continue;
    size_t size = 2;
    void *status =
        call(kGetAttributeArrayInt64, info, attribute.name, attribute.values, &size);
    if (status) {
      delete kernel;
      return status;
    }
  }
  return nullptr;
}

template <size_t inputs>
CustomOp describe() {
  CustomOp op{};
  op.version = 16;
  op.create_kernel_v2 = create_kernel<inputs>;
  op.name = [](const CustomOp *) {
    return inputs == 2 ? "Involution2d" : "FusedInvolution2d";
  };
  op.provider = [](const CustomOp *) -> const char * { return nullptr; };  // the CPU
  op.input_type = [](const CustomOp *, size_t) { return 1; };              // float
  op.input_count = [](const CustomOp *) { return inputs; };
  op.output_type = op.input_type;
  op.output_count = [](const CustomOp *) { return size_t{1}; };
  op.compute_v2 = [](void *kernel, void *context) {
    return static_cast<Kernel *>(kernel)->compute(context);
  };
  op.destroy = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
  // The fourth input, the bias, is optional.
  op.input_characteristic = [](const CustomOp *, size_t i) { return i == 3 ? 1 : 0; };
  op.output_characteristic = [](const CustomOp *, size_t) { return 0; };
  op.input_memory = op.output_characteristic;
  op.input_arity = [](const CustomOp *) { return 1; };
  op.input_homogeneity = op.input_arity;
  op.output_arity = op.input_arity;
  op.output_homogeneity = op.input_arity;
  return op;
}

}  // namespace

// What SessionOptions.register_custom_ops_library looks for.
extern "C" __attribute__((visibility("default")))
void *RegisterCustomOps(void *options, const ApiBase *base) {
  static const CustomOp given = describe<2>(), fused = describe<4>();
  void *const *found = base->get_api(kApiVersion);
  if (!found) {  // older: version 1 has what says so
    api = base->get_api(1);
    return call(kCreateStatus, 1, "mmcls_involution needs ONNX Runtime 1.17 or later");
  }
  api = found;
  void *domain, *status;
  if ((status = call(kCreateCustomOpDomain, "mmcls_involution", &domain))) return status;
  for (const CustomOp *op : {&given, &fused})
    if ((status = call(kCustomOpDomainAdd, domain, op))) return status;
  return call(kAddCustomOpDomain, options, domain);
}
