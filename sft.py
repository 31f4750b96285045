"""A 4-bit Qwen2.5-VL with LoRA learns the template from verified traces:
VideoP2R's first training stage (Sec. 3.1).

The language model's linear layers are frozen in nf4 with double quantisation (QLoRA), the vision tower is
frozen and not quantised, and LoRA adapters on the language model are all that trains. The loss is next-token
cross-entropy on the assistant's completion only.

This file is also where every later stage gets its model and its tensors: `load_model`, `encode_prompt`,
`rope_positions`, `embed_prompts`, `logprobs_from_hidden`; and what the two trainers have in common, from
arguments and the processes' shares of a batch to checkpoints and curves.

    python sft.py --model tiny                 # a laptop's CPU: under a minute, 1 GiB
    python sft.py --model qwen2.5-vl-7b        # one consumer GPU

Shapes: B samples, S tokens of a sequence, P prompt tokens, T completion tokens, D hidden size,
V vocabulary, N patches.

Our choices where the paper is silent (cited by number in the code):
 1. M-RoPE positions are computed here, once per sample, from the true sampled frame rate (`rope_positions`),
    and given to every forward pass; the library's own depend on its version and assume 24 frames per second.
 2. A batch's loss is the mean over all its completion tokens, however it is split into micro-batches.
 3. `--process-agnostic` (Table 2) removes the observation block from the target; the prompt stays the same.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # advertises, as it is imported
from peft import (LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict,
                  load_peft_weights)
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from gen_cot import (FACTOR, IMAGE_PIXELS, MediaError, add_data_args, add_vision_args, build_prompt,
                     load_template, parse_args, positive, read_ahead, select_records, write_atomically)
from rewards import UserError, nan_mean, parse_trace

PATCH, MERGE, TEMPORAL = 14, 2, 2  # pixels a patch side; patches a token side; frames a temporal patch
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>{medium}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n")

STAGE_PRESETS = {"tiny": dict(lr=2e-3, lora_rank=32, micro_batch=16, max_pixels=4, no_checkpointing=True)}
CURVES = {"loss": ["loss", "held_out_loss"], "gradient norm": ["grad_norm"]}
MEND = "lower --micro-batch, then --lora-rank, --num-frames or --max-pixels"  # what takes a step's memory


# --- the model ----------------------------------------------------------------------------------------------

def add_model_args(model_group):
    """What every stage with a model can be told about it."""
    model_group.add_argument("--no-4bit", action="store_true", help="keep the base in 16 bits (big cards)")


def pick_device():
    """(device, dtype of the 16-bit parts): bf16 on a GPU, float32 on a CPU, where 16 bits are slow."""
    if torch.cuda.is_available():
        return team().device, torch.bfloat16
    return torch.device("cpu"), torch.float32


def load_base(base, four_bit=True):
    """The frozen base and its tokenizer; 4-bit linear layers in the language model only.

    Raises UserError where `base` is no such model or lacks weights, or where the vision tower or the head
    came out in 4 bits.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's use of an old name
    device, dtype = pick_device()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"]) if four_bit else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base, dtype=dtype, quantization_config=quantization, attn_implementation="sdpa",
            device_map={"": device}, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The model {base} can't be loaded: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:  # the library would go on with random ones
        raise UserError(f"{base} lacks {len(info['missing_keys'])} of Qwen2.5-VL's weights, for example "
                        f"{min(info['missing_keys'])}: download it again, or name another model.")
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU with bf16 instructions a pass without
            module.support_avx512bf16_for_cpu = False  # gradients would repack the weights, and none could follow
    linears = [(name, "4bit" in type(m).__name__)
               for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantised = [name for name, is_4bit in linears if is_4bit]
    strays = [name for name in quantised if "language_model.layers" not in name]
    if strays or (four_bit and not quantised):
        raise UserError(f"4-bit layers belong in the language model only; "
                        f"found {strays[:3] or 'none at all'} in {base}.")
    print(f"{base}: {len(quantised)} linear layers in 4 bits, {len(linears) - len(quantised)} not quantised, "
          f"on {device}.")
    return model, tokenizer


def print_parameters(model):
    """How many parameters there are in 4 bits, in 16 (32 on a CPU), and how many train (32)."""
    in_four = {id(m.weight): m.in_features * m.out_features
               for m in model.modules() if "4bit" in type(m).__name__ and hasattr(m, "quant_state")}
    rest = [p for p in model.parameters() if id(p) not in in_four]
    counts = {"in 4 bits": sum(in_four.values()),
              "frozen in more": sum(p.numel() for p in rest if not p.requires_grad),
              "trainable": sum(p.numel() for p in rest if p.requires_grad)}
    print("parameters: " + ", ".join(f"{n / 1e6:,.1f} M {name}" for name, n in counts.items()))


def load_model(base, adapter=None, four_bit=True, lora_rank=64, lora_alpha=None, trainable=True):
    """The base with a LoRA adapter named `policy`: the one saved in the folder `adapter`,
    or a fresh one (B = 0).

    Returns (model, tokenizer). Raises UserError where the adapter is missing or does not fit the base.
    """
    if adapter is not None:
        check_adapter(adapter)
    model, tokenizer = load_base(base, four_bit)
    if adapter is None:
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha or 2 * lora_rank, target_modules=LORA_TARGETS)
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
    for name, parameter in model.named_parameters():
        if ".policy." in name:
            parameter.requires_grad_(trainable)
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # an adapter from elsewhere can bring some; ρ wants the same policy twice
    print_parameters(model)
    return model.eval(), tokenizer


def add_reference(model, adapter, args):
    """π_ref as the frozen adapter `ref`, the SFT adapter once more; returns its name, or None where there is
    no adapter, i.e. where π_ref is the base. UserError where rank or scale are not those of the arguments."""
    if adapter is None and not (args.probe and args.adapter is None):
        return None
    if adapter is None:  # the probe has one as there will be once sft.py has run
        model.add_adapter("ref", model.peft_config["policy"])
    else:
        model.load_adapter(str(adapter), "ref", is_trainable=False)
        rank, alpha = model.peft_config["policy"].r, model.peft_config["policy"].lora_alpha
        if rank != args.lora_rank or args.lora_alpha not in (None, alpha):
            raise UserError(f"The adapter in {adapter} has rank {rank} and alpha {alpha}: pass --lora-rank "
                            f"{rank} and no --lora-alpha, or train another with sft.py.")
    model.set_adapter("policy")
    return "ref"


def check_adapter(adapter):
    """Raises UserError where the folder holds no saved adapter."""
    if not (Path(adapter) / "adapter_config.json").exists():
        raise UserError(f"No adapter in {adapter}: train one with sft.py, or name none for the base.")


def check_adapter_fits(model, adapter):
    """Raises UserError where the saved weights are not all of the adapter's and no others, or where a layer's
    change nothing: they are of another model or version, which peft would pass over."""
    saved = set(load_peft_weights(str(adapter), device="cpu"))
    strays = saved ^ set(get_peft_model_state_dict(model, adapter_name="policy"))
    if strays:
        raise UserError(f"The adapter in {adapter} does not fit this base: {len(strays)} weights are missing "
                        f"or have no place, for example {min(strays)}.")
    if any(p.abs().max() == 0 for n, p in model.named_parameters() if "lora_B" in n):
        raise UserError(f"The adapter in {adapter} has no effect on this base: "
                        "it was trained for another model or version.")


def core(model):
    """The Qwen2.5-VL inside a PeftModel (or the model itself), its LoRA layers in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def use_adapter(model, name):
    """Within the block the adapter `name` acts (None: none does, i.e. the bare base);
    afterwards `policy` again."""
    if name is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter("policy")


@contextlib.contextmanager
def merged(model):
    """Within the block each adapted layer is one dense matrix, its weight plus the change of the adapter that
    acts now: decoding is bound by the number of calls, and this makes one of four. The layers themselves stay
    as they are. Exact up to rounding in float32; 16 bits would round away what is small in the change, and
    nothing is merged there."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if model.dtype == torch.float32 else []
    for layer in layers:
        weight = dequantize_module_weight(layer.base_layer).float()
        if not layer.disable_adapters:
            weight = weight + sum(map(layer.get_delta_weight, layer.active_adapters))
        layer.forward = functools.partial(F.linear, weight=weight, bias=layer.base_layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class has its own


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


def banned_ids(tokenizer, size):
    """Ids that a completion can't contain: every special token but the end-of-sequence one, and those that
    stand for nothing, as the released heads have more rows (`size`) than there are tokens."""
    special = [i for i, token in tokenizer.added_tokens_decoder.items()
               if i != tokenizer.eos_token_id and token.content.startswith("<|")]
    return special + list(range(len(tokenizer), size))


def save_adapter(model, folder):
    """Write the policy adapter in peft's own format; each of its files appears whole or not at all."""
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        model.save_pretrained(partial, selected_adapters=["policy"])
        folder.mkdir(exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(partial) / "policy" / name, folder / name)


# --- from a record to tensors -------------------------------------------------------------------------------

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
    """M-RoPE positions of a sequence of text and visual tokens (choice 1; Qwen2.5-VL report).

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
    chat = CHAT.format(medium=placeholder, prompt=text.replace("<|", "< |"))  # it can't write control tokens
    ids = torch.tensor(tokenizer(chat, add_special_tokens=False)["input_ids"])
    at = int((ids == pad).nonzero()[0])
    visual = torch.full((math.prod(grid) // MERGE**2,), pad)
    ids = torch.cat([ids[:at], visual, ids[at + 1:]])
    seconds = 0.0 if fps is None else TEMPORAL / fps
    return Prompt(ids, rope_positions(ids, [grid], [seconds], config), pixel_values, torch.tensor([grid]))


def encode_text(text, tokenizer):
    """A chat prompt without a medium."""
    chat = CHAT.replace("<|vision_start|>{medium}<|vision_end|>", "").format(prompt=text.replace("<|", "< |"))
    ids = torch.tensor(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1),
                  torch.empty(0, 2 * 3 * PATCH**2), torch.empty(0, 3, dtype=torch.long))


def embed_prompts(model, prompts):
    """Fill in `embeds` of each prompt: token embeddings with the vision tower's features in their places.

    The tower is frozen, so this runs once per prompt and its features serve sampling,
    policy and reference alike.
    """
    qwen = core(model).model
    device = qwen.visual.patch_embed.proj.weight.device
    pixels = torch.cat([p.pixel_values for p in prompts]).to(device)
    grids = torch.cat([p.grid_thw for p in prompts]).to(device)
    features = qwen.visual(pixels, grid_thw=grids).pooler_output if len(grids) else None  # (visual tokens, D)
    done = 0
    for prompt in prompts:
        ids = prompt.input_ids.to(device)
        prompt.embeds = qwen.language_model.embed_tokens(ids)
        if len(prompt.grid_thw):
            is_visual = (ids == qwen.config.image_token_id) | (ids == qwen.config.video_token_id)
            prompt.embeds[is_visual] = features[done:done + int(is_visual.sum())].to(prompt.embeds.dtype)
            done += int(is_visual.sum())


def logprobs_from_hidden(model, hidden, targets, chunk=None):
    """Log-probability of each target under the head, float32 (M,), from hidden states (M, D)
    and targets (M,).

    In chunks of `chunk` tokens (default: logits of 256 MiB), under checkpointing where there are several, so
    that no two of them have their (tokens × V) tensors at once.
    """
    head = core(model).lm_head
    chunk = chunk or max(1, 2**26 // head.out_features)

    def one_chunk(h, t):
        return -F.cross_entropy(head(h).float(), t, reduction="none")

    parts = list(zip(hidden.split(chunk), targets.split(chunk)))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([one_chunk(h, t) for h, t in parts])
    return torch.cat([checkpoint(one_chunk, h, t, use_reentrant=False) for h, t in parts])


# --- SFT ----------------------------------------------------------------------------------------------------

def target_text(record, process_agnostic=False):
    """The completion to learn: the record's whole trace, or without its observation block (choice 3)."""
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


def target_ids(record, tokenizer, process_agnostic=False):
    """The completion's tokens, (T,) int64, the end-of-sequence token included."""
    text = target_text(record, process_agnostic).replace("<|", "< |")  # it can't write control tokens
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])


def strip_tag(text, tag):
    """A segment without its tags, whether the file stores it with or without them."""
    return text.replace(f"<{tag}>", "").replace(f"</{tag}>", "").strip()


def sft_loss(model, prompts, completions):
    """Summed negative log-likelihood of the completions, a scalar;
    labels are the completion tokens and nothing else.

    Args:
        prompts: B of Prompt with embeds. completions: B of (T,) int64, end-of-sequence included.
    """
    qwen = core(model).model
    device = prompts[0].embeds.device
    lengths = [len(p.input_ids) + len(c) for p, c in zip(prompts, completions)]
    width = max(lengths)
    embeds, positions, attend = [], [], torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        tail = width - len(prompt.input_ids)
        ids = F.pad(completion, (0, tail - len(completion))).to(device)
        embeds.append(torch.cat([prompt.embeds, qwen.language_model.embed_tokens(ids)]))
        after = prompt.next_position + torch.arange(tail)
        positions.append(torch.cat([prompt.positions, after.expand(3, -1)], dim=1))
        attend[row, :lengths[row]] = 1
    embeds = torch.stack(embeds)
    hidden = qwen.language_model(  # (B, S, D)
        inputs_embeds=embeds, attention_mask=attend, use_cache=False,
        position_ids=torch.stack(positions, dim=1).to(device)).last_hidden_state
    wanted = torch.cat([h[len(p.input_ids) - 1:n - 1] for h, p, n in zip(hidden, prompts, lengths)])
    return -logprobs_from_hidden(model, wanted, torch.cat(completions).to(device)).sum()


# --- training -----------------------------------------------------------------------------------------------

def begin(args):
    """What a training process does first. Raises UserError where its memory can't be limited."""
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # one voice is enough
    seed_everything(args.seed)
    limit_memory(args.memory_limit)


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def team():
    """The processes that train together: this one alone, or all that `accelerate launch` started. Each takes
    its share of every batch, gradients are added up, and only the first one talks and writes."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_first():
    return team().is_main_process


def share_of(batch_size):
    """How many of a batch are this process's: every n-th of them for n processes, so perhaps one more or less
    than another's."""
    return len(range(team().process_index, batch_size, team().num_processes))


def mine(items, batch_size):
    """This process's share of a stream, batch by batch."""
    return (item for i, item in enumerate(items)
            if i % batch_size % team().num_processes == team().process_index)


def endless(records, seed, batch_size, step=0):
    """This process's share of the records in random order, over and over, each pass in a new order, from this
    batch on; `turn` counts them."""
    def passes():
        rng, turn = random.Random(seed), count()
        while True:
            for record in rng.sample(records, len(records)):
                yield dict(record, turn=next(turn))

    return mine(islice(passes(), step * batch_size, None), batch_size)


def trainable_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def cosine_lr(step, steps, lr, warmup):
    """Learning rate of step 0 … steps - 1: linear warm-up over the share `warmup`,
    then a cosine down to 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return lr * (step + 1) / ramp
    return lr * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def optimiser_step(model, optimizer, lr, clip):
    """One step of AdamW at this learning rate on the processes' summed gradients;
    returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter in trainable_parameters(model):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = reduce(own, "sum")
    norm = torch.nn.utils.clip_grad_norm_(trainable_parameters(model), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def add_training_args(parser, stage, lr):
    """The groups 'optimisation' and 'run', the same for sft.py and pagrpo.py; returns the two."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lora-rank", type=positive, default=64, help="rank of the LoRA adapters")
    group.add_argument("--lora-alpha", type=positive, help="their scale (default: twice the rank)")
    group.add_argument("--lr", type=float, default=lr,
                       help="peak learning rate (paper: 1e-6 on all weights; LoRA wants more)")
    group.add_argument("--warmup", type=float, default=0.03, help="share of the steps with linear warm-up")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW (paper: 0.01)")
    group.add_argument("--max-grad-norm", type=float, default=5.0,
                       help="gradients are clipped to this norm (paper: 5)")
    group.add_argument("--no-checkpointing", action="store_true",
                       help="keep all activations: faster, more memory (the default for tiny)")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0,
                     help="seed of the order of the data, of a fresh adapter and of the sampling")
    run.add_argument("--output", type=Path,
                     help=f"folder for adapter, metrics and curves (default: runs/<model>/{stage})")
    run.add_argument("--memory-limit", type=float, metavar="GIB",
                     help="let PyTorch have so much of the GPU; the CUDA context comes on top")
    run.add_argument("--save-every", type=positive, default=100, help="steps between two checkpoints")
    run.add_argument("--resume", action="store_true",
                     help="go on from the last checkpoint of a run that was stopped, where there is one")
    run.add_argument("--probe", action="store_true",
                     help="only measure the worst case of these settings: seconds and peak memory")
    return group, run


def parse_training_args(parser, stage_presets, stage, data_key):
    """`parse_args`, by one process after the other, since the first one prepares the toy data."""
    with team().main_process_first():
        args = parse_args(parser, stage_presets, data_key)
    args.output = args.output or args.run_dir / stage
    return args


def prepare_for_training(model, args):
    """Checkpointing as asked for, in the variant that keeps gradients alive;
    returns AdamW over the LoRA weights.

    Hugging Face checkpoints only in training mode, so `model.train()` turns it on for gradient passes and
    `model.eval()` off for sampling, where it would disable the key-value cache. Nothing here has dropout.
    """
    if not args.no_checkpointing:
        core(model).activation_checkpointing_enable({"use_reentrant": False})
    return torch.optim.AdamW(trainable_parameters(model), lr=args.lr, weight_decay=args.weight_decay)


def encode_batch(batch, template, tokenizer, config, skipped):
    """Pairs (record, Prompt) of a batch of pairs of `read_ahead`. Records whose media can't be read are
    listed in `skipped`, never replaced, and named the first time."""
    encoded = []
    for record, media in batch:
        if isinstance(media, MediaError):
            if str(media) not in skipped:
                tqdm.write(f"skipped: {media}", file=sys.stderr)  # which all processes have
            skipped.append(str(media))
        else:
            encoded.append((record, encode_prompt(build_prompt(record, template), *media, tokenizer, config)))
    return encoded


def peak_gib():
    """Peak memory in GiB: allocated on the GPU since the last reset,
    or resident in this process so far on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024) / 2**30)


def limit_memory(gib):
    """Hold PyTorch's allocations to so many GiB of the GPU, or to all of it. Raises UserError."""
    if gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError("--memory-limit is for a GPU, and there is none.")
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / torch.cuda.mem_get_info()[1]))


@contextlib.contextmanager
def measured(phase, mend, rows=None):
    """Put the seconds and peak GiB of what runs within into rows["sec/PHASE"] and rows["gib/PHASE"], or print
    them. Out of memory is a UserError that says how to mend it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.time()
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"The phase '{phase}' does not fit into the memory: {mend}.") from None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    figures = {f"sec/{phase}": time.time() - start, f"gib/{phase}": peak_gib()}
    if rows is None:
        print_phases(figures)
    else:
        rows.update(figures)


def print_phases(rows):
    for phase in [key.removeprefix("sec/") for key in rows if key.startswith("sec/")]:
        seconds, gib = rows[f"sec/{phase}"], rows[f"gib/{phase}"]
        print(f"{phase:<10}{seconds:>10.2f} s{gib:>10.2f} GiB at most", flush=True)


def worst_prompt(tokenizer, config, args, words=300):
    """(record, Prompt) of as many visual tokens as these settings allow a clip or a picture, and a long
    question."""
    blocks, count, fps = args.max_pixels, args.num_frames, 2.0
    if blocks * FACTOR**2 * (count // TEMPORAL) < IMAGE_PIXELS[1]:  # a picture has a budget of its own
        blocks, count, fps = IMAGE_PIXELS[1] // FACTOR**2, 1, None
    rows = math.gcd(blocks, 8)
    shape = count, rows * FACTOR, blocks // rows * FACTOR, 3
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    record = dict(problem="the " * words, problem_type="free-form", solution="<answer>the</answer>")
    text = build_prompt(record, load_template(args.prompt_file))
    return record, encode_prompt(text, frames, fps, tokenizer, config)


# What a run may be continued with otherwise: where things lie, and what only time and memory depend on.
FREE = {"resume", "save_every", "show_every", "output", "run_dir", "data_given", "workers", "decode_timeout",
        "memory_limit", "no_checkpointing", "micro_batch", "prompts_per_rollout", "completions_per_pass",
        "judge_cache", "judge_concurrency", "judge_max_calls"}


def settings_of(model, records, args):
    """All else that a run depends on, as its checkpoint names it: dict of JSON values."""
    digest = hashlib.sha256(json.dumps(records).encode())
    for parameter in trainable_parameters(model):
        digest.update(parameter.detach().cpu().numpy().tobytes())
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    for name in ("prompt_file", "judge_prompt_file"):
        if settings.get(name):  # its text counts, not where it lies
            settings[name] = hashlib.sha256(Path(settings[name]).read_bytes()).hexdigest()[:16]
    settings["records and first weights"] = digest.hexdigest()[:16]
    return json.loads(json.dumps(settings, default=str))


def save_checkpoint(step, model, optimizer, skipped, settings, folder):
    """Write checkpoint.pt, all that a run needs to go on with this step, whole or not at all. The order of
    the data and the dice of the sampling follow from seed and step. skipped: of all processes."""
    if is_first():
        weights = [p.detach().cpu() for p in trainable_parameters(model)]
        torch.save(dict(step=step, weights=weights, optimizer=optimizer.state_dict(), skipped=skipped,
                        settings=settings), folder / "checkpoint.partial")
        os.replace(folder / "checkpoint.partial", folder / "checkpoint.pt")


def load_checkpoint(model, optimizer, settings, args):
    """(step, skipped) to go on with, weights and AdamW's means being put back; (0, []) for a run that begins.
    Raises UserError for a checkpoint that can't be read or is of other settings."""
    path = args.output / "checkpoint.pt"
    if not args.resume:
        return 0, []
    if not path.exists():
        print(f"No {path}: starting from the beginning.")
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the library
        raise UserError(f"{path} can't be read ({type(error).__name__}): start again without "
                        "--resume.") from None
    for name, value in settings.items():
        before = state["settings"].get(name)
        if before != value:
            raise UserError(f"{path} is of a run with {name.replace('_', ' ')} {before}, not {value}: go on "
                            "with the same, or start again without --resume.")
    with torch.no_grad():
        for parameter, weight in zip(trainable_parameters(model), state["weights"], strict=True):
            parameter.copy_(weight)
    optimizer.load_state_dict(state["optimizer"])
    print(f"Going on from step {state['step']}.")
    return state["step"], state["skipped"] if is_first() else []


def open_log(folder, step):
    """metrics.jsonl for the rows from this step on: what a killed run wrote of them goes, the rest stays."""
    if not is_first():
        return open(os.devnull, "w")
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if step else []
    write_atomically(path, "".join(line for line in lines
                                   if line.endswith("\n") and json.loads(line)["step"] < step))
    return open(path, "a")


def log_line(file, row):
    """Append one row to an open JSON Lines file, floats with six digits."""
    file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")
    file.flush()


def finish(model, curves, folder):
    """What a run leaves beside its metrics.jsonl: the adapter and curves.png, but no checkpoint."""
    if is_first():
        save_adapter(model, folder)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        plot_curves(folder, curves)


def plot_curves(folder, curves, window=15):
    """Draw `curves.png` from `metrics.jsonl`, running means; curves: {title: its keys in the log}."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    lines, columns = math.ceil(len(curves) / 3), min(len(curves), 3)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3 * lines), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, curves.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            means = [nan_mean([v for _, v in points[max(0, i - window + 1):i + 1]])
                     for i in range(len(points))]
            axis.plot([step for step, _ in points], means, marker="." if len(points) < window else None,
                      label=key.split("/")[-1].removesuffix("_" + title))
        axis.set(title=title, xlabel="step")
        if len(keys) > 1:
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)
    pyplot.close(figure)


@torch.no_grad()
def held_out_loss(model, tokenizer, records, template, args):
    """Mean loss per completion token over records that are not trained on; unreadable media don't count, and
    None is what is left where all are."""
    loss, tokens = 0.0, 0
    for pair in read_ahead(mine(records, len(records)), args):
        for record, prompt in encode_batch([pair], template, tokenizer, core(model).config, []):
            embed_prompts(model, [prompt])
            target = target_ids(record, tokenizer, args.process_agnostic)
            loss += float(sft_loss(model, [prompt], [target]))
            tokens += len(target)
    loss, tokens = sum(gather_object([loss])), sum(gather_object([tokens]))
    return loss / tokens if tokens else None


def sft_step(model, optimizer, encoded, targets, tokens, lr, args):
    """One optimiser step on pairs (record, Prompt) and their targets, with as many `tokens` in all processes;
    returns (loss, gradient norm)."""
    loss = 0.0
    model.train()
    for i in range(0, len(encoded), args.micro_batch):
        prompts = [prompt for _, prompt in encoded[i:i + args.micro_batch]]
        with torch.no_grad():
            embed_prompts(model, prompts)
        part = sft_loss(model, prompts, targets[i:i + args.micro_batch]) / tokens  # choice 2
        part.backward()
        loss += part.item()
    norm = optimiser_step(model, optimizer, lr, args.max_grad_norm)
    model.eval()
    return sum(gather_object([loss])), norm


def train(model, tokenizer, records, args):
    """SFT over the records, `--epochs` times, but for those held out; writes metrics.jsonl, curves.png and the
    adapter."""
    template, config = load_template(args.prompt_file), core(model).config
    optimizer, batch_size = prepare_for_training(model, args), share_of(args.batch_size)
    settings = settings_of(model, records, args)
    start, skipped = load_checkpoint(model, optimizer, settings, args)
    records = random.Random(args.seed).sample(records, len(records))
    held_out = [records.pop() for _ in range(min(args.held_out, len(records) // 10))]
    order = [record for epoch in range(args.epochs)
             for record in random.Random(args.seed + epoch).sample(records, len(records))]
    steps = math.ceil(len(order) / args.batch_size)
    media = read_ahead(mine(order[start * args.batch_size:], args.batch_size), args)
    args.output.mkdir(parents=True, exist_ok=True)
    with (open_log(args.output, start) as metrics,
          tqdm(range(start, steps), "SFT", steps, initial=start, disable=not is_first()) as bar):
        for step in bar:
            if step > start and step % args.save_every == 0:
                save_checkpoint(step, model, optimizer, gather_object(skipped), settings, args.output)
            since = time.time()
            encoded = encode_batch(islice(media, batch_size), template, tokenizer, config, skipped)
            waited = time.time() - since
            encoded.sort(key=lambda pair: len(pair[1].input_ids))  # like lengths together pad less
            targets = [target_ids(record, tokenizer, args.process_agnostic) for record, _ in encoded]
            tokens = sum(gather_object([sum(map(len, targets))]))
            if not tokens:
                continue
            row = {"step": step, "lr": cosine_lr(step, steps, args.lr, args.warmup), "sec/media": waited}
            with measured("step", MEND, row):
                row["loss"], row["grad_norm"] = sft_step(
                    model, optimizer, encoded, targets, tokens, row["lr"], args)
            if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
                row["held_out_loss"] = held_out_loss(model, tokenizer, held_out, template, args)
            log_line(metrics, row)
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k.endswith("loss") and v is not None})
    lost = len(gather_object(skipped))
    if lost == len(order):
        raise UserError(f"None of the {len(records)} media can be read: see the list above.")
    finish(model, CURVES, args.output)
    print(f"SFT on {len(records) - lost // args.epochs} traces, {lost // args.epochs} skipped; last "
          + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in row.items()
                      if k.endswith("loss") and v is not None)
          + f"; adapter, metrics.jsonl, curves.png in {args.output}")


def probe(model, tokenizer, args, tokens=1024):
    """Two micro-batches of long prompts with traces of 1024 tokens, and a step, with all that a step in the
    middle of a run has in memory; returns the figures of `measured`."""
    rows, optimizer = {}, prepare_for_training(model, args)
    optimiser_step(model, optimizer, 0.0, args.max_grad_norm)  # changes nothing, and AdamW has its means
    prompts = [worst_prompt(tokenizer, core(model).config, args)[1] for _ in range(args.micro_batch)]
    targets = [torch.randint(len(tokenizer), (tokens,)) for _ in prompts]
    print(f"{args.micro_batch} prompts of {len(prompts[0].input_ids)} tokens, traces of {tokens}")
    model.train()
    with measured("passes", MEND, rows):
        for _ in range(2):  # the second finds the first one's gradients in its way
            with torch.no_grad():
                embed_prompts(model, prompts)
            (sft_loss(model, prompts, targets) / tokens).backward()
    with measured("step", "lower --lora-rank", rows):
        optimiser_step(model, optimizer, args.lr, args.max_grad_norm)
    print_phases(rows)
    seconds = rows["sec/passes"] / (2 * args.micro_batch) + rows["sec/step"] / args.batch_size
    print(f"1,000 such traces take {1000 * seconds / 60:.1f} min in one process.")
    return rows


def get_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model, _ = add_data_args(
        parser, "verified traces (default: those of gen_cot.py, else the official release)")
    add_model_args(model)
    add_vision_args(parser)
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--process-agnostic", action="store_true",
                           help="no observation block in the target (Table 2)")
    optimisation, _ = add_training_args(parser, "sft", lr=1e-4)
    optimisation.add_argument("--batch-size", type=positive, default=16,
                              help="traces per optimiser step (paper: 8 x 2)")
    optimisation.add_argument("--micro-batch", type=positive, default=1,
                              help="traces per forward pass, as many as fit")
    optimisation.add_argument("--epochs", type=positive, default=1, help="passes over the data (paper: 1)")
    optimisation.add_argument("--held-out", type=int, default=64,
                              help="traces not trained on, to measure the loss on (at most a tenth of them)")
    optimisation.add_argument("--eval-every", type=positive, default=500,
                              help="steps between two measurements; the last is after the last step")
    return parse_training_args(parser, STAGE_PRESETS, "sft", data_key="cot_data")


def main(args):
    begin(args)
    verified = args.run_dir / "gen_cot" / "cot.jsonl"
    if not args.data_given and (verified.exists() or args.model == "tiny"):
        args.data = verified
    records = [] if args.probe else select_records(args)
    for record in records:
        if not record.get("output") and not (record.get("observation") and record.get("process")):
            raise UserError(f"{args.data}: the question {record['problem'][:60]!r} has no trace to learn "
                            "(output, or observation and process): run gen_cot.py first.")
        if args.process_agnostic and None in parse_trace(target_text(record))[1:]:
            raise UserError(f"{args.data}: the trace of {record['problem'][:60]!r} lacks its think or its "
                            "answer block: leave the record out.")
    with measured("load", "take a smaller model"):
        model, tokenizer = load_model(args.base, None, not args.no_4bit, args.lora_rank, args.lora_alpha)
    return probe(model, tokenizer, args) if args.probe else train(model, tokenizer, records, args)


if __name__ == "__main__":
    main(get_args())
