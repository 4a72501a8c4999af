"""Trains the embedded family: a tokenizer and three tiny language models of grade-school maths problems.

    python -m hf_spec_ensemble.demo.train                          # rows of openai/gsm8k from the Hub
    python -m hf_spec_ensemble.demo.train --data train.jsonl       # the same rows from a file

Writes `reader` and `solver` (same size, one trunk, then one learns more of the questions and the other the answers
only) and `draft` (a sixth of the size, distilled from the trunk) to the folder of this file. Under an hour on
two cores. Needs the `demo` extra (datasets).
"""

import argparse
import copy
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import FAMILY


CONTEXT = 256  # tokens of a training window
BATCH = 32  # windows of a training step
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('Question: ' if message.role == 'user' else 'Answer: ') + message.content + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def load_rows(data: str | None) -> list[tuple[str, str]]:
    """(question, answer) pairs, without GSM8K's calculator annotations (`<<48/2=24>>`)."""
    from datasets import load_dataset

    if data is None:
        rows = load_dataset("openai/gsm8k", "main", split="train")
    else:
        rows = load_dataset("json", data_files=data, split="train")
    return [
        (f"Question: {row['question'].strip()}\n", "Answer: " + re.sub(r"<<.*?>>", "", row["answer"]).strip())
        for row in rows
    ]


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def build(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows in one line of tokens [T], and which of them belong to an answer [T]."""
    ids, in_answer = [], []
    for question, answer in rows:
        q, a = (tokenizer(text).input_ids for text in (question, answer + END))
        ids += q + a
        in_answer += [False] * len(q) + [True] * len(a)
    return torch.tensor(ids), torch.tensor(in_answer)


def train(name, model, ids, weights, steps, lr, teacher=None) -> None:
    """Minimises the weighted cross-entropy, or with a `teacher` the divergence from it, on random windows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH, 1)) + torch.arange(CONTEXT + 1)  # [B, T + 1]
        inputs, targets, weight = ids[starts[:, :-1]], ids[starts[:, 1:]], weights[starts[:, 1:]]
        logits = model(inputs).logits  # [B, T, V]
        if teacher is None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        else:
            with torch.no_grad():
                soft = teacher(inputs).logits.softmax(-1)
            loss = F.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name:8} step {step:5} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a JSON lines file with 'question' and 'answer' (default: openai/gsm8k, Hub)")
    parser.add_argument("--out", type=Path, default=FAMILY, help="folder to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1600, help="training steps of the trunk (default: %(default)s)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    rows = load_rows(args.data)
    tokenizer = train_tokenizer([text for row in rows for text in row])
    ids, in_answer = encode(tokenizer, rows)
    print(f"{len(rows)} problems, {len(ids)} tokens, vocabulary of {len(tokenizer)}")

    everything = torch.ones(len(ids))
    trunk = build(tokenizer, hidden=128, layers=6)
    train("trunk", trunk, ids, everything, args.steps, lr=4e-3)
    family = {"reader": copy.deepcopy(trunk), "solver": copy.deepcopy(trunk), "draft": build(tokenizer, 64, 2)}
    train("reader", family["reader"], ids, everything - 0.7 * in_answer.float(), args.steps // 4, lr=1e-3)
    train("solver", family["solver"], ids, in_answer.float(), args.steps // 4, lr=1e-3)
    train("draft", family["draft"], ids, everything, args.steps, lr=6e-3, teacher=trunk)

    for name, model in family.items():
        model.half().save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        print(f"wrote {args.out / name}: {model.num_parameters() / 1e6:.2f}M parameters")


if __name__ == "__main__":
    main()
