#!/usr/bin/env bash
# What one NVIDIA GPU is asked: are the kernels right, how fast is each, how fast is Flash.
#
#   benchmarks/gpu.sh kernels|exact|model|whole [DIR]      writes DIR/*.json and *.txt
#
# kernels: each alone, and every launch of a token and of a chunk, by Nsight Compute (in $NCU or on the PATH).
# exact: decoding against the references, and what bfloat16 loses. model: every kernel against its plain body.
# whole: all layers of Flash with random weights, q2 and the formats of ds4's file; takes 100 GB.
# Each part compiles first what it launches, many kernels at a time; a step that takes too long is ended.
set -uo pipefail
cd "$(dirname "$0")/.."
part="${1:?kernels, exact, model or whole}" out="${2:-benchmarks/results/gpu}"
mkdir -p "$out"
python="${PYTHON:-python3}"
export MLX_ENABLE_TF32=0 DS4MLX_KERNELS=1 PYTHONUNBUFFERED=1
# A token is thousands of small objects of the host: another allocator takes a fifth off its time, or, where
# there is none, larger caches of the C library's a tenth.
tcmalloc="$(ldconfig -p | awk '/libtcmalloc_minimal\.so/ { print $NF; exit }')"
export LD_PRELOAD="${LD_PRELOAD:-$tcmalloc}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.tcache_count=60000}"
export MLX_PTX_CACHE_DIR="${MLX_PTX_CACHE_DIR:-/tmp/ds4mlx-ptx}"
export PYTHONPATH="$PWD:$PWD/tests:$PWD/oracle${PYTHONPATH:+:$PYTHONPATH}"

step() { # seconds, name, command...
    local seconds="$1" name="$2" begun=$SECONDS
    shift 2
    timeout -k 5 "$seconds" "$@" >"$out/$name.txt" 2>"$out/$name.err" </dev/null
    echo "$name: exit $? after $((SECONDS - begun)) s; $(tail -n 1 "$out/$name.txt")"
}
ahead() { step 90 "compiled_$1" "$python" benchmarks/prebuild.py "${@:2}"; }
measure() { step "$1" "$2" "$python" "benchmarks/$3" "${@:4}" --results "$out/$2.json"; }

case "$part" in
kernels)
    ahead launches benchmarks/flash_launches.py
    measure 90 gpu_time kernel_gpu_time.py
    for batch in 1 4; do measure 60 "token_$batch" step_gpu_time.py --batch "$batch"; done
    for chunk in 512 2048 4096; do measure 90 "chunk_$chunk" step_gpu_time.py --depth 8192 --chunk "$chunk"; done
    ahead attention benchmarks/prefill_attention.py
    measure 90 attention prefill_attention.py
    measure 90 chunk_deep step_gpu_time.py --depth 65536 --chunk 2048
    ;;
exact)
    ahead kl benchmarks/kernel_model.py --tokens 2100 --decoded 600
    measure 240 kernel_model kernel_model.py
    step 240 tests "$python" -m pytest -q -o addopts= -p no:cacheprovider tests/test_step_exact.py \
        --deselect tests/test_step_exact.py::test_a_token_as_metals_own_text
    ;;
model)
    step 300 equality "$python" benchmarks/kernel_equality.py --jobs "${JOBS:-8}" --results "$out/kernel_equality.json"
    ;;
whole)
    ahead launches benchmarks/flash_launches.py
    measure 330 full_q2 full_model.py
    ahead launches_keep benchmarks/flash_launches.py --recipe keep
    measure 120 full_keep full_model.py --recipe keep --prompts 2048 --deep "" --batches ""
    ;;
*)
    echo "kernels, exact, model or whole" >&2
    exit 2
    ;;
esac
