#!/usr/bin/env bash
# Measures what this folder shows: `benchmarks/run.sh FOLDER`, then results lie in FOLDER/results.
#
# FOLDER holds four models with one tokenizer, `base`, `math` and `code` of equal size and the small `draft`, and rows of
# the tasks, `gsm8k.jsonl` and `humaneval.jsonl`, with the fields of their Hub versions. Names of arguments after it
# choose parts: weighted contrastive three steering prompts batch8 copy float32 compared compiled curves. Interrupted, it goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"
shift

bench() { python -m hf_spec_ensemble.bench --num-prompts 20 --threads 2 "$@"; }
tasks=(--tasks gsm8k humaneval --data-file gsm8k=gsm8k.jsonl humaneval=humaneval.jsonl --shots 0 --run-model-code)

[ $# -gt 0 ] || set -- weighted contrastive three steering prompts batch8 copy float32 compared compiled curves
for part; do
    out=(--out "results/$part")
    case $part in
        weighted) bench "${tasks[@]}" "${out[@]}" --members ./base ./math --dtype bfloat16 --temperatures 0 1 --compare standard auto ;;
        contrastive) bench "${tasks[@]}" "${out[@]}" --members ./base ./draft --dtype bfloat16 --method contrastive --contrast 0.1 --compare standard auto ;;
        batch8) bench "${tasks[@]}" "${out[@]}" --members ./base ./math --dtype bfloat16 --batch-sizes 8 --num-prompts 24 --compare standard auto ;;
        copy) bench --tasks copy "${out[@]}" --data-file copy=humaneval.jsonl --members ./base ./math --dtype bfloat16 --compare standard auto drafter:prompt_lookup ;;
        three) bench "${tasks[@]}" "${out[@]}" --members ./base ./math ./code --dtype bfloat16 --compare standard auto ;;
        steering) bench "${tasks[@]}" "${out[@]}" --members ./code ./math ./base --dtype bfloat16 --method product --weights 1 1 -1 --compare standard auto ;;
        prompts) mkdir -p results/prompts && python "$here/guidance.py" . | tee results/prompts/table.md ;;
        float32) bench "${tasks[@]}" "${out[@]}" --members ./base ./math --compare standard auto ;;
        compared) bench "${tasks[@]}" "${out[@]}" --members ./base ./math --dtype bfloat16 --num-prompts 12 --compare standard auto members fixed:1 fixed:5 no-alternate:1 no-alternate:5 drafter:prompt_lookup drafter:./draft ensemble-weight:1 ensemble-weight:2 ensemble-weight:5 assisted:5 ;;
        compiled)
            compiled() { bench --members ./base ./math --num-prompts "$1" --compare standard auto compiled:standard compiled:auto --freeze "${@:2}"; }
            compiled 8 "${tasks[@]}" --dtype bfloat16 --out results/compiled
            compiled 6 --tasks gsm8k --data-file gsm8k=gsm8k.jsonl --shots 0 --out results/compiled-float32
            ;;
        curves)
            curve() { bench --tasks gsm8k --data-file gsm8k=gsm8k.jsonl --shots 0 --dtype bfloat16 --members "${@:2}" --curve "$1" --out "results/curve-$1"; }
            curve members ./base ./math ./code --max-new-tokens 64 --num-prompts 4
            curve batch ./base ./math --max-new-tokens 64 --num-prompts 16
            curve prompt-length ./base ./math --max-new-tokens 64 --num-prompts 4
            curve proposal-length ./base ./math --max-new-tokens 64 --num-prompts 4
            ;;
        *) echo "There is no part $part." >&2; exit 1 ;;
    esac
done
