// Choice of instruction set, threads, and the C interface.

#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "involution.h"

#define DECLARE(ISA)                                                                    \
  namespace ISA {                                                                       \
  int64_t tile_count(Operation, const Problem &);                                       \
  bool run_tiles(Operation, DType, const Problem &, int64_t, int64_t,                   \
                 const void *const *, void *);                                          \
  }

DECLARE(baseline)
#ifdef __x86_64__
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace {

struct InstructionSet {
  const char *name;
  decltype(&baseline::tile_count) tile_count;
  decltype(&baseline::run_tiles) run_tiles;
};

// Those of this machine, the best one first.
std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    sets.push_back({"avx512", avx512::tile_count, avx512::run_tiles});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    sets.push_back({"avx2", avx2::tile_count, avx2::run_tiles});
#endif
  sets.push_back({"baseline", baseline::tile_count, baseline::run_tiles});
  return sets;
}

InstructionSet &instruction_set() {
  static InstructionSet chosen = supported().front();
  return chosen;
}

struct Job {
  Operation operation;
  DType dtype;
  const Problem *problem;
  const void *const *inputs;
  void *out;
  std::atomic<bool> failed{false};
};

void work(int64_t begin, int64_t end, void *context) {
  Job &job = *static_cast<Job *>(context);
  if (!instruction_set().run_tiles(job.operation, job.dtype, *job.problem, begin, end,
                                   job.inputs, job.out))
    job.failed = true;
}

}  // namespace

int32_t involution(Operation operation, DType dtype, const Problem *problem,
                   const void *const inputs[4], void *out, ParallelFor parallel_for,
                   int32_t threads) {
  Job job{operation, dtype, problem, inputs, out};
  const Problem &p = *problem;
  const int64_t tiles = instruction_set().tile_count(operation, p);
  if (tiles == 0) return 0;
  // Waking a thread costs about as much as this many multiplications.
  const int64_t worth = 1 << 18;
  const int64_t multiplications =
      p.batch * p.channels * p.kernel[0] * p.kernel[1] * p.output[0] * p.output[1];
  const int64_t grain = 1 + worth / (1 + multiplications / tiles);
  if (parallel_for) {
    if (parallel_for(0, tiles, grain, work, &job) != 0) return 1;
  } else {
    const int64_t by_thread = (tiles + threads - 1) / threads;
    const int64_t share = by_thread > grain ? by_thread : grain;
    std::vector<std::thread> others;
    int64_t begin = share < tiles ? share : tiles, own = begin;
    try {
      others.reserve((tiles - 1) / share);
      for (; begin < tiles; begin += share)
        others.emplace_back(work, begin, begin + share < tiles ? begin + share : tiles, &job);
    } catch (const std::exception &) {
      // No more threads or memory to be had: the rest is this thread's.
      work(begin, tiles, &job);
    }
    work(0, own, &job);
    for (std::thread &other : others) other.join();
  }
  return job.failed ? 1 : 0;
}

const char *involution_instruction_set() { return instruction_set().name; }

int32_t involution_use_instruction_set(const char *name) {
  for (const InstructionSet &set : supported())
    if (std::strcmp(set.name, name) == 0) {
      instruction_set() = set;
      return 0;
    }
  return 1;
}
