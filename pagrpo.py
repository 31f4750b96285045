"""PA-GRPO: each token of a completion gets the advantage of its own process and of no other
(VideoP2R, Sec. 3.2).

A completion is perception o_P, the observation, and reasoning o_R, think and answer.
Each process has its own reward:

    R_P = judge finds the observation sufficient (0/1)  + format (0/1) + length bonus              (Eq. 3, 5)
    R_R = metric of the problem type in [0, 1]          + format (0/1) + length bonus              (Eq. 4, 5)

and its own group-normalised advantage over the G completions of a prompt:

    A_{i,k} = (R_{i,k} - mean_j R_{j,k}) / std_j R_{j,k}                                           (Eq. 6)

which goes to the tokens of o_{i,k} alone:

    J = E[ 1/G Σ_i Σ_k ( min(ρ A, clip(ρ, 1-ε, 1+ε) A) - β KL(π_θ || π_ref) ) ]                     (Eq. 7)

with ρ the likelihood ratio of the policy to the policy that sampled, per token,
and π_ref the frozen model after SFT.

    python pagrpo.py --model tiny              # a laptop's CPU
    python pagrpo.py --model qwen2.5-vl-7b     # one consumer GPU

Why the loss is about 0: with one gradient step per rollout (μ = 1) the ratio ρ is exactly 1, the advantages
of a group add up to 0, and so does the policy term. Its gradient, A · ∇ log π, does not. Watch the rewards,
not the loss.

Shapes: G completions per group, P prompt tokens, T completion tokens, S packed tokens, D hidden size.

Our choices where the paper is silent (cited by number in the code):
 1. Segments partition the completion. P is everything up to and including the token that completes the first
    `</observation>`; R is the rest, end-of-sequence included. Never closed: P runs to the first `<think>`,
    else to the end. Never opened: everything is R. Boundaries are found on the sampled ids, never by
    re-tokenising text.
 2. A completion's loss is the mean over each process's tokens, summed over the two: Eq. 7 read literally. An
    empty segment contributes 0. `--loss-average completion` takes one mean over all tokens, as the peers do.
 3. std is the unbiased estimate plus 1e-4; a group with equal rewards gets exact zeros.
 4. KL per token is exp(x) - x - 1 with x = log π_ref - log π clamped to ±10 (the k3 estimator), in the
    segment's mean.
 5. Completions are sampled at temperature 1 from the whole vocabulary but for visual and chat-control tokens;
    the sampled ids are kept and trained on as they are; those cut at the limit count as truncated.
 6. A judge that fails yields "unknown": that completion leaves its group's perception mean and std and gets
    perception advantage 0; it is never scored 0.
 7. Ablations (Table 2). `--algorithm grpo` is `--without perception`: the reasoning reward's advantage on all
    tokens, averaged by completion. `--without reasoning` is its mirror image. `--without separation`: the sum
    of both rewards on all tokens. `--without length`: no length bonus.
"""
import argparse
import copy
import json
import random
import time
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gen_cot import (add_data_args, add_judge_args, add_vision_args, judge_from, load_template, parse_args,
                     positive, print_stats, read_ahead, select_records)
from rewards import UserError, accuracy_reward, format_rewards, length_reward, parse_trace
from sft import (Prompt, add_model_args, add_training_args, core, cosine_lr, embed_prompts, encode_batch,
                 encode_text, hush, is_first, limit_memory, load_checkpoint, load_model, log_line,
                 logprobs_from_hidden, measured, merged, mine, open_log, optimiser_step, peak_gib,
                 prepare_for_training, save_adapter, save_checkpoint, seed_everything, settings_of, share_of,
                 team, use_adapter, worst_prompt)

STAGE_PRESETS = {"tiny": dict(
    lr=8e-4, lora_rank=32, updates=100, prompts_per_update=8, max_completion_tokens=112,
    perception_length=(16, 64), reasoning_length=(16, 64), max_pixels=4, no_checkpointing=True)}


# --- rollout ------------------------------------------------------------------------------------------------

def rollout(model, prompts, tokenizer, num_generations, max_tokens, dice=None):
    """Sample `num_generations` completions for each prompt (choice 5).

    Each prompt is prefilled once, into the key-value cache of all its group; all groups decode in one loop,
    every step with our own positions, in float32 through weights that the adapter is merged into.

    Args:
        prompts: B of Prompt with embeds. max_tokens: T, the completions' limit.
        dice: (B·G, T) float64 uniform in [0, 1), one for each token to be drawn; None: the likeliest tokens.

    Returns:
        completion_ids (B·G, T) int64, padded behind the end-of-sequence token; completion_mask (B·G, T) bool,
        true up to and including it; logprobs (B·G, T) float32 of the sampled tokens.
    """
    qwen, head = core(model).model, core(model).lm_head
    device, G = prompts[0].embeds.device, num_generations
    width = max(len(p.input_ids) for p in prompts)
    pads = torch.tensor([width - len(p.input_ids) for p in prompts], device=device)  # on the left
    cache, hidden = GroupCache(prompts[0].embeds, qwen.config.text_config, len(prompts) * G,
                               width + max_tokens), []
    with torch.no_grad(), merged(model):
        for b, prompt in enumerate(prompts):
            cache.rows, cache.columns = slice(b * G, (b + 1) * G), slice(int(pads[b]), width)
            hidden.append(qwen.language_model(  # (1, P, D)
                inputs_embeds=prompt.embeds[None], position_ids=prompt.positions[:, None].to(device),
                attention_mask={"full_attention": None}, past_key_values=cache).last_hidden_state[:, -1])
        hidden = torch.cat(hidden).repeat_interleave(G, dim=0)  # (B·G, D)
        attend = (torch.arange(width + max_tokens, device=device) >= pads.repeat_interleave(G)[:, None]
                  if pads.any() else None)  # (B·G, P + T)
        position = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(G)
        cache.rows = slice(None)

        banned = torch.tensor(banned_ids(tokenizer), device=device)
        dice = None if dice is None else dice.to(device)
        running = torch.ones(len(hidden), dtype=torch.bool, device=device)
        ids, masks, logprobs = [], [], []
        for t in range(max_tokens):
            logits = head(hidden).float()
            allowed = logits.index_fill(-1, banned, -torch.inf)
            token = allowed.argmax(-1) if dice is None else draw(allowed, dice[:, t])
            token = torch.where(running, token, tokenizer.pad_token_id)
            logprobs.append(-F.cross_entropy(logits, token, reduction="none") * running)
            ids.append(token)
            masks.append(running)
            running = running & (token != tokenizer.eos_token_id)
            if not running.any():
                break
            end = width + t + 1  # with the token that is fed now
            cache.columns = slice(end)
            hidden = qwen.language_model(
                inputs_embeds=qwen.language_model.embed_tokens(token)[:, None],
                position_ids=position.expand(3, -1)[..., None],
                attention_mask={"full_attention": None if attend is None else attend[:, None, None, :end]},
                past_key_values=cache).last_hidden_state[:, 0]
            position = position + 1
    return torch.stack(ids, 1), torch.stack(masks, 1), torch.stack(logprobs, 1)


def draw(logits, dice):
    """One token a row (N,): the first whose cumulative probability exceeds the row's number in `dice`.
    In float64, where rounding gives no banned token a chance."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (N, V)
    return torch.searchsorted(cumulative, dice[:, None] * cumulative[:, -1:], right=True)[:, 0]


def roll_dice(seed, turn, *shape):
    """Uniform numbers for a prompt's completions, float64. They depend on the seed and on the prompt's turn
    in the run alone: neither the other prompts of its batch nor the number of processes matters."""
    return torch.from_numpy(np.random.default_rng([seed, turn]).random(shape))


class GroupCache:
    """Keys and values of a decode loop, written in place: growing the tensors would copy all of them at every
    token. `rows` are those that are fed now (a prompt's G, all) and `columns` what they have seen, the new
    tokens at the end."""

    def __init__(self, like, config, rows, length):
        shape = rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads
        self.layers = [[like.new_zeros(shape), like.new_zeros(shape)]
                       for _ in range(config.num_hidden_layers)]
        self.rows = self.columns = slice(None)

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by the library's attention with (n, heads, tokens, d) of the new tokens, n = 1 for a prompt;
        returns n rows of all so far."""
        for room, new in zip(self.layers[layer], (keys, values)):
            room[self.rows, :, self.columns.stop - new.shape[2]:self.columns.stop] = new
        return [room[self.rows, :, self.columns][:len(keys)] for room in self.layers[layer]]


def banned_ids(tokenizer):
    """Ids that a completion can't contain: every special token but the end-of-sequence one."""
    return [i for i, token in tokenizer.added_tokens_decoder.items()
            if i != tokenizer.eos_token_id and token.content.startswith("<|")]


# --- whose token is it --------------------------------------------------------------------------------------

def segment_masks(completion_ids, tokenizer):
    """Which tokens are perception's and which are reasoning's (choice 1).

    The tags are plain ASCII, so decoding token by token, which garbles multi-byte characters split over
    tokens, leaves every tag intact and gives each character of it an owner.

    Args:
        completion_ids: (G, T) int64 as sampled; what follows the first end-of-sequence token is padding.

    Returns:
        perception_mask, reasoning_mask: bool (G, T), disjoint, together every token but the padding.
    """
    perception = torch.zeros_like(completion_ids, dtype=torch.bool)
    reasoning = torch.zeros_like(perception)
    text_of = {i: tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
               for i in completion_ids.unique().tolist()}
    for g, row in enumerate(completion_ids.tolist()):
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        pieces = [text_of[i] for i in row[:length]]
        ends, text = np.cumsum([len(piece) for piece in pieces]), "".join(pieces)
        closed, think = text.find("</observation>"), text.find("<think>")
        if "<observation>" not in text:
            split = 0
        elif closed >= 0:
            split = int(np.searchsorted(ends, closed + len("</observation>"))) + 1  # the tag's last token
        elif think >= 0:
            split = int(np.searchsorted(ends, think, side="right"))  # the tag's first token is R's
        else:
            split = length
        perception[g, :split] = True
        reasoning[g, split:length] = True
    return perception, reasoning


# --- rewards and advantages ---------------------------------------------------------------------------------

def score(record, completion, lengths, verdict, args):
    """All rewards of one completion (Eq. 3-5): dict of `perception_…` and `reasoning_…` parts and their two
    sums.

    lengths: (perception, reasoning) tokens. verdict: True, False or None (unknown, choice 6: NaN).
    """
    form_p, form_r = format_rewards(completion)
    acc_p = float("nan") if verdict is None else float(verdict)
    acc_r = accuracy_reward(record["problem_type"], completion, record["solution"], args.scoring,
                            record.get("options"))
    bonus = 0.0 if args.without == "length" else args.length_bonus
    len_p = acc_p if verdict is None else length_reward(
        lengths[0], acc_p, form_p, *args.perception_length, bonus=bonus)
    len_r = length_reward(lengths[1], acc_r, form_r, *args.reasoning_length, bonus=bonus)
    return dict(perception_accuracy=acc_p, perception_format=form_p, perception_length=len_p,
                reasoning_accuracy=acc_r, reasoning_format=form_r, reasoning_length=len_r,
                perception=acc_p + form_p + len_p, reasoning=acc_r + form_r + len_r)


def group_advantages(rewards):
    """Advantages (G,) of one group's rewards (G,), Eq. 6 (choice 3); NaN marks an unknown reward,
    which gets 0."""
    advantages = torch.zeros_like(rewards)
    known = ~torch.isnan(rewards)
    values = rewards[known]
    if len(values) > 1 and values.max() > values.min():
        advantages[known] = (values - values.mean()) / (values.std() + 1e-4)
    return advantages


def process_advantages(perception_rewards, reasoning_rewards, without=None):
    """(perception_advantages, reasoning_advantages), (G,) each;
    the whole of every ablation but length (choice 7)."""
    if without == "perception":  # GRPO
        perception_rewards = reasoning_rewards
    elif without == "reasoning":
        reasoning_rewards = perception_rewards
    elif without == "separation":
        perception_rewards = reasoning_rewards = perception_rewards + reasoning_rewards
    return group_advantages(perception_rewards), group_advantages(reasoning_rewards)


# --- log-probs and loss -------------------------------------------------------------------------------------

class SharedPrefix(NamedTuple):
    """Where the tokens of a pack [prompt, completion 1, …, G] stand; in an attention mask's place."""
    prompt: int  # P, the prompt's tokens
    slots: torch.Tensor  # (G, T) int64, each completion token's place behind the prompt; anything at padding
    mask: torch.Tensor  # (G, T) bool, false at padding


def shared_prefix_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention over a pack (S tokens) in two calls, neither of which computes anything between completions:
    the prompt on itself, and each completion on the prompt and itself. All else goes the library's way.

    query (1, heads, S, d), key and value (1, key-value heads, S, d); returns (1, S, heads, d) and None.
    """
    if not isinstance(attention_mask, SharedPrefix):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    P, slots, mask = attention_mask
    G, T = slots.shape

    shared, own = zip(*(x.split([P, x.shape[2] - P], dim=2) for x in (query, key, value)))
    own = [x[0].transpose(0, 1)[slots].transpose(1, 2) for x in own]  # (G, heads, T, d)
    keys, values = (torch.cat([s.expand(G, -1, -1, -1), o], dim=2) for s, o in zip(shared[1:], own[1:]))
    visible = torch.ones(T, P + T, dtype=torch.bool, device=slots.device).tril(P)  # all of P, then causal
    prompt, _ = sdpa_attention_forward(module, *shared, None, **kwargs)
    completions, _ = sdpa_attention_forward(module, own[0], keys, values, visible[None, None], **kwargs)
    return torch.cat([prompt, completions[mask][None]], dim=1), None


def token_logprobs(model, prompt, completion_ids, completion_mask):
    """Log-probs of a group's completions under the model, float32 (G, T), 0 at padding, in one pass.

    The pass runs over [prompt, completion 1, …, completion G] with the prompt once. It is exact because a
    token's hidden state depends on nothing but what it attends to and where it stands: each completion
    attends to the prompt and to itself, and each one's positions start where the prompt's end. What is left
    is rounding: on the toy base these log-probs are within 1e-4 of the rollout's own in float32, 4 bits or
    not, and within 0.2, on average 0.005, in bf16.

    Args:
        prompt: Prompt with embeds (P, D). completion_ids (G, T) int64, completion_mask (G, T) bool.
    """
    qwen, P, device = core(model).model, len(prompt.input_ids), prompt.embeds.device
    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    AttentionMaskInterface.register("shared_prefix", sdpa_mask)
    qwen.language_model.config._attn_implementation = "shared_prefix"
    tokens = completion_ids[completion_mask]  # (S - P,), row after row
    steps = completion_mask.nonzero()[:, 1]  # which of its completion's tokens each one is
    order = torch.arange(len(tokens), device=device)
    slots = torch.zeros_like(completion_ids).masked_scatter(completion_mask, order)  # (G, T)
    positions = torch.cat([prompt.positions.to(device), (prompt.next_position + steps).expand(3, -1)],
                          dim=1)  # (3, S)
    embeds = torch.cat([prompt.embeds, qwen.language_model.embed_tokens(tokens)])[None]
    hidden = qwen.language_model(  # (S, D)
        inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False,
        attention_mask={"full_attention": SharedPrefix(P, slots, completion_mask)}).last_hidden_state[0]
    before = torch.where(steps == 0, P - 1, P + order - 1)  # the place whose state predicts each token
    logprobs = logprobs_from_hidden(model, hidden[before], tokens)
    return torch.zeros(completion_ids.shape, device=device).masked_scatter(completion_mask, logprobs)


def pa_grpo_loss(logprobs, old_logprobs, ref_logprobs, perception_mask, reasoning_mask, perception_advantages,
                 reasoning_advantages, clip_eps=0.2, beta=0.04, loss_average="segment"):
    """The negative of Eq. 7 for one group.

    Args:
        logprobs, old_logprobs, ref_logprobs: (G, T) of the policy, of the policy that sampled, and of π_ref
            (None where beta is 0). perception_mask, reasoning_mask: bool (G, T). perception_advantages,
            reasoning_advantages: (G,).
        loss_average: "segment" (Eq. 7) or "completion" (choice 2).

    Returns:
        (loss, metrics): a scalar tensor, and a dict of float with `kl` and `clip_frac`,
        means over all tokens.
    """
    ratio = torch.exp(logprobs - old_logprobs)  # ρ, (G, T)
    advantages = torch.where(perception_mask, perception_advantages[:, None], reasoning_advantages[:, None])
    surrogate, clipped = ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages  # (G, T)
    kl = torch.zeros_like(logprobs)
    if beta:
        x = (ref_logprobs - logprobs).clamp(-10, 10)
        kl = torch.exp(x) - x - 1  # choice 4
    objective = torch.min(surrogate, clipped) - beta * kl
    both = perception_mask | reasoning_mask
    means = [torch.where(mask, objective, 0).sum(1) / mask.sum(1).clamp(min=1)  # (G,) each
             for mask in ([perception_mask, reasoning_mask] if loss_average == "segment" else [both])]
    loss = -sum(means).mean()  # Σ_k, then 1/G Σ_i
    tokens = both.sum().clamp(min=1)
    return loss, {"kl": float((kl.detach() * both).sum() / tokens),
                  "clip_frac": float(((clipped < surrogate) & both).sum() / tokens)}


# --- the loop -----------------------------------------------------------------------------------------------

@dataclass
class Group:
    """One prompt's completions with all that the update needs of them."""
    record: dict
    prompt: Prompt
    completion_ids: torch.Tensor  # (G, T)
    completion_mask: torch.Tensor  # (G, T)
    perception_mask: torch.Tensor  # (G, T)
    reasoning_mask: torch.Tensor  # (G, T)
    texts: list = None  # G of str
    scores: list = None  # G of dict, see `score`
    perception_advantages: torch.Tensor = None  # (G,)
    reasoning_advantages: torch.Tensor = None  # (G,)
    old_logprobs: torch.Tensor = None  # (G, T)
    ref_logprobs: torch.Tensor = None  # (G, T)

    @property
    def inputs(self):
        return self.prompt, self.completion_ids, self.completion_mask

    def split(self, size):
        """The group's tensors in pieces of up to `size` completions (None: in one)."""
        tensors = {name: value for name, value in vars(self).items()
                   if isinstance(value, torch.Tensor)}
        size = size or len(self.completion_ids)
        return [replace(self, **{name: value[i:i + size] for name, value in tensors.items()})
                for i in range(0, len(self.completion_ids), size)]

    def rewards(self, process):
        """(G,) float32, NaN where unknown."""
        return torch.tensor([s[process] for s in self.scores], dtype=torch.float32)


def sample_groups(model, encoded, tokenizer, args):
    """Embed the prompts, sample G completions of each, `--prompts-per-rollout` prompts in one loop, and find
    whose token is whose. encoded: pairs (record, Prompt)."""
    groups, shape = [], (args.num_generations, args.max_completion_tokens)
    at_once = args.prompts_per_rollout or max(1, len(encoded))
    for i in range(0, len(encoded), at_once):
        records, prompts = zip(*encoded[i:i + at_once])
        with torch.no_grad():
            embed_prompts(model, prompts)
        dice = torch.cat([roll_dice(args.seed, record["turn"], *shape) for record in records])  # (B·G, T)
        ids, mask, _ = rollout(model, prompts, tokenizer, *shape, dice)
        tensors = (t.split(args.num_generations) for t in (ids, mask, *segment_masks(ids, tokenizer)))
        groups += [Group(*parts) for parts in zip(records, prompts, *tensors)]
    return groups


def score_groups(groups, tokenizer, judge, args):
    """Fill in texts, scores and advantages; the judge sees all observations of the update in one batch."""
    for group in groups:
        group.texts = [tokenizer.decode(ids[mask], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
                       for ids, mask in zip(group.completion_ids, group.completion_mask)]
    records = [group.record for group in groups for _ in group.texts]
    verdicts = iter(judge(records, [parse_trace(text).observation for group in groups
                                    for text in group.texts]))
    for group in groups:
        lengths = zip(group.perception_mask.sum(1).tolist(), group.reasoning_mask.sum(1).tolist())
        ended = (group.completion_ids == tokenizer.eos_token_id).any(1).tolist()
        group.scores = [dict(score(group.record, text, n, next(verdicts), args), truncated=not end,
                             perception_tokens=n[0], reasoning_tokens=n[1])
                        for text, n, end in zip(group.texts, lengths, ended)]
        device = group.completion_ids.device
        group.perception_advantages, group.reasoning_advantages = (
            a.to(device) for a in process_advantages(group.rewards("perception"), group.rewards("reasoning"),
                                                     args.without))


def update_policy(model, reference, optimizer, groups, lr, args):
    """μ gradient steps on the groups of one rollout, each over all of them; returns the last one's metrics.

    `--completions-per-pass` cuts the groups into smaller passes; as every completion counts 1/G, the loss is
    the sum of the pieces' losses by their shares.
    """
    pieces = [piece for group in groups for piece in group.split(args.completions_per_pass)]
    sizes = [(len(piece.completion_ids), int(piece.completion_mask.sum())) for piece in pieces]
    completions, tokens = map(sum, zip(*gather_object(sizes)))
    with torch.no_grad():
        for piece in pieces:
            if args.beta:
                with use_adapter(model, reference):
                    piece.ref_logprobs = token_logprobs(model, *piece.inputs)
            if args.num_iterations > 1:
                piece.old_logprobs = token_logprobs(model, *piece.inputs)
    model.train()
    for _ in range(args.num_iterations):
        totals = {"loss": 0.0, "kl": 0.0, "clip_frac": 0.0}
        for piece in pieces:
            logprobs = token_logprobs(model, *piece.inputs)
            old_logprobs = (logprobs.detach() if piece.old_logprobs is None  # μ = 1: ρ = 1
                            else piece.old_logprobs)
            loss, metrics = pa_grpo_loss(
                logprobs, old_logprobs, piece.ref_logprobs, piece.perception_mask, piece.reasoning_mask,
                piece.perception_advantages, piece.reasoning_advantages, args.clip_eps, args.beta,
                args.loss_average)
            share = len(logprobs) / completions
            (share * loss).backward()
            totals["loss"] += share * loss.item()
            for key, value in metrics.items():  # means over tokens
                totals[key] += int(piece.completion_mask.sum()) / tokens * value
        grad_norm = optimiser_step(model, optimizer, lr, args.max_grad_norm)
    model.eval()
    shares = gather_object([totals])
    return dict({key: sum(share[key] for share in shares) for key in totals}, grad_norm=grad_norm)


def reward_metrics(groups):
    """What an update's completions earned, as logged (names in the README); unknown verdicts count in no
    mean. groups: for each prompt the scores of its completions, list of list of dict."""
    groups = [[dict(s, sum=s["perception"] + s["reasoning"]) for s in group] for group in groups]
    scores = [s for group in groups for s in group]
    metrics = {"reward": nan_mean([s["sum"] for s in scores])}
    for process in ("perception", "reasoning"):
        for part in ("accuracy", "format", "length"):
            metrics[f"rewards/{process}_{part}"] = nan_mean([s[f"{process}_{part}"] for s in scores])
        metrics[f"length/{process}"] = nan_mean([s[f"{process}_tokens"] for s in scores])
    for name in ("perception", "reasoning", "sum"):
        equal = [len({s[name] for s in group if s[name] == s[name]}) <= 1 for group in groups]
        metrics[f"frac_reward_zero_std/{name}"] = sum(equal) / len(equal)
    metrics["truncated_frac"] = nan_mean([s["truncated"] for s in scores])
    metrics["judge_unknown"] = sum(s["perception"] != s["perception"] for s in scores)
    return metrics


def nan_mean(values):
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else None


def show(group, tokenizer):
    """A group on screen, a line per completion: rewards and advantages of both processes, then perception in
    cyan and reasoning in yellow."""
    record = group.record
    lines = [f"\n{record['problem']} {' '.join(record['options'])}  gold {record['solution']}",
             "perception       reasoning        reward, advantage"]
    for ids, text, s, a_p, a_r in zip(
            [ids[mask] for ids, mask in zip(group.completion_ids, group.perception_mask)], group.texts,
            group.scores, group.perception_advantages, group.reasoning_advantages):
        split = len(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        lines.append(f"{s['perception']:5.2f}, {a_p:+5.2f}     {s['reasoning']:5.2f}, {a_r:+5.2f}     "
                     f"\033[36m{text[:split]}\033[33m{text[split:]}\033[0m")
    tqdm.write("\n".join(lines))


def train(model, reference, tokenizer, records, args):
    """The RL loop: sample, score, update, log. Writes metrics.jsonl, curves.png and the adapter."""
    template = load_template(args.prompt_file)
    judge = judge_from(args, lambda prompts: self_judge(model, tokenizer, prompts, rollout_rows(args)))
    optimizer, batch_size = prepare_for_training(model, args), share_of(args.prompts_per_update)
    settings = settings_of(model, records, args)
    start, skipped = load_checkpoint(model, optimizer, settings, args)
    stream = islice(endless(records, args.seed), start * args.prompts_per_update, None)
    media = read_ahead(mine(stream, args.prompts_per_update), args)
    args.output.mkdir(parents=True, exist_ok=True)
    with (open_log(args.output, start) as file,
          tqdm(range(start, args.updates), "PA-GRPO", args.updates, initial=start,
               disable=not is_first()) as bar):
        for step in bar:
            if step > start and step % args.save_every == 0:
                save_checkpoint(step, model, optimizer, skipped, settings, args.output)
            clock = [time.time()]
            batch = islice(media, batch_size)  # decoded while the last update ran
            encoded = encode_batch(batch, template, tokenizer, core(model).config, skipped)
            if not any(gather_object([len(encoded)])):
                continue
            groups = sample_groups(model, encoded, tokenizer, args)
            clock.append(time.time())
            try:
                score_groups(groups, tokenizer, judge, args)
            except UserError:  # the judge refuses or has had its calls: stop, and keep what has been learnt
                save_adapter(model, args.output)  # by whichever process this is: all have the same weights
                raise
            clock.append(time.time())
            lr = cosine_lr(step, args.updates, args.lr, args.warmup)
            losses = update_policy(model, reference, optimizer, groups, lr, args)
            clock.append(time.time())
            seconds = dict(zip(("sec/rollout", "sec/judge", "sec/update"), np.diff(clock).tolist()))
            scores = gather_object([group.scores for group in groups])
            metrics = dict(reward_metrics(scores), **losses, lr=lr, **seconds, peak_gib=peak_gib())
            log_line(file, dict(step=step, scoring=args.scoring, **metrics))
            bar.set_postfix({"reward": metrics["reward"], "P": metrics["rewards/perception_accuracy"],
                             "R": metrics["rewards/reasoning_accuracy"], "kl": metrics["kl"]})
            if step % args.show_every == 0 and groups:
                show(groups[0], tokenizer)
    lost = len(gather_object(skipped))
    if lost == args.updates * args.prompts_per_update:
        raise UserError("None of the media can be read, so nothing was learnt: see the list above.")
    if is_first():
        save_adapter(model, args.output)
        (args.output / "checkpoint.pt").unlink(missing_ok=True)
        plot_curves(args.output)
    print_stats(judge)
    print(f"{args.updates} updates, {lost} records skipped; "
          f"adapter, metrics.jsonl, curves.png in {args.output}")


def endless(records, seed):
    """The records in random order, over and over, each pass in a new order; `turn` counts them."""
    rng, turn = random.Random(seed), count()
    while True:
        for record in rng.sample(records, len(records)):
            yield dict(record, turn=next(turn))


def self_judge(model, tokenizer, prompts, batch, max_tokens=256):
    """Replies (list of str) of the frozen base, its adapters off, to text prompts, decoded greedily, `batch`
    at a time."""
    replies = []
    for i in range(0, len(prompts), batch):
        encoded = [encode_text(text, tokenizer) for text in prompts[i:i + batch]]
        with torch.no_grad(), use_adapter(model, None):
            embed_prompts(model, encoded)
            ids, mask, _ = rollout(model, encoded, tokenizer, 1, max_tokens)
        replies += [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask)]
    return replies


def rollout_rows(args):
    """How many sequences are decoded together, completions or judgements."""
    return args.num_generations * (args.prompts_per_rollout or args.prompts_per_update)


def probe(model, reference, tokenizer, args):
    """An update on long prompts with every completion at the limit, with all in memory that one in the middle
    of a run has there; returns {phase: (seconds, peak GiB)}."""
    rows, optimizer = {}, prepare_for_training(model, args)
    endless_tokenizer = copy.deepcopy(tokenizer)
    endless_tokenizer.eos_token = None  # so that every completion runs to the limit
    optimiser_step(model, optimizer, 0.0, args.max_grad_norm)  # changes nothing, and AdamW has its means
    record, prompt = worst_prompt(tokenizer, core(model).config, args)
    encoded = [(dict(record, turn=turn), replace(prompt))
               for turn in range(share_of(args.prompts_per_update))]
    print(f"{len(encoded)} prompts of {len(prompt.input_ids)} tokens, {args.num_generations} completions of "
          f"{args.max_completion_tokens} each")
    with measured("rollout", "pass --prompts-per-rollout 1, then fewer --num-generations", rows):
        groups = sample_groups(model, encoded, endless_tokenizer, args)
    if args.judge == "self":
        observation = "the " * args.max_completion_tokens
        judge = judge_from(
            args, lambda prompts: self_judge(model, endless_tokenizer, prompts, rollout_rows(args)))
        with measured("judge", "lower --prompts-per-rollout or name another --judge", rows):
            judge([record] * len(encoded) * args.num_generations,
                  [observation] * len(encoded) * args.num_generations)
    for group in groups:
        mask = group.completion_mask
        half = torch.arange(mask.shape[1], device=mask.device) % 2 == 0
        group.perception_mask, group.reasoning_mask = mask & half, mask & ~half
        group.perception_advantages = group.reasoning_advantages = group_advantages(
            torch.arange(args.num_generations, device=half.device).float())
    with measured("update", "lower --completions-per-pass, then --lora-rank from sft.py on", rows):
        update_policy(model, reference, optimizer, groups, args.lr, args)
    seconds = sum(s for phase, (s, _) in rows.items())
    print(f"{args.updates} such updates take {args.updates * seconds / 3600:.1f} h.")
    return rows


CURVES = {"reward": ["reward"],
          "accuracy": ["rewards/perception_accuracy", "rewards/reasoning_accuracy"],
          "format": ["rewards/perception_format", "rewards/reasoning_format"],
          "tokens": ["length/perception", "length/reasoning"],
          "groups with equal rewards": [f"frac_reward_zero_std/{k}"
                                        for k in ("perception", "reasoning", "sum")],
          "KL to the reference": ["kl"]}


def plot_curves(folder, window=15):
    """Draw `curves.png` from `metrics.jsonl`: running means of the paper's Fig. 6c and 15."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, CURVES.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row[key] is not None]
            means = [nan_mean([v for _, v in points[max(0, i - window + 1):i + 1]])
                     for i in range(len(points))]
            axis.plot([step for step, _ in points], means, label=key.split("/")[-1].removesuffix("_" + title))
        axis.set(title=title, xlabel="update")
        if len(keys) > 1:
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)
    pyplot.close(figure)


def get_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model, _ = add_data_args(parser, "questions: JSON list or JSON Lines, .gz or plain, globs allowed")
    add_model_args(model)
    model.add_argument("--adapter", help="folder of the SFT adapter to start from, or none for the base "
                                         "(default: runs/<model>/sft where it is)")
    add_vision_args(parser)
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--algorithm", default="pa-grpo", choices=["pa-grpo", "grpo"],
                           help="grpo: choice 7")
    algorithm.add_argument("--without", choices=["perception", "reasoning", "length", "separation"],
                           help="leave one part of the reward out (Table 2, choice 7)")
    algorithm.add_argument("--num-generations", type=positive, default=8,
                           help="completions per prompt, G (paper: 8)")
    algorithm.add_argument("--prompts-per-update", type=positive, default=7,
                           help="prompts per optimiser step (paper: 7)")
    algorithm.add_argument("--num-iterations", type=positive, default=1, help="gradient steps per rollout, μ")
    algorithm.add_argument("--prompts-per-rollout", type=positive,
                           help="prompts sampled in one loop (default: all; fewer, less memory)")
    algorithm.add_argument("--completions-per-pass", type=positive,
                           help="completions of a group per training pass (default: all; fewer, less memory)")
    algorithm.add_argument("--max-completion-tokens", type=positive, default=768,
                           help="completions are cut here (paper: 768)")
    algorithm.add_argument("--clip-eps", type=float, default=0.2, help="ε of Eq. 7")
    algorithm.add_argument("--beta", type=float, default=0.04,
                           help="β of Eq. 7 (paper: 0.04); 0 skips the reference pass")
    algorithm.add_argument("--loss-average", choices=["segment", "completion"],
                           help="choice 2 (default: segment; completion where one process alone is rewarded)")
    algorithm.add_argument("--perception-length", type=int, nargs=2, default=(128, 320),
                           metavar=("LOW", "HIGH"),
                           help="tokens of an observation that earn the length bonus (paper: 128 320)")
    algorithm.add_argument("--reasoning-length", type=int, nargs=2, default=(320, 512),
                           metavar=("LOW", "HIGH"),
                           help="tokens of think and answer that earn the length bonus (paper: 320 512)")
    algorithm.add_argument("--length-bonus", type=float, default=0.2, help="the length bonus (paper: 0.2)")
    add_judge_args(algorithm, default="self")
    optimisation = add_training_args(
        parser, lr=1e-5, lr_help="peak learning rate (paper: 1e-6 on all weights; LoRA wants more)")
    optimisation.add_argument("--updates", type=positive, default=1000,
                              help="optimiser steps at μ = 1 (paper: 1000)")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="seed of the order and of the sampling")
    run.add_argument("--show-every", type=positive, default=25, help="updates between two groups on screen")
    run.add_argument("--output", type=Path,
                     help="folder for adapter, metrics and curves (default: runs/<model>/pagrpo)")
    with team().main_process_first():  # it prepares the toy data
        args = parse_args(parser, STAGE_PRESETS, data_key="rl_data")
    if args.algorithm == "grpo":
        if args.without not in (None, "perception"):
            raise UserError(f"--algorithm grpo is --without perception: leave out --without {args.without}.")
        args.without = "perception"
    one_process = args.without in ("perception", "reasoning")
    args.loss_average = args.loss_average or ("completion" if one_process else "segment")
    args.output = args.output or args.run_dir / "pagrpo"
    return args


def main(args):
    hush()
    seed_everything(args.seed)
    limit_memory(args.memory_limit)
    records = [] if args.probe else select_records(args)
    adapter = args.adapter or args.run_dir / "sft"
    if args.adapter == "none" or (args.adapter is None and not (adapter / "adapter_config.json").exists()):
        print("No SFT adapter: starting from the base (Table 2, RL only).")
        adapter = None
    reference = None  # π_ref is the base, where there is no SFT adapter
    with measured("load", "take a smaller model"):
        model, tokenizer = load_model(args.base, adapter, not args.no_4bit, args.lora_rank, args.lora_alpha)
        if adapter is not None:
            reference = "ref"  # the same adapter once more, frozen: without one π_ref would be the base
            model.load_adapter(str(adapter), reference, is_trainable=False)
            rank, alpha = model.peft_config["policy"].r, model.peft_config["policy"].lora_alpha
            if rank != args.lora_rank or args.lora_alpha not in (None, alpha):
                raise UserError(f"The adapter in {adapter} has rank {rank} and alpha {alpha}: pass "
                                f"--lora-rank {rank} and no --lora-alpha, or train another with sft.py.")
        elif args.probe and args.adapter is None:
            reference = "ref"  # as it will be once sft.py has run
            model.add_adapter(reference, model.peft_config["policy"])
            model.set_adapter("policy")
    return (probe(model, reference, tokenizer, args) if args.probe
            else train(model, reference, tokenizer, records, args))


if __name__ == "__main__":
    main(get_args())
