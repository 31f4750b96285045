"""PA-GRPO: each token of a completion gets the advantage of its own process and of no other
(VideoP2R, Sec. 3.2).

A completion is perception o_P, the observation, and reasoning o_R, think and answer. Each has its own reward,

    R_P = judge finds the observation sufficient (0/1)  + format (0/1) + length bonus              (Eq. 3, 5)
    R_R = metric of the problem type in [0, 1]          + format (0/1) + length bonus              (Eq. 4, 5)

and its own group-normalised advantage over the G completions of a prompt,

    A_{i,k} = (R_{i,k} - mean_j R_{j,k}) / std_j R_{j,k}                                           (Eq. 6)

which goes to the tokens of o_{i,k} alone:

    J = E[ 1/G Σ_i Σ_k ( min(ρ A, clip(ρ, 1-ε, 1+ε) A) - β KL(π_θ || π_ref) ) ]                    (Eq. 7)

with ρ the likelihood ratio of the policy to the policy that sampled, per token, and π_ref the frozen model
after SFT.

    python pagrpo.py --model tiny              # a laptop's CPU: 2 to 4 minutes, 1 GiB
    python pagrpo.py --model qwen2.5-vl-7b     # one consumer GPU

Why the loss is about 0: with one gradient step per rollout (μ = 1) ρ is exactly 1, a group's advantages add
up to 0, and so does the policy term. Its gradient, A · ∇ log π, does not. Watch the rewards, not the loss.

Shapes: B prompts, G completions per group, P prompt tokens, T completion tokens, S packed tokens, D hidden.

Our choices where the paper is silent (cited by number in the code):
 1. Segments partition the completion. P is everything up to and including the token that completes the first
    `</observation>`; R is the rest, end-of-sequence included. Never closed: P runs to the first `<think>`,
    else to the end. Never opened: all is R. Boundaries are found on the sampled ids, never by re-tokenising.
 2. A completion's loss is the mean over each process's tokens, summed over the two: Eq. 7 read literally. An
    empty segment contributes 0. `--loss-average completion` takes one mean over all tokens, as the peers do
    and as is right where all of them have one advantage (choice 7).
 3. std is the unbiased estimate plus 1e-4; a group with equal rewards gets exact zeros.
 4. KL per token is exp(x) - x - 1, x = log π_ref - log π clamped to ±10 (k3), in the segment's mean.
 5. Completions are sampled at temperature 1 from all tokens but the visual and chat-control ones; the sampled
    ids are kept and trained on as they are; completions cut at the limit count as truncated.
 6. A judge that fails yields "unknown": that completion leaves its group's perception mean and std and gets
    perception advantage 0; it is never scored 0.
 7. Ablations (Table 2). `--algorithm grpo` is `--without perception`: the reasoning reward's advantage on all
    tokens. `--without reasoning` is its mirror image. `--without separation`: the sum of both rewards on all
    tokens. `--without length`: no length bonus. The judge is asked in any case, for the log.
"""
import argparse
import copy
import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gen_cot import (add_data_args, add_judge_args, add_vision_args, judge_from, load_template, positive,
                     print_stats, read_ahead, select_records)
from rewards import UserError, parse_trace, process_rewards, reward_metrics
from sft import (GroupCache, Prompt, add_model_args, add_reference, add_training_args, banned_ids, begin,
                 core, cosine_lr, embed_prompts, encode_batch, encode_text, endless, finish, is_first,
                 load_checkpoint, load_model, log_line, logprobs_from_hidden, measured, merged, open_log,
                 optimiser_step, parse_training_args, prepare_for_training, print_phases, save_adapter,
                 save_checkpoint, settings_of, share_of, use_adapter, worst_prompt)

STAGE_PRESETS = {"tiny": dict(
    lr=8e-4, lora_rank=32, updates=100, prompts_per_update=8, max_completion_tokens=112,
    perception_length=(16, 64), reasoning_length=(16, 64), max_pixels=4, no_checkpointing=True)}


# --- rollout ------------------------------------------------------------------------------------------------

def rollout(model, prompts, tokenizer, num_generations, max_tokens, dice=None):
    """Sample `num_generations` completions for each prompt (choice 5).

    Each prompt is prefilled once, into the key-value cache of all its group; all groups decode in one loop,
    every step with our own positions, where that is exact through weights with the adapter in them (`merged`).

    Args:
        prompts: B of Prompt with embeds. max_tokens: T, the completions' limit.
        dice: (B·G, T) float64 uniform in [0, 1), one for each token to be drawn; None: the likeliest tokens.

    Returns:
        completion_ids (B·G, T) int64, padded behind the end-of-sequence token; completion_mask (B·G, T) bool,
        true up to and including it; logprobs (B·G, T) float32 of the sampled tokens.
    """
    qwen, head, device, G = core(model).model, core(model).lm_head, prompts[0].embeds.device, num_generations
    width = max(len(p.input_ids) for p in prompts)
    pads = torch.tensor([width - len(p.input_ids) for p in prompts], device=device)  # on the left
    position = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(G)
    banned = torch.tensor(banned_ids(tokenizer, head.out_features), device=device)
    dice = None if dice is None else dice.to(device)
    cache = GroupCache(prompts[0].embeds, qwen.config.text_config, len(prompts) * G, width + max_tokens)

    def feed(embeds, positions, visible=None):  # (n, tokens, D), (3, n, tokens); the last one's state (n, D)
        return qwen.language_model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache,
                                   attention_mask={"full_attention": visible}).last_hidden_state[:, -1]

    with torch.no_grad(), merged(model):
        hidden = []
        for b, prompt in enumerate(prompts):
            cache.rows, cache.columns = slice(b * G, (b + 1) * G), slice(int(pads[b]), width)
            hidden.append(feed(prompt.embeds[None], prompt.positions[:, None].to(device)))
        hidden = torch.cat(hidden).repeat_interleave(G, dim=0)  # (B·G, D)
        visible = (torch.arange(width + max_tokens, device=device) >= pads.repeat_interleave(G)[:, None]
                   )[:, None, None] if pads.any() else None  # (B·G, 1, 1, P + T)
        running = torch.ones(len(hidden), dtype=torch.bool, device=device)
        ids, masks, logprobs, cache.rows = [], [], [], slice(None)
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
            cache.columns = slice(width + t + 1)  # with the token that is fed now
            hidden = feed(qwen.language_model.embed_tokens(token)[:, None], position.expand(3, -1)[..., None],
                          None if visible is None else visible[..., cache.columns])
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


# --- whose token is it, and what is it worth ----------------------------------------------------------------

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


def group_advantages(rewards):
    """Advantages (G,) of one group's rewards (G,), Eq. 6 (choice 3); NaN marks an unknown reward, which gets 0
    (choice 6)."""
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


# --- log-probs over a shared prompt, and the loss -----------------------------------------------------------

class SharedPrefix(NamedTuple):
    """Where the tokens of a pack [prompt, completion 1, …, G] stand; in an attention mask's place."""
    prompt: int  # P, the prompt's tokens
    slots: torch.Tensor  # (G, T) int64, each completion token's place behind the prompt, 0 at padding
    kept: torch.Tensor  # (S - P,) int64, the places in the flattened (G, T) that are no padding
    visible: torch.Tensor  # (T, P + T) bool, what a completion's tokens see: all of P, then causal


def shared_prefix_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention over a pack (S tokens) in two calls, neither of which computes anything between completions:
    the prompt on itself, and each completion on the prompt and itself. All else goes the library's way.

    query (1, heads, S, d), key and value (1, key-value heads, S, d); returns (1, S, heads, d) and None.
    """
    if not isinstance(attention_mask, SharedPrefix):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    P, slots, kept, visible = attention_mask
    (G, T), R = slots.shape, module.num_key_value_groups  # R query heads share a key-value head

    def rows(x, index):  # as an embedding, since its gradient, a sum by rows, is quicker than indexing's
        return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])

    shared, own = zip(*(x.split([P, x.shape[2] - P], dim=2) for x in (query, key, value)))
    prompt, _ = sdpa_attention_forward(module, *shared, None, **kwargs)  # (1, P, heads, d)
    q, k, v = (rows(x[0].transpose(0, 1), slots).transpose(1, 2) for x in own)  # (G, heads, T, d)
    k, v = (torch.cat([x.expand(G, -1, -1, -1), y], dim=2) for x, y in zip(shared[1:], (k, v)))
    q = q.unflatten(1, (-1, R)).flatten(2, 3)  # (G, key-value heads, R·T, d): no key is copied for R heads
    own = F.scaled_dot_product_attention(q, k, v, visible.repeat(R, 1), scale=module.scaling)
    own = own.unflatten(2, (R, T)).flatten(1, 2).transpose(1, 2)  # (G, T, heads, d)
    return torch.cat([prompt, rows(own.flatten(0, 1), kept)[None]], dim=1), None


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
    language, P, device = core(model).model.language_model, len(prompt.input_ids), prompt.embeds.device
    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    AttentionMaskInterface.register("shared_prefix", sdpa_mask)
    language.config._attn_implementation = "shared_prefix"
    tokens = completion_ids[completion_mask]  # (S - P,), row after row
    steps = completion_mask.nonzero()[:, 1]  # which of its completion's tokens each one is
    order = torch.arange(len(tokens), device=device)
    slots = torch.zeros_like(completion_ids).masked_scatter(completion_mask, order)  # (G, T)
    visible = torch.ones(slots.shape[1], P + slots.shape[1], dtype=torch.bool, device=device).tril(P)
    pack = SharedPrefix(P, slots, completion_mask.flatten().nonzero()[:, 0], visible)
    positions = torch.cat([prompt.positions.to(device), (prompt.next_position + steps).expand(3, -1)],
                          dim=1)  # (3, S)
    embeds = torch.cat([prompt.embeds, language.embed_tokens(tokens)])[None]
    hidden = language(inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False,
                      attention_mask={"full_attention": pack}).last_hidden_state[0]  # (S, D)
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
        (loss, metrics): a scalar, and a dict of float with `kl` and `clip_frac`, means over all tokens.
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


# --- one update ---------------------------------------------------------------------------------------------

@dataclass
class Group:
    """One prompt's completions with all that the update needs of them."""
    record: dict
    prompt: Prompt
    completion_ids: torch.Tensor  # (G, T)
    completion_mask: torch.Tensor  # (G, T)
    perception_mask: torch.Tensor  # (G, T)
    reasoning_mask: torch.Tensor  # (G, T)
    sampled_logprobs: torch.Tensor  # (G, T), the rollout's own
    texts: list = None  # G of str
    scores: list = None  # G of dict, see `process_rewards`
    perception_advantages: torch.Tensor = None  # (G,)
    reasoning_advantages: torch.Tensor = None  # (G,)
    old_logprobs: torch.Tensor = None  # (G, T)
    ref_logprobs: torch.Tensor = None  # (G, T)

    @property
    def inputs(self):
        return self.prompt, self.completion_ids, self.completion_mask

    def split(self, size):
        """The group's tensors in pieces of up to `size` completions (None: in one)."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        size = size or len(self.completion_ids)
        return [replace(self, **{name: value[i:i + size] for name, value in tensors.items()})
                for i in range(0, len(self.completion_ids), size)]


def sample_groups(model, encoded, tokenizer, args):
    """Embed the prompts, sample G completions of each, `--prompts-per-rollout` prompts in one loop, and find
    whose token is whose. encoded: pairs (record, Prompt)."""
    groups, shape = [], (args.num_generations, args.max_completion_tokens)
    for i in range(0, len(encoded), args.prompts_per_rollout):
        records, prompts = zip(*encoded[i:i + args.prompts_per_rollout])
        with torch.no_grad():
            embed_prompts(model, prompts)
        dice = torch.cat([roll_dice(args.seed, record["turn"], *shape) for record in records])  # (B·G, T)
        ids, mask, logprobs = rollout(model, prompts, tokenizer, *shape, dice)
        tensors = (t.split(args.num_generations)
                   for t in (ids, mask, *segment_masks(ids, tokenizer), logprobs))
        for record, prompt, *parts in zip(records, prompts, *tensors):
            longest = int(parts[1].sum(1).max())  # of this group, which need not wait for the others'
            groups.append(Group(record, prompt, *(part[:, :longest] for part in parts)))
    return groups


def score_groups(groups, tokenizer, judge, args):
    """Fill in texts, scores and advantages (Eq. 3-6); the judge sees all observations in one batch."""
    for group in groups:
        group.texts = [tokenizer.decode(ids[mask], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
                       for ids, mask in zip(group.completion_ids, group.completion_mask)]
    pairs = [(group.record, parse_trace(text).observation) for group in groups for text in group.texts]
    verdicts = iter(judge([record for record, _ in pairs], [observation for _, observation in pairs]))
    bonus = 0.0 if args.without == "length" else 0.2  # choice 7
    for group in groups:
        lengths = zip(group.perception_mask.sum(1).tolist(), group.reasoning_mask.sum(1).tolist())
        ended = [tokenizer.eos_token_id in row for row in group.completion_ids.tolist()]
        group.scores = [
            process_rewards(group.record, text, next(verdicts), n,
                            (args.perception_length, args.reasoning_length), bonus, args.scoring)
            | dict(truncated=not end) for text, n, end in zip(group.texts, lengths, ended)]
        rewards = [torch.tensor([s[k] for s in group.scores]) for k in ("perception", "reasoning")]
        group.perception_advantages, group.reasoning_advantages = (
            a.to(group.completion_ids.device) for a in process_advantages(*rewards, args.without))


def update_policy(model, reference, optimizer, groups, lr, args):
    """μ gradient steps on the groups of one rollout, each over all of them; returns the last one's metrics.
    `logprob_gap` is how far the rollout's log-probs were from those recomputed before the first step.

    `--completions-per-pass` cuts the groups into smaller passes; as every completion counts 1/G, the loss is
    the sum of the pieces' losses by their shares.
    """
    pieces = [piece for group in groups for piece in group.split(args.completions_per_pass)]
    sizes = [(len(piece.completion_ids), int(piece.completion_mask.sum())) for piece in pieces]
    all_completions, all_tokens = map(sum, zip(*gather_object(sizes)))
    with torch.no_grad():
        for piece in pieces:
            if args.beta:
                with use_adapter(model, reference):
                    piece.ref_logprobs = token_logprobs(model, *piece.inputs)
            if args.num_iterations > 1:
                piece.old_logprobs = token_logprobs(model, *piece.inputs)
    model.train()
    for _ in range(args.num_iterations):
        totals = dict.fromkeys(("loss", "kl", "clip_frac", "logprob_gap"), 0.0)
        for piece, (completions, tokens) in zip(pieces, sizes):
            logprobs = token_logprobs(model, *piece.inputs)
            old = logprobs.detach() if piece.old_logprobs is None else piece.old_logprobs  # μ = 1: ρ = 1
            loss, metrics = pa_grpo_loss(
                logprobs, old, piece.ref_logprobs, piece.perception_mask, piece.reasoning_mask,
                piece.perception_advantages, piece.reasoning_advantages, args.clip_eps, args.beta,
                args.loss_average)
            (completions / all_completions * loss).backward()
            totals["loss"] += completions / all_completions * loss.item()
            metrics["logprob_gap"] = float((old - piece.sampled_logprobs).abs().sum() / tokens)
            for key, value in metrics.items():  # means over tokens
                totals[key] += tokens / all_tokens * value
        grad_norm = optimiser_step(model, optimizer, lr, args.max_grad_norm)
    model.eval()
    shares = gather_object([totals])
    return dict({key: sum(share[key] for share in shares) for key in totals}, grad_norm=grad_norm)


def update(model, reference, tokenizer, optimizer, encoded, judge, lr, args):
    """Sample, score, learn: one update on pairs (record, Prompt). Returns (groups, metrics)."""
    metrics = {}
    with measured("rollout", "pass --prompts-per-rollout 1, then fewer --num-generations", metrics):
        groups = sample_groups(model, encoded, tokenizer, args)
    with measured("judge", "lower --prompts-per-rollout or name another --judge", metrics):
        score_groups(groups, tokenizer, judge, args)
    with measured("update", "lower --completions-per-pass, then --lora-rank from sft.py on", metrics):
        losses = update_policy(model, reference, optimizer, groups, lr, args)
    metrics["peak_gib"] = max(metrics[f"gib/{phase}"] for phase in ("rollout", "judge", "update"))
    return groups, reward_metrics(gather_object([group.scores for group in groups])) | losses | metrics


def show(group, tokenizer):
    """A group on screen, a line per completion: rewards and advantages of both processes, then perception in
    cyan and reasoning in yellow."""
    record = group.record
    lines = [f"\n{record['problem']} {' '.join(record['options'])}  gold {record['solution']}",
             "perception       reasoning        reward, advantage"]
    for i, (text, s) in enumerate(zip(group.texts, group.scores)):
        split = len(tokenizer.decode(group.completion_ids[i][group.perception_mask[i]],
                                     clean_up_tokenization_spaces=False))
        lines.append(f"{s['perception']:5.2f}, {group.perception_advantages[i]:+5.2f}     "
                     f"{s['reasoning']:5.2f}, {group.reasoning_advantages[i]:+5.2f}     "
                     f"\033[36m{text[:split]}\033[33m{text[split:]}\033[0m")
    tqdm.write("\n".join(lines))


# --- the loop -----------------------------------------------------------------------------------------------

CURVES = {"reward": ["reward"], "KL to the reference": ["kl"],  # the paper's Fig. 6c and 15
          "accuracy": ["rewards/perception_accuracy", "rewards/reasoning_accuracy"],
          "format": ["rewards/perception_format", "rewards/reasoning_format"],
          "tokens": ["length/perception", "length/reasoning"],
          "groups with equal rewards": [f"frac_reward_zero_std/{k}"
                                        for k in ("perception", "reasoning", "sum")]}


def train(model, reference, tokenizer, records, args):
    """The RL loop: sample, score, update, log. Writes metrics.jsonl, curves.png and the adapter."""
    template, config = load_template(args.prompt_file), core(model).config
    judge = judge_from(args, lambda prompts: self_judge(model, tokenizer, prompts, args))
    optimizer, settings = prepare_for_training(model, args), settings_of(model, records, args)
    start, skipped = load_checkpoint(model, optimizer, settings, args)
    media = read_ahead(endless(records, args.seed, args.prompts_per_update, start), args)
    args.output.mkdir(parents=True, exist_ok=True)
    with (open_log(args.output, start) as file,
          tqdm(range(start, args.updates), "PA-GRPO", args.updates, initial=start,
               disable=not is_first()) as bar):
        for step in bar:
            if step > start and step % args.save_every == 0:
                save_checkpoint(step, model, optimizer, gather_object(skipped), settings, args.output)
            since = time.time()
            batch = islice(media, share_of(args.prompts_per_update))  # decoded while the last update ran
            encoded = encode_batch(batch, template, tokenizer, config, skipped)
            waited = time.time() - since
            if not any(gather_object([len(encoded)])):
                continue
            lr = cosine_lr(step, args.updates, args.lr, args.warmup)
            try:
                groups, metrics = update(model, reference, tokenizer, optimizer, encoded, judge, lr, args)
            except UserError:  # no memory, or a judge that refuses: stop, and keep what has been learnt
                save_adapter(model, args.output)  # by whichever process this is: all have the same weights
                save_checkpoint(step, model, optimizer, skipped, settings, args.output)
                raise
            log_line(file, {"step": step, "scoring": args.scoring, "lr": lr, **metrics, "sec/media": waited})
            bar.set_postfix({"reward": metrics["reward"], "P": metrics["rewards/perception_accuracy"],
                             "R": metrics["rewards/reasoning_accuracy"], "kl": metrics["kl"]})
            if step % args.show_every == 0 and groups:
                show(groups[0], tokenizer)
            del groups, encoded  # their embeddings would be in the next update's way
    lost = len(gather_object(skipped))
    if lost == args.updates * args.prompts_per_update:
        raise UserError("None of the media can be read, so nothing was learnt: see the list above.")
    finish(model, CURVES, args.output)
    print_stats(judge)
    print(f"{args.updates} updates, {lost} records skipped; "
          f"adapter, metrics.jsonl, curves.png in {args.output}")


def self_judge(model, tokenizer, prompts, args, max_tokens=256):
    """Replies (list of str) of the frozen base, its adapters off, to text prompts, decoded greedily, as many
    at a time as the completions are."""
    replies, batch = [], args.num_generations * args.prompts_per_rollout
    for i in range(0, len(prompts), batch):
        encoded = [encode_text(text, tokenizer) for text in prompts[i:i + batch]]
        with torch.no_grad(), use_adapter(model, None):
            embed_prompts(model, encoded)
            ids, mask, _ = rollout(model, encoded, tokenizer, 1, max_tokens)
        replies += [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask)]
    return replies


def probe(model, reference, tokenizer, args):
    """An update on long prompts with every completion and judgement at the limit, with all in memory that
    one in the middle of a run has there; returns the update's metrics."""
    optimizer, endless_tokenizer = prepare_for_training(model, args), copy.deepcopy(tokenizer)
    endless_tokenizer.eos_token = None  # so that every completion runs to the limit
    optimiser_step(model, optimizer, 0.0, args.max_grad_norm)  # changes nothing, and AdamW has its means
    record, prompt = worst_prompt(tokenizer, core(model).config, args)
    encoded = [(dict(record, turn=turn), replace(prompt))
               for turn in range(share_of(args.prompts_per_update))]
    for _, shorter in encoded[1:2]:  # unequal lengths, as usual, are decoded under a mask
        shorter.input_ids, shorter.positions = shorter.input_ids[1:], shorter.positions[:, 1:]
    print(f"{len(encoded)} prompts of {len(prompt.input_ids)} tokens, {args.num_generations} completions of "
          f"{args.max_completion_tokens} each")

    def judge(records, observations):
        if args.judge != "self":  # asking another costs none of this memory
            return [None for _ in records]
        own = judge_from(args, lambda prompts: self_judge(model, endless_tokenizer, prompts, args))
        return own(records, ["the " * args.max_completion_tokens for _ in records])

    _, metrics = update(model, reference, endless_tokenizer, optimizer, encoded, judge, args.lr, args)
    print_phases(metrics)
    seconds = sum(metrics[f"sec/{phase}"] for phase in ("rollout", "judge", "update"))
    print(f"{args.updates} such updates take {args.updates * seconds / 3600:.1f} h.")
    return metrics


def get_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model, _ = add_data_args(parser, "questions: JSON list or JSON Lines, .gz or plain, globs allowed")
    add_model_args(model)
    model.add_argument("--adapter", help="folder of the SFT adapter to start from, or none for the base "
                                         "(default: runs/<model>/sft where it is)")
    add_vision_args(parser)
    group = parser.add_argument_group("algorithm")
    add = group.add_argument
    add("--algorithm", default="pa-grpo", choices=["pa-grpo", "grpo"], help="grpo: choice 7")
    add("--without", choices=["perception", "reasoning", "length", "separation"],
        help="leave one part of the reward out (Table 2, choice 7)")
    add("--num-generations", type=positive, default=8, help="completions per prompt, G (paper: 8)")
    add("--prompts-per-update", type=positive, default=7, help="prompts per optimiser step (paper: 7)")
    add("--num-iterations", type=positive, default=1, help="gradient steps per rollout, μ")
    add("--prompts-per-rollout", type=positive,
        help="prompts sampled in one loop (default: all; fewer, less memory)")
    add("--completions-per-pass", type=positive,
        help="completions of a group per training pass (default: all; fewer, less memory)")
    add("--max-completion-tokens", type=positive, default=768, help="completions are cut here (paper: 768)")
    add("--clip-eps", type=float, default=0.2, help="ε of Eq. 7")
    add("--beta", type=float, default=0.04, help="β of Eq. 7 (paper: 0.04); 0 skips the reference pass")
    add("--loss-average", choices=["segment", "completion"],
        help="choice 2 (default: segment; completion where all tokens have one advantage)")
    for process, low, high in (("perception", 128, 320), ("reasoning", 320, 512)):
        add(f"--{process}-length", type=int, nargs=2, default=(low, high), metavar=("LOW", "HIGH"),
            help=f"tokens of the {process} segment that earn the length bonus (paper: {low} {high})")
    add_judge_args(group, default="self")
    optimisation, run = add_training_args(parser, "pagrpo", lr=1e-5)
    optimisation.add_argument("--updates", type=positive, default=1000,
                              help="optimiser steps at μ = 1 (paper: 1000)")
    run.add_argument("--show-every", type=positive, default=25, help="updates between two groups on screen")
    args = parse_training_args(parser, STAGE_PRESETS, "pagrpo", data_key="rl_data")
    if args.algorithm == "grpo":
        if args.without not in (None, "perception"):
            raise UserError(f"--algorithm grpo is --without perception: leave out --without {args.without}.")
        args.without = "perception"
    one_advantage = args.without in ("perception", "reasoning", "separation")
    args.loss_average = args.loss_average or ("completion" if one_advantage else "segment")
    if args.num_generations < 2:
        raise UserError("--num-generations 1 leaves nothing to compare a completion with: pass 2 or more.")
    args.prompts_per_rollout = args.prompts_per_rollout or args.prompts_per_update
    return args


def main(args):
    begin(args)
    records = [] if args.probe else select_records(args)
    adapter = args.adapter or args.run_dir / "sft"
    if args.adapter == "none" or (args.adapter is None and not (adapter / "adapter_config.json").exists()):
        print("No SFT adapter: starting from the base (Table 2, RL only).")
        adapter = None
    with measured("load", "take a smaller model"):
        model, tokenizer = load_model(args.base, adapter, not args.no_4bit, args.lora_rank, args.lora_alpha)
        reference = add_reference(model, adapter, args)
    return (probe(model, reference, tokenizer, args) if args.probe
            else train(model, reference, tokenizer, records, args))


if __name__ == "__main__":
    main(get_args())
