#!/usr/bin/env bash
# Trains what nightly.json says, and exports it only when it got better than the model it began with.
#
#   nightly.sh [CONFIG.json] [FOLDER]
#
# FOLDER (default: the working directory) gets runs/, summary.json, train.log and, when all went well, model/.
# Exit code: that of the step that failed, as whet gives it; 3 when the tuned model is no better.
set -uo pipefail

config=$(realpath "${1:-$(dirname "${BASH_SOURCE[0]}")/nightly.json}")
cd "${2:-.}" || exit 2

# A run that was stopped is taken up again: by a signal, or by a power cut, after which there is no summary.
resume=()
if [ -d runs/nightly/checkpoints ] && [ -f summary.json ]; then
    case $(sed -n 's/.*"status": "\(.*\)".*/\1/p' summary.json) in stopped | '') resume=(--resume) ;; esac
fi

whet train --config-json "$config" --json "${resume[@]}" >summary.json 2>>train.log
code=$?
if [ $code != 0 ]; then
    echo "whet train ended with $code; the reason is in $PWD/summary.json" >&2
    exit $code
fi

python3 - summary.json <<'PYTHON' || exit 3
import json
import sys

scores = json.load(open(sys.argv[1]))["evaluation"]
base, tuned = scores["base"]["perplexity"], scores["tuned"]["perplexity"]
print(f"perplexity on held-out rows: {base:.3f} before, {tuned:.3f} after")
sys.exit(tuned >= base)
PYTHON

rm -rf model.new
whet export runs/nightly --to merged --out model.new >>train.log 2>&1 || exit
rm -rf model.old
if [ -d model ]; then mv model model.old; fi
mv model.new model
# Earlier runs are kept aside as nightly.1, nightly.2, ...; those of the last two weeks stay.
find runs -maxdepth 1 -name 'nightly.*' -mtime +14 -exec rm -r {} +
