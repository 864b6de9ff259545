#!/usr/bin/env bash
# What is worth measuring on a borrowed GPU, the most valuable part first, each in under eight minutes.
#
#   bash benchmarks/gpu.sh [--dry-run] [PART ...]    run the parts named, or all of them
#   bash benchmarks/gpu.sh --list                    name the parts
#
# Variables: PYTHON, the interpreter (default python3; whet itself need not be installed), and RESULTS_DIR
# (default benchmarks/results/gpu-DATE). A part that is done there is skipped, a part that fails does
# not stop the others, and what was found is summed up at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS_DIR=${RESULTS_DIR:-benchmarks/results/gpu-$(date +%F)}
LIMIT=470 # seconds of a part
PARTS=(tests kernels whet-hf-1b whet-hf-8b peers-8b peers-1b contexts contexts-hf
    contexts-large kernels-full)

# Set `words` to what a part runs and `about` to what it is.
describe() {
    local peers=("$PYTHON" -m benchmarks.peers --here --at-once 2 --variants default)
    local contexts=("$PYTHON" -m benchmarks.contexts --here --model llama-3.1-8b --nf4)
    local out="$RESULTS_DIR/$1"
    # One file for all three parts: what one has measured the next leaves out.
    contexts+=(--json "$RESULTS_DIR/contexts.json")
    case $1 in
    tests)
        about="the tests that need a GPU"
        words=("$PYTHON" -m pytest -m gpu -q -p no:cacheprovider)
        ;;
    kernels)
        about="each kernel against eager torch and Liger"
        words=("$PYTHON" -m benchmarks.kernels --quick --json "$out.json")
        ;;
    whet-hf-1b)
        about="steps of whet and transformers, Llama 3.2 1B, LoRA"
        words=("${peers[@]}" --peers hf --workloads llama-3.2-1b-lora --out "$out")
        ;;
    whet-hf-8b)
        about="steps of whet and transformers, Llama 3.1 8B, QLoRA"
        words=("${peers[@]}" --peers hf --workloads llama-3.1-8b-qlora --out "$out")
        ;;
    peers-8b)
        about="the same with Unsloth, trl and Liger, 8B"
        words=("${peers[@]}" --peers hf,unsloth,trl,liger --workloads llama-3.1-8b-qlora
            --no-evaluation --out "$out")
        ;;
    peers-1b)
        about="the same with Unsloth, trl and Liger, 1B"
        words=("${peers[@]}" --peers hf,unsloth,trl,liger --workloads llama-3.2-1b-lora
            --no-evaluation --out "$out")
        ;;
    contexts)
        about="the longest context of 8B QLoRA in 8, 16 and 24 GiB, whet and Unsloth"
        words=("${contexts[@]}" --memory 8,24,16 --peers whet,unsloth --limit 68)
        ;;
    contexts-hf)
        about="the same of transformers, and 12 GiB"
        words=("${contexts[@]}" --memory 8,24,12,16 --peers whet,hf,unsloth --limit 68)
        ;;
    contexts-large)
        about="the same in 40 and 80 GiB"
        words=("${contexts[@]}" --memory 40,80 --peers whet,unsloth --limit 110)
        ;;
    kernels-full)
        about="each kernel again, with torch.compile and more rounds"
        words=("$PYTHON" -m benchmarks.kernels --json "$out.json")
        ;;
    *) return 1 ;;
    esac
}

run_part() {
    local part=$1 began=$SECONDS code
    if [ -e "$RESULTS_DIR/$part.done" ]; then
        echo "== $part: done already ($RESULTS_DIR/$part.done)"
        return
    fi
    echo "== $part: $about"
    timeout -k 10 $LIMIT "${words[@]}" 2>&1 | tee "$RESULTS_DIR/$part.log"
    code=${PIPESTATUS[0]}
    case $code in
    0) echo "$((SECONDS - began)) s" >"$RESULTS_DIR/$part.done" ;;
    124 | 137) echo "== $part: not done in $LIMIT s; what it wrote is kept" ;;
    *) echo "== $part: failed with code $code" ;;
    esac
}

dry= parts=() words=() about=
for word in "$@"; do
    case $word in
    --list)
        for part in "${PARTS[@]}"; do
            describe "$part"
            printf '%-15s %s\n' "$part" "$about"
        done
        exit
        ;;
    --dry-run) dry=yes ;;
    *)
        describe "$word" || { echo "there is no part '$word'; use ${PARTS[*]}" >&2; exit 2; }
        parts+=("$word")
        ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${PARTS[@]}")

if [ -n "$dry" ]; then
    for part in "${parts[@]}"; do
        describe "$part"
        echo "$part: timeout -k 10 $LIMIT$(printf ' %q' "${words[@]}")"
    done
    exit
fi
found=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())' 2>&1 | tail -n 1)
if [ "$found" != True ]; then
    [ "$found" = False ] && found="no CUDA device"
    for part in "${parts[@]}"; do
        echo "$part: left out, $found"
    done
    exit 1
fi
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false UNSLOTH_DISABLE_STATISTICS=1
mkdir -p "$RESULTS_DIR"
for part in "${parts[@]}"; do
    describe "$part"
    run_part "$part"
done
"$PYTHON" -m benchmarks.summary "$RESULTS_DIR"
