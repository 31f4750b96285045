"""A 4-bit Qwen2.5-VL with LoRA learns the template from verified traces: VideoP2R's first training stage
(Sec. 3.1).

The language model's linear layers are frozen in nf4 with double quantisation (QLoRA), the vision tower is
frozen and not quantised, and LoRA adapters on the language model are all that trains. The loss is next-token
cross-entropy on the assistant's completion only.

    python sft.py --model tiny                 # a laptop's CPU: under a minute, 0.6 GiB
    python sft.py --model qwen2.5-vl-7b        # one consumer GPU

`train`, `sft_step` and `sft_loss` come first. Below the double line is what later stages borrow: the
model, the way from a record to its tensors, and what the two trainers have in common.

Shapes: B samples, S tokens of a sequence, P prompt tokens, T completion tokens, D hidden size, V vocabulary,
N patches.

Our choices where the paper is silent:
S1. M-RoPE positions are computed here, once per sample, from the true sampled frame rate (`rope_positions`),
    and given to every forward pass; the library's own depend on its version and assume 24 frames per second.
S2. A batch's loss is the mean over all its completion tokens, however it is split into micro-batches.
S3. `--process-agnostic` (Table 2) removes the observation block from the target; the prompt stays the same.
S4. One medium in fifty (of the toy, in twenty) is held out, by a hash of its path (`gen_cot.hold_out`): no
    question about it is trained on, in SFT or RL. The paper trains on all, as `--held-out 0` does.
S5. LoRA is on all linear layers of the language model's blocks (`LORA_TARGETS`), in float32, without dropout.
    Its alpha is twice its rank.
S6. The learning rate rises linearly in the first 3 % of the steps, then falls to 0 along a cosine. AdamW's
    weight decay is 0.01 (Video-R1's).
S7. A step whose loss or gradient isn't finite is counted and not taken. Three in a row end the run.
"""
import contextlib
import hashlib
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import gather_object, reduce

# bitsandbytes logs an advertisement as it is imported
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from gen_cot import (FACTOR, MODELS, Flags, MediaError, build_prompt, hold_out, load_template, lock,
                     move_aside, parse_args, read_ahead, run_script, select_records)
from rewards import (UserError, digest, json_line, open_append, parse_trace, read_jsonl, write_jsonl,
                     write_text)

CURVES = {"loss": ["loss"], "gradient norm": ["grad_norm"]}
TINY = dict(data="runs/tiny/gen_cot/cot.jsonl", media_root="data/toy", lr=2e-3, lora_rank=32, micro_batch=16,
            max_pixels=4, checkpointing=False, held_out=0.05)


@dataclass
class ModelFlags(Flags):
    """What all stages have that load a model."""
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: run there, even a large model
    no_4bit: bool = False  # keep the base in 16 bits (big cards)
    held_out: float = 0.02  # share of the media that is never trained on, by a hash of their paths (paper: 0)


@dataclass
class TrainingFlags(ModelFlags):
    """What both trainers have."""
    lora_rank: int = 64  # rank of the LoRA adapters; their alpha is twice that
    lr: float = 1e-4  # peak learning rate (Video-R1: 1e-6 on all weights; LoRA wants more)
    max_grad_norm: float = 5.0  # clip gradients to this norm (Video-R1: 5)
    checkpointing: bool = True  # of activations, to save memory
    max_prompt_tokens: int | None = None  # leave out longer prompts (default: a 300-word question's)
    save_every: int = 20  # steps between two checkpoints
    show_every: int = 25  # every N steps: curves.png; in RL a group on screen, accuracy on held-out prompts
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None  # gets every row of the log, too
    resume: bool = False  # go on from a stopped run's last checkpoint, if there is one


@dataclass
class Args(TrainingFlags):
    data: str | None = None  # verified traces (default: those of gen_cot.py, else the authors' release)
    process_agnostic: bool = False  # no observation block in the target (Table 2)
    epochs: int = 1  # passes over the data (paper: 1)
    batch_size: int = 16  # traces per optimiser step (paper: 8 x 2)
    micro_batch: int = 1  # traces per forward pass, as many as fit


def get_args():
    args = parse_args(Args, TINY, "sft", __doc__)
    verified = args.run_dir / "gen_cot/cot.jsonl"
    args.data = args.data or str(verified if verified.exists() else "data/VideoP2R-162k_sft.part*.json.gz")
    return args


def main(args):
    setup_process(args)
    if is_finished(args):
        return
    records = select_records(args)
    for record in records:
        target_text(record, args.process_agnostic)  # an error here, not in mid-run
    model, tokenizer = load_model(args.base, None, not args.no_4bit, args.lora_rank)
    train(model, tokenizer, records, args)


def train(model, tokenizer, records, args):
    """SFT over the records, `--epochs` times; writes run.json, metrics.jsonl, curves.png and the adapter."""
    _, records = hold_out(records, args.held_out)
    run = describe_run("process-agnostic SFT" if args.process_agnostic else "SFT", records, args)
    template, optimizer, order = load_template(args), setup_training(model, args), []
    config = unwrap(model).config
    # the longest prompt that is kept: by default the tokens of a 300-word question with the most frames
    limit = args.max_prompt_tokens or len(worst_prompt(tokenizer, config, args)[1].input_ids)
    for epoch in range(args.epochs):  # each in an order of its own
        order += random.Random(args.seed + epoch).sample(records, len(records))
    steps = math.ceil(len(order) / args.batch_size)
    # --resume: puts a checkpoint's weights back; else moves an earlier run aside; in any case writes run.json
    start = load_checkpoint(model, optimizer, run, args)
    media = read_ahead(shard(order[start * args.batch_size:], args.batch_size), args)
    tracker = start_tracker(args)
    with open_log(args.output / "metrics.jsonl", start) as log:
        for step in resumable("SFT", start, steps, model, optimizer, args, CURVES):
            # take this rank's share of a batch of `size`: its media were decoded while the last step ran
            size = min(args.batch_size, len(order) - step * args.batch_size)
            encoded, media_log = encode_batch(media, size, template, tokenizer, config, limit)
            row = {"step": step, "lr": cosine_lr(step, steps, args.lr)} | media_log
            # learn, unless all of the batch was skipped (skipped_media is of all ranks)
            if row["skipped_media"] < size:
                with measured("step", row):
                    row |= sft_step(model, tokenizer, optimizer, encoded, row["lr"], args)
            log_row(log, row, tracker)
    finish(model, CURVES, run, args.output)


def sft_step(model, tokenizer, optimizer, encoded, lr, args):
    """One optimiser step on pairs (record, Prompt); returns its metrics: `loss`, the mean over the completion
    tokens of all ranks (S2), and those of `optimiser_step`."""
    encoded = sorted(encoded, key=lambda pair: len(pair[1].input_ids))  # like lengths together pad less
    targets = [target_ids(record, tokenizer, args.process_agnostic) for record, _ in encoded]
    tokens = sum(gather_object([sum(map(len, targets))]))  # gather_object joins the lists of all ranks
    loss = 0.0
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
    # embeds: B of (S, D). positions: B of (S, 3), transposed since pad_sequence pads the first axis.
    embeds, positions = [], []
    for prompt, completion in zip(prompts, completions):
        after = prompt.next_position + torch.arange(len(completion))
        embeds.append(torch.cat([prompt.embeds, qwen.language_model.embed_tokens(completion.to(device))]))
        positions.append(torch.cat([prompt.positions, after.expand(3, -1)], dim=1).T)
    attention_mask = pad_sequence([e.new_ones(len(e), dtype=torch.bool) for e in embeds], batch_first=True)
    hidden = qwen.language_model(  # (B, S, D)
        inputs_embeds=pad_sequence(embeds, batch_first=True), attention_mask=attention_mask, use_cache=False,
        # (B, S, 3) -> (3, B, S), which the model wants
        position_ids=pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(device)).last_hidden_state
    # a label is predicted from the state of the token before it
    before = [h[len(p.input_ids) - 1:len(e) - 1] for h, p, e in zip(hidden, prompts, embeds)]
    return -logprobs_from_hidden(model, torch.cat(before), torch.cat(completions).to(device)).sum()


def target_text(record, process_agnostic=False):
    """The completion to learn: the record's whole trace, or without its observation block (S3)."""
    text = (record.get("output") or "").strip()
    if not text:  # only its segments, which the file stores with or without their tags
        observation = re.sub("</?observation>", "", record.get("observation") or "").strip()
        think = re.sub("</?think>", "", record.get("process") or "").strip()
        assert observation and think, f"no trace to learn of {record['problem']!r}: run gen_cot.py first"
        text = f"<observation>{observation}</observation> <think>{think}</think>{record['solution']}"
    if process_agnostic:
        trace = parse_trace(text)
        assert None not in trace[1:], f"a trace without a think or an answer block: {text}"
        text = f"<think>{trace.think}</think><answer>{trace.answer}</answer>"
    return text


def target_ids(record, tokenizer, process_agnostic=False):
    """The completion's tokens, (T,) int64, the end-of-sequence token included and no other control token."""
    ids = token_ids(defuse(target_text(record, process_agnostic), tokenizer), tokenizer)
    return torch.cat([ids, torch.tensor([tokenizer.eos_token_id])])


# === below: what later stages borrow ========================================================================

# --- the model ----------------------------------------------------------------------------------------------

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def pick_device():
    """(device, dtype of the 16-bit parts): bf16 on a GPU, float32 on a CPU, where 16 bits are slow."""
    return process().device, torch.bfloat16 if on_gpu() else torch.float32


def load_base(base, four_bit=True):
    """The frozen base and its tokenizer; 4-bit linear layers in the language model only."""
    device, dtype = pick_device()
    # On matrices this small a second thread gains 0 to 20 % on an idle machine. On a busy one two threads are
    # three to eight times slower than one, as they wait for each other.
    if base == MODELS["tiny"]:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's use of an old name
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"]) if four_bit else None
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        base, dtype=dtype, quantization_config=quantization, attn_implementation="sdpa",
        device_map={"": device}, output_loading_info=True)
    assert not info["missing_keys"], f"{base} lacks {len(info['missing_keys'])} of Qwen2.5-VL's weights"
    # Without this, on a CPU with bf16 instructions, a pass without gradients repacks the 4-bit weights, and
    # no later pass with gradients works.
    model.apply(lambda module: setattr(module, "support_avx512bf16_for_cpu", False))
    # which linear layers are in 4 bits, and which should be
    linears = {name: "4bit" in type(module).__name__ for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear)}
    expected = {name: four_bit and "language_model.layers" in name for name in linears}
    assert linears == expected, f"4-bit layers belong into {base}'s language model, and nowhere else"
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")}
    assert dtypes == {dtype}, f"{base} is in {dtypes}, this device wants {dtype}: take the base in 16 bits"
    print(f"{base}: {sum(linears.values())} of {len(linears)} linear layers in 4 bits, on {device}.")
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(base)


def load_model(base, adapter=None, four_bit=True, lora_rank=64, trainable=True):
    """(model, tokenizer): the base with a LoRA adapter, see `add_adapter`."""
    model, tokenizer = load_base(base, four_bit)
    return add_adapter(model, adapter, lora_rank, trainable), tokenizer


def add_adapter(model, adapter=None, lora_rank=64, trainable=True):
    """The model with a LoRA adapter named `policy`: the one saved in the folder `adapter`, or a fresh one
    (LoRA's matrix B is 0). Its weights are float32, which is peft's default. A saved one that doesn't fit
    this base is an error; peft would load what fits and say nothing."""
    if adapter is None:
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS)
        model = get_peft_model(model, config, adapter_name="policy")
    else:
        check_adapter(adapter)
        model = PeftModel.from_pretrained(model, str(adapter), adapter_name="policy", is_trainable=trainable)
        expected = get_peft_model_state_dict(model, adapter_name="policy").keys()
        assert load_peft_weights(str(adapter), "cpu").keys() == expected, f"{adapter} is of another model"
        changes = [p.any() for name, p in model.named_parameters() if "lora_B" in name]
        assert all(changes), f"{adapter} changes nothing in a layer: of another model, or it learnt nothing"
        config = model.peft_config["policy"]
        plain = not (config.lora_dropout or config.use_dora or config.lora_bias) and config.bias == "none"
        # `pagrpo.merged`, with which a CPU decodes, adds B·A to the base's weights and nothing else
        assert plain, f"{adapter} has dropout, DoRA or biases, which the merged decoding on a CPU leaves out"
        check_finite(model)
    model.requires_grad_(False)
    model.set_requires_grad("policy", trainable)
    return model.eval()


def check_adapter(adapter, lora_rank=None):
    """Raises UserError where the folder has no adapter (peft would look for one on the hub), or one of
    another rank."""
    path = Path(adapter) / "adapter_config.json"
    if not path.exists():
        raise UserError(f"No adapter in {adapter}: train one with sft.py, or name none for the base.")
    rank = json.loads(path.read_text())["r"]
    if lora_rank not in (None, rank):
        raise UserError(f"The adapter in {adapter} has rank {rank}: pass --lora-rank {rank}.")


def check_finite(model):
    finite = all(p.isfinite().all() for name, p in model.named_parameters() if "lora_" in name)
    assert finite, "the LoRA weights hold numbers that are not finite: train again with a lower --lr"


def unwrap(model):
    """The Qwen2.5-VL inside a PeftModel (or the model itself), its LoRA layers in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_adapter(model, folder, run=None):
    """Write the policy adapter in peft's own format, and run.json; each file appears whole or not at all."""
    check_finite(model)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=folder) as partial:
        model.save_pretrained(partial, selected_adapters=["policy"])
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(f"{partial}/policy/{name}", folder / name)
    if run:
        write_text(folder / "run.json", json.dumps(run, indent=1))


# --- from a record to tensors -------------------------------------------------------------------------------

PATCH, MERGE, TEMPORAL = 14, 2, 2  # pixels per patch side; patches per token side; frames per temporal patch
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
    patches of one visual token (2 × 2) follow each other, as in the library's image processor.
    """
    if len(frames) % TEMPORAL:
        frames = np.concatenate([frames, frames[-1:]])
    pixels = (frames.astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD  # (T, H, W, 3)
    t, h, w = len(frames) // TEMPORAL, frames.shape[1] // PATCH, frames.shape[2] // PATCH
    pixels = pixels.reshape(t, TEMPORAL, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    # axes 0 t, 1 frame, 2 h/2, 3 row of two, 4 y, 5 w/2, 6 column of two, 7 x, 8 channel
    pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, channel, 2 frames, 14, 14)
    return torch.from_numpy(pixels.reshape(t * h * w, -1)), (t, h, w)


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
            times = torch.arange(t, dtype=torch.float64) * (vision.tokens_per_second * seconds)
            times = (times + 1e-6).floor().long()  # what should be 93 can come out of floats as 92.999…
            block = torch.cartesian_prod(times, torch.arange(h), torch.arange(w)).T  # (3, t · h · w)
        else:
            # of text, up to the next visual token
            length = int(visual[i:].int().argmax()) if visual[i:].any() else len(input_ids) - i
            block = torch.arange(length).expand(3, -1)
        blocks.append(block + start)
        start, i = int(blocks[-1].max()) + 1, i + block.shape[1]
    return torch.cat(blocks, dim=1)  # (3, S)


def encode_prompt(text, frames, fps, tokenizer, config):
    """Chat-format a prompt text with its frames uint8 (T, H, W, 3); fps is the sampled rate,
    None for an image."""
    pixel_values, grid = pack_frames(frames)
    placeholder = "<|image_pad|>" if fps is None else "<|video_pad|>"
    medium = placeholder * (math.prod(grid) // MERGE**2)  # one for each visual token
    ids = token_ids(CHAT.format(medium=medium, prompt=defuse(text, tokenizer)), tokenizer)
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
    """A text that can't write a control token, such as <|im_end|> or <tool_call>: each gets a space after its
    first character. (The template's tags are plain text to Qwen's tokenizer.)"""
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
        # the tower's `pooler_output` has one state for each visual token
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


# --- several ranks ------------------------------------------------------------------------------------------

def process():
    """The PartialState of this rank (accelerate calls a rank a process): its index, its device, and how many
    ranks `accelerate launch` started. Each rank takes its share of every batch. Gradients are summed. Only
    rank 0 talks and writes.

    PartialState is a singleton. `start_ranks` has made it on the device that --device names; every later
    call returns that one. The `cpu` below counts only where `start_ranks` was never called, as in tests.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def on_gpu():
    return process().device.type == "cuda"


def is_first():
    return process().process_index == 0


def shard(items, batch_size):
    """This rank's share of a stream, batch by batch: every n-th item of a batch for n ranks."""
    rank, world_size = process().process_index, process().num_processes
    # an item's place in its batch is i % batch_size; that place % world_size is its rank
    return (item for i, item in enumerate(items) if i % batch_size % world_size == rank)


def shard_size(batch_size):
    """How many items of a batch are this rank's, as `shard` deals them."""
    return len(range(process().process_index, batch_size, process().num_processes))


# --- what the two trainers have in common -------------------------------------------------------------------

WARMUP, WEIGHT_DECAY = 0.03, 0.01  # share of the steps with linear warm-up; of AdamW (Video-R1's)


def start_ranks(args):
    """Joins the ranks, of which rank 0 alone prints. One may be done hours before another, or its judge may
    keep it waiting: none gives up on the others after the usual ten minutes."""
    # a singleton: `process` returns this one, on this device, from now on
    PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=1))
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def setup_process(args):
    """What a rank does before it loads a model. Raises UserError where a large one would run on a CPU."""
    start_ranks(args)
    if is_first():
        lock(args.output)
    torch.manual_seed(args.seed)  # of a fresh adapter; all else draws from generators of its own
    if not on_gpu() and args.device != "cpu":
        print("No GPU is visible to torch: running on the CPU.")
        if AutoConfig.from_pretrained(args.base).get_text_config().hidden_size > 1000:  # 3B: 2,048
            raise UserError(f"{args.base} wants a GPU; torch (for CUDA {torch.version.cuda}) sees none: "
                            "look at the driver (nvidia-smi). --device cpu runs it all the same.")


def setup_training(model, args):
    """AdamW over the LoRA weights. Activation checkpointing if asked for; non-reentrant, because reentrant
    wants inputs that require a gradient.

    transformers applies it only in training mode. So `model.train()` turns it on for gradient passes, and
    `model.eval()` turns it off for sampling, where it would disable the key-value cache. Nothing here has
    dropout.
    """
    if args.checkpointing:
        unwrap(model).activation_checkpointing_enable({"use_reentrant": False})
    # the two counters are in the group so that they are saved with the optimiser
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
    """One step of AdamW at this learning rate on the gradients summed over the ranks; returns `grad_norm`,
    before clipping, and `skipped_steps`, how many so far were not taken, since their loss or norm was not
    finite. Raises UserError for three of these in a row."""
    group, parameters = optimizer.param_groups[0], trainable_parameters(model)
    group["lr"] = lr
    for parameter in parameters:
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = reduce(own, "sum")
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    finite = math.isfinite(loss + norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    group["skipped_steps"] += not finite
    group["skipped_in_a_row"] = 0 if finite else group["skipped_in_a_row"] + 1
    if group["skipped_in_a_row"] >= 3:
        raise UserError("Three steps in a row were not finite and not taken: lower --lr.")
    return {"grad_norm": norm, "skipped_steps": group["skipped_steps"]}


def worst_prompt(tokenizer, config, args, words=300):
    """(record, Prompt) of a clip with as many visual tokens as these settings allow, and a long question."""
    # Rows of 28×28 blocks: a divisor of max_pixels, so that rows × columns is max_pixels. 256 gives 8 rows of
    # 32 blocks, 4 gives 4 rows of 1.
    rows = math.gcd(args.max_pixels, 8)
    shape = args.num_frames, rows * FACTOR, args.max_pixels // rows * FACTOR, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    record = dict(problem="the " * words, problem_type="free-form", solution="the", options=[])
    text = build_prompt(record, load_template(args))
    return record, encode_prompt(text, pixels, 2.0, tokenizer, config)


def encode_medium(record, medium, text, tokenizer, config, limit=None):
    """The Prompt of a text with its `medium`, which is (frames, fps), or None where there is none. A medium
    that is a MediaError is returned as it is, and a prompt over `limit` tokens as a MediaError."""
    if isinstance(medium, MediaError):
        return medium
    if medium is None:
        return encode_text(text, tokenizer)
    prompt = encode_prompt(text, *medium, tokenizer, config)
    if limit and len(prompt.input_ids) > limit:
        return MediaError(f"{record['media']}: its prompt of {len(prompt.input_ids)} tokens is over {limit}.")
    return prompt


def encode_batch(media, size, template, tokenizer, config, limit=None):
    """This rank's share of a batch of `size` records. `media` is the rank's own `read_ahead`. What can't be
    read or is over `limit` tokens is left out, never replaced.

    Returns (pairs, log): list of (record, Prompt), and a dict with `sec/media`, the seconds that this took,
    waiting for media included, and `skipped_media` of all ranks.
    """
    since, share, encoded = time.time(), shard_size(size), []
    for record, medium in islice(media, share):
        prompt = encode_medium(record, medium, build_prompt(record, template), tokenizer, config, limit)
        if isinstance(prompt, MediaError):
            tqdm.write(f"skipped: {prompt}", file=sys.stderr)  # stdout is rank 0's alone
        else:
            encoded.append((record, prompt))
    lost = sum(gather_object([share - len(encoded)]))  # which joins the lists of all ranks
    return encoded, {"sec/media": time.time() - since, "skipped_media": lost}


# === keeping a run alive: skip on a first reading ===========================================================

def describe_run(name, records, args, adapter="none"):
    """The content of run.json: what identifies a run, wherever its folder lies. `adapter` is the folder that
    it starts from."""
    if not records:
        raise UserError("All media are held out: pass a lower --held-out, or more records.")
    data = hashlib.sha256()
    for record in records:
        data.update(json_line({k: v for k, v in record.items() if k != "media"}).encode())
    flags = json.loads(json.dumps(vars(args), default=str))
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    return dict(algorithm=name, steps=0, base=base_digest(args.base), adapter=weights_digest(adapter),
                data=data.hexdigest()[:24], records=len(records), loss_average=flags.get("loss_average"),
                flags=flags, earlier_flags=[], commit=commit.stdout.decode().strip(),
                versions={name: version(name) for name in ("torch", "transformers", "peft", "av")})


def read_run(folder):
    """What run.json says of a folder's run. Without one the folder's path is its algorithm's name."""
    path = Path(folder, "run.json")
    return {"algorithm": str(folder)} | (json.loads(path.read_text()) if path.exists() else {})


def weights_digest(folder):
    """The SHA-256 of an adapter's weights; None where there is none."""
    path = Path(folder, "adapter_model.safetensors")
    if path.exists():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def base_digest(base):
    """Of a local base, the hash of its weights files' names, sizes and sixteen blocks of 64 KiB each, evenly
    spaced; an id of the hub as it is."""
    parts = []
    for path in sorted(Path(base).glob("*.safetensors")):
        content = np.memmap(path, mode="r")
        starts = np.linspace(0, max(0, len(content) - 2**16), 16, dtype=int)
        parts += [path.name, len(content), *(content[i:i + 2**16].tobytes() for i in starts)]
    return digest(parts) if parts else base


def is_finished(args):
    """Whether --resume has nothing left to do, as the output holds a finished run."""
    finished = (args.output / "adapter_model.safetensors").exists()
    if args.resume and finished and not (args.output / "checkpoint.pt").exists():
        print(f"{args.output} holds a finished run of {read_run(args.output).get('steps')} steps: nothing to "
              "do. A longer one starts without --resume.")
        return True
    return False


def check_resume(run, old):
    """Raises UserError if the run that `old` describes would become another one by going on as `run`. Prints
    flags that have changed, and keeps the old ones in run["earlier_flags"]."""
    for key in ("base", "adapter", "data", "algorithm", "loss_average"):
        # Of an algorithm's name, such as "SFT + GRPO", only the part after the last " + " is compared: the
        # part before names the run that this one starts from, and `adapter` is the hash of its weights.
        before, now = (str(either.get(key)).rpartition(" + ")[2] for either in (old, run))
        if before != now:
            raise UserError(f"The run was begun with another {key}, {before} (now {now}): give it back what "
                            "it had, or pass another --output.")
    changed = [f"{flag}: {old['flags'].get(flag)}, now {value}" for flag, value in run["flags"].items()
               if flag != "resume" and old["flags"].get(flag) != value]
    run["earlier_flags"] = old["earlier_flags"]
    if changed:
        print("Flags that differ from before: " + "; ".join(changed))
        run["earlier_flags"].append(old["flags"])


def save_checkpoint(step, model, optimizer, folder):
    """Saves all that a run needs to go on with this step: weights, AdamW's moments, the step. (The order of
    the data and the random numbers of the sampling follow from seed and step.)"""
    if is_first():
        check_finite(model)
        weights = [p.detach() for p in trainable_parameters(model)]
        state = dict(step=step, weights=weights, optimizer=optimizer.state_dict())
        torch.save(state, folder / "checkpoint.new")
        os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")


def load_checkpoint(model, optimizer, run, args):
    """Returns the step to go on with, 0 for a run that begins. With --resume puts the checkpoint's weights
    and AdamW's moments back. Without --resume moves an earlier run in the folder aside. Writes run.json."""
    path = args.output / "checkpoint.pt"
    if args.resume and path.exists():
        check_resume(run, read_run(args.output))
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, weight in zip(trainable_parameters(model), state["weights"], strict=True):
                assert parameter.shape == weight.shape, f"{path} is of another --lora-rank"
                parameter.copy_(weight)
        optimizer.load_state_dict(state["optimizer"])
        run["steps"] = state["step"]
        print(f"Going on from step {run['steps']}.")
    elif is_first() and not args.resume and args.output.exists() and any(args.output.iterdir()):
        move_aside(args.output)
    if is_first():
        write_text(args.output / "run.json", json.dumps(run, indent=1))
    return run["steps"]


def resumable(name, start, steps, model, optimizer, args, curves):
    """The steps from `start` on, behind a progress bar. A checkpoint is saved after every `--save-every` of
    them and after the last. curves.png is drawn anew every `--show-every`.

    On Ctrl-C, SIGTERM, or SIGHUP where it isn't ignored (nohup), the step in hand is finished and saved, and
    the run ends with the command that goes on. A second Ctrl-C or SIGTERM ends it at once, with the last
    checkpoint.

    An error ends the caller's loop. Python then closes this generator, which raises GeneratorExit at the
    yield. The weights are saved, too, unless AdamW has begun its step.
    """
    asked = []  # the signals so far
    # AdamW counts its steps for each weight: while the sum is the same, no weight has changed
    adamw_steps = lambda: sum(int(state["step"]) for state in optimizer.state.values())

    def receive(number, frame):  # raises nothing: it may run inside an object's __del__, which swallows it
        asked.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal sends two

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)
    program = ["accelerate", "launch"] if process().num_processes > 1 else ["python"]
    again = shlex.join([*program, *(word for word in sys.argv if word != "--resume"), "--resume"])
    for step in tqdm(range(start, steps), name, steps, initial=start, disable=not is_first()):
        before = adamw_steps()
        try:
            yield step
        except GeneratorExit:  # an error in the caller's loop
            if adamw_steps() == before:
                save_checkpoint(step, model, optimizer, args.output)
            raise
        if is_first() and (step + 1) % args.show_every == 0:
            plot_curves(curves, args.output)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_checkpoint(step + 1, model, optimizer, args.output)
        if any(gather_object([bool(asked)])) and step + 1 < steps:  # as ranks may hear of it one by one
            save_checkpoint(step + 1, model, optimizer, args.output)
            raise UserError(f"Stopped. {args.output} holds a checkpoint: go on with `{again}`.")


def open_log(path, start):
    """A log for the rows from this step on. Rows of these steps, which a killed run wrote, are dropped."""
    if not is_first():
        return open(os.devnull, "a")
    write_jsonl(path, [row for row in read_jsonl(path) if row["step"] < start])
    return open_append(path)


def log_row(file, row, tracker=None):
    """Append a row to the log, floats with six digits, null for what is not finite, at any depth. Its numbers
    go to the tracker, too."""
    # rounds by a trip through JSON, which finds every float, however deep
    row = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.6g}"),
                     parse_constant=lambda nan: None)
    file.write(json_line(row))
    if tracker:
        tracker.log({key: value for key, value in row.items() if isinstance(value, float | int)}, row["step"])


def finish(model, curves, run, folder):
    """What a run leaves: the adapter, run.json, metrics.jsonl and curves.png, but no checkpoint. Raises
    UserError where no step has learnt anything."""
    if is_first():
        rows = read_jsonl(folder / "metrics.jsonl")
        if not any("loss" in row for row in rows):
            raise UserError("Nothing was learnt in any step: see above.")
        save_adapter(model, folder, run | {"steps": len(rows)})
        plot_curves(curves, folder)
        # Remove partial saves first and checkpoint.pt last: if killed here, the run can still resume.
        for path in sorted(folder.glob("checkpoint*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        lost = sum(row["skipped_media"] for row in rows)
        print(f"{len(rows)} steps, {lost} media skipped; adapter, metrics.jsonl and curves.png in {folder}")


def start_tracker(args):
    """accelerate's tracker of --tracker, or None. A package that is missing is named by its ImportError."""
    if args.tracker and is_first():
        folder = {"logging_dir": args.output} if args.tracker == "tensorboard" else {}
        tracker = LOGGER_TYPE_TO_CLASS[args.tracker]("videop2r", **folder)
        tracker.start()
        return tracker


def plot_curves(curves, folder, window=15):
    """Draw `curves.png` from metrics.jsonl; curves: {title: its keys in the log}. Those that have no value so
    far are left out. Of more values than `window`, running means are drawn."""
    rows = read_jsonl(folder / "metrics.jsonl")
    seen = {key for row in rows for key in row if row[key] is not None}
    curves = {title: keys for title, keys in curves.items() if seen.intersection(keys)}
    from matplotlib.figure import Figure  # a second to import; without pyplot, which would look for a screen
    lines, columns = max(1, math.ceil(len(curves) / 3)), max(1, min(len(curves), 3))
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    for n, (title, keys) in enumerate(curves.items(), 1):
        axis = figure.add_subplot(lines, columns, n)  # one by one, as the last line may have fewer
        for key in keys:
            known = [row for row in rows if row.get(key) is not None]
            values, span = [row[key] for row in known], window if len(known) > window else 1
            means = [np.mean(values[max(0, i - span + 1):i + 1]) for i in range(len(values))]
            axis.plot([row["step"] for row in known], means, marker="." * (span == 1), label=key)
        axis.set(title=title, xlabel="step" if span == 1 else f"step; means of {window}")
        axis.legend(fontsize=6)
    figure.savefig(folder / "curves.png", dpi=100)


@contextlib.contextmanager
def measured(phase, row):
    """Put the seconds and peak GiB of what runs within into row["sec/PHASE"] and row["gib/PHASE"]. That is
    memory allocated on the GPU or, without one, resident in this process so far."""
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.time()
    yield
    if on_gpu():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        import resource  # which Windows lacks
        unit = 2**30 if sys.platform == "darwin" else 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    row |= {f"sec/{phase}": time.time() - start, f"gib/{phase}": peak}


def print_phases(row):
    for phase in [key.removeprefix("sec/") for key in row if key.startswith("sec/")]:
        print(f"{phase:<10}{row[f'sec/{phase}']:>10.2f} s{row[f'gib/{phase}']:>10.2f} GiB at most")


if __name__ == "__main__":
    run_script(main, get_args)
