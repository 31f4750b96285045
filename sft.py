"""A 4-bit Qwen2.5-VL with LoRA learns the template from verified traces: VideoP2R's first training stage
(Sec. 3.1).

The language model's linear layers are frozen in nf4 with double quantisation (QLoRA), the vision tower is
frozen and not quantised, and LoRA adapters on the language model are all that trains. The loss is next-token
cross-entropy on the assistant's completion only.

    python sft.py --model tiny                 # a laptop's CPU: under a minute, 0.6 GiB
    python sft.py --model qwen2.5-vl-7b        # one consumer GPU

`train`, `sft_step` and `sft_loss` come first. Below the double line stands what later stages borrow: the
model, the way from a record to its tensors, and what the two trainers have in common.

Shapes: B samples, S tokens of a sequence, P prompt tokens, T completion tokens, D hidden size, V vocabulary,
N patches.

Our choices where the paper is silent:
S1. M-RoPE positions are computed here, once per sample, from the true sampled frame rate (`rope_positions`),
    and given to every forward pass; the library's own depend on its version and assume 24 frames per second.
S2. A batch's loss is the mean over all its completion tokens, however it is split into micro-batches.
S3. `--process-agnostic` (Table 2) removes the observation block from the target; the prompt stays the same.
"""
import contextlib
import io
import json
import logging
import math
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # advertises, as it is imported
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from gen_cot import (MODELS, MediaError, build_prompt, check_writable, load_template, make_parser, move_aside,
                     number, open_jsonl, parse_args, positive, read_ahead, run_script, select_records)
from rewards import UserError, parse_trace, write_atomically

TINY = dict(data="runs/tiny/gen_cot/cot.jsonl", media_root="data/toy", lr=2e-3, lora_rank=32, micro_batch=16,
            max_pixels=4, checkpointing=False)


def get_args():
    parser, model, _ = make_parser(__doc__, None, "verified traces (default: those of gen_cot.py, else the "
                                                  "authors' release)")
    add = parser.add_argument_group("algorithm").add_argument
    add("--process-agnostic", action="store_true", help="no observation block in the target (Table 2)")
    optimisation, _ = add_training_args(parser, model, "sft", lr=1e-4)
    add = optimisation.add_argument
    add("--epochs", type=positive, default=1, help="passes over the data (paper: 1)")
    add("--batch-size", type=positive, default=16, help="traces per optimiser step (paper: 8 x 2)")
    add("--micro-batch", type=positive, default=1, help="traces per forward pass, as many as fit")
    args = parse_training_args(parser, TINY, "sft")
    verified = args.run_dir / "gen_cot" / "cot.jsonl"
    args.data = args.data or (str(verified) if verified.exists() else "data/VideoP2R-162k_sft.part*.json.gz")
    return args


def main(args):
    setup_process(args)
    records = select_records(args)
    for record in records:
        if not record.get("output") and not (record.get("observation") and record.get("process")):
            raise UserError(f"{args.data}: the question {record['problem'][:60]!r} has no trace to learn "
                            "(output, or observation and process): run gen_cot.py first.")
        if args.process_agnostic and None in parse_trace(target_text(record))[1:]:
            raise UserError(f"{args.data}: the trace of {record['problem'][:60]!r} lacks its think or its "
                            "answer block: leave the record out.")
    claim_output(args)
    with measured("load", "take a smaller model"):
        model, tokenizer = load_model(args.base, None, not args.no_4bit, args.lora_rank)
    train(model, tokenizer, records, args)


def train(model, tokenizer, records, args):
    """SFT over the records, `--epochs` times; writes metrics.jsonl, curves.png and the adapter."""
    template, optimizer, order = load_template(args), setup_training(model, args), []
    for epoch in range(args.epochs):
        order += random.Random(args.seed + epoch).sample(records, len(records))
    steps = math.ceil(len(order) / args.batch_size)
    start, named = load_checkpoint(model, optimizer, args), set()
    media = read_ahead(shard(order[start * args.batch_size:], args.batch_size), args)
    with (open_log(args.output, start) as log, progress("SFT", start, steps) as bar,
          Checkpoints(start, steps, model, optimizer, args) as checkpoints):
        for step in bar:
            size = min(args.batch_size, len(order) - step * args.batch_size)
            encoded, media_log = encode_batch(media, size, template, tokenizer, unwrap(model).config, named)
            row = {"step": step, "lr": cosine_lr(step, steps, args.lr)} | media_log
            if row["skipped_media"] < size:
                with measured("step", "lower --micro-batch, then --lora-rank or --num-frames", row):
                    row |= sft_step(model, tokenizer, optimizer, encoded, row["lr"], args)
                bar.set_postfix(loss=f"{row['loss']:.3f}")
            log_row(log, row)
            checkpoints.updated(step + 1)
    lost = finish(model, {"loss": ["loss"], "gradient norm": ["grad_norm"]}, len(order), args.output)
    print(f"SFT on {len(order) - lost} traces, {lost} skipped; adapter, metrics.jsonl, curves.png in "
          f"{args.output}")


def sft_step(model, tokenizer, optimizer, encoded, lr, args):
    """One optimiser step on pairs (record, Prompt); returns its metrics: `loss`, the mean over the completion
    tokens of all processes (S2), and those of `optimiser_step`."""
    encoded = sorted(encoded, key=lambda pair: len(pair[1].input_ids))  # like lengths together pad less
    targets = [target_ids(record, tokenizer, args.process_agnostic) for record, _ in encoded]
    tokens, loss = sum(gather_object([sum(map(len, targets))])), 0.0
    model.train()
    for i in range(0, len(encoded), args.micro_batch):
        prompts = [prompt for _, prompt in encoded[i:i + args.micro_batch]]
        with torch.no_grad():
            embed_prompts(model, prompts)
        part = sft_loss(model, prompts, targets[i:i + args.micro_batch]) / tokens
        part.backward()
        loss += part.item()
    model.eval()
    loss = sum(gather_object([loss]))
    return {"loss": loss, **optimiser_step(model, optimizer, lr, args.max_grad_norm, loss)}


def sft_loss(model, prompts, completions):
    """Summed negative log-likelihood of the completions, a scalar; labels are the completion tokens and
    nothing else.

    Args:
        prompts: B of Prompt with embeds. completions: B of (T,) int64, end-of-sequence included.
    """
    qwen = unwrap(model).model
    device = prompts[0].embeds.device
    embeds, positions = [], []  # (S, D) and (S, 3) each
    for prompt, completion in zip(prompts, completions):
        after = prompt.next_position + torch.arange(len(completion))
        embeds.append(torch.cat([prompt.embeds, qwen.language_model.embed_tokens(completion.to(device))]))
        positions.append(torch.cat([prompt.positions, after.expand(3, -1)], dim=1).T)
    attention_mask = pad_sequence([e.new_ones(len(e), dtype=torch.bool) for e in embeds], batch_first=True)
    hidden = qwen.language_model(  # (B, S, D)
        inputs_embeds=pad_sequence(embeds, batch_first=True), attention_mask=attention_mask,  # (B, S)
        position_ids=pad_sequence(positions).permute(2, 1, 0).to(device), use_cache=False).last_hidden_state
    before = [h[len(p.input_ids) - 1:len(e) - 1] for h, p, e in zip(hidden, prompts, embeds)]  # of the labels
    labels = torch.cat(completions).to(device)
    return -logprobs_from_hidden(model, torch.cat(before), labels).sum()


def target_text(record, process_agnostic=False):
    """The completion to learn: the record's whole trace, or without its observation block (S3)."""
    if record.get("output"):
        text = record["output"].strip()
    else:
        observation = strip_tag(record["observation"], "observation")
        think = strip_tag(record["process"], "think")
        text = f"<observation>{observation}</observation> <think>{think}</think>{record['solution']}"
    if process_agnostic:
        trace = parse_trace(text)
        text = f"<think>{trace.think}</think><answer>{trace.answer}</answer>"
    return text


def strip_tag(text, tag):
    """A segment without its tags, whether the file stores it with or without them."""
    return text.replace(f"<{tag}>", "").replace(f"</{tag}>", "").strip()


def target_ids(record, tokenizer, process_agnostic=False):
    """The completion's tokens, (T,) int64, the end-of-sequence token included."""
    ids = token_ids(defuse(target_text(record, process_agnostic), tokenizer), tokenizer)
    return torch.cat([ids, torch.tensor([tokenizer.eos_token_id])])


# === below: what later stages borrow ========================================================================

# --- the model ----------------------------------------------------------------------------------------------

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def pick_device():
    """(device, dtype of the 16-bit parts): bf16 on a GPU, float32 on a CPU, where 16 bits are slow."""
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() < (8, 0):
            print("This card is older than Ampere: it emulates bf16, which is slow.")
        return process().device, torch.bfloat16
    return torch.device("cpu"), torch.float32


def load_base(base, four_bit=True):
    """The frozen base and its tokenizer; 4-bit linear layers in the language model only.

    Raises UserError where `base` is no such model or lacks weights, or where the vision tower or the head
    came out in 4 bits.
    """
    if os.path.isdir(base) and not os.path.exists(f"{base}/config.json"):
        raise UserError(f"The folder {base} is no model: there is no config.json in it.")
    print(f"Loading {base}" + ("." if os.path.isdir(base) else ", from the hub if it is not here yet: 17 GB "
                               "for the 7B, 7.5 GB for the 3B."), flush=True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading; the switch is the hub's too
    enable_progress_bars()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's use of an old name
    device, dtype = pick_device()
    if base == MODELS["tiny"]:  # on matrices this small a second thread gains 0 to 20 % on an idle machine,
        torch.set_num_threads(1)  # and is three to eight times slower on a busy one: they wait for each other
    local = dict(local_files_only=not os.path.isdir(base) and not hub_answers())
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"]) if four_bit else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **local)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base, dtype=dtype, quantization_config=quantization, attn_implementation="sdpa",
            device_map={"": device}, output_loading_info=True, **local)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The model {base} can't be loaded: {' '.join(str(error).split())}") from None
    if info["missing_keys"]:  # the library would go on with random ones
        raise UserError(f"{base} lacks {len(info['missing_keys'])} of Qwen2.5-VL's weights, for example "
                        f"{min(info['missing_keys'])}: download it again, or name another model.")
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU with bf16 instructions a pass without
            module.support_avx512bf16_for_cpu = False  # gradients repacks the weights, and no later one works
    linears = [(name, "4bit" in type(m).__name__)
               for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantised = [name for name, is_4bit in linears if is_4bit]
    unexpected = [name for name in quantised if "language_model.layers" not in name]
    if unexpected or (four_bit and not quantised):
        raise UserError(f"4-bit layers belong in the language model only; "
                        f"found {unexpected[:3] or 'none at all'} in {base}.")
    print(f"{base}: {len(quantised)} linear layers in 4 bits, {len(linears) - len(quantised)} not quantised, "
          f"on {device}.")
    return model, tokenizer


def hub_answers():
    """Whether there is a way to the hub, to whose library it takes a minute to find that there is none."""
    with contextlib.suppress(requests.RequestException):
        # offline by its own setting, the library knows without asking
        return constants.HF_HUB_OFFLINE or bool(requests.head(constants.ENDPOINT, timeout=10).status_code)
    return False


def load_model(base, adapter=None, four_bit=True, lora_rank=64, trainable=True):
    """(model, tokenizer): the base with a LoRA adapter, see `add_adapter`."""
    if adapter is not None:
        check_adapter(adapter)
    model, tokenizer = load_base(base, four_bit)
    return add_adapter(model, base, adapter, lora_rank, trainable), tokenizer


def add_adapter(model, base, adapter=None, lora_rank=64, trainable=True):
    """The model with a LoRA adapter named `policy`: the one saved in the folder `adapter`, or a fresh one (B
    = 0). Raises UserError where it does not fit the base."""
    if adapter is None:
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS)
        model = get_peft_model(model, config, adapter_name="policy")
    else:
        try:
            model = PeftModel.from_pretrained(model, str(adapter), adapter_name="policy",
                                              is_trainable=trainable)
        except (RuntimeError, ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"The adapter in {adapter} does not fit {base}: {reason}") from None
        check_adapter_fits(model, adapter)
    model.requires_grad_(False)
    model.set_requires_grad("policy", trainable)  # its weights are float32, which is peft's default
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # an adapter from elsewhere can bring some; ρ wants the same policy twice
    model.print_trainable_parameters()
    return model.eval()


def check_adapter(adapter, lora_rank=None):
    """Raises UserError where the folder holds no saved adapter, for which peft would ask the hub, or one of
    another rank."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / name).exists():
            raise UserError(f"No adapter in {adapter}, which lacks {name}: train one with sft.py, or name "
                            "none for the base.")
    try:
        rank = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("r", lora_rank)
    except ValueError:
        raise UserError(f"The adapter in {adapter} has no readable adapter_config.json.") from None
    if lora_rank not in (None, rank):
        raise UserError(f"The adapter in {adapter} has rank {rank}: pass --lora-rank {rank}, or train "
                        "another with sft.py.")


def check_adapter_fits(model, adapter):
    """Raises UserError where the saved weights are not all of the adapter's and no others, or where a layer's
    change nothing: they are of another model or version, which peft would pass over."""
    saved = set(load_peft_weights(str(adapter), device="cpu"))
    unexpected = saved ^ set(get_peft_model_state_dict(model, adapter_name="policy"))
    if unexpected:
        raise UserError(f"The adapter in {adapter} does not fit this base: {len(unexpected)} weights are "
                        f"missing or have no place, for example {min(unexpected)}.")
    check_finite(model, f"The adapter in {adapter}")
    if any(p.abs().max() == 0 for n, p in model.named_parameters() if "lora_B" in n):
        raise UserError(f"The adapter in {adapter} has no effect on this base: "
                        "it was trained for another model or version.")


def check_finite(model, name):
    """Raises UserError where the LoRA weights hold NaN or infinities."""
    if not all(p.isfinite().all() for n, p in model.named_parameters() if "lora_" in n):
        raise UserError(f"{name} holds numbers that are not finite: train again with a lower --lr.")


def unwrap(model):
    """The Qwen2.5-VL inside a PeftModel (or the model itself), its LoRA layers in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_adapter(model, folder):
    """Write the policy adapter in peft's own format; each of its files appears whole or not at all."""
    folder = Path(folder)
    check_finite(model, "The trained adapter")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=folder) as partial:
        try:
            model.save_pretrained(partial, selected_adapters=["policy"])
        except SafetensorError as error:
            raise UserError(f"The adapter can't be written: {error}.") from None
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(partial) / "policy" / name, folder / name)


# --- from a record to tensors -------------------------------------------------------------------------------

PATCH, MERGE, TEMPORAL = 14, 2, 2  # pixels a patch side; patches a token side; frames a temporal patch
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>{medium}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n")


@dataclass
class Prompt:
    """One encoded question with its medium."""
    input_ids: torch.Tensor      # (P,) int64, visual placeholders expanded
    positions: torch.Tensor      # (3, P) int64, M-RoPE
    pixel_values: torch.Tensor   # (N, 1176) float32
    grid_thw: torch.Tensor       # (1, 3) int64, in patches
    embeds: torch.Tensor = None  # (P, D), set by embed_prompts

    @property
    def next_position(self):
        """Where the text after the prompt starts, on all three axes."""
        return int(self.positions.max()) + 1


def pack_frames(frames):
    """Frames uint8 (T, H, W, 3) → the tower's patches float32 (N, 1176) and their grid (t, h, w).

    Two frames make a temporal patch (an odd last one counts twice, so a still image is two equal frames); the
    patches of one visual token (2 × 2) stand together, which is the order of the library's image processor.
    """
    if len(frames) % TEMPORAL:
        frames = np.concatenate([frames, frames[-1:]])
    pixels = (frames.astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD  # (T, H, W, 3)
    t, h, w = len(frames) // TEMPORAL, frames.shape[1] // PATCH, frames.shape[2] // PATCH
    pixels = pixels.reshape(t, TEMPORAL, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, channel, 2 frames, 14, 14)
    return torch.from_numpy(pixels.reshape(t * h * w, -1).copy()), (t, h, w)


def rope_positions(input_ids, grid_thw, second_per_grid, config):
    """M-RoPE positions of a sequence of text and visual tokens (S1; Qwen2.5-VL report).

    Text advances all three axes by one. A visual token of the medium's temporal patch t, row h, column w is
    at (start + floor(t · interval), start + h, start + w), interval = tokens_per_second · seconds per
    temporal patch. The text after it starts at one more than the largest position on any axis so far.

    Args:
        input_ids: (S,) int64 with one placeholder id per visual token.
        grid_thw: per medium in order, its (t, h, w) in patches.
        second_per_grid: per medium, seconds per temporal patch.
        config: the model's config (placeholder ids, merge size, tokens_per_second).

    Returns:
        int64 (3, S): temporal, height, width.
    """
    vision = config.vision_config
    visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    blocks, start, i = [], 0, 0
    media = iter(zip(torch.as_tensor(grid_thw).reshape(-1, 3).tolist(), second_per_grid))
    while i < len(input_ids):
        if visual[i]:
            (t, h, w), seconds = next(media)
            h, w = h // vision.spatial_merge_size, w // vision.spatial_merge_size
            times = (torch.arange(t, dtype=torch.float64)
                     * (vision.tokens_per_second * seconds)).floor().long()
            block = torch.stack(torch.meshgrid(times, torch.arange(h), torch.arange(w),
                                               indexing="ij")).flatten(1)
        else:
            length = int(visual[i:].int().argmax()) if visual[i:].any() else len(input_ids) - i
            block = torch.arange(length).expand(3, -1)
        blocks.append(block + start)
        start, i = int(blocks[-1].max()) + 1, i + block.shape[1]
    return torch.cat(blocks, dim=1)  # (3, S)


def encode_prompt(text, frames, fps, tokenizer, config):
    """Chat-format a prompt text with its frames uint8 (T, H, W, 3); fps is the sampled rate,
    None for an image."""
    pixel_values, grid = pack_frames(frames)
    pad = config.image_token_id if fps is None else config.video_token_id
    placeholder = "<|image_pad|>" if fps is None else "<|video_pad|>"
    ids = token_ids(CHAT.format(medium=placeholder, prompt=defuse(text, tokenizer)), tokenizer)
    at = int((ids == pad).nonzero()[0])
    visual = torch.full((math.prod(grid) // MERGE**2,), pad)
    ids = torch.cat([ids[:at], visual, ids[at + 1:]])
    seconds = 0.0 if fps is None else TEMPORAL / fps
    return Prompt(ids, rope_positions(ids, [grid], [seconds], config), pixel_values, torch.tensor([grid]))


def encode_text(text, tokenizer):
    """A chat prompt without a medium."""
    chat = CHAT.replace("<|vision_start|>{medium}<|vision_end|>", "")
    ids = token_ids(chat.format(prompt=defuse(text, tokenizer)), tokenizer)
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1),
                  torch.empty(0, 2 * 3 * PATCH**2), torch.empty(0, 3, dtype=torch.long))


def token_ids(text, tokenizer):
    """The tokens of a text, (S,) int64, and no others around them."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def defuse(text, tokenizer):
    """A text that can't write a control token, such as <|im_end|> or <tool_call>: each gets a space."""
    for token in tokenizer.added_tokens_decoder.values():
        text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


def embed_prompts(model, prompts):
    """Fill in `embeds` of each prompt: token embeddings with the vision tower's features in their places.

    The tower is frozen, so this runs once per prompt and its features serve sampling,
    policy and reference alike.
    """
    qwen = unwrap(model).model
    device = qwen.visual.patch_embed.proj.weight.device
    ids = torch.cat([p.input_ids for p in prompts]).to(device)
    embeds = qwen.language_model.embed_tokens(ids)  # of all prompts, one behind the other
    grids = torch.cat([p.grid_thw for p in prompts]).to(device)
    if len(grids):
        pixels = torch.cat([p.pixel_values for p in prompts]).to(device)
        is_visual = (ids == qwen.config.image_token_id) | (ids == qwen.config.video_token_id)
        embeds[is_visual] = qwen.visual(pixels, grid_thw=grids).pooler_output.to(embeds.dtype)
    for prompt, own in zip(prompts, embeds.split([len(p.input_ids) for p in prompts])):
        prompt.embeds = own


def logprobs_from_hidden(model, hidden, targets, chunk=None):
    """Log-probability of each target under the head, float32 (M,), from hidden states (M, D)
    and targets (M,).

    In chunks of `chunk` tokens (default: logits of 256 MiB), under checkpointing where there are several, so
    that no two of them have their (tokens × V) tensors at once.
    """
    head = unwrap(model).lm_head
    chunk = chunk or max(1, 2**26 // head.out_features)

    def one_chunk(h, t):
        return -F.cross_entropy(head(h).float(), t, reduction="none")

    if len(hidden) <= chunk:
        return one_chunk(hidden, targets)
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(one_chunk, h, t, use_reentrant=False) for h, t in parts])


# --- several processes --------------------------------------------------------------------------------------

def process():
    """This process among those that `accelerate launch` started, or alone: its rank, their number, its
    device. Each takes its share of every batch, gradients are summed, and rank 0 alone talks and writes."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_first():
    return process().process_index == 0


def shard(items, batch_size):
    """This process's share of a stream, batch by batch: every n-th item of a batch for n processes."""
    rank, world_size = process().process_index, process().num_processes
    return (item for i, item in enumerate(items) if i % batch_size % world_size == rank)


def shard_size(batch_size):
    """How many items of a batch are this process's."""
    return len(range(process().process_index, batch_size, process().num_processes))


# --- what the two trainers have in common -------------------------------------------------------------------

WARMUP, WEIGHT_DECAY = 0.03, 0.01  # share of the steps with linear warm-up; of AdamW (Video-R1's)


def add_training_args(parser, model, stage, lr):
    """The model's flags and the groups 'optimisation' and 'run' of both trainers; returns the two groups."""
    model.add_argument("--no-4bit", action="store_true", help="keep the base in 16 bits (big cards)")
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--lora-rank", type=positive, default=64, help="rank of the LoRA adapters; their alpha is twice that")
    add("--lr", type=number(1e-12), default=lr,
        help="peak learning rate (Video-R1: 1e-6 on all weights; LoRA wants more)")
    add("--max-grad-norm", type=number(1e-12), default=5.0, help="clip gradients to this norm (Video-R1: 5)")
    parser.set_defaults(checkpointing=True)  # of activations, to save memory; no flag, `tiny` turns it off
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--seed", type=number(0, int), default=0, help="seed of the data's order, fresh adapter and sampling")
    add("--output", type=Path, help=f"folder for adapter, metrics and curves (default: runs/<model>/{stage})")
    add("--memory-limit", type=number(0.1), metavar="GIB",
        help="let PyTorch have so much of the GPU; the CUDA context comes on top")
    add("--save-every", type=positive, default=100, help="steps between two checkpoints")
    add("--resume", action="store_true", help="go on from a stopped run's last checkpoint, if there is one")
    return group, run


def parse_training_args(parser, tiny, stage):
    """`parse_args`, by one process after the other, since the first one prepares the toy data."""
    with process().main_process_first():
        return parse_args(parser, tiny, stage)


def setup_process(args):
    """What a training process does first. Raises UserError where its memory can't be limited."""
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # one voice is enough
    torch.manual_seed(args.seed)  # of a fresh adapter; all else draws from generators of its own
    if args.memory_limit is not None:
        if not torch.cuda.is_available():
            raise UserError("--memory-limit is for a GPU, and there is none.")
        share = args.memory_limit * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def claim_output(args):
    """Makes the output folder; an old run in it is moved aside, or, with --resume, ends this one if it is
    finished (SystemExit). Raises UserError where nothing can be written."""
    with process().main_process_first():
        saved = list(args.output.glob("checkpoint*.pt"))
        finished = (args.output / "adapter_model.safetensors").exists()
        if args.resume and finished and not saved:
            print(f"{args.output} holds a finished run: nothing to do.")
            raise SystemExit(0)
        if not args.resume and (finished or saved) and is_first():
            move_aside(args.output)
        check_writable(args.output)


def setup_training(model, args):
    """AdamW over the LoRA weights; checkpointing as asked for, in the variant that keeps gradients alive.

    Hugging Face checkpoints only in training mode, so `model.train()` turns it on for gradient passes and
    `model.eval()` off for sampling, where it would disable the key-value cache. Nothing here has dropout.
    """
    if args.checkpointing:
        unwrap(model).activation_checkpointing_enable({"use_reentrant": False})
    group = dict(params=trainable_parameters(model), skipped_steps=0, skipped_in_a_row=0)
    return torch.optim.AdamW([group], lr=args.lr, weight_decay=WEIGHT_DECAY)


def trainable_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def cosine_lr(step, steps, lr, warmup=WARMUP):
    """Learning rate of step 0 … steps - 1: linear warm-up over the share `warmup`, then a cosine to 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return lr * (step + 1) / ramp
    return lr * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def optimiser_step(model, optimizer, lr, clip, loss=0.0):
    """One step of AdamW at this learning rate on the gradients summed over the processes; returns
    `grad_norm`, before clipping, and `skipped_steps`, how many so far were not taken, since their loss or
    norm was not finite.

    Raises UserError for three of these in a row, and for a step that leaves every LoRA B at its first 0.
    """
    group, parameters = optimizer.param_groups[0], trainable_parameters(model)
    group["lr"] = lr
    for parameter in parameters:
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = reduce(own, "sum")
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    if math.isfinite(loss + norm):
        group["skipped_in_a_row"] = 0
        optimizer.step()
        if norm > 0 and not any(p.any() for n, p in model.named_parameters() if "lora_B" in n):
            raise UserError("Every LoRA B is still 0 after a step with a gradient: this run would learn "
                            "nothing.")
    else:
        group["skipped_in_a_row"] += 1
        group["skipped_steps"] += 1
        tqdm.write(f"step not taken: the loss is {loss:.3g}, the gradient's norm {norm:.3g}", file=sys.stderr)
    optimizer.zero_grad(set_to_none=True)
    if group["skipped_in_a_row"] >= 3:
        raise UserError("Three steps in a row were not finite and not taken: lower --lr.")
    return {"grad_norm": norm, "skipped_steps": group["skipped_steps"]}


def encode_batch(media, size, template, tokenizer, config, named):
    """This process's share of a batch of so many records, from its pairs of `read_ahead`. Records whose media
    can't be read are left out, never replaced, and named once; `named` are those so far.

    Returns (pairs, log): list of (record, Prompt), and a dict with `sec/media`, the seconds that were waited
    for media, and `skipped_media` of all processes.
    """
    since, share, encoded = time.time(), shard_size(size), []
    for record, frames in islice(media, share):
        if isinstance(frames, MediaError):
            if str(frames) not in named:
                tqdm.write(f"skipped: {frames}", file=sys.stderr)  # which all processes have
            named.add(str(frames))
        else:
            text = build_prompt(record, template)
            encoded.append((record, encode_prompt(text, *frames, tokenizer, config)))
    lost = sum(gather_object([share - len(encoded)]))  # which joins the lists of all processes
    return encoded, {"sec/media": time.time() - since, "skipped_media": lost}


def checkpoint_bytes(step, model, optimizer, args):
    """All that a run needs to go on with this step, as torch.save has it. The order of the data and the
    random numbers of the sampling follow from seed and step. UserError for weights that are not finite."""
    check_finite(model, "The model")
    buffer = io.BytesIO()
    torch.save(dict(step=step, weights=[p.detach().cpu() for p in trainable_parameters(model)],
                    optimizer=optimizer.state_dict(), args=settings(args)), buffer)
    return buffer.getbuffer()


def save_checkpoint(data, folder):
    """Write checkpoint.pt; the one before it stays beside it."""
    if is_first():
        path = folder / "checkpoint.pt"
        with write_atomically(path) as partial:
            partial.write_bytes(data)
            if path.exists():
                os.replace(path, folder / "checkpoint-before.pt")


def load_checkpoint(model, optimizer, args):
    """The step to go on with, weights and AdamW's moments being put back; 0 for a run that begins. A damaged
    checkpoint is named and the one before it taken. Says which settings differ. UserError where none fits."""
    paths = [args.output / "checkpoint.pt", args.output / "checkpoint-before.pt"]
    paths = [path for path in paths if args.resume and path.exists()]
    for path in paths:
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load doesn't look at the checksums
                raise ValueError
            state = torch.load(path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for parameter, weight in zip(trainable_parameters(model), state["weights"], strict=True):
                    parameter.copy_(weight)
            break
        except Exception as error:  # a damaged file can fail anywhere in the library
            print(f"{path} is damaged, or of another --lora-rank ({type(error).__name__}).")
    else:
        if paths:
            raise UserError(f"No checkpoint in {args.output} fits: start again without --resume.")
        return 0
    optimizer.load_state_dict(state["optimizer"])
    print(f"Going on from step {state['step']}.")
    for name, value in settings(args).items():
        if state["args"].get(name) != value and name != "resume":
            print(f"Before, {name.replace('_', ' ')} was {state['args'].get(name)}; now it is {value}.")
    return state["step"]


class Checkpoints:
    """Saves a run every `--save-every` updates and after the last one. Whatever else ends its loop, Ctrl-C,
    SIGTERM or an error, leaves a checkpoint of the last whole update and one sentence that says how to go on.

    From AdamW's step until `updated`, when the update stands in the log, signals are held back. With several
    steps an update (μ > 1) the weights before it are kept. Nothing here is collective: the other processes
    may be gone.
    """

    def __init__(self, start, steps, model, optimizer, args):
        self.state, self.several = (model, optimizer, args), getattr(args, "num_iterations", 1) > 1
        self.asked, self.folder, self.steps, self.every = False, args.output, steps, args.save_every
        self.begin(start)

    def begin(self, step):
        self.step, self.changing, self.stepped = step, False, False
        self.kept = checkpoint_bytes(step, *self.state) if self.several else None

    def updated(self, step):
        self.begin(step)
        if step % self.every == 0 or step == self.steps:
            save_checkpoint(self.kept or checkpoint_bytes(step, *self.state), self.folder)
        if self.asked:
            raise KeyboardInterrupt

    def receive(self, *signal_and_frame):
        if not self.changing or self.asked and self.several:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self):
        optimizer = self.state[1]
        self.hooks = [
            optimizer.register_step_pre_hook(lambda *_: vars(self).update(changing=True, stepped=False)),
            optimizer.register_step_post_hook(lambda *_: vars(self).update(stepped=True))]
        self.handlers = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, traceback):
        for hook in self.hooks:
            hook.remove()
        for signal_number, handler in self.handlers.items():
            signal.signal(signal_number, handler)
        if error is None or not is_first():
            return
        # μ = 1: once AdamW has stepped, the update is whole, logged or not; μ > 1: the copy from before it
        if self.kept or self.stepped or not self.changing:  # else AdamW failed half-way: the last one stays
            data = self.kept or checkpoint_bytes(self.step + self.stepped, *self.state)
            save_checkpoint(data, self.folder)
        reason = "Stopped" if kind is KeyboardInterrupt else str(error).removesuffix(".")
        program = ["accelerate", "launch"] if process().num_processes > 1 else ["python"]
        again = shlex.join([*program, *(a for a in sys.argv if a != "--resume"), "--resume"])
        sentence = f"{reason}. {self.folder} holds a checkpoint: go on with `{again}`."
        if issubclass(kind, (KeyboardInterrupt, UserError)):
            raise UserError(sentence) from None
        print(sentence, file=sys.stderr)


def settings(args):
    """A run's arguments as plain values."""
    return {name: str(value) for name, value in vars(args).items()}


def progress(name, start, steps):
    """A bar over the steps from `start` on."""
    return tqdm(range(start, steps), name, steps, initial=start, disable=not is_first())


def open_log(folder, step, name="metrics.jsonl"):
    """A log for the rows from this step on: what a killed run wrote of them goes, the rest stays."""
    if not is_first():
        return open(os.devnull, "ab")
    file = open_jsonl(folder / name)
    file.seek(0)
    kept = sum(len(line) for line in file.readlines() if json.loads(line)["step"] < step)
    file.truncate(kept)
    return file


def log_row(file, row):
    """Append a row to the log, floats with six digits, null for what is not finite, at any depth."""
    row = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.6g}"),
                     parse_constant=lambda nan: None)
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()


def finish(model, curves, media, folder):
    """What a run leaves: the adapter, metrics.jsonl and curves.png, but no checkpoint. Returns how many of so
    many `media` were skipped. Raises UserError where all were."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")] if is_first() else []
    lost = sum(row.get("skipped_media", 0) for row in rows)
    if lost == media:
        raise UserError("None of the media can be read, so nothing was learnt: see the list above.")
    if is_first():
        save_adapter(model, folder)
        plot_curves(rows, curves, folder)
        for path in sorted(folder.glob("checkpoint*")):  # the newest one last; torn ones, too
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lost


def plot_curves(rows, curves, folder, window=15):
    """Draw `curves.png` from the log's rows, running means; curves: {title: its keys in the log}."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines, columns = math.ceil(len(curves) / 3), min(len(curves), 3)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3 * lines), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, curves.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            steps, values = zip(*points) if points else ((), ())
            means = [np.mean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]
            axis.plot(steps, means, marker="." if len(points) < window else None,
                      label=key.split("/")[-1].removesuffix("_" + title))
        axis.set(title=title, xlabel="step")
        if len(keys) > 1:
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)
    pyplot.close(figure)


# --- seconds and memory -------------------------------------------------------------------------------------

@contextlib.contextmanager
def measured(phase, hint, row=None):
    """Put the seconds and peak GiB of what runs within into row["sec/PHASE"] and row["gib/PHASE"], or print
    them. Out of memory is a UserError with a hint on what to turn."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    report, start = {} if row is None else row, time.time()
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"The phase '{phase}' does not fit into the memory: {hint}.") from None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        report["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    report.update({f"sec/{phase}": time.time() - start, f"gib/{phase}": peak_gib()})
    if row is None:
        print_phases(report)


def peak_gib():
    """Peak memory in GiB: allocated on the GPU since the last reset, or resident in this process so far on a
    machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024) / 2**30)


def print_phases(row):
    for phase in [key.removeprefix("sec/") for key in row if key.startswith("sec/")]:
        seconds, gib = row[f"sec/{phase}"], row[f"gib/{phase}"]
        print(f"{phase:<10}{seconds:>10.2f} s{gib:>10.2f} GiB at most", flush=True)


if __name__ == "__main__":
    run_script(main, get_args)
