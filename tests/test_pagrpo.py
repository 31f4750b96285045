"""The algorithm against oracles from outside: slow float64 loops, and Hugging Face's own model."""
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import gen_cot
import pagrpo
import sft
from conftest import ROOT
from rewards import process_rewards

BASE = ROOT / gen_cot.MODELS["tiny"]

# --- whose token is it --------------------------------------------------------------------------------------


class ByteTokenizer:
    """A tokenizer of arbitrary byte pieces, to split tags and characters anywhere; id 0 pads, id 1 ends."""
    pad_token_id, eos_token_id = 0, 1

    def __init__(self, pieces):
        self.pieces = {0: b"<|pad|>", 1: b"<|end|>"} | dict(enumerate(pieces, 2))

    def decode(self, ids, **kwargs):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def split_anywhere(text, rng):
    """The UTF-8 bytes of a text in random pieces of 1 to 12 bytes,
    so that tags and characters are torn apart."""
    raw, pieces = text.encode(), []
    while raw:
        n = rng.randint(1, 12)
        pieces.append(raw[:n])
        raw = raw[n:]
    return pieces


def slow_split(pieces):
    """How many leading pieces are perception's, straight from the definition, on bytes."""
    raw = b"".join(pieces)
    if b"<observation>" not in raw:
        return 0
    end = raw.find(b"</observation>")
    think = raw.find(b"<think>")
    for n in range(len(pieces) + 1):
        done = len(b"".join(pieces[:n]))
        if end >= 0:
            if done >= end + len(b"</observation>"):
                return n
        elif think >= 0 and n < len(pieces) and done + len(pieces[n]) > think:
            return n
    return len(pieces)


PARTS = ["<observation>", "</observation>", "<think>", "</think>", "<answer>", "</answer>", " ", "é", "観察",
         "🙂", "red", "<", "</", "observation>", "<observation", "\n"]


def test_masks_partition_the_completion_wherever_the_tokenizer_splits_it():
    rng = random.Random(0)
    for _ in range(1000):
        if rng.random() < 0.5:
            text = "<observation>é {0}</observation> <think>{0}観</think><answer>{0}</answer>".format(
                rng.choice(PARTS))
        else:
            text = "".join(rng.choices(PARTS, k=rng.randint(1, 14)))
        pieces = split_anywhere(text, rng)
        ended = rng.random() < 0.7
        ids = torch.tensor([list(range(2, len(pieces) + 2)) + [1] * ended + [0] * rng.randint(0, 3) * ended])
        p, r = pagrpo.segment_masks(ids, ByteTokenizer(pieces))
        length, split = len(pieces) + ended, slow_split(pieces + [b"<|end|>"] * ended)
        assert (pieces, p[0].nonzero()[:, 0].tolist()) == (pieces, list(range(split)))
        assert (pieces, r[0].nonzero()[:, 0].tolist()) == (pieces, list(range(split, length)))


@pytest.mark.parametrize("text, perception", [
    ("<observation>a</observation> <think>b</think><answer>c</answer>", "<observation>a</observation>"),
    ("<observation>a <think>b</think><answer>c</answer>", "<observation>a "),  # never closed: up to <think>
    ("<observation>a and on and on", "<observation>a and on and on\n"),  # no <think>: all, the end too
    ("<think>b</think><answer>c</answer>", ""),  # never opened
    ("<observation>a</observation> <observation>b</observation>", "<observation>a</observation>"),
])
def test_masks_by_hand(text, perception):
    ids = torch.tensor([list(range(2, len(text) + 2)) + [1]])
    p, r = pagrpo.segment_masks(ids, ByteTokenizer([c.encode() for c in text]))
    parts = ["".join(c for c, own in zip(text + "\n", mask[0]) if own) for mask in (p, r)]
    assert parts == [perception, (text + "\n")[len(perception):]]
    assert p[0].tolist() == [t < len(perception) for t in range(len(text) + 1)]
    assert torch.equal(r, ~p)  # the end-of-sequence token included


@pytest.mark.parametrize("pieces, perception", [
    (["<observation>", "red.</obs", "ervation>", "<think>"], 3),
    (["<observation>", "red.</observation", "> <th", "ink>"], 3),  # it completes the tag
    (["<observation>", "red.", " <th", "ink>"], 2),  # never closed; it begins <think>
])
def test_a_token_across_a_tag_by_hand(pieces, perception):
    ids = torch.tensor([[2, 3, 4, 5, 1, 0]])
    p, r = pagrpo.segment_masks(ids, ByteTokenizer([piece.encode() for piece in pieces]))
    assert p[0].tolist() == [t < perception for t in range(6)]
    assert r[0].tolist() == [perception <= t < 5 for t in range(6)]  # the end, but not the padding


# --- advantages and loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards, expected", [
    ([1.0, 2.0, math.nan, 3.0], [-1 / 1.0001, 0, 0, 1 / 1.0001]),  # the unbiased std of 1, 2, 3 is 1
    ([0.1] * 8, [0.0] * 8),  # 0.1 has no exact mean
    ([math.nan, math.nan], [0, 0]),
    ([2.0, math.nan], [0, 0]),  # nobody to compare with
])
def test_advantages_by_hand(rewards, expected):
    got = pagrpo.group_advantages(torch.tensor(rewards)).tolist()
    assert got == pytest.approx(expected, rel=1e-6, abs=0)  # zeros are exact


def test_ablations_are_the_rows_of_the_table():
    p, r = torch.tensor([0.0, 1, 2, 1]), torch.tensor([2.0, 2, 0, 1])
    a = pagrpo.group_advantages
    expected = {None: (a(p), a(r)), "length": (a(p), a(r)), "perception": (a(r), a(r)),
                "reasoning": (a(p), a(p)), "separation": (a(p + r), a(p + r)),
                "assignment": (a(p) + a(r), a(p) + a(r))}
    for without, pair in expected.items():
        got = pagrpo.process_advantages(p, r, without)
        assert [a.tolist() for a in got] == [a.tolist() for a in pair], f"without {without}"


@pytest.mark.parametrize("without, known", [(None, 1), ("separation", 0)])
def test_an_unknown_perception_counts_as_nothing(without, known):
    """Where the reward is the sum of both, the whole completion leaves its group."""
    p, r = torch.tensor([0.0, math.nan, 2.0]), torch.tensor([1.0, 7.0, 2.0])
    perception, reasoning = pagrpo.process_advantages(p, r, without)
    assert perception.tolist() == pytest.approx([-math.sqrt(0.5), 0, math.sqrt(0.5)], abs=1e-3)
    assert (reasoning[1] != 0) == known and (reasoning[[0, 2]] != 0).all()


def test_gdpo_keeps_the_reasoning_advantage_where_the_verdict_is_unknown():
    p, r = torch.tensor([0.0, math.nan, 2.0]), torch.tensor([1.0, 7.0, 2.0])
    perception, reasoning = pagrpo.process_advantages(p, r, "assignment")
    assert torch.equal(perception, reasoning) and perception[1] == pagrpo.group_advantages(r)[1] != 0


def slow_objective(logp, old, ref, perception, reasoning, adv_p, adv_r, eps, beta, average):
    """Eq. 7 with a minus, token by token, in Python floats."""
    total = 0.0
    for i in range(len(logp)):
        sums = {"P": 0.0, "R": 0.0}
        counts = {"P": 0, "R": 0}
        for t in range(len(logp[i])):
            for k, mask, adv in (("P", perception, adv_p), ("R", reasoning, adv_r)):
                if mask[i][t]:
                    rho = math.exp(logp[i][t] - old[i][t])
                    value = min(rho * adv[i], min(max(rho, 1 - eps), 1 + eps) * adv[i])
                    if beta:
                        x = min(max(ref[i][t] - logp[i][t], -10), 10)
                        value -= beta * (math.exp(x) - x - 1)
                    sums[k] += value
                    counts[k] += 1
        if average == "segment":
            total += sum(sums[k] / counts[k] for k in "PR" if counts[k])
        else:
            total += (sums["P"] + sums["R"]) / max(1, counts["P"] + counts["R"])
    return -total / len(logp)


def random_case(rng):
    """Unequal lengths, empty segments, unknown verdicts, equal rewards, ratios beyond both clips."""
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    G, T = rng.randint(2, 5), rng.randint(1, 7)
    logp = -torch.rand(G, T, generator=g, dtype=torch.float64) * 3
    old, ref = (logp + 0.6 * torch.randn(G, T, generator=g, dtype=torch.float64) for _ in range(2))
    if rng.random() < 0.2:
        ref = ref + 30 * torch.randn(G, T, generator=g, dtype=torch.float64)  # x beyond its clamp
    lengths = torch.randint(0, T + 1, (G, 1), generator=g)
    splits = torch.randint(0, T + 1, (G, 1), generator=g).minimum(lengths)
    index = torch.arange(T)
    rewards = torch.randint(0, 3, (2, G), generator=g).double()
    if rng.random() < 0.3:
        rewards[0, 0] = math.nan
    if rng.random() < 0.3:
        rewards[1] = 1.0
    adv = pagrpo.process_advantages(*rewards, rng.choice(
        [None, "perception", "reasoning", "separation", "assignment"]))
    return logp.requires_grad_(), old, ref, index < splits, (index >= splits) & (index < lengths), *adv


@pytest.mark.parametrize("ratio, segments, advantages, expected, clip_frac", [
    ([1.0], "P", (2.0, 5.0), -2.0, 0),  # each token has its own process's advantage
    ([1.0], "R", (2.0, 5.0), -5.0, 0),
    ([1.5], "P", (1.0, 0.0), -1.2, 1),  # clipped at 1 + ε
    ([1.5], "P", (-1.0, 0.0), 1.5, 0),  # the clipped one isn't the minimum
    ([0.5], "P", (1.0, 0.0), -0.5, 0),
    ([0.5], "P", (-1.0, 0.0), 0.8, 1),
    ([1.1, 0.9, 1.5], "PRR", (1.0, 2.0), -3.2, 1 / 3),  # 1.1 + 2 · (0.9 + 1.2) / 2: two means, added
    ([1.5, 1.1, 1.5], "PP.", (1.0, 9.0), -1.15, 1 / 2),  # neither padding nor an empty segment counts
])
def test_loss_by_hand(ratio, segments, advantages, expected, clip_frac):
    masks = [torch.tensor([[s == k for s in segments]]) for k in "PR"]
    adv = [torch.tensor([a]) for a in advantages]
    logp = torch.tensor([ratio]).log()
    loss, metrics = pagrpo.pa_grpo_loss(logp, torch.zeros_like(logp), None, *masks, *adv, 0.2, beta=0)
    assert loss.item() == pytest.approx(expected)
    assert metrics["clip_frac"] == pytest.approx(clip_frac)


def test_kl_by_hand():
    """The first completion has three tokens, at which π_ref is half of π: x = -ln 2. So the KL of each token,
    and the mean of each segment, is 1/2 + ln 2 - 1. The second has one token, at which π_ref is π."""
    logp = torch.full((2, 4), 0.5).log()
    ref = logp - torch.tensor([[math.log(2)] * 4, [0, 9, 9, 9]])
    perception, reasoning = torch.tensor([[[1, 0, 0, 0], [0] * 4], [[0, 1, 1, 0], [1, 0, 0, 0]]]) > 0
    loss, metrics = pagrpo.pa_grpo_loss(logp, logp, ref, perception, reasoning, *torch.zeros(2, 2), beta=0.1)
    kl = 0.5 + math.log(2) - 1
    assert metrics["kl"] == pytest.approx(3 / 4 * kl)
    assert loss.item() == pytest.approx(0.1 * (kl + kl + 0) / 2)


def test_loss_and_gradient_equal_a_slow_loop():
    rng = random.Random(1)
    clipped = 0
    for _ in range(200):
        case = random_case(rng)
        eps, beta, average = rng.choice([0.1, 0.2]), rng.choice([0.0, 0.04]), rng.choice(
            ["segment", "completion"])
        loss, metrics = pagrpo.pa_grpo_loss(*case, clip_eps=eps, beta=beta, loss_average=average)
        clipped += metrics["clip_frac"] > 0
        gradient, = torch.autograd.grad(loss, case[0])
        lists = [x.tolist() for x in case]
        assert loss.item() == pytest.approx(slow_objective(*lists, eps, beta, average), abs=1e-6)
        for i, t in [(i, t) for i in range(len(lists[0])) for t in range(len(lists[0][0]))]:
            values = []  # central differences
            for step in (1e-6, -1e-6):
                lists[0][i][t] += step
                values.append(slow_objective(*lists, eps, beta, average))
                lists[0][i][t] -= step
            assert gradient[i, t].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-5)
    assert clipped > 50


def test_a_process_without_advantage_sends_no_gradient_through_its_tokens():
    logp, old, ref, perception, reasoning, adv_p, adv_r = random_case(random.Random(2))
    perception[:, 0], reasoning[:, 0] = True, False
    for zero, mask in ((0, perception), (1, reasoning)):
        advantages = [torch.ones_like(adv_p), torch.ones_like(adv_r)]
        advantages[zero] = torch.zeros_like(adv_p)
        loss, _ = pagrpo.pa_grpo_loss(logp, logp.detach(), None, perception, reasoning, *advantages, beta=0.0)
        gradient, = torch.autograd.grad(loss, logp)
        assert (gradient[mask] == 0).all() and (gradient[(perception | reasoning) & ~mask] != 0).all()


def test_grpo_equals_trl(tmp_path):
    """The same tensors through the loss of TRL's trainer, `loss_type="grpo"`."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    config = Qwen2Config(vocab_size=1100, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM(config), processing_class=AutoTokenizer.from_pretrained(BASE),
        reward_funcs=lambda **_: [0.0], train_dataset=Dataset.from_list([dict(prompt="a")]),
        args=GRPOConfig(output_dir=str(tmp_path), loss_type="grpo", report_to=[], use_cpu=True, bf16=False,
                        num_generations=2, per_device_train_batch_size=2,
                        use_bias_correction_kl=False))  # its KL is times ρ else, which Eq. 1 does not have
    trainer.beta, trainer.current_gradient_accumulation_steps = 0.04, 1  # at 0 it loads no reference model
    rng = random.Random(7)
    for _ in range(20):
        logp, old, ref, perception, reasoning, adv, _ = random_case(rng)
        ref = logp.detach() + (ref - logp.detach()).clamp(-9, 9)  # TRL does not clamp
        mask = perception | reasoning
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
        ids = torch.zeros(mask.shape, dtype=torch.long)
        theirs = trainer._compute_loss(trainer.model, dict(
            prompt_ids=ids, prompt_mask=torch.ones_like(ids), completion_ids=ids, completion_mask=mask.long(),
            advantages=adv, old_per_token_logps=old, ref_per_token_logps=ref))
        ours, _ = pagrpo.pa_grpo_loss(logp, old, ref, perception, reasoning, adv, adv,
                                      loss_average="completion")
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_the_loss_is_zero_and_its_gradient_is_not_at_the_first_step():
    """μ = 1: ρ is 1 and a group's advantages add up to 0; what learns is the gradient."""
    logp = torch.randn(4, 3, requires_grad=True)
    mask = torch.ones(4, 3, dtype=torch.bool)
    adv = pagrpo.group_advantages(torch.tensor([0.0, 1, 1, 2]))
    loss, _ = pagrpo.pa_grpo_loss(logp, logp.detach(), None, mask, torch.zeros_like(mask), adv, adv, beta=0.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and logp.grad.abs().max() > 0.05


# --- the model's side ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tiny, toy_records):
    """Two prompts (a video and a picture) with four sampled completions each, at temperature 1."""
    model, tokenizer = tiny
    chosen = [next(r for r in toy_records if r["data_type"] == kind) for kind in ("video", "image")]
    media = [(record, gen_cot.read_media(record, 16, 4)) for record in chosen]
    encoded, _ = sft.encode_batch(media, 2, gen_cot.PROMPT, tokenizer, sft.unwrap(model).config)
    prompts = [prompt for _, prompt in encoded]
    with torch.no_grad():
        sft.embed_prompts(model, prompts)
    uniforms = torch.cat([pagrpo.draw_uniforms(0, sample_index, 4, 60) for sample_index in (0, 1)])
    return prompts, *pagrpo.rollout(model, prompts, tokenizer, 4, 60, uniforms)


def act(model):
    """Make the fresh policy another than the base, which it is while its B are 0."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)


def test_media_held_out_are_the_same_everywhere_and_no_question_about_them_is_trained_on():
    records = [dict(problem_id=i, path=f"{i // 2}.mp4") for i in range(4000)]
    held, rest = gen_cot.hold_out(records, 0.05)
    media = {r["path"] for r in held}
    assert 75 < len(media) < 125 and not media & {r["path"] for r in rest}
    assert sorted(r["problem_id"] for r in held + rest) == list(range(4000))
    some = random.Random(0).sample(records, 900)  # another file about the same media
    assert {r["path"] for r in gen_cot.hold_out(some, 0.05)[0]} == media & {r["path"] for r in some}
    assert media > {r["path"] for r in gen_cot.hold_out(records, 0.02)[0]}
    assert gen_cot.hold_out(records, 0) == ([], records)
    assert len(gen_cot.hold_out(records[:20], 1e-9)[0]) == 2 and gen_cot.hold_out(records[:18], 1e-9)[0] == []


def test_samples_follow_the_probabilities():
    """Numbers spread evenly over [0, 1) hit a token as often as its probability says, a banned one never."""
    logits = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -torch.inf])
    n = 10_000
    drawn = pagrpo.sample_from(logits.expand(n, -1), (torch.arange(n) + 0.5).double() / n)
    assert (drawn.bincount(minlength=5) / n).tolist() == pytest.approx(logits.softmax(-1).tolist(), abs=2e-4)
    ends = torch.tensor([0, 1 - 2**-53], dtype=torch.float64)
    assert pagrpo.sample_from(logits.expand(2, -1), ends).tolist() == [0, 3]


def test_what_a_prompt_is_answered_depends_on_no_other_prompt(tiny, group):
    """Nor on the batch it is in: its numbers are those of its index."""
    model, tokenizer = tiny
    prompts, ids, mask, _ = group
    for i in (0, 1):
        alone, kept, _ = pagrpo.rollout(model, [prompts[i]], tokenizer, 4, 60, pagrpo.draw_uniforms(0, i, 4, 60))
        assert all(row[keep].tolist() == other[known].tolist() for row, keep, other, known in zip(
            alone, kept, ids[4 * i:], mask[4 * i:]))
    assert (pagrpo.draw_uniforms(0, 0, 4) != pagrpo.draw_uniforms(0, 1, 4)).any()
    assert (pagrpo.draw_uniforms(0, 0, 4) != pagrpo.draw_uniforms(1, 0, 4)).any()


def test_samples_differ_and_hold_no_control_tokens(tiny, group):
    _, tokenizer = tiny
    _, ids, mask, _ = group
    assert len({tuple(row.tolist()) for row in ids[:4]}) > 1
    sampled = ids[mask]
    specials = set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id}
    assert len(specials) >= 13 and not specials & set(sampled.tolist())
    for row, keep in zip(ids.tolist(), mask.tolist()):  # the mask ends with the first end-of-sequence token
        ended = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        assert keep == [t < ended for t in range(len(row))]


def test_rows_of_the_head_that_stand_for_no_token_are_never_sampled(tiny, group):
    """The released heads have hundreds of them, which decode to nothing and would count as tokens."""
    model, tokenizer = tiny
    qwen = sft.unwrap(model)
    head = qwen.lm_head
    wide = torch.nn.Linear(head.in_features, head.out_features + 200, bias=False)
    top = group[1][0, 0]  # a likely token's row, over and over
    wide.weight.data = torch.cat([head.weight, head.weight[top].expand(200, -1)])
    try:
        qwen.lm_head = wide
        ids, mask, logprobs = pagrpo.rollout(model, group[0], tokenizer, 4, 30, pagrpo.draw_uniforms(0, 0, 8, 30))
    finally:
        qwen.lm_head = head
    assert ids.max() < len(tokenizer) == head.out_features
    assert logprobs[:, 0].min() < -3  # though likely, as the policy's own probabilities have it


def test_a_group_does_not_wait_for_the_others_longest_completion(tiny, group, toy_records):
    model, tokenizer = tiny
    args = make_args(num_generations=4, max_completion_tokens=60, seed=0)
    encoded = [(dict(toy_records[i], sample_index=i), group[0][i]) for i in (0, 1)]
    groups = pagrpo.sample_groups(model, encoded, tokenizer, args)
    _, ids, mask, logprobs = group
    lengths = mask.sum(1).view(2, 4).max(1).values.tolist()
    assert lengths[0] != lengths[1]
    for made, first, longest in zip(groups, (0, 4), lengths):
        rows = slice(first, first + 4)
        assert torch.equal(made.completion_ids, ids[rows, :longest])
        assert torch.equal(made.completion_mask, mask[rows, :longest])
        assert torch.equal(made.perception_mask | made.reasoning_mask, made.completion_mask)
        assert torch.allclose(made.sampled_logprobs, logprobs[rows, :longest], atol=1e-5)


@pytest.mark.parametrize("four_bit, dtype, mean, most", [
    (True, torch.float32, 1e-6, 1e-4), (False, torch.float32, 1e-6, 1e-4),
    (True, torch.bfloat16, 5e-3, 0.2), (False, torch.bfloat16, 5e-3, 0.2)])
def test_sampled_and_recomputed_logprobs_agree(group, monkeypatch, four_bit, dtype, mean, most):
    """Rollout (key-value cache, padded prompts) and training (packed, no cache) see the same pixels and
    positions; what differs is rounding, by so much at most."""
    monkeypatch.setattr(sft, "pick_device", lambda: (torch.device("cpu"), dtype))
    model, tokenizer = sft.load_model(BASE, four_bit=four_bit, lora_rank=8)
    act(model)
    prompts = [replace(prompt) for prompt in group[0]]
    with torch.no_grad():
        sft.embed_prompts(model, prompts)
        ids, mask, sampled = pagrpo.rollout(model, prompts, tokenizer, 4, 60, pagrpo.draw_uniforms(0, 0, 8, 60))
        again = torch.cat([pagrpo.token_logprobs(model, p, ids[i:i + 4], mask[i:i + 4])
                           for i, p in zip((0, 4), prompts)])
    assert again.dtype == torch.float32
    gaps = (again - sampled).abs()[mask]
    assert gaps.mean() < mean and gaps.max() < most


@pytest.mark.parametrize("adapter", ["policy", "ref", None])
def test_merged_weights_say_what_the_acting_adapter_says_and_are_gone_afterwards(started, group, adapter):
    model, _ = started
    prompts, ids, mask, _ = group
    for name, weight in model.named_parameters():
        if "lora_B.policy" in name:
            weight.data.mul_(-1)  # apart from ref

    def logprobs():
        return pagrpo.token_logprobs(model, prompts[0], ids[:4], mask[:4])

    with torch.no_grad():
        policy = logprobs()
        with pagrpo.use_adapter(model, adapter) if adapter else model.disable_adapter():
            plain = logprobs()
            with pytest.raises(KeyboardInterrupt), pagrpo.merged(model):
                assert sum("forward" in vars(m) for m in model.modules()) == 28
                dense = logprobs()
                raise KeyboardInterrupt
        assert (dense - plain).abs().max() < 1e-4 and torch.equal(logprobs(), policy)
        assert adapter == "policy" or (dense - policy).abs().max() > 0.1
    assert not any("forward" in vars(m) for m in model.modules())


def hugging_face_logprobs(model, prompt, ids, mask):
    """The naive way: one full sequence per completion through Hugging Face's own forward, pixels and all."""
    qwen, rows = sft.unwrap(model), []
    for row, keep in zip(ids, mask):
        row = row[keep]
        sequence = torch.cat([prompt.input_ids, row])[None]
        after = (prompt.next_position + torch.arange(len(row))).expand(3, -1)
        media = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw}
        if (prompt.input_ids == qwen.config.video_token_id).any():
            media = {"pixel_values_videos": prompt.pixel_values, "video_grid_thw": prompt.grid_thw}
        logits = qwen(input_ids=sequence, position_ids=torch.cat([prompt.positions, after], 1)[:, None],
                      **media).logits[0]
        rows.append(logits[len(prompt.input_ids) - 1:-1].log_softmax(-1).gather(1, row[:, None])[:, 0])
    return rows


def test_packed_attention_equals_a_dense_mask():
    """A prompt of three tokens, completions of two and one; four heads on two of keys and values."""
    lengths, segment, index = [3, 2, 1], torch.tensor([0, 0, 0, 1, 1, 2]), torch.arange(6)
    query, key, value = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    key, value = key[:, :2], value[:, :2]
    sees = (index <= index[:, None]) & ((segment == 0) | (segment == segment[:, None]))
    keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
    weights = (query @ keys.mT * 0.5).masked_fill(~sees, -math.inf).softmax(-1)
    expected = (weights @ values).transpose(1, 2)
    module = SimpleNamespace(scaling=0.5, num_key_value_groups=2)
    got, _ = pagrpo.shared_prefix_attention(module, query, key, value, None, lengths)
    assert got.shape == expected.shape
    wrong = [t for t in range(6) if not torch.allclose(got[0, t], expected[0, t], atol=1e-5)]
    assert wrong == []  # tokens: 0 to 2 are the prompt's, 3 and 4 one completion's, 5 is another's


def test_packed_logprobs_and_gradients_equal_hugging_face(tiny, group):
    model, _ = tiny
    prompts, ids, mask, _ = group
    weights = [p for p in model.parameters() if p.requires_grad]
    for first, prompt in zip((0, 4), prompts):
        rows, keep = ids[first:first + 4], mask[first:first + 4]
        ours = pagrpo.token_logprobs(model, prompt, rows, keep)
        naive = torch.cat(hugging_face_logprobs(model, prompt, rows, keep))
        assert (ours[keep] - naive).abs().max() < 1e-4
        coefficients = torch.randn(len(naive), generator=torch.Generator().manual_seed(3))
        a = torch.autograd.grad((ours[keep] * coefficients).sum(), weights)
        b = torch.autograd.grad((naive * coefficients).sum(), weights)
        scale = max(x.abs().max() for x in b)
        assert scale > 0 and max((x - y).abs().max() for x, y in zip(a, b)) < 1e-3 * scale
        assert (ours[~keep] == 0).all()


@pytest.mark.parametrize("stage", ["sft", "pagrpo"])
def test_checkpointing_changes_no_gradient_and_keeps_all_alive(group, stage):
    """The big models' default: layers run again in the backward pass, over the same pack. Frozen embeddings
    and the wrong kind of checkpointing leave every gradient at None or 0, silently."""
    prompts, ids, mask, _ = group
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = sft.load_model(BASE, lora_rank=8)
        act(model)
        sft.setup_training(model, make_args(checkpointing=checkpointing))
        calls = []
        layer = sft.unwrap(model).model.language_model.layers[1]
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
        model.train()
        if stage == "sft":
            value = sft.sft_loss(model, prompts, [ids[0, mask[0]], ids[4, mask[4]]])
        else:
            value = pagrpo.token_logprobs(model, prompts[0], ids[:4], mask[:4])
        value.mean().backward()
        found.append([value, *(weight.grad for weight in sft.trainable_parameters(model))])
        assert len(calls) == 1 + checkpointing
    for kept, recomputed in zip(*found):
        assert torch.allclose(kept, recomputed, rtol=1e-4, atol=1e-5) and recomputed.abs().max() > 0


def make_args(**changes):
    defaults = dict(beta=0.04, num_iterations=1, completions_per_pass=None, clip_eps=0.2, checkpointing=False,
                    loss_average="segment", lr=1e-3, max_grad_norm=5.0, without=None, scoring="paper",
                    perception_length=(4, 64), reasoning_length=(4, 64), num_generations=4,
                    prompts_per_rollout=2)
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture
def started(tiny, group, tmp_path):
    """The policy as it starts: a saved adapter loaded twice, trainable as `policy` and frozen as `ref`."""
    model, tokenizer = tiny
    act(model)
    sft.save_adapter(model, tmp_path / "sft")
    pagrpo.add_reference(model, make_args(adapter=str(tmp_path / "sft")))
    yield model, tokenizer
    model.delete_adapter("ref")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()


def test_without_sft_the_reference_is_the_base_to_the_bit(group):
    """Whatever the policy has learnt."""
    prompts, ids, mask, _ = group
    model, _ = sft.load_model(BASE, lora_rank=8)
    pagrpo.add_reference(model, make_args(adapter="none"))
    for name, weight in model.named_parameters():
        if "lora_B.policy" in name:
            weight.data.normal_(0, 0.05)
    found = []
    for name in ("policy", None, "ref"):
        with torch.no_grad(), pagrpo.use_adapter(model, name) if name else model.disable_adapter():
            found.append(pagrpo.token_logprobs(model, prompts[0], ids[:4], mask[:4]))
    assert torch.equal(found[2], found[1]) and not torch.equal(found[0], found[1])
    assert all((".policy." in name) == weight.requires_grad for name, weight in model.named_parameters())


def test_at_the_start_kl_is_zero_and_only_the_policy_gets_gradients(started, group):
    model, tokenizer = started
    prompts, ids, mask, _ = group
    p_mask, r_mask = mask[:4] & (torch.arange(ids.shape[1]) < 5), mask[:4] & (torch.arange(ids.shape[1]) >= 5)
    adv = torch.tensor([1.0, -1.0, 0.5, -0.5])
    with torch.no_grad(), pagrpo.use_adapter(model, "ref"):
        ref = pagrpo.token_logprobs(model, prompts[0], ids[:4], mask[:4])
    with torch.no_grad(), model.disable_adapter():
        base = pagrpo.token_logprobs(model, prompts[0], ids[:4], mask[:4])
    logp = pagrpo.token_logprobs(model, prompts[0], ids[:4], mask[:4])
    loss, metrics = pagrpo.pa_grpo_loss(logp, logp.detach(), ref, p_mask, r_mask, adv, -adv)
    assert metrics["kl"] < 1e-8 and metrics["clip_frac"] == 0
    assert (base - ref).abs().max() > 1e-2  # the base is not the reference, so KL 0 says something
    loss.backward()
    for name, p in model.named_parameters():
        if ".policy." in name and "lora_B" in name:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        elif ".policy." not in name:
            assert p.grad is None and not p.requires_grad, name
    model.zero_grad(set_to_none=True)


def test_updates_raise_the_likelihood_of_what_was_rewarded_and_leave_the_reference(
        started, group, toy_records):
    """μ = 3 steps with real old log-probs: the rewarded completion gains, the punished one loses."""
    model, tokenizer = started
    prompts = group[0]
    rows = torch.randint(0, 600, (4, 16), generator=torch.Generator().manual_seed(0))  # none like another
    keep = torch.ones(4, 16, dtype=torch.bool)
    p_mask, r_mask = keep & (torch.arange(16) < 8), keep & (torch.arange(16) >= 8)
    adv = torch.tensor([1.5, -0.5, -0.5, -0.5])
    made = pagrpo.Group(toy_records[0], prompts[0], rows, keep, torch.zeros(4, 16), p_mask, r_mask,
                        perception_advantages=adv, reasoning_advantages=adv)
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".ref." in n}
    args = make_args(num_iterations=3, lr=2e-4)
    optimizer = sft.setup_training(model, args)
    with torch.no_grad():
        before = pagrpo.token_logprobs(model, prompts[0], rows, keep).sum(1)
    metrics = pagrpo.update_policy(model, optimizer, [made], args.lr, args)
    assert metrics["logprob_gap"] == pytest.approx(-float(before.sum()) / 64, rel=1e-4)  # of nothing sampled
    with torch.no_grad():
        gain = pagrpo.token_logprobs(model, prompts[0], rows, keep).sum(1) - before
    assert gain[0] > 0 and gain[0] > gain[1:].max(), gain
    assert metrics["kl"] > 0 and math.isfinite(metrics["grad_norm"])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if ".ref." in n)


def test_groups_without_gradient_are_those_whose_tokens_have_no_advantage(monkeypatch):
    """Of four groups one has an advantage where it has tokens."""
    def made(perception_tokens, advantage):
        mask = torch.arange(4) < perception_tokens
        return SimpleNamespace(scores=[], sampled_logprobs=torch.zeros(2, 4),
                               perception_mask=mask.expand(2, 4), reasoning_mask=~mask.expand(2, 4),
                               perception_advantages=torch.tensor(advantage),
                               reasoning_advantages=torch.zeros(2))

    groups = [made(2, [1.0, -1.0]), made(0, [1.0, -1.0]), made(2, [0.0, 0.0]), made(4, [0.0, 0.0])]
    monkeypatch.setattr(pagrpo, "sample_groups", lambda *_: groups)
    monkeypatch.setattr(pagrpo, "score_groups", lambda *_: [])
    monkeypatch.setattr(pagrpo, "update_policy", lambda *_: {})
    assert pagrpo.update(None, None, None, [], None, 0, make_args())[1]["frac_no_gradient"] == 0.75


def test_smaller_passes_give_the_same_step(started, group, toy_records):
    """Log-probs of both policies, loss, KL and gradient norm of one group in one, two and three passes."""
    model, _ = started
    prompts, ids, mask, _ = group
    adv = torch.tensor([1.5, -0.5, -0.7, -0.3])
    split = torch.arange(ids.shape[1]) < 5
    mask = mask[:4] & (torch.arange(ids.shape[1]) < torch.tensor([2, 9, 3, 7])[:, None])  # unequal lengths
    saved = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    results = []
    for size in (None, 2, 3):
        made = pagrpo.Group(toy_records[0], prompts[0], ids[:4], mask, group[3][:4] * mask, mask & split,
                            mask & ~split, perception_advantages=adv, reasoning_advantages=-adv)
        args = make_args(completions_per_pass=size, num_iterations=2)
        optimizer = sft.setup_training(model, args)
        metrics = pagrpo.update_policy(model, optimizer, [made], args.lr, args)
        results.append([metrics[key] for key in ("loss", "grad_norm", "kl", "clip_frac", "logprob_gap")])
        for p, value in saved:
            p.data.copy_(value)
    assert results[0][1] > 0 and results[0][2] > 0
    assert results[1] == pytest.approx(results[0], rel=1e-3)
    assert results[2] == pytest.approx(results[0], rel=1e-3)


def test_unknown_verdicts_are_left_out_and_scores_add_up():
    record = dict(problem_type="numerical", solution="<answer>2</answer>")
    text = "<observation>first red.</observation> <think>one and one</think><answer>2</answer>"

    def rewards(completion, verdict, lengths=(10, 10), **changes):
        return process_rewards(record, completion, verdict, lengths, ((4, 64), (4, 64)), **changes)

    good = rewards(text, True)
    assert (good["perception"], good["reasoning"], good["reward"]) == (2.2, 2.2, 4.4)
    short = rewards(text, True, (3, 10))
    assert (short["perception"], short["reasoning"]) == (2.0, 2.2)
    unsure = rewards(text, None)
    assert math.isnan(unsure["perception"]) and unsure["reasoning"] == 2.2
    means = pagrpo.reward_metrics([[dict(s, truncated=False) for s in (good, unsure)]])
    assert (means["rewards/perception_accuracy"], means["rewards/perception_length"]) == (1.0, 0.2)
    assert (means["reward"], means["length/reasoning"], means["judge_unknown"]) == (4.4, 10, 1)
    assert means["frac_reward_zero_std/reasoning"] == 1.0  # 2.2 twice
    assert means["frac_reward_zero_std/perception"] is None  # nothing known to compare with
    assert rewards(text, True, bonus=0.0)["perception"] == 2.0
    wrong = rewards(text.replace(">2<", ">3<"), False)
    assert (wrong["perception"], wrong["reasoning"]) == (1.0, 1.0)  # format alone: no bonus without accuracy


@pytest.mark.parametrize("without, total", [(None, 4.4), ("length", 4.0)])
def test_completions_are_scored_as_the_policy_wrote_them(tiny, group, toy_records, without, total):
    """Text and segment lengths come from the sampled ids; the judge sees each observation with its record."""
    _, tokenizer = tiny
    record = next(r for r in toy_records if r["problem_type"] == "numerical")
    texts = ["<observation>first red.</observation> <think>one and one</think>" + record["solution"], "red"]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows])
    masks, seen = pagrpo.segment_masks(ids, tokenizer), []
    made = pagrpo.Group(record, group[0][0], ids, masks[0] | masks[1], torch.zeros(ids.shape), *masks)

    def judge(records, observations):  # any function of this form is one
        seen.extend(zip(records, observations))
        return [observation is not None for observation in observations]

    known = pagrpo.score_groups([made], tokenizer, judge, make_args(without=without))
    assert known == [True]  # an observation that is none was never asked about
    assert seen == [(record, "first red."), (record, None)]
    assert [s["reward"] for s in made.scores] == [total, 0.0]
    assert [s["perception_tokens"] + s["reasoning_tokens"] for s in made.scores] == [len(row) for row in rows]
    assert made.perception_advantages[0] > 0 > made.perception_advantages[1]


def test_the_self_judge_is_the_base_whatever_the_policy_has_learnt(started):
    """The policy must not be able to talk its own judge round: adapters are off while it judges."""
    model, tokenizer = started
    prompts = ["Which option is red?\nOptions:\nA. blue\nB. red", "List the colours in order."]
    judged = pagrpo.self_judge(model, tokenizer, prompts, make_args(), max_tokens=24)
    for name, p in model.named_parameters():
        if ".policy." in name and "lora_B" in name:
            p.data.mul_(-20)
    one_by_one = make_args(num_generations=1, prompts_per_rollout=1)
    assert pagrpo.self_judge(model, tokenizer, prompts, one_by_one, max_tokens=24) == judged and all(judged)
    encoded = [sft.encode_text(text, tokenizer) for text in prompts]
    with torch.no_grad():
        sft.embed_prompts(model, encoded)
    ids, mask, _ = pagrpo.rollout(model, encoded, tokenizer, 1, 24)  # what the policy itself would say
    assert [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask)] != judged
