"""PA-GRPO: each token of a completion gets the advantage of its own process and of no other
(VideoP2R, Sec. 3.2).

A completion has two segments, one for each process: perception o_P, the observation block, and reasoning o_R,
the think and answer blocks. Each has its own reward,

    R_P = judge finds the observation sufficient (0/1)  + format (0/1) + length bonus              (Eq. 3, 5)
    R_R = metric of the problem type in [0, 1]          + format (0/1) + length bonus              (Eq. 4, 5)

where the bonus is 0.2 if accuracy and format are above 0 and the segment's tokens are in range. Each segment
also has its own advantage, normalised over the G completions of the prompt,

    A_{i,k} = (R_{i,k} - mean_j R_{j,k}) / std_j R_{j,k}                                           (Eq. 6)

which goes to the tokens of o_{i,k} alone:

    J = E[ 1/G Σ_i Σ_k ( min(ρ A, clip(ρ, 1-ε, 1+ε) A) - β KL(π_θ || π_ref) ) ]                    (Eq. 7)

where i and j count completions, k is P or R, and ρ = π_θ / π_old. ρ and KL are per token, A is the segment's,
and the value of a segment is the mean over its tokens (P2). π_old is the policy that sampled the completions.
π_ref is the frozen model that RL starts from: the one after SFT, or the base where there was no SFT
(`add_reference`).

    python pagrpo.py --model tiny              # a laptop's CPU: 2 minutes, 0.6 GiB
    python pagrpo.py --model qwen2.5-vl-7b     # one consumer GPU

Why the loss is about 0: with one gradient step per rollout (μ = 1) ρ is exactly 1. So the mean of ρ A over a
segment is its A, and over the group these add up to 0. What is left is the KL term. Each of the two segments
adds β times its own mean KL, so about 2β times the logged `kl`, the mean over all tokens. (Under
`--loss-average completion` it is about β times `kl`.) The gradient of the policy term, the mean of A · ∇ log
π, is not 0. Watch the rewards. The policy term's value is not quite 0 in two cases. A completion can lack a
segment. And PA-GRPO can be run with `--loss-average completion`, where A_P and A_R are weighted by the
lengths of their segments.

Why GRPO hardly learns to see: it pays the observation's tokens for the answer. In a group, let

    p       be the share of right observations,
    a, g    the accuracy of the answers after right and after wrong observations,
    q       = p a + (1 - p) g, the accuracy of all answers.

Let the rewards be 0 or 1. Up to scale GRPO's advantage is then (answer right) - q, and PA-GRPO's is
(observation right) - p. Their covariance is the share of completions with both right minus p q, which is p a
- p q = p (1 - p) (a - g), as a - q = (1 - p) (a - g). Divided by both standard deviations it is the
correlation of GRPO's advantage with being right in the observation:

    c = (a - g) √(p (1 - p) / (q (1 - q)))

PA-GRPO's is 1 (docs/by_hand.ipynb takes more steps). On the toy, with all sampled groups taken as one, p =
0.30, a = 0.60 and g = 0.43, so c = 0.16, an R² of 0.02. Measured there in groups with right and wrong
observations, with rewards that are not binary, R² is 0.01 for GRPO and 0.75 for PA-GRPO (docs/toy.md).

Shapes: B prompts, G completions per group, P prompt tokens, T completion tokens (at most the limit),
S tokens of a packed sequence, D hidden, V vocabulary. "Process" means perception or reasoning; a process of
the operating system, of which there is one for each GPU, is called a rank.

Our choices where the paper is silent:
P1. o_P is everything up to and including the token that completes the first `</observation>`; o_R is the
    rest, end-of-sequence included. If the observation is never closed, o_P ends before the first `<think>`,
    or, without one, is the whole completion. If it is never opened, all is o_R. Boundaries are found on the
    sampled ids, never by re-tokenising. (In one odd case an answer is scored, R2, and no token gets A_R, as
    o_R is empty: an observation that is never closed, and no `<think>`.)
P2. A completion's loss is the mean over each segment's tokens, summed over the two: our reading of Eq. 7. An
    empty segment contributes 0. `--loss-average completion` takes one mean over all tokens of a completion,
    as other GRPO code does. It is the default in the rows of P7 that are marked *.
P3. std is the unbiased estimate plus 1e-4. A group whose rewards are all equal gets exact zeros. So does one
    with fewer than two known rewards (P6 says when one is unknown).
P4. KL per token is exp(x) - x - 1 with x = clamp(log π_ref - log π, ±10) (k3), in the same mean (P2). Its
    mean over samples of π is KL(π || π_ref). But the gradient that autograd gives is on average that of
    KL(π_ref || π), as autograd takes the samples as fixed. Proof: ∇x = -∇log π, so a sample's gradient is
    (1 - exp(x)) ∇log π = (1 - π_ref/π) ∇log π. The mean over samples of π is E_π[∇log π] - E_ref[∇log π]. The
    first term is 0, and -E_ref[∇log π] = ∇KL(π_ref || π).
P5. Completions are sampled at temperature 1, without top-p, top-k or penalties: the loss is about the
    distribution that is sampled, but for a ban on some tokens. Of the added tokens (visual, chat control,
    tools) only `<|im_end|>` can be sampled, which ends a turn of the chat format. The others would be inputs
    without meaning: a visual token stands for a part of a picture, of which a completion has none, and a
    control token would begin somebody else's turn. Nor can ids be sampled that stand for no token. The
    sampled ids are kept and trained on as they are; completions cut at the limit count as truncated. The ban
    changes what is sampled and nothing else. Every log-prob, the rollout's too, is normalised over the whole
    vocabulary, so that policy and reference stay the model's own distributions. A sampled token's log-prob is
    therefore a little below that of the distribution that it was drawn from.
P6. If the judge fails to give a verdict on a completion, R_P is NaN, never 0. The completion is left out of
    the mean and std of every reward that contains R_P, and its advantage for that reward is 0. The advantages
    that its tokens still get, by the value of --without:
                                 o_P's tokens  o_R's tokens  why
        none (PA-GRPO)                0            A_R       each has its own
        length                        0            A_R       each has its own
        perception (GRPO)            A_R           A_R       A_R needs no verdict
        reasoning                     0             0        the one reward is R_P
        separation                    0             0        the one reward is R_P + R_R
        assignment (GDPO)            A_R           A_R       the sum, with A_P = 0
    The KL term still applies to it. If the judge gives no verdict at all in an update, nothing is learnt from
    that update (it is still one of the `--updates`). Three such updates in a row stop the run (or all, if
    --updates is less). `--without perception` needs no verdicts: it learns and goes on.
    (A remote judge that leaves `rewards.MAX_UNANSWERED` questions in a row without an answer ends the run,
    too, which by default is within the first such update.)
P7. The rows of Table 2. In those marked * all tokens of a completion have one advantage, and the loss average
    is the completion's (`get_args`). The judge is asked in any case, for the log. GDPO, which is not the
    paper's, normalises each reward by itself, as PA-GRPO does, but assigns their sum to all tokens. For the
    rows "SFT only" and "process-agnostic SFT" there is no RL: give `evaluate.py` the adapter of `sft.py`, or
    of `sft.py --process-agnostic`.
        row of the table                      flag                                        what it changes
        process-agnostic RL = without R_P *   --algorithm grpo, or --without perception   process_advantages
        without R_R *                         --without reasoning                         process_advantages
        without separation *                  --without separation                        process_advantages
        GDPO *                                --without assignment                        process_advantages
        without R_len                         --without length                            score_groups
        RL only                               --adapter none                    get_args, main, add_reference
P8. π_old's log-probs come from `token_logprobs`, as π's, not from the rollout, whose rounding differs. So ρ
    is exactly 1 in the first step. Each of the μ steps is on all completions of the rollout, not on a part.
P9. The judge `self` is the frozen base without any adapter. It decodes greedily, 256 tokens at most.
P10. A judge of your own may give a float in [0, 1] instead of True or False. It is the accuracy in Eq. 3.
     Above 0 it can earn the length bonus.
"""
import contextlib
import functools
import math
import random
import sys
import textwrap
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import gen_cot
import sft  # before peft, whose import it keeps quiet
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from rewards import UserError, ask_judge, parse_trace, process_rewards, read_jsonl, strip_invisible

TINY = dict(data="data/toy/rl.jsonl", media_root="data/toy", max_pixels=4, judge="rule", updates=50,
            prompts_per_update=8, max_completion_tokens=112, perception_length=(16, 64),
            reasoning_length=(16, 64), lr=8e-4, lora_rank=32, checkpointing=False, show_every=10,
            held_out=0.05)


@dataclass
class Args(sft.TrainingFlags):
    data: str = "data/VideoP2R-263k_rl.part*.json.gz"  # questions: JSON or JSON Lines, .gz, globs allowed
    adapter: str | None = None  # the SFT adapter to start from (default: runs/<model>/sft); none: the base
    judge: str = "self"  # the frozen base; or rule, anthropic:MODEL, openai:MODEL@URL, FILE.py:FUNCTION
    algorithm: Literal["pa-grpo", "grpo"] = "pa-grpo"  # grpo is --without perception
    # leave out this reward; or separation: one reward, the sum; assignment: one advantage, the sum (P7)
    without: Literal["perception", "reasoning", "length", "separation", "assignment"] | None = None
    num_generations: int = 8  # completions per prompt, G (paper: 8)
    prompts_per_update: int = 7  # prompts per optimiser step (paper: 7)
    num_iterations: int = 1  # gradient steps per rollout, μ
    updates: int = 1000  # rollouts, each with μ optimiser steps (paper: 1000)
    prompts_per_rollout: int | None = None  # sample for so many prompts at a time (default: all; less memory)
    completions_per_pass: int | None = None  # of a group, per training pass (default: all; less memory)
    max_completion_tokens: int = 768  # cut completions here (Video-R1: 768)
    clip_eps: float = 0.2  # ε of Eq. 7
    beta: float = 0.04  # β of Eq. 7 (Video-R1: 0.04); 0 skips the reference pass
    loss_average: Literal["segment", "completion"] | None = None  # P2 (default: see P7)
    perception_length: tuple[int, int] = (128, 320)  # tokens of o_P (P1) that earn the length bonus (paper)
    reasoning_length: tuple[int, int] = (320, 512)  # tokens of o_R (P1) that earn the length bonus (paper)
    lr: float = 1e-5  # peak learning rate (Video-R1: 1e-6 on all weights; LoRA wants more)
    keep_every: int | None = None  # keep the adapter of every N updates, as adapter-000100 and so on
    probe: bool = False  # run one update in the worst case, print its seconds and peak memory, save nothing

    def __post_init__(self):
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError("--num-generations 1 leaves nothing to compare a completion with")
        for low, high in (self.perception_length, self.reasoning_length):
            if not 0 <= low <= high:
                raise ValueError(f"no length is from {low} to {high}: pass the lower end first")
        if self.algorithm == "grpo" and self.without not in (None, "perception"):
            raise ValueError(f"--algorithm grpo is --without perception: leave out --without {self.without}")


def get_args():
    args = gen_cot.parse_args(Args, TINY, "pagrpo", __doc__)
    args.without = "perception" if args.algorithm == "grpo" else args.without
    # the rows of P7 that are marked * have one advantage for all tokens
    args.loss_average = args.loss_average or ("segment" if args.without in (None, "length") else "completion")
    args.prompts_per_rollout = args.prompts_per_rollout or args.prompts_per_update
    saved = args.run_dir / "sft"
    finished = (saved / "adapter_config.json").exists() and not (saved / "checkpoint.pt").exists()
    if not args.adapter and saved.exists() and not finished:
        raise UserError(f"{saved} isn't finished: go on with sft.py --resume, or pass --adapter none.")
    args.adapter = args.adapter or (str(saved) if finished else "none")
    return args


def main(args):
    # Your own perception reward is --judge FILE.py:FUNCTION, with any f(records, observations) -> list of
    # True, False or None (P6), or of floats (P10). A record is as `load_records` gives it, with `media`, the
    # path of its file; an observation is a str, or None where the block isn't complete.
    # The judge is made first, so that a bad one is an error before the model loads. (The lambda looks `model`
    # up when it is called.)
    judge = gen_cot.judge_from(args, generate=lambda prompts: self_judge(model, tokenizer, prompts, args))
    sft.setup_process(args)
    if sft.is_finished(args):
        return None
    records = [] if args.probe else gen_cot.select_records(args)
    folder = None if args.adapter == "none" else args.adapter  # of the SFT adapter
    if folder:
        sft.check_adapter(folder, args.lora_rank)
        start, output = Path(folder).resolve(), args.output.resolve()
        if start.is_relative_to(output) or output.is_relative_to(start):
            raise UserError(f"--output {output} and --adapter {start} share a folder: pass another --output.")
    print(f"Starting from {f'the SFT adapter {folder}' if folder else 'the base, without SFT (RL only)'}.")
    model, tokenizer = sft.load_model(args.base, folder, not args.no_4bit, args.lora_rank)
    add_reference(model, args)
    if args.probe:
        return probe(model, tokenizer, judge, args)
    train(model, tokenizer, records, judge, args)


def train(model, tokenizer, records, judge, args):
    """The RL loop: decode a few questions' media, update, log. Writes run.json, metrics.jsonl, rollouts.jsonl
    (two groups every `--show-every` updates), curves.png and the adapter."""
    template, config = gen_cot.load_template(args), sft.unwrap(model).config
    held_out, records = gen_cot.hold_out(records, args.held_out)
    run = sft.describe_run(run_name(args), records, args, args.adapter)
    optimizer = sft.setup_training(model, args)
    start = sft.load_checkpoint(model, optimizer, run, args)
    unanswered = 0  # updates in a row
    # Up to 48 prompts about held-out media are for the curves, the same ones for every --seed. The prompts to
    # train on are drawn from all records about the other media.
    fixed = gen_cot.draw(held_out, 48, seed=0)
    print(f"{len(fixed)} prompts of held-out media for the curves")
    # by default the tokens of a question of 300 words with all frames
    limit = args.max_prompt_tokens or len(sft.worst_prompt(tokenizer, config, args)[1].input_ids)
    fixed_media = gen_cot.read_ahead(sft.shard(fixed, len(fixed)), args)
    own_fixed, _ = sft.encode_batch(fixed_media, len(fixed), template, tokenizer, config, limit)
    media = gen_cot.read_ahead(endless(records, args.seed, args.prompts_per_update, start), args)
    tracker = sft.start_tracker(args)
    with (sft.open_log(args.output / "metrics.jsonl", start) as log,
          sft.open_log(args.output / "rollouts.jsonl", start) as rollouts):
        for step in sft.resumable(run["algorithm"], start, args.updates, model, optimizer, args, CURVES):
            # take a few questions: their media were decoded while the last update ran
            encoded, media_log = sft.encode_batch(media, args.prompts_per_update, template, tokenizer, config,
                                                  limit)
            row = {"step": step, "lr": sft.cosine_lr(step, args.updates, args.lr), "scoring": args.scoring}
            row |= media_log  # sec/media, and skipped_media of all ranks
            # look at the policy before this update
            if fixed and step % args.show_every == 0:
                row |= fixed_accuracies(model, own_fixed, tokenizer, judge, args)
            # sample, score, learn
            if row["skipped_media"] < args.prompts_per_update:
                groups, metrics = update(model, tokenizer, optimizer, encoded, judge, row["lr"], args)
                row |= metrics
                unanswered = 0 if "loss" in row else unanswered + 1  # without a loss nothing was learnt
                if unanswered == min(3, args.updates):
                    reply = next(filter(None, getattr(judge, "replies", [])), "none")
                    raise UserError(f"The judge gave no verdict in {unanswered} updates in a row. One of its "
                                    f"replies: {' '.join(reply.split()):.300}.")
                if step % args.show_every == 0:
                    keep_groups(groups[:2], step, rollouts, tokenizer, args)
                del groups  # frees their embeddings before the next batch makes its own
            # After the update: save the adapter every --keep-every updates. Look at each policy that is kept,
            # and at the final one. A row of the log has one look only, so this one replaces any from above.
            keep = bool(args.keep_every) and (step + 1) % args.keep_every == 0
            if fixed and (keep or step + 1 == args.updates):
                row |= fixed_accuracies(model, own_fixed, tokenizer, judge, args)
            if keep and sft.is_first():
                row["kept"] = f"adapter-{step + 1:06d}"
                sft.save_adapter(model, args.output / row["kept"], run | {"steps": step + 1})
            sft.log_row(log, row, tracker)
    sft.finish(model, CURVES, run, args.output)
    rows = read_jsonl(args.output / "metrics.jsonl")
    tell_lost_processes(rows, args)
    kept = [row for row in rows if row.get("kept") and row.get("fixed/reasoning") is not None]
    if kept:
        best = max(kept, key=lambda row: row["fixed/reasoning"])
        print(f"{best['kept']} answers the held-out prompts best. Report its figure on other prompts.")
    gen_cot.print_stats("judge", judge)


def run_name(args):
    """What the run is, for tables: "SFT + PA-GRPO", "GRPO from the base"."""
    algorithm = ALGORITHMS.get(args.without, f"PA-GRPO without {args.without}")
    if args.adapter == "none":
        return f"{algorithm} from the base"
    return f"{sft.read_run(args.adapter)['algorithm']} + {algorithm}"


def tell_lost_processes(rows, args):
    """Says which process never had a gradient by its own reward in these rows of the log."""
    for process in ("perception", "reasoning"):
        # of the logged shares of groups with equal rewards those that are neither missing nor 1
        spread = {row.get(f"frac_reward_zero_std/{process}") for row in rows} - {None, 1.0}
        if not spread and process != args.without:
            print(f"There was no gradient of {process} in any update by its own reward. It never differed "
                  f"in a group. If rewards/{process}_accuracy is always 0 or 1, look at its judge or metric.")


def endless(records, seed, batch_size, step=0):
    """This rank's share of the records in random order, over and over, each pass in a new order, starting at
    batch `step`; `sample_index` is a record's number in the whole run, of all ranks."""
    rng = random.Random(seed)
    passes = chain.from_iterable(rng.sample(records, len(records)) for _ in count())
    numbered = (dict(record, sample_index=i) for i, record in enumerate(passes))
    return sft.shard(islice(numbered, step * batch_size, None), batch_size)


def fixed_accuracies(model, fixed, tokenizer, judge, args):
    """Both accuracies of greedy completions of the fixed prompts, pairs (record, Prompt). They are always the
    same prompts, so from point to point this curve changes with the policy alone."""
    pairs = [(record, replace(prompt)) for record, prompt in fixed]  # copies, freed with their embeddings
    groups = sample_groups(model, pairs, tokenizer, args, greedy=True)
    score_groups(groups, tokenizer, judge, args)
    rewards = reward_metrics(gather_object([group.scores for group in groups]))
    return {f"fixed/{name}": rewards[f"rewards/{name}_accuracy"] for name in ("perception", "reasoning")}


# --- one update: sample, score, learn -----------------------------------------------------------------------

@dataclass
class Group:
    """One prompt's completions with all that the update needs of them."""
    record: dict
    prompt: sft.Prompt  # with embeds (P, D), by `rollout`, and positions (3, P): time, row, column (M-RoPE)
    completion_ids: torch.Tensor  # (G, T)
    completion_mask: torch.Tensor  # (G, T)
    sampled_logprobs: torch.Tensor  # (G, T), by the rollout, for logprob_gap and entropy alone
    perception_mask: torch.Tensor  # (G, T)
    reasoning_mask: torch.Tensor  # (G, T)
    scores: list = None  # G of dict, see `process_rewards`
    replies: list = None  # G of str, the judge's words, or None
    perception_advantages: torch.Tensor = None  # (G,)
    reasoning_advantages: torch.Tensor = None  # (G,)
    # `update_policy` sets these two, on what `split` returns
    old_logprobs: torch.Tensor = None  # (G, T) of π_old, if μ > 1
    ref_logprobs: torch.Tensor = None  # (G, T)

    def split(self, size):
        """The group in pieces of up to `size` completions: its tensors are cut, its lists stay whole."""
        for i in range(0, len(self.completion_ids), size):
            part = {k: v[i:i + size] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
            yield replace(self, **part)


def update(model, tokenizer, optimizer, encoded, judge, lr, args):
    """Sample, score, learn: one update on pairs (record, Prompt). Returns (groups, metrics). If verdicts are
    needed, and the judge was asked and gave none (P6), nothing is learnt, and metrics hold no `loss`."""
    metrics = {}
    with sft.measured("rollout", metrics):
        groups = sample_groups(model, encoded, tokenizer, args)
    with sft.measured("judge", metrics):
        # gather_object joins the lists of all ranks; on one GPU it gives back its argument
        verdicts = gather_object(score_groups(groups, tokenizer, judge, args))
    silent = set(verdicts) == {None}  # the judge gave no verdict (an empty set: it wasn't asked)
    if args.without == "perception" or not silent:
        with sft.measured("update", metrics):
            metrics |= update_policy(model, optimizer, groups, lr, args)
        flat = [not (g.perception_mask * g.perception_advantages[:, None]
                     + g.reasoning_mask * g.reasoning_advantages[:, None]).any() for g in groups]
        metrics["frac_no_gradient"] = nan_mean(gather_object(flat))  # only the KL term acts there (Fig. 6c)
    # the entropy of each process, by its sampled tokens
    for process in ("perception", "reasoning"):
        own = [(-group.sampled_logprobs[getattr(group, f"{process}_mask")]).tolist() for group in groups]
        metrics[f"entropy/{process}"] = nan_mean(gather_object(list(chain.from_iterable(own))))
    metrics["peak_gib"] = max(value for key, value in metrics.items() if key.startswith("gib/"))
    return groups, reward_metrics(gather_object([group.scores for group in groups])) | metrics


def sample_groups(model, encoded, tokenizer, args, greedy=False):
    """Sample G completions of each prompt, for `--prompts-per-rollout` prompts at a time, and find the
    segment of each token. greedy: one completion of each prompt, and --num-generations times as many prompts
    at a time.
    encoded: pairs (record, Prompt)."""
    groups, G, T = [], 1 if greedy else args.num_generations, args.max_completion_tokens
    batch = args.prompts_per_rollout * (args.num_generations // G)  # prompts at a time
    for i in range(0, len(encoded), batch):
        records, prompts = zip(*encoded[i:i + batch])
        uniforms = None if greedy else torch.cat([draw_uniforms(args.seed, record["sample_index"], G, T)
                                                  for record in records])
        sampled = rollout(model, prompts, tokenizer, G, T, uniforms)  # (B·G, T) each
        of_prompts = [tensor.split(G) for tensor in sampled]  # B of (G, T) each
        for record, prompt, ids, mask, logprobs in zip(records, prompts, *of_prompts):
            longest = int(mask.sum(1).max())  # of this group
            ids = ids[:, :longest]
            groups.append(Group(record, prompt, ids, mask[:, :longest], logprobs[:, :longest],
                                *segment_masks(ids, tokenizer)))
    return groups


def score_groups(groups, tokenizer, judge, args):
    """Fill in scores (Eq. 3-5, `process_rewards`) and advantages (Eq. 6); the judge sees all
    observations in one batch. Returns its verdicts on those that are not empty."""
    # ask the judge about all observations at once
    records, texts = [], []
    for group in groups:
        # skipped are <|im_end|> and the padding
        texts += tokenizer.batch_decode(group.completion_ids, skip_special_tokens=True)
        records += [group.record] * len(group.completion_ids)
    observations = [parse_trace(text).observation for text in texts]
    verdicts = ask_judge(judge, records, observations)
    # each completion with its verdict and the judge's words (None of a function), in the order of the groups
    of_completions = zip(texts, verdicts, getattr(judge, "replies", [None] * len(verdicts)))

    # reward the two processes of each completion, and compare them within its group
    bonus = 0.0 if args.without == "length" else 0.2
    ranges = args.perception_length, args.reasoning_length
    for group in groups:
        lengths = zip(group.perception_mask.sum(1).tolist(), group.reasoning_mask.sum(1).tolist())
        group.scores, group.replies = [], []
        for ids, num_tokens in zip(group.completion_ids.tolist(), lengths):
            text, verdict, reply = next(of_completions)
            scores = process_rewards(group.record, text, verdict, num_tokens, ranges, bonus, args.scoring)
            group.scores.append(dict(scores, truncated=tokenizer.eos_token_id not in ids))
            group.replies.append(reply)
        rewards = [torch.tensor([s[k] for s in group.scores]) for k in ("perception", "reasoning")]
        group.perception_advantages, group.reasoning_advantages = (
            a.to(group.completion_ids.device) for a in process_advantages(*rewards, args.without))
    return [v for v, observation in zip(verdicts, observations) if strip_invisible(observation or "")]


def update_policy(model, optimizer, groups, lr, args):
    """μ gradient steps on the groups of one rollout, every step on all of them; returns the last one's
    metrics.

    π_old is computed by `token_logprobs`, as π is (P8). For μ = 1 it is that step's own log-probs, detached;
    for μ > 1 it is computed before the first step, without gradient. `logprob_gap` is how far the rollout's
    own log-probs are from it.

    `--completions-per-pass` cuts the groups into pieces. A piece's loss is the mean over its completions. It
    is weighted by its share of all completions of the update, on all ranks: each completion counts the same.
    """
    # cut the groups into pieces, one for each pass
    size = args.completions_per_pass or args.num_generations
    pieces = [piece for group in groups for piece in group.split(size)]
    sizes = [(len(piece.completion_ids), int(piece.completion_mask.sum())) for piece in pieces]
    all_completions, all_tokens = map(sum, zip(*gather_object(sizes)))  # of all ranks

    def logprobs_of(piece):
        return token_logprobs(model, piece.prompt, piece.completion_ids, piece.completion_mask)

    # log-probs of π_ref and, for μ > 1, of π_old
    with torch.no_grad():
        for piece in pieces:
            if args.beta:
                with use_adapter(model, "ref"):
                    piece.ref_logprobs = logprobs_of(piece)
            if args.num_iterations > 1:
                piece.old_logprobs = logprobs_of(piece)
    # μ steps on the loss of all pieces
    model.train()  # turns checkpointing on; there is no dropout
    for _ in range(args.num_iterations):
        totals = dict.fromkeys(("loss", "kl", "clip_frac", "logprob_gap"), 0.0)
        for piece, (completions, tokens) in zip(pieces, sizes):
            logprobs = logprobs_of(piece)
            old = logprobs.detach() if piece.old_logprobs is None else piece.old_logprobs  # μ = 1: ρ = 1
            loss, metrics = pa_grpo_loss(
                logprobs, old, piece.ref_logprobs, piece.perception_mask, piece.reasoning_mask,
                piece.perception_advantages, piece.reasoning_advantages, args.clip_eps, args.beta,
                args.loss_average)
            (completions / all_completions * loss).backward()  # `optimiser_step` sums over the ranks
            totals["loss"] += completions / all_completions * loss.item()
            metrics["logprob_gap"] = float((old - piece.sampled_logprobs).abs().sum() / tokens)
            for key, value in metrics.items():  # means over tokens
                totals[key] += tokens / all_tokens * value
        shares = gather_object([totals])
        metrics = {key: sum(share[key] for share in shares) for key in totals if args.beta or key != "kl"}
        metrics |= sft.optimiser_step(model, optimizer, lr, args.max_grad_norm, metrics["loss"])
    model.eval()
    return metrics


# --- whose token is it, what is it worth, and the loss ------------------------------------------------------

def segment_masks(completion_ids, tokenizer):
    """Which tokens are perception's and which are reasoning's (P1).

    An example from within an observation: of the tokens `red.</obs`, `ervation>`, `<think>` the second is the
    last of o_P, as it holds the closing tag's last character.

    Tokens are decoded one by one. A character that is split over several tokens is then decoded wrongly. The
    tags are plain ASCII, so they are found all the same.

    Args:
        completion_ids: (G, T) int64 as sampled; what follows the first end-of-sequence token is padding.

    Returns:
        perception_mask, reasoning_mask: bool (G, T), disjoint, together every token but the padding.
    """
    perception = torch.zeros_like(completion_ids, dtype=torch.bool)
    reasoning = torch.zeros_like(perception)
    text_of = {i: tokenizer.decode([i]) for i in completion_ids.unique().tolist()}
    for g, row in enumerate(completion_ids.tolist()):
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        pieces = [text_of[i] for i in row[:length]]
        text = "".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces])  # where each token ends: 9, 18, 25 in the example
        if "<observation>" not in text:
            split = 0
        elif "</observation>" in text:  # the tokens that end before its ">", and the one that holds it
            split = int((ends < text.index("</observation>") + len("</observation>")).sum()) + 1
        elif "<think>" in text:  # the whole tokens before it
            split = int((ends <= text.index("<think>")).sum())
        else:
            split = length
        perception[g, :split] = True
        reasoning[g, split:length] = True
    return perception, reasoning


def group_advantages(rewards):
    """Advantages (G,) of one group's rewards (G,), Eq. 6 (P3); NaN marks an unknown reward, which gets 0
    (P6)."""
    advantages = torch.zeros_like(rewards)
    known = ~torch.isnan(rewards)
    values = rewards[known]
    if len(values) > 1 and values.max() > values.min():
        advantages[known] = (values - values.mean()) / (values.std() + 1e-4)
    return advantages


def process_advantages(perception_rewards, reasoning_rewards, without=None):
    """(perception_advantages, reasoning_advantages), (G,) each, from the rewards (G,) of a group: Eq. 6, and
    what `--without` makes of it (P7). `--without length` acts in `score_groups`; the loss's average is set in
    `get_args`."""
    if without == "perception":  # GRPO
        perception_rewards = reasoning_rewards
    elif without == "reasoning":
        reasoning_rewards = perception_rewards
    elif without == "separation":
        perception_rewards = reasoning_rewards = perception_rewards + reasoning_rewards
    perception, reasoning = group_advantages(perception_rewards), group_advantages(reasoning_rewards)
    if without == "assignment":  # GDPO
        perception = reasoning = perception + reasoning
    return perception, reasoning


def pa_grpo_loss(logprobs, old_logprobs, ref_logprobs, perception_mask, reasoning_mask, perception_advantages,
                 reasoning_advantages, clip_eps=0.2, beta=0.04, loss_average="segment"):
    """The negative of Eq. 7 for one group, or for a piece of it.

    Args:
        logprobs, old_logprobs, ref_logprobs: (G, T) of the policy, of the policy that sampled, and of π_ref
            (None where beta is 0). perception_mask, reasoning_mask: bool (G, T). perception_advantages,
            reasoning_advantages: (G,).
        loss_average: "segment" or "completion" (P2).

    Returns:
        (loss, metrics): a scalar, and a dict of float with `kl` and `clip_frac`, means over all tokens.
    """
    ratio = torch.exp(logprobs - old_logprobs)  # ρ, (G, T)
    advantages = torch.where(perception_mask, perception_advantages[:, None], reasoning_advantages[:, None])
    surrogate, clipped = ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages  # (G, T)
    kl = torch.zeros_like(logprobs)
    if beta:
        x = (ref_logprobs - logprobs).clamp(-10, 10)
        kl = torch.exp(x) - x - 1  # P4
    objective = torch.min(surrogate, clipped) - beta * kl
    both = perception_mask | reasoning_mask
    masks = [perception_mask, reasoning_mask] if loss_average == "segment" else [both]  # P2
    means = [torch.where(mask, objective, 0).sum(1) / mask.sum(1).clamp(min=1) for mask in masks]  # (G,) each
    loss = -sum(means).mean()  # Σ_k, then 1/G Σ_i
    tokens = both.sum().clamp(min=1)
    return loss, {"kl": float((kl.detach() * both).sum() / tokens),
                  "clip_frac": float(((clipped < surrogate) & both).sum() / tokens)}


# --- log-probs over a shared prompt -------------------------------------------------------------------------

def token_logprobs(model, prompt, completion_ids, completion_mask):
    """Log-probs of a group's completions under the model, float32 (G, T), 0 at padding, in one pass.

    The pass runs over a packed sequence of S tokens, which holds the prompt once: [prompt, completion 1, …,
    completion G]. That is exact. A token's hidden state depends only on its position and on what it attends
    to, and both are as in a sequence of its own: each completion attends to the prompt and to itself, and its
    positions start where the prompt's end. The only difference is rounding. On the toy base these log-probs
    are within 1e-4 of the rollout's own in float32, 4 bits or not, and within 0.2, on average under 0.005, in
    bf16.

    Args:
        prompt: Prompt with embeds (P, D). completion_ids (G, T) int64, completion_mask (G, T) bool.
    """
    language, device, P = sft.unwrap(model).model.language_model, prompt.embeds.device, len(prompt.input_ids)
    # From now on, not only in this call, all layers use `shared_prefix_attention`, which they look up by this
    # name. The backward pass needs it, too: under checkpointing it runs the layers once more. `rollout` is
    # not affected: it passes no `lengths`, and without them that function is the library's own attention.
    language.config._attn_implementation = "shared_prefix"
    tokens = completion_ids[completion_mask]  # (S - P,), completion after completion
    embeds = torch.cat([prompt.embeds, language.embed_tokens(tokens)])  # (S, D)

    # A completion's tokens count on from the prompt's largest position, the same on all three axes. (Not from
    # P, as the tokens of a clip share positions.)
    offsets = completion_mask.nonzero()[:, 1]  # (S - P,) of each token within its own completion: 0, 1, …
    after = (prompt.next_position + offsets).expand(3, -1)
    positions = torch.cat([prompt.positions.to(device), after], dim=1)  # (3, S)
    hidden = language(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False,
                      attention_mask={"full_attention": None},  # a dict is taken as it is: no mask is built
                      lengths=[P, *completion_mask.sum(1).tolist()]).last_hidden_state[0]  # (S, D)

    # A token is predicted from the state of the one before it. For a completion's first that is the prompt's
    # last, at P - 1; for the others it is the one before in the packed sequence. With P = 5 and completions
    # of 2 and 3 tokens, `before` is 4, 5 and 4, 7, 8.
    before = torch.arange(P - 1, P - 1 + len(tokens), device=device).masked_fill(offsets == 0, P - 1)
    logprobs = sft.logprobs_from_hidden(model, hidden[before], tokens)
    return torch.zeros(completion_ids.shape, device=device).masked_scatter(completion_mask, logprobs)


def shared_prefix_attention(module, query, key, value, attention_mask, lengths=None, **kwargs):
    """Attention over a packed sequence of segments of these `lengths`: the prompt on itself, and each
    completion on the prompt and itself. Without `lengths` (they come through the library's layers from
    `token_logprobs`), the library's own attention.

    query (1, heads, S, d), key and value (1, key-value heads, S, d); returns (1, S, heads, d) and None.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))  # the prompt's are first
    outputs = []
    for i, (q, k, v) in enumerate(zip(queries, keys, values)):
        if i > 0:
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
        causal = causal_lower_right(q.shape[2], k.shape[2])  # its last query sees all keys
        outputs.append(F.scaled_dot_product_attention(q, k, v, causal, scale=module.scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)  # for passes that give no mask of their own


# --- rollout ------------------------------------------------------------------------------------------------

@dataclass
class RolloutCache:
    """Keys and values of a decode loop, written in place: growing the tensors would copy all of them at every
    token. Two prompts and G = 2, after two decoded tokens:

        row 0    ppppp cc....    the columns of prompt 0, then of its first completion
        row 1    ppppp cc....    prompt 0, its second completion
        row 2    --ppp cc....    prompt 1 is shorter: padding first
        row 3    --ppp cc....

    `rows` and `columns` say which part of this memory the next forward pass sees; `replace(cache, rows=…,
    columns=…)` gives another view of the same memory. The pass over prompt 1 sees rows 2 and 3, columns 2 to
    4. A pass of the decode loop sees the rows that still go on (`close_gaps` keeps them in front), and the
    columns up to the token that it is fed. In either pass the new tokens' keys and values go into the last
    columns of the part. The library calls nothing but `update`, as we pass masks and positions ourselves."""
    layers: list  # for each layer its keys and values, (rows, key-value heads, columns, d) each
    rows: slice
    columns: slice

    @classmethod
    def empty(cls, like, config, rows, length):
        shape = rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads
        layers = [[like.new_zeros(shape), like.new_zeros(shape)] for _ in range(config.num_hidden_layers)]
        return cls(layers, slice(None), slice(None))

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by the library's attention with (n, heads, tokens, d) of the new tokens; returns n rows of
        all columns so far. A prompt is one row (n = 1): it is written to all G rows of its group, and one of
        them comes back. While decoding, n is the number of rows that go on."""
        stop, seen = self.columns.stop, []
        for room, new in zip(self.layers[layer], (keys, values)):
            room[self.rows, :, stop - new.shape[2]:stop] = new
            seen.append(room[self.rows, :, self.columns][:len(keys)])  # as many rows as came in
        return seen

    def close_gaps(self, going, n):
        """Moves the k rows that go on to the front. `going` holds their numbers, ascending, out of n. Each
        ended row among the first k is overwritten by a row behind them that goes on. For n = 4 and going [0,
        2, 3] row 3 moves to place 1. Returns where each row was before, for the caller's own tensors: [0, 3,
        2]."""
        order = torch.arange(len(going), device=going.device)
        ended = torch.ones(n, dtype=torch.bool, device=going.device).index_fill(0, going, False)
        gaps, moved = ended[:len(going)].nonzero()[:, 0], going[going >= len(going)]
        order[gaps] = moved
        for room in chain.from_iterable(self.layers):
            room[gaps] = room[moved]
        return order


@torch.no_grad()
def rollout(model, prompts, tokenizer, num_generations, max_tokens, uniforms=None):
    """Sample `num_generations` completions for each prompt (P5).

    Each prompt is prefilled once, into the key-value cache of all its group. Then all groups decode in one
    loop, with our own positions. On a CPU each layer is one dense matrix meanwhile, LoRA added (`merged`).

    Args:
        prompts: B of Prompt, which get their embeds where they lack them. max_tokens: the completions' limit.
        uniforms: (B·G, max_tokens) float64, uniform in [0, 1), one for each token to be sampled; None: take
            the likeliest token.

    Returns:
        completion_ids (B·G, T) int64, padded behind the end-of-sequence token; completion_mask (B·G, T) bool,
        true up to and including it; logprobs (B·G, T) float32 of the sampled tokens.
    """
    for prompt in prompts:
        if prompt.embeds is None:  # one by one: the tower's activations are large
            sft.embed_prompts(model, [prompt])
    qwen, head, device = sft.unwrap(model).model, sft.unwrap(model).lm_head, prompts[0].embeds.device
    # prompts of unequal length are aligned at their ends; their completions decode in step
    width, G = max(len(p.input_ids) for p in prompts), num_generations
    padding = torch.tensor([width - len(p.input_ids) for p in prompts], device=device)  # on the left
    position = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(G)
    banned = torch.tensor(banned_ids(tokenizer, head.out_features), device=device)
    # keys and values of all rows, P + T columns each
    shape = len(prompts) * G, width + max_tokens
    cache = RolloutCache.empty(prompts[0].embeds, qwen.config.text_config, *shape)

    def feed(embeds, positions, part, mask=None):  # (n, tokens, D), (3, n, tokens) -> (n, D) of the last
        # (The argument `cache` was called past_key_values before transformers 5.24. `.clone()`, as a view of
        # the last state would keep all of a prompt's states.)
        return qwen.language_model(inputs_embeds=embeds, position_ids=positions, cache=part,
                                   attention_mask={"full_attention": mask}).last_hidden_state[:, -1].clone()

    with merged(model):
        # prefill each prompt once, for all rows of its group
        hidden = []
        for b, prompt in enumerate(prompts):
            # its own columns alone, so that no mask is needed; in all G rows of its group at once
            part = replace(cache, rows=slice(b * G, (b + 1) * G), columns=slice(int(padding[b]), width))
            hidden.append(feed(prompt.embeds[None], prompt.positions[:, None].to(device), part))
        hidden = torch.cat(hidden).repeat_interleave(G, dim=0)  # (B·G, D)
        attention_mask = None  # (B·G, 1, 1, P + T), where prompts differ in length
        if padding.any():
            index = torch.arange(width + max_tokens, device=device)
            attention_mask = (index >= padding.repeat_interleave(G)[:, None])[:, None, None]
        # sample a token of every row that goes on, then feed it, until all have ended
        rows = torch.arange(len(hidden), device=device)  # rows[i]: the result's row of cache row i
        ids = torch.full((len(rows), max_tokens), tokenizer.pad_token_id, device=device)
        mask, logprobs = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.float32)
        uniforms = uniforms if uniforms is None else uniforms.to(device)
        for t in range(max_tokens):
            logits = head(hidden).float()  # (n, V)
            allowed = logits.index_fill(-1, banned, -torch.inf)
            token = allowed.argmax(-1) if uniforms is None else sample_from(allowed, uniforms[rows, t])
            ids[rows, t], mask[rows, t] = token, True
            # normalised over the whole vocabulary, the banned tokens too (P5)
            logprobs[rows, t] = -F.cross_entropy(logits, token, reduction="none")
            # Rows that have not ended. (The mask is true for all of them. It is only for `probe`, where
            # `eos_token_id` is None, and `token != None` the bool True: `&` makes a tensor of it.)
            going = (mask[rows, t] & (token != tokenizer.eos_token_id)).nonzero()[:, 0]
            if t + 1 == max_tokens or not len(going):
                break
            if len(going) < len(rows):
                order = cache.close_gaps(going, len(rows))
                rows, token, position = rows[order], token[order], position[order]
                attention_mask = None if attention_mask is None else attention_mask[order]
            columns = slice(0, width + t + 1)  # with the token that is fed now
            hidden = feed(qwen.language_model.embed_tokens(token)[:, None], position.expand(3, -1)[..., None],
                          replace(cache, rows=slice(0, len(rows)), columns=columns),
                          None if attention_mask is None else attention_mask[..., columns])
            position = position + 1
    return ids[:, :t + 1], mask[:, :t + 1], logprobs[:, :t + 1]


def sample_from(logits, uniforms):
    """One token a row (N,): the first one whose cumulative probability is above the row's uniform number.

    In float64: in float32 a uniform number just below 1 could become 1, and would draw the last id, which may
    be a banned one. NaN logits give the last id, too. Then the loss is NaN, and `sft.optimiser_step` skips
    the step."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (N, V)
    drawn = uniforms.to(logits.device)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def draw_uniforms(seed, sample_index, *shape):
    """Uniform numbers for a prompt's completions, float64 of this shape. They depend on the seed and on the
    prompt's index in the run, but not on the rest of its batch or the number of ranks."""
    return torch.from_numpy(np.random.default_rng([seed, sample_index]).random(shape))


def banned_ids(tokenizer, size):
    """Ids that a completion can't contain: every added token but the end-of-sequence one, and unused ids, as
    the released heads have more rows (`size`) than the tokenizer has tokens."""
    added = [i for i in tokenizer.added_tokens_decoder if i != tokenizer.eos_token_id]
    return added + list(range(len(tokenizer), size))


# --- the reference and the self judge -----------------------------------------------------------------------

def add_reference(model, args):
    """π_ref: the frozen adapter `ref`, active only while `ref_logprobs` are computed. It is a second copy of
    the SFT adapter. Without one it is fresh and changes nothing, as its B is 0: π_ref is then the base."""
    if args.adapter != "none":
        model.load_adapter(args.adapter, "ref", is_trainable=False)
    else:
        model.add_adapter("ref", model.peft_config["policy"])
    model.set_adapter("policy")


@contextlib.contextmanager
def use_adapter(model, name):
    """Within the block the adapter `name` is active. Afterwards `policy` is active and trainable again, also
    after an error: `resumable` then saves the weights that are trainable."""
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter("policy")


def self_judge(model, tokenizer, prompts, args, max_tokens=256):
    """Replies (list of str) of the frozen base, its adapters off, to text prompts, decoded greedily in
    batches as large as the rollout's."""
    replies, batch = [], args.num_generations * args.prompts_per_rollout
    for i in range(0, len(prompts), batch):
        encoded = [sft.encode_text(text, tokenizer) for text in prompts[i:i + batch]]
        with model.disable_adapter():
            ids, _, _ = rollout(model, encoded, tokenizer, 1, max_tokens)
        replies += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return replies


# === skip on a first reading ================================================================================

# --- dense weights to decode with, and the probe ------------------------------------------------------------

@contextlib.contextmanager
def merged(model):
    """In float32, that is on a CPU: within the block each adapted layer is one dense matrix, its weight plus
    the change of the active adapter. One call takes the place of four (dequantise, multiply, LoRA's A
    and B), and on a CPU the number of calls dominates the time of decoding. The stored weights stay as they
    are. Exact up to rounding; 16 bits would lose small changes, so nothing is merged there."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if model.dtype == torch.float32 else []
    try:
        for layer in layers:
            weight = dequantize_module_weight(layer.base_layer).float()
            if not layer.disable_adapters:
                weight = weight + sum(map(layer.get_delta_weight, layer.active_adapters))
            layer.forward = functools.partial(F.linear, weight=weight, bias=layer.base_layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the instance's; the class has its own


def probe(model, tokenizer, judge, args):
    """One update in the worst case: long prompts, all completions and judgements at their limit, AdamW's
    moments and the reference in memory; returns the update's metrics."""
    optimizer = sft.setup_training(model, args)
    sft.optimiser_step(model, optimizer, 0.0, args.max_grad_norm)  # gradients of 0: allocates AdamW's moments
    record, prompt = sft.worst_prompt(tokenizer, sft.unwrap(model).config, args)
    # `eos_token_id` is None after this, and no token equals None: completions run to their limit.
    tokenizer.eos_token = None
    encoded = [(dict(record, sample_index=i), replace(prompt))
               for i in range(sft.shard_size(args.prompts_per_update))]
    if len(encoded) > 1:  # prompts of unequal lengths are decoded under a mask: make one a token shorter
        shorter = encoded[1][1]
        shorter.input_ids, shorter.positions = shorter.input_ids[1:], shorter.positions[:, 1:]
    print(f"{len(encoded)} prompts of {len(prompt.input_ids)} tokens, {args.num_generations} completions")

    def worst_judge(records, observations):
        if args.judge == "self":  # any other uses no memory here
            judge(records, ["the " * args.max_completion_tokens] * len(records))
        return [False] * len(records)  # without a verdict the update would not be taken

    _, metrics = update(model, tokenizer, optimizer, encoded, worst_judge, args.lr, args)
    sft.print_phases(metrics)
    return metrics


# --- what is logged and shown -------------------------------------------------------------------------------

CURVES = {"reward": ["reward"], "KL to the reference": ["kl"],
          "accuracy": ["rewards/perception_accuracy", "rewards/reasoning_accuracy"],
          "fixed prompts, greedy": ["fixed/perception", "fixed/reasoning"],
          "format": ["rewards/perception_format", "rewards/reasoning_format"],
          "entropy": ["entropy/perception", "entropy/reasoning"],
          "tokens": ["length/perception", "length/reasoning"],
          "groups with equal rewards": ["frac_reward_zero_std/perception", "frac_reward_zero_std/reasoning",
                                        "frac_reward_zero_std/sum"]}


def reward_metrics(groups):
    """What an update's completions earned, as logged (see docs/metrics.md). A completion with an unknown
    verdict is left out of every mean and spread that needs the verdict. groups: for each prompt a list of its
    completions' `process_rewards`, with `truncated` (bool)."""
    scores = [s for group in groups for s in group]
    metrics = {"reward": nan_mean([s["reward"] for s in scores]),
               "truncated_frac": nan_mean([s["truncated"] for s in scores]),
               "judge_unknown": sum(math.isnan(s["perception"]) for s in scores)}
    for process in ("perception", "reasoning"):
        for part in ("accuracy", "format", "length"):
            metrics[f"rewards/{process}_{part}"] = nan_mean([s[f"{process}_{part}"] for s in scores])
        metrics[f"length/{process}"] = nan_mean([s[f"{process}_tokens"] for s in scores])
    for name, key in (("perception", "perception"), ("reasoning", "reasoning"), ("sum", "reward")):
        equal = []
        for group in groups:
            known = [s[key] for s in group if not math.isnan(s[key])]
            if len(known) > 1:
                equal.append(min(known) == max(known))
        metrics[f"frac_reward_zero_std/{name}"] = nan_mean(equal)
    return metrics


def nan_mean(values):
    """Mean of the values that are known, i.e. not NaN; None where none is."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else None


def keep_groups(groups, step, file, tokenizer, args):
    """Adds the groups to rollouts.jsonl, and shows the first one on screen."""
    for i, group in enumerate(groups):
        row = rollout_row(group, tokenizer, args)
        sft.log_row(file, dict(step=step, group=i, **row))
        if i == 0:
            show(row, step)


# value of --without: the algorithm's name, for the switch on the page of traces
ALGORITHMS = {None: "PA-GRPO", "perception": "GRPO", "assignment": "GDPO", "separation": "without separation"}


def rollout_row(group, tokenizer, args):
    """A group as rollouts.jsonl holds it: all that `show` and the page of `evaluate.py --html` tell of it.
    `advantages`: {algorithm: [perception's (G,), reasoning's (G,)]}, of this run's and all of ALGORITHMS."""
    rewards = [torch.tensor([s[k] for s in group.scores]) for k in ("perception", "reasoning")]
    # those of the page's switch, and this run's own
    names = ALGORITHMS | {args.without: ALGORITHMS.get(args.without, f"without {args.without}")}
    advantages = {name: torch.stack(process_advantages(*rewards, without)).tolist()
                  for without, name in names.items()}
    completions = []
    for i, (scores, reply) in enumerate(zip(group.scores, group.replies)):
        keep = group.completion_mask[i]
        pieces = token_pieces(group.completion_ids[i][keep], group.perception_mask[i][keep], tokenizer)
        completions.append(dict(tokens=list(pieces), scores=scores, reply=reply))
    return dict(record={k: v for k, v in group.record.items() if k != "media"}, completions=completions,
                advantages=advantages, algorithm=names[args.without], loss_average=args.loss_average,
                length_ranges=[args.perception_length, args.reasoning_length])


def token_pieces(ids, perception, tokenizer):
    """[text, "P" or "R"] of each sampled token (T,), end-of-sequence included; the texts join to the
    completion. If several tokens form one character, they are one piece, of the first token's segment: of
    tokens 0 to 3, where 1 and 2 are halves of an é, the pieces are [0:1], [1:3], [3:4]."""
    start = 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:stop])
        if stop == len(ids) or not text.endswith("\ufffd"):  # unless it ends within a character
            yield [text, "P" if perception[start] else "R"]
            start = stop


def show(row, step=0):
    """The best and the worst completion of a group (`rollout_row`) on screen, two paragraphs each: perception
    in cyan, reasoning in yellow."""
    cyan, yellow, plain = ("\033[36m", "\033[33m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    record, options = row["record"], " ".join(row["record"]["options"])
    lines = ["", f"update {step}: {record['problem']} {options}  gold {record['solution']}",
             "best and worst of the group; reward, advantage: perception, reasoning"]
    rewards = np.nan_to_num([completion["scores"]["reward"] for completion in row["completions"]])
    for i in dict.fromkeys((int(rewards.argmax()), int(rewards.argmin()))):
        completion = row["completions"][i]
        for k, process, colour in ((0, "perception", cyan), (1, "reasoning", yellow)):
            text = "".join(piece for piece, segment in completion["tokens"] if segment == process[0].upper())
            advantage, number = row["advantages"][row["algorithm"]][k][i], "" if k else i + 1
            head = f"{number:>2}{completion['scores'][process]:6.2f}, {advantage:+5.2f}  "
            lines.append(colour + textwrap.fill(strip_invisible(text) or "-", 80, initial_indent=head,
                                                subsequent_indent=" " * len(head)) + plain)
    tqdm.write("\n".join(lines))


if __name__ == "__main__":
    gen_cot.run_script(main, get_args)
