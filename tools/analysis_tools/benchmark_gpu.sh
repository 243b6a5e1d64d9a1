#!/usr/bin/env bash
# All that docs/benchmarks.md says about a GPU: its tests, then its figures, in OUT.
#
#     [PYTHON=python] [OUT=work_dirs/gpu] tools/analysis_tools/benchmark_gpu.sh
#
# Needs torch for CUDA with its Triton, and one NVIDIA GPU of 80 GB; CuPy for the plain
# CUDA kernels; MMEngine, MMCV (mmcv-lite will do), MMPretrain for the networks.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-work_dirs/gpu}
TOOLS=tools/analysis_tools
IMAGES="128x224x224 2x800x1216 2x512x1024"
NETWORKS="128x3x224x224 2x3x800x1216"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"

$PYTHON -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit(f"torch {torch.__version__} finds no GPU")'
failed=0
$PYTHON -m pytest -q tests/test_ops 2>&1 | tee "$OUT/tests.txt" || failed=1
for dtype in fp32 bf16; do
  for layout in "" --channels-last; do
    name=op_$dtype${layout:+_channels_last}
    $PYTHON $TOOLS/benchmark_op.py --device cuda --image $IMAGES --dtype $dtype \
      $layout --out "$OUT/$name.csv" 2>&1 | tee "$OUT/$name.txt"
  done
done
$PYTHON $TOOLS/benchmark_model.py --device cuda --amp --rounds 20 \
  --shape $NETWORKS --out "$OUT/model_amp.csv" 2>&1 | tee "$OUT/model_amp.txt"
growth=""
for side in 256 512 768 1024; do growth="$growth 8x${side}x$side"; done
$PYTHON $TOOLS/benchmark_op.py --device cuda --image $growth --dtype bf16 \
  --backend triton --channels-last --out "$OUT/growth_op.csv" 2>&1 | tee "$OUT/growth_op.txt"
$PYTHON $TOOLS/benchmark_model.py --device cuda --amp --rounds 20 --treatment eager \
  --shape ${growth//8x/8x3x} --out "$OUT/growth_model.csv" 2>&1 | tee "$OUT/growth_model.txt"
echo "Written: $OUT"
[ $failed = 0 ] || echo "The tests failed: see $OUT/tests.txt"
exit $failed
