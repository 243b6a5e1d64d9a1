// The forward kernels as custom operators of ONNX Runtime, in the same library.
//
// No package that pip installs has ONNX Runtime's headers, so the few parts of its C
// interface that are needed are declared here. The interface only grows at its end, and
// who asks for version 17 gets that one's layout for good: ONNX Runtime 1.17 and later.

#include <cstddef>
#include <string>
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

// The status that ONNX Runtime makes an exception of.
void *refuse(const std::string &message) {
  const int invalid_argument = 2;
  return call(kCreateStatus, invalid_argument, ("mmcls_involution: " + message).c_str());
}

// This and what follows returns a status, null for success.
void *get_shape(const void *value, std::vector<int64_t> &sizes) {
  void *info, *status;
  if ((status = call(kGetTensorTypeAndShape, value, &info))) return status;
  const void *known = info;
  size_t rank;
  if (!(status = call(kGetDimensionsCount, known, &rank))) {
    sizes.resize(rank);
    status = call(kGetDimensions, known, sizes.data(), rank);
  }
  call<void>(kReleaseTensorTypeAndShapeInfo, info);
  return status;
}

template <typename Sizes>
std::string text(const Sizes &sizes) {
  std::string joined;
  for (int64_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  return "[" + joined + "]";
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
  bool fused;         // a reduced map and a span instead of kernels
  Problem problem{};  // the attributes; sizes come with each call

  // Completes `p` by the inputs' shapes, or refuses them. A file can be wrong where
  // PyTorch cannot: these are the checks of ops/checks.py.
  void *add_sizes(const std::vector<int64_t> *shapes, bool has_bias, Problem &p) const {
    const std::vector<int64_t> &input = shapes[0], &second = shapes[1], &span = shapes[2],
                               &bias = shapes[3];
    const std::string name = fused ? "reduced" : "weight";
    if (input.size() != 4)
      return refuse("input must be [N, C, H, W], got shape " + text(input));
    if (second.size() != (fused ? 4 : 6))
      return refuse(name + " must be " +
                    (fused ? "[N, R, Ho, Wo]" : "[N, G, Kh, Kw, Ho, Wo]") +
                    ", got shape " + text(second));
    p.batch = input[0];
    p.channels = input[1];
    if (second[0] != p.batch)
      return refuse(name + " must have the batch size of input, " +
                    std::to_string(p.batch) + ", got shape " + text(second));
    if (fused) {
      p.reduced = second[1];
      const int64_t taps = p.kernel[0] * p.kernel[1];
      if (p.reduced < 1 || span.size() != 4 || span[1] != p.reduced || span[2] != 1 ||
          span[3] != 1 || span[0] % taps != 0)
        return refuse("weight must be [G*Kh*Kw, R, 1, 1] with Kh*Kw = " +
                      std::to_string(taps) + " and R = " + std::to_string(p.reduced) +
                      ", the channels of reduced, got shape " + text(span));
      if (has_bias && (bias.size() != 1 || bias[0] != span[0]))
        return refuse("bias must have one value per row of weight, " +
                      std::to_string(span[0]) + ", got shape " + text(bias));
      p.groups = span[0] / taps;
    } else {
      p.groups = second[1];
      p.kernel[0] = second[2];
      p.kernel[1] = second[3];
    }
    if (p.channels < 1 || p.groups < 1 || p.channels % p.groups != 0)
      return refuse("the groups of weight must divide the channels of input, " +
                    std::to_string(p.channels) + ", got " + std::to_string(p.groups));
    int64_t expected[2];
    for (int i = 0; i < 2; ++i) {
      p.input[i] = input[2 + i];
      p.output[i] = second[(fused ? 2 : 4) + i];
      const int64_t room =
          p.input[i] + 2 * p.padding[i] - p.dilation[i] * (p.kernel[i] - 1) - 1;
      if (p.input[i] < 1 || p.kernel[i] < 1 || room < 0)
        return refuse("a kernel of size " + text(p.kernel) + ", pads " + text(p.padding) +
                      " and dilations " + text(p.dilation) +
                      " does not fit into an input of shape " + text(input));
      expected[i] = room / p.stride[i] + 1;
    }
    if (p.output[0] != expected[0] || p.output[1] != expected[1])
      return refuse(name + " must hold one kernel per output pixel, " + text(expected) +
                    " for an input of shape " + text(input) + ", kernel_shape " +
                    text(p.kernel) + ", strides " + text(p.stride) + ", pads " +
                    text(p.padding) + " and dilations " + text(p.dilation) + ", got " +
                    text(p.output));
    return nullptr;
  }

  void *compute(void *context) const {
    const void *known = context;
    void *status;
    size_t count;
    if ((status = call(kGetInputCount, known, &count))) return status;
    const void *inputs[4] = {};
    std::vector<int64_t> shapes[4];
    for (size_t i = 0; i < count && i < 4; ++i) {
      const void *value = nullptr;
      if ((status = call(kGetInput, known, i, &value))) return status;
      if (!value) continue;
      if ((status = get_shape(value, shapes[i]))) return status;
      void *data;
      if ((status = call(kGetTensorMutableData, const_cast<void *>(value), &data)))
        return status;
      inputs[i] = data;
    }
    Problem p = problem;
    if ((status = add_sizes(shapes, inputs[3] != nullptr, p))) return status;
    const int64_t sizes[4] = {p.batch, p.channels, p.output[0], p.output[1]};
    const int64_t *begin = sizes;
    void *output, *data;
    if ((status = call(kGetOutput, context, size_t{0}, begin, size_t{4}, &output)))
      return status;
    if ((status = call(kGetTensorMutableData, output, &data))) return status;
    current_context = context;
    if (involution(kForward, kFloat32, &p, inputs, data, parallel_for, 1) != 0)
      return call(kCreateStatus, 1, "mmcls_involution: no memory for an involution");
    return nullptr;
  }
};

template <size_t inputs>
void *create_kernel(const CustomOp *, void *const *, const void *info, void **out) {
  Problem p{};
  struct {
    const char *name;
    int64_t *values, lowest;
  } attributes[] = {{"kernel_shape", p.kernel, 1},
                    {"strides", p.stride, 1},
                    {"pads", p.padding, 0},
                    {"dilations", p.dilation, 1}};
  for (auto &attribute : attributes) {
    // Kernels that are an input have their shape from it.
    if (inputs == 2 && attribute.values == p.kernel) continue;
    size_t size = 0;
    int64_t *none = nullptr;  // asks for the size alone
    void *status = call(kGetAttributeArrayInt64, info, attribute.name, none, &size);
    if (status) return status;
    std::vector<int64_t> values(size);
    status = call(kGetAttributeArrayInt64, info, attribute.name, values.data(), &size);
    if (status) return status;
    // Kernels count in 64-bit numbers, and multiply.
    const int64_t lowest = attribute.lowest, most = INT32_MAX;
    for (size_t i = 0; i < size && i < 2; ++i) attribute.values[i] = values[i];
    if (size != 2 || values[0] < lowest || values[1] < lowest || values[0] > most ||
        values[1] > most)
      return refuse(std::string(attribute.name) + " must be 2 numbers from " +
                    std::to_string(lowest) + " to " + std::to_string(most) + ", got " +
                    text(values));
  }
  *out = new Kernel{inputs == 4, p};
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
