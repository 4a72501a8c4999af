#!/usr/bin/env bash
# Measures each kind of ensemble beside its limit and its rivals: `benchmarks/limits.sh FOLDER`, then tables lie in
# FOLDER/results-limits.
#
# FOLDER holds four models with one tokenizer, `base`, `math` and `code` of equal size and the small `draft`, and rows of
# the tasks, `gsm8k.jsonl` and `humaneval.jsonl`, with the fields of their Hub versions. Names of arguments after it
# choose parts: two three greedy early weight contrastive product steering batch8 batch16. Interrupted, it goes on where it was.
#
# PROMPTS (16) of each task, TOKENS (128), THREADS (2), DTYPE (float32; bfloat16, or auto for the faster), and DATA
# (FOLDER) with the rows. A short version, some minutes on two cores:
#
#     PROMPTS=2 TOKENS=24 benchmarks/limits.sh FOLDER two early weight
set -euo pipefail
folder=$(realpath "$1")
data=$(realpath "${DATA:-$folder}")
shift
prompts=${PROMPTS:-16} dtype=${DTYPE:-float32}
results=${RESULTS:-$folder/results-limits/$dtype}

part() { # NAME MEMBERS.. -- OPTIONS..
    local name=$1 members=()
    shift
    while [ "$1" != -- ]; do members+=("$folder/$1"); shift; done
    shift
    python -m hf_spec_ensemble.bench --members "${members[@]}" --tasks gsm8k humaneval --shots 0 \
        --data-file gsm8k="$data/gsm8k.jsonl" humaneval="$data/humaneval.jsonl" --num-prompts "$prompts" \
        --max-new-tokens "${TOKENS:-128}" --threads "${THREADS:-2}" --dtype "$dtype" --out "$results/$name" "$@"
}

batch() { # SIZE: at least two batches, or medians mean nothing
    local prompts=$((prompts > 2 * $1 ? prompts : 2 * $1))
    part "batch$1" base math -- --batch-sizes "$1" --temperatures 0 1 --compare auto drafter:none
}

[ $# -gt 0 ] || set -- two three greedy early weight contrastive product steering batch8 batch16
for each; do
    case $each in
        two) part two base math -- --temperatures 1 --compare auto drafter:none loop ;;
        three) part three base math code -- --temperatures 1 --compare auto drafter:none loop ;;
        greedy) part greedy base math code -- --compare auto drafter:none ;;
        early) part early base math -- --weights 0.7 0.3 --compare auto drafter:none ;;
        weight) part weight base math -- --compare auto drafter:none ensemble-weight:3 ensemble-weight:5 ensemble-weight:8 ;;
        contrastive) part contrastive base draft -- --method contrastive --contrast 0.1 --temperatures 0 1 --compare auto drafter:none ;;
        product) part product base math -- --method product --temperatures 0 1 --compare auto drafter:none ;;
        steering) part steering code math base -- --method product --weights 1 1 -1 --compare auto drafter:none ;;
        batch8) batch 8 ;;
        batch16) batch 16 ;;
        *) echo "There is no part $each." >&2; exit 1 ;;
    esac
done
