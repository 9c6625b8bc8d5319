#!/usr/bin/env bash
# What one NVIDIA GPU is asked about the kernels, in about a quarter of an hour: are they right, how fast is
# each, and how fast are a few layers of Flash with and without them.
#
#   benchmarks/gpu.sh [DIR]      writes DIR/*.json and *.txt (default benchmarks/results/gpu)
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results/gpu}"
mkdir -p "$out"
python="${PYTHON:-python3}"
export MLX_ENABLE_TF32=0 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
layers="${LAYERS:-4}"

step() { # seconds, name, command...
    local seconds="$1" name="$2" begun=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>"$out/$name.err"
    echo "$name: exit $? after $((SECONDS - begun)) s; $(tail -n 1 "$out/$name.txt")"
}
run=("$python" -c "from ds4mlx.cli.main import main; main()")

if command -v "${NCU:-ncu}" >/dev/null; then
    step 90 gpu_time "$python" benchmarks/kernel_gpu_time.py --results "$out/kernel_gpu_time.json"
fi
step 150 equality "$python" benchmarks/kernel_equality.py --jobs "${JOBS:-8}" --results "$out/kernel_equality.json"
unset MLX_ENABLE_TF32
step 240 kernels "${run[@]}" bench --kernels --json
synth=(synth --like flash --layers "$layers" --in-memory --bench --gen 16 --json)
for recipe in q2 keep; do
    step 150 "synth_$recipe" "${run[@]}" "${synth[@]}" --recipe "$recipe" --prompt 512,2048
    step 150 "synth_${recipe}_plain" "${run[@]}" "${synth[@]}" --recipe "$recipe" --prompt 512 --plain
done
step 150 synth_deep "${run[@]}" "${synth[@]}" --recipe q2 --prompt 32768 --fill synthetic
MLX_ENABLE_TF32=0 step 300 model "$python" benchmarks/kernel_model.py --results "$out/kernel_model.json"
