"""Peak memory of both stages, counted without a GPU and without computing anything. `bench_gpu.py
--projection` prints it.

The code of both stages, of transformers, peft and bitsandbytes runs on a model of fake tensors (torch's
FakeTensorMode), which have shapes and dtypes but no data. Token ids, masks and positions are real, as the
code looks at their values. `Count` sees every tensor that an operation returns. It adds up the storages that
are alive, in blocks of 512 bytes, as CUDA's allocator has them.

What stands in while `faked` counts:

    the loader's `from_pretrained`     gives a fake model; its 4-bit layers are `Fake4bit`, as bitsandbytes'
                                       own weights can't be fake
    a number read from a fake tensor   is 1.0: losses, norms, metrics
    bitsandbytes' `gemm_4bit`          is its fallback: a dequantised weight, then a product; a GPU does the
                                       same for more than a few rows
    bitsandbytes' weight in `merged`   is dequantised without peft, which asks for its class
    AdamW                              is the `foreach` variant, a GPU's default
    `range` in `rollout`               has the first two and the last two tokens
    what `rollout` returns             is token 0 up to the limit, as the others weren't decoded
    `Group.split`                      gives two pieces: the second meets the first one's gradients
    `causal_lower_right`               is no mask: a GPU needs none
    `.to` of modules, and peft's       do nothing: there is one device

What a count can't see: the CUDA context, what a kernel allocates within itself (cuBLAS's workspaces), and the
gaps between blocks (fragmentation). Attention is a CPU's flash kernel, which keeps what a GPU's keeps.
"""
import contextlib
import functools
import gc
import itertools
import math
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLForConditionalGeneration

import pagrpo
import sft

GIB = 2**30
LIBRARY = str(Path(torch.__file__).parent)


class Count(TorchDispatchMode):
    """Bytes that are alive, `now` and at the `peak`, and by whom each storage was made."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.at_peak = {}, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, func)
        return out

    def add(self, tensor, maker):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.live:
            weakref.finalize(storage, self.drop, key)
            self.now += size
            self.peak = max(self.peak, self.now)
        if key not in self.live or maker == "weights":
            made = maker if isinstance(maker, str) else f"{maker.overloadpacket.__name__} in {caller()}"
            self.live[key] = size, f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", ""), made

    def drop(self, key):
        if self.now == self.peak:
            self.at_peak = list(self.live.values())
        self.now -= self.live.pop(key)[0]

    @contextlib.contextmanager
    def measured(self, peaks, phase, row):
        """Takes the place of `sft.measured`, and puts what `summary` says into peaks[phase]."""
        start, self.peak, self.at_peak = self.now, self.now, list(self.live.values())
        yield
        if self.now == self.peak:
            self.at_peak = list(self.live.values())
        peaks[phase] = summary(self.at_peak, start)
        row |= {f"sec/{phase}": 0.0, f"gib/{phase}": self.peak / GIB}


def caller():
    """The function that made the tensor at hand: the innermost one that is not torch's or this file's."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(LIBRARY):
        if frame.f_code.co_name == "_engine_run_backward":
            return "the backward pass"
        frame = frame.f_back
    return frame.f_code.co_qualname.replace(".<locals>", "").replace(".<listcomp>", "")


class Peak(NamedTuple):
    total: float  # GiB that are alive at a phase's peak
    start: float  # GiB at its start
    fixed: float  # GiB of weights, adapters and AdamW's moments among them
    largest: list  # a line on each of the three kinds of tensors that take most of the rest


def summary(live, start):
    """The Peak of (bytes, shape and dtype, maker) of each tensor alive; start in bytes."""
    sizes, number, fixed = Counter(), Counter(), 0
    for size, like, made in live:
        if made in ("weights", "zeros_like in optimiser_step"):  # the latter are AdamW's moments
            fixed += size
        else:
            sizes[like, made] += size
            number[like, made] += 1
    largest = [f"{size / GIB:.2f} GiB: {number[like, made]} x {like}, {made}"
               for (like, made), size in sizes.most_common(3)]
    return Peak((fixed + sum(sizes.values())) / GIB, start / GIB, fixed / GIB, largest)


class Fake4bit(bnb.nn.Linear4bit):
    """A layer in nf4 with double quantisation: half a byte a weight, one for 64 of them, and a float32 for
    256 of those. Its forward pass is the library's."""

    def __init__(self, linear, dtype):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        n = linear.weight.numel()
        second = QuantState(absmax=torch.empty(math.ceil(n / 64 / 256)), blocksize=256,
                            code=torch.empty(256), dtype=torch.float32)
        state = QuantState(absmax=torch.empty(n // 64, dtype=torch.uint8), shape=linear.weight.shape,
                           code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=dtype,
                           offset=torch.empty(()), state2=second)
        self.weight = torch.nn.Parameter(torch.empty(n // 2, 1, dtype=torch.uint8), requires_grad=False)
        vars(self.weight).update(quant_state=state, compress_statistics=True, quant_type="nf4")
        self.compute_dtype, self.compute_type_is_set = dtype, True

    def tensors(self):
        state = self.weight.quant_state
        return state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code


@contextlib.contextmanager
def faked(config, dtype=torch.bfloat16):
    """Within the block the stages load a fake model of this shape. Yields {phase: `summary` of its peak}, to
    be filled by `sft.measured`."""
    fake, count, peaks = FakeTensorMode(allow_non_fake_inputs=True), Count(), {}

    def in_fake(function):  # what it makes is fake, and weights
        def wrapped(model, *args, **kwargs):
            with fake:
                result = function(model, *args, **kwargs)
            gc.collect()
            for tensor in [*(result or model).parameters(), *(result or model).buffers()]:
                count.add(tensor, "weights")
            return result
        return wrapped

    def from_pretrained(base, dtype, quantization_config, attn_implementation, **_):
        with fake:
            model = Qwen2_5_VLForConditionalGeneration._from_config(
                config, dtype=dtype, attn_implementation=attn_implementation)
            for name, module in list(model.named_modules()) if quantization_config else ():
                if isinstance(module, torch.nn.Linear) and "language_model.layers" in name:
                    model.set_submodule(name, Fake4bit(module, dtype))
        gc.collect()
        for layer in model.modules():
            for tensor in layer.tensors() if isinstance(layer, Fake4bit) else ():
                count.add(tensor, "weights")
        model.is_loaded_in_4bit = bool(quantization_config)  # peft takes its layer for 4 bits by this
        return model, {"missing_keys": []}

    def rollout(model, prompts, tokenizer, num_generations, max_tokens, uniforms=None):
        real_rollout(model, prompts, tokenizer, num_generations, max_tokens, uniforms)
        shape = len(prompts) * num_generations, max_tokens
        return torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool), torch.zeros(shape)

    def ends(*bounds):
        steps = range(*bounds)
        decoding = sys._getframe(1).f_code.co_name == "rollout" and len(steps) > 4
        return [*steps[:2], *steps[-2:]] if decoding else steps

    real_rollout, real_split = pagrpo.rollout, pagrpo.Group.split
    stand_ins = [
        (sft, "Qwen2_5_VLForConditionalGeneration", SimpleNamespace(from_pretrained=from_pretrained)),
        (sft, "pick_device", lambda: (torch.device("cpu"), dtype)),
        (sft, "get_peft_model", in_fake(sft.get_peft_model)),
        (sft, "measured", functools.partial(count.measured, peaks)),
        (pagrpo, "add_reference", in_fake(pagrpo.add_reference)),
        (pagrpo, "rollout", rollout),
        (pagrpo, "range", ends),
        (pagrpo, "causal_lower_right", lambda queries, keys: None),
        (pagrpo.Group, "split", lambda group, size: itertools.islice(real_split(group, size), 2)),
        (pagrpo, "dequantize_module_weight",
         lambda layer: bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)),
        (torch.optim, "AdamW", functools.partial(torch.optim.AdamW, foreach=True)),
        (torch.nn.Module, "to", lambda self, *args, **kwargs: self),
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *args, **kwargs: None)]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in, create=name == "range"))
        with count:
            yield peaks
