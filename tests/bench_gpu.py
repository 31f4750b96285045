"""What the released shapes need: Qwen2.5-VL-7B and -3B with random weights, through sft.py's own step and
pagrpo.py's own --probe.

    python tests/bench_gpu.py                    # both shapes, completions of 512 and 768, on a GPU
    python tests/bench_gpu.py --shapes small     # the same script on a shape that a CPU can run
    python tests/bench_gpu.py --projection       # only floors and counted memory; needs no GPU
    python tests/bench_gpu.py --memory-limit 12 --lora-rank 16 --prompts-per-rollout 2 \\
        --completions-per-pass 2

Nothing is downloaded, and no 16-bit copy of the model is ever held: every weight is a view into one small
buffer of noise, quantised layer by layer by the loader that the stages use. Flags that this script does not
know go to pagrpo.py, and those that sft.py shares with it to both. Prompts are tokenised by the toy's
tokenizer, which needs a few more tokens for the template than Qwen's.

The floors are what no implementation of the same arithmetic gets below on the device at hand. Its speed is
measured first (a large matrix product, a large copy). With N parameters in the language model's 4-bit layers,
L layers, D hidden, V vocabulary, B prompts of P tokens, G completions of T tokens each:

    decoding   T times: read the cache of B G rows (2 · 2 bytes · L · key-value heads · head size a token);
               and for each --prompts-per-rollout prompts, T times: read the 4-bit weights (0.52 bytes each
               with their scales) and the head (2 V D bytes)
    a pass     2 N floating-point operations a token forward, as many for gradients of the activations (the
               weights are frozen), as many again for what checkpointing recomputes; the same for the head on
               completion tokens, 2 V D each; attention 4 D a layer for each pair that see each other
    SFT        a pass over a prompt and one trace of 1024 tokens
    judge      prefill B G prompts of J tokens, then decode 256 times as above
    update     B passes over P + G T tokens, and the forward part once more for the reference

The memory is counted by running this same script on a model of fake tensors (count_memory.py), with the
three kinds of tensors that take most at each phase's peak, next to weights, adapters and AdamW's moments.
FRAGMENTATION and CONTEXT are the margin for what a count can't see.
"""
import argparse
import contextlib
import copy
import io
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pagrpo  # noqa: E402
import sft  # noqa: E402
from bench import naive_logprobs  # noqa: E402
from count_memory import faked  # noqa: E402
from rewards import make_judge  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head; the vision tower
    "7b": (3584, 18944, 28, 28, 4, 152064, False, dict(depth=32, hidden_size=1280, intermediate_size=3420,
                                                       num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])),
    "3b": (2048, 11008, 36, 16, 2, 151936, True, dict(depth=32, hidden_size=1280, intermediate_size=3420,
                                                      num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])),
    "small": (256, 512, 4, 4, 2, 4096, True, dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4,
                                                  fullatt_block_indexes=[1])),
}
TOY = ROOT / "data/toy/base"  # lends its tokenizer
DEVICE = [] if torch.cuda.is_available() else ["--device", "cpu"]
FRAGMENTATION, CONTEXT = 0.05, 1.0  # a share of what is counted; GiB
SHARED = ("lora_rank", "no_4bit", "num_frames", "max_pixels")  # flags of pagrpo.py and sft.py


def make_config(shape):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, vision = SHAPES[shape]
    toy, part = Qwen2_5_VLConfig.from_pretrained(TOY), hidden // heads // 16
    ends = {name: getattr(toy.text_config, name) for name in ("bos_token_id", "eos_token_id")}
    ids = {name: getattr(toy, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=128000,
            rms_norm_eps=1e-6, tie_word_embeddings=tied,
            rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                 mrope_section=[2 * part, 3 * part, 3 * part]), **ends),
        vision_config=dict(vision, out_hidden_size=hidden, tokens_per_second=2),
        tie_word_embeddings=tied, **ids)


def random_weights(config):
    """A state dict of overlapping views of one buffer of noise (W[i, j] = noise[i + j + offset]):
    random enough to compute with, and next to no memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    noise = 0.02 * torch.randn(2**19, generator=torch.Generator().manual_seed(0))
    weights = {}
    for i, (name, like) in enumerate(model.state_dict().items()):
        rows, columns = like.shape[0], like[0].numel()
        view = noise[131 * i:].as_strided((rows, columns), (1, 1)).reshape(like.shape)
        weights[name] = torch.ones(like.shape) if "norm" in name and like.ndim == 1 else view
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def use_random_weights(shape):
    """From here on the stages' loader builds this shape, whatever model it is asked for."""
    config = make_config(shape)
    sft.Qwen2_5_VLForConditionalGeneration = SimpleNamespace(
        from_pretrained=lambda base, **options: Qwen2_5_VLForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=random_weights(config), **options))
    sft.AutoTokenizer = SimpleNamespace(from_pretrained=lambda base, **_: AutoTokenizer.from_pretrained(TOY))
    return config


def device_speed():
    """(floating-point operations, bytes) per second of this device: a matrix product, a copy."""
    device, dtype = sft.pick_device()
    n = 8192 if device.type == "cuda" else 1024
    a, big = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(n * n * 4, device=device)

    def seconds(function):
        best = float("inf")
        for _ in range(10):
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            best = min(best, time.perf_counter() - start)
        return best

    return 2 * n**3 / seconds(lambda: a @ a), 8 * big.numel() / seconds(lambda: big.clone())


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sizes(config, args):
    """(D, I, L, V, keys of a token in a layer, N) of a shape and (B, G, T) of a run, as in the docstring."""
    text = config.text_config
    D, L = text.hidden_size, text.num_hidden_layers
    kv = D // text.num_attention_heads * text.num_key_value_heads
    N = L * (2 * D * D + 2 * D * kv + 3 * D * text.intermediate_size)
    return ((D, text.intermediate_size, L, text.vocab_size, kv, N),
            (args.prompts_per_update, args.num_generations, args.max_completion_tokens))


def count(config, args, dtype=torch.bfloat16):
    """{phase: Peak} of both stages, counted on fake tensors. Of the prompts, only those that are sampled
    together take part, and two at least: another would add its embeddings, 10 MiB at 7B."""
    args = copy.copy(args)
    args.prompts_per_update = min(args.prompts_per_update, max(2, args.prompts_per_rollout))
    with contextlib.redirect_stdout(io.StringIO()), faked(config, dtype) as peaks:
        time_sft(args)
        pagrpo.main(args)
    return peaks


def prompt_lengths(config, args):
    """Tokens of the probe's longest prompt, and of its judge's."""
    tokenizer, asked = AutoTokenizer.from_pretrained(TOY), []
    record, prompt = sft.worst_prompt(tokenizer, config, args)
    judge = make_judge("self", args.judge_prompt_file, lambda prompts: asked.extend(prompts) or [""])
    judge([record], ["the " * args.max_completion_tokens])
    return len(prompt.input_ids), len(sft.encode_text(asked[0], tokenizer).input_ids)


def floors(config, args, P, J, flops, bandwidth):
    """{phase: seconds} of the floors in the docstring."""
    (D, _, L, V, kv, N), (B, G, T) = sizes(config, args)

    def decode(prompts, tokens, rows, new):
        loops = math.ceil(B / args.prompts_per_rollout)
        read = loops * (0.52 * N + 2 * V * D) + rows * (tokens + new / 2) * 4 * L * kv
        return prompts * 2 * N * tokens / flops + new * read / bandwidth

    def forward(G, T):
        return 2 * N * (P + G * T) + 4 * D * L * (P * P / 2 + G * (T * P + T * T / 2)) + 2 * V * D * G * T

    return {"SFT": 3 * forward(1, 1024) / flops, "rollout": decode(B, P, B * G, T),
            "judge": decode(B * G, J, B * G, 256),
            "update": B * 4 * forward(G, T) / flops}  # the policy's 3, the reference's 1


def time_sft(shared, tokens=1024):
    """(seconds a trace, GiB at most) of `sft_step` in two micro-batches, of which the second finds the first
    one's gradients in its way, on the longest prompts and traces of so many tokens."""
    sys.argv = ["sft.py", "--model", "random/weights", *DEVICE]
    args, row = sft.get_args(), {}
    vars(args).update({name: getattr(shared, name) for name in SHARED})
    sft.setup_process(args)
    model, tokenizer = sft.load_model(args.base, None, not args.no_4bit, args.lora_rank)
    optimizer = sft.setup_training(model, args)
    record, prompt = sft.worst_prompt(tokenizer, sft.unwrap(model).config, args)
    record["output"] = "the" + " the" * (tokens - 3)  # without a blank it is two tokens, and the end is one
    assert len(sft.target_ids(record, tokenizer)) == tokens
    encoded = [(record, replace(prompt)) for _ in range(2 * args.micro_batch)]
    print(f"{len(encoded)} prompts of {len(prompt.input_ids)} tokens, traces of {tokens}")
    sft.sft_step(model, tokenizer, optimizer, encoded, args.lr, args)  # warm-up, allocates AdamW's moments
    with sft.measured("SFT", row):
        sft.sft_step(model, tokenizer, optimizer, encoded, args.lr, args)
    sft.print_phases(row)
    return row["sec/SFT"] / len(encoded), row["gib/SFT"]


def compare_passes(args):
    """The packed training pass against G whole sequences: seconds, peak memory, and how far the log-probs are
    from each other, measured against naive ones of another batch size."""
    model, tokenizer = sft.load_model(args.base, None, not args.no_4bit, args.lora_rank)
    sft.setup_training(model, args)
    _, prompt = sft.worst_prompt(tokenizer, sft.unwrap(model).config, args)
    with torch.no_grad():
        sft.embed_prompts(model, [prompt])
    G, T = args.num_generations, args.max_completion_tokens
    ids = torch.randint(600, (G, T), generator=torch.Generator().manual_seed(0)).to(prompt.embeds.device)
    mask, rows = torch.ones_like(ids, dtype=torch.bool), {}

    def packed():
        return torch.cat([pagrpo.token_logprobs(model, prompt, i, m) for i, m in zip(
            ids.split(args.completions_per_pass or G), mask.split(args.completions_per_pass or G))])

    def naive(size):
        return torch.cat([naive_logprobs(model, prompt, part) for part in ids.split(size)])

    with torch.no_grad():
        ours, theirs, other = packed(), naive(1), naive(2)
    print(f"log-probs: packed against naive {(ours - theirs).abs().mean():.2e} on average, "
          f"{(ours - theirs).abs().max():.2e} at most; naive one by one against two by two "
          f"{(other - theirs).abs().mean():.2e}, {(other - theirs).abs().max():.2e}")
    model.train()
    size = args.completions_per_pass or G
    for name, function in (("packed", lambda i, m: pagrpo.token_logprobs(model, prompt, i, m)),
                           ("naive", lambda i, m: naive_logprobs(model, prompt, i))):
        at_once = size if name == "packed" else 1
        pieces = list(zip(ids.split(at_once), mask.split(at_once)))
        function(*pieces[0]).mean().backward()  # warm-up
        with sft.measured(name, rows):
            for piece in pieces:
                function(*piece).mean().backward()
    P = len(prompt.input_ids)
    ratio = G * (P + T) / (P * len(ids.split(size)) + G * T)
    sft.print_phases(rows)
    speedup = rows["sec/naive"] / rows["sec/packed"]
    print(f"training pass: {speedup:.2f}x the naive one, "
          f"{speedup / ratio:.0%} of the token ratio {ratio:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["7b", "3b"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 768], help="completion limits, T")
    parser.add_argument("--projection", action="store_true",
                        help="only floors, for an assumed 150 Tflop/s and 1 TB/s, and the count")
    parser.add_argument("--memory-limit", type=float, metavar="GIB",
                        help="let PyTorch have so much of the GPU; the CUDA context comes on top")
    own, rest = parser.parse_known_args()
    if own.memory_limit:
        share = own.memory_limit * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    speed = (150e12, 1e12) if own.projection else device_speed()
    print(f"{'assumed' if own.projection else name}: "
          f"{speed[0] / 1e12:.1f} Tflop/s, {speed[1] / 1e9:.0f} GB/s")
    for shape in own.shapes:
        for tokens in own.tokens:
            command = ["--model", "random/weights", "--probe", *DEVICE, *rest]
            sys.argv = ["pagrpo.py", *command, "--max-completion-tokens", str(tokens)]
            args = pagrpo.get_args()
            config = use_random_weights(shape)
            print(f"\n{shape}, completions of {tokens}")
            peaks = count(config, args, torch.bfloat16 if own.projection else sft.pick_device()[1])
            if not own.projection:
                measured, rows = {"SFT": time_sft(args)}, pagrpo.main(args)
                for phase in ("rollout", "judge", "update"):
                    measured[phase] = rows[f"sec/{phase}"], rows[f"gib/{phase}"]
                compare_passes(args)
            P, J = prompt_lengths(config, args)
            floor = floors(config, args, P, J, *speed)
            print(f"prompts of {P} tokens, the judge's of {J}\n{'':<10}{'floor':>10}{'counted':>14}"
                  + ("" if own.projection else f"{'measured':>11}{'of floor':>10}{'measured':>14}"))
            for phase in floor:
                row = f"{phase:<10}{floor[phase]:>8.2f} s{peaks[phase].total:>10.2f} GiB"
                if not own.projection:
                    seconds, gib = measured[phase]
                    row += f"{seconds:>9.2f} s{floor[phase] / seconds:>10.0%}{gib:>10.2f} GiB"
                print(row)
            most = peaks["SFT"].total, max(peaks[phase].total for phase in ("rollout", "judge", "update"))
            needed = [(1 + FRAGMENTATION) * gib + CONTEXT for gib in most]
            print(f"with {FRAGMENTATION:.0%} for fragmentation and {CONTEXT:.0f} GiB for the CUDA context: "
                  f"SFT {needed[0]:.1f}, RL {needed[1]:.1f} GiB")
            for phase, peak in peaks.items():
                print(f"{phase}: {peak.fixed:.2f} GiB of weights, adapters and moments, and")
                print(*(f"    {line}" for line in peak.largest), sep="\n")
            if not own.projection:
                drawn = args.prompts_per_update * args.num_generations * tokens
                print(f"rollout: {drawn / measured['rollout'][0]:.0f} tokens/s")


if __name__ == "__main__":
    main()
