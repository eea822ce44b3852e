#!/usr/bin/env bash
# The figures of training that need GPUs: `gpu_training.sh two OUT` on a host of two (about three minutes),
# `gpu_training.sh fashion OUT FOLDER` on one, FOLDER holding Fashion-MNIST's IDX files (about two and a half).
set -euo pipefail
what=$1 out=$2
export OMP_NUM_THREADS=1
here=$(dirname "$0")
mkdir -p "$out"
case $what in
two)
    CUDA_VISIBLE_DEVICES=0 python "$here/data_parallel.py" --output "$out" --compile --compile_mode reduce-overhead --workers 15
    python -m torch.distributed.run --nproc-per-node 2 "$here/data_parallel.py" --output "$out" --compile \
        --compile_mode reduce-overhead --workers 15 \
        --compare "$out/1.json"
    python -m torch.distributed.run --nproc-per-node 2 "$here/data_parallel.py" --output "$out" --model vmamba_nano \
        --img_size 64 --batch 32 --parallel fsdp --skip gradients,decoded --workers 2
    python "$here/loader.py" --workers 0 8 16 30 --seconds 3 --output "$out/loader.json"
    python "$here/engine_overhead.py" --model vmamba_tiny --batch 128 --img_size 224 --precision bf16 --steps 30
    ;;
fashion)
    python "$here/small_models.py" --data "$3" --output "$out/warm.csv" --seeds 0 --epochs 1
    for seed in 0 1 2; do # bound by launches, not by the GPU: three at a time
        python "$here/small_models.py" --data "$3" --output "$out/seed$seed.csv" --seeds "$seed" --epochs 15 &
    done
    wait
    cat "$out"/seed?.csv
    ;;
*)
    echo "gpu_training.sh: the first word must be two or fashion, not $what" >&2
    exit 2
    ;;
esac
