"""A judge that never sees the correct answer. The SFT model goes on behind an observation without the medium,
and its answer is scored by Eq. 4. MoCA (arXiv 2605.14054) rewards perception by such a blindfolded reasoner.

    python docs/exercises/blind_judge.py runs/tiny/evaluate/completions-sft.jsonl  # agreement with the rule
    python pagrpo.py --model tiny --judge docs/exercises/blind_judge.py:blind --output runs/ex/blind

No model is asked for a verdict, so none can be talked round. But an observation that holds the bare answer is
enough for a Yes, and a good one gets a No where the model reasons wrongly.

blind says True from a score of 0.6 on. exact says it for a full score only: a text with one wrong word, or a
number that is nearly right, is a No. The model is a second, frozen one next to the policy, with the adapter
in BLIND_ADAPTER, by default runs/tiny/sft.
"""
import functools
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the stages live two folders up

import sft  # noqa: E402
from gen_cot import build_prompt  # noqa: E402
from pagrpo import rollout  # noqa: E402
from rewards import (RIGHT, accuracy_reward, parse_trace, rule_judge, strip_invisible,  # noqa: E402
                     write_jsonl)

BATCH, MAX_TOKENS = 64, 112  # observations at a time; tokens of a thought and its answer


def blind(records, observations, least=RIGHT):
    """Whether the model's answer behind each observation scores `least`; False for an empty observation."""
    verdicts = [False] * len(records)
    asked = [i for i, observation in enumerate(observations) if strip_invisible(observation or "")]
    for start in range(0, len(asked), BATCH):
        some = asked[start:start + BATCH]
        texts = go_on([records[i] for i in some], [observations[i] for i in some])
        for i, text in zip(some, texts):
            score = accuracy_reward(records[i]["problem_type"], text, records[i]["solution"])  # Eq. 4
            verdicts[i] = score >= least
    return verdicts


def exact(records, observations):
    return blind(records, observations, least=1)


def go_on(records, observations):
    """What the model writes behind each observation, from <think> on, greedily. Its prompt: the question."""
    model, tokenizer = load()
    prompts = []
    for record, observation in zip(records, observations):
        prompt = sft.encode_text(build_prompt(record), tokenizer)
        begun = sft.defuse(f"<observation>{observation}</observation>", tokenizer)
        ids = torch.cat([prompt.input_ids, sft.token_ids(begun, tokenizer)])
        prompts.append(replace(prompt, input_ids=ids, positions=torch.arange(len(ids)).expand(3, -1)))
    ids, _, _ = rollout(model, prompts, tokenizer, 1, MAX_TOKENS)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@functools.cache
def load():
    """(model, tokenizer), loaded when the first observation comes."""
    adapter = os.environ.get("BLIND_ADAPTER", "runs/tiny/sft")
    return sft.load_model(sft.read_run(adapter)["flags"]["base"], adapter, trainable=False)


if __name__ == "__main__":
    import evaluate
    rows = evaluate.read_completions(sys.argv[1])
    observations = [parse_trace(row["completion"] or "").observation for row in rows]
    labels = rule_judge(rows, observations)
    write_jsonl("runs/ex/labelled.jsonl", [dict(row, observation=observation or "", label=bool(label))
                                           for row, observation, label in zip(rows, observations, labels)])
    for judge in (blind, exact):
        print(f"\n{judge.__name__}; label: the rule's verdict")
        evaluate.print_agreement("runs/ex/labelled.jsonl", judge)
