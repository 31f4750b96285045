"""Speed and memory against the usual ways, as ratios measured side by side in one run; not in the test suite.

    python tests/bench.py                      # everything: about 12 minutes on two cores
    python tests/bench.py training rollout     # some of: frames, questions, training, rollout, update
    python tests/bench.py --since 0f4748e      # this build against an older one, CPU seconds: half an hour

frames      decoding in worker processes ahead of the model, and in this process, against a plain decord loop
            (pip install decord==0.6.0; left out without it)
questions   gen_cot.py with 20,000 questions about pictures and 64 in flight, against the 50 ms that the
            server beside it takes for each
training    our pass over [prompt, completion 1, …, G] against G whole sequences, forward and backward
rollout     our sampling loop against Hugging Face's `generate` with G copies of the prompt
update      a whole update against TRL's GRPOTrainer on images (pip install trl==1.16.0; left out without it);
            in these two both sides' completions end at the same tokens, all at T, and at T/8, 2T/8 … T

The model is the toy base (128 wide) in float32 with LoRA of rank 32; P = 574 prompt tokens, 512 of them
visual. The training pass is measured on a wider one too, with random weights: at 128 a tenth of our pass is
what calling its functions takes. Times are the best of several runs in turn.

--since takes medians of --repeats, in turn, one thread each. It compares training passes, a rollout of the SFT
adapter on the toy's own lengths, and the quick start's commands. The older build is a git worktree. Run the
quick start once before.
"""
import argparse
import asyncio
import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

ROOT = Path(os.environ.get("BENCH_ROOT") or Path(__file__).resolve().parents[1])  # the build to measure
sys.path[:0] = [str(ROOT)]

import gen_cot  # noqa: E402
import pagrpo  # noqa: E402
import sft  # noqa: E402


def load():
    torch.manual_seed(0)
    model, tokenizer = sft.load_model(ROOT / "data/toy/base", four_bit=False, lora_rank=32)
    return model, tokenizer


def load_wide(folder):
    """The toy's architecture, 512 wide and with four query heads to a key-value head, with random weights."""
    config = AutoConfig.from_pretrained(ROOT / "data/toy/base")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 512, 1376, 8
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.out_hidden_size = 512
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data/toy/base").save_pretrained(folder)
    return sft.load_model(folder, four_bit=False, lora_rank=32)


FRAMES = np.random.default_rng(0).integers(0, 255, (16, 224, 224, 3)).astype(np.uint8)


def make_prompt(model, tokenizer):
    """A prompt of 16 frames (8 · 64 visual tokens) and a question, 574 tokens in all."""
    return sft.encode_prompt(" E" * 41, FRAMES, 2.0, tokenizer, sft.unwrap(model).config)


def embedded(model, prompt):
    with torch.no_grad():
        sft.embed_prompts(model, [prompt])
    return prompt


def lengths_of(G, T, ragged):
    """Where each of G completions ends: T / G, 2 T / G … T, or T for all."""
    return torch.arange(1, G + 1) * (T // G) if ragged else torch.full((G,), T)


@contextlib.contextmanager
def ends_at(lengths, end):
    """Within the block our completions have these lengths: a number over 1 marks the end, and
    `sample_from` gives the end there and nowhere else."""
    sample_from, draw_uniforms = pagrpo.sample_from, pagrpo.draw_uniforms

    def marked(*args):
        uniforms = draw_uniforms(*args)
        uniforms[torch.arange(len(lengths)), lengths - 1] = 2.0
        return uniforms

    def ending(logits, uniforms):
        others = logits.index_fill(-1, torch.tensor([end]), -torch.inf)
        return sample_from(others, uniforms.clamp(max=1 - 1e-9)).masked_fill(uniforms > 1, end)

    pagrpo.sample_from, pagrpo.draw_uniforms = ending, marked
    try:
        yield
    finally:
        pagrpo.sample_from, pagrpo.draw_uniforms = sample_from, draw_uniforms


def ending_processor(start, lengths, end):
    """The same for `generate`: a logits processor, for prompts of `start` tokens."""
    def process(ids, scores):
        ends = ids.shape[1] - start == lengths - 1
        scores[:, end] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, end] = 0.0
        return scores
    return process


def in_turn(functions, repeats):
    """Best seconds of each function, called in turn after one warm-up each."""
    best = [float("inf")] * len(functions)
    for repeat in range(repeats + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if repeat:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def peak_mib(function):
    """What the call adds to the process's memory at its peak, MiB (Linux only)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mib("VmRSS")
    function()
    return status_mib("VmHWM") - before


def status_mib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024


# --- frames -------------------------------------------------------------------------------------------------

def bench_frames(clips=48):
    try:
        import decord
    except ImportError:
        print("frames: left out, decord is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        ground = rng.integers(0, 255, (360, 1280, 3)).astype(np.uint8)
        for n in range(clips):
            with av.open(f"{folder}/{n}.mp4", "w") as container:
                stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
                stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
                for i in range(200):
                    frame = np.ascontiguousarray(ground[:, 3 * i:3 * i + 640])
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode(None))
        records = [dict(media=f"{folder}/{n}.mp4", data_type="video") for n in range(clips)]
        args = SimpleNamespace(num_frames=16, max_pixels=128, workers=2)

        def plain(threads):
            for record in records:
                reader = decord.VideoReader(record["media"], num_threads=threads)
                for frame in reader.get_batch(np.linspace(0, 199, 16).round().astype(int)).asnumpy():
                    Image.fromarray(frame).resize((420, 224), Image.BICUBIC)

        def ahead():
            for _, (frames, _) in gen_cot.read_ahead(records, args):
                assert frames.shape == (16, 224, 420, 3)

        def alone():
            for record in records:
                gen_cot.read_media(record)

        seconds = in_turn([ahead, alone, lambda: plain(1), lambda: plain(0)], 3)
    print("frames: 16 of 200 of 640x360 H.264, resized; frames per second, and times the first line's seconds")
    names = "ours, two workers", "ours, in this process", "decord loop, one thread", "decord loop, its threads"
    for name, s in zip(names, seconds):
        print(f"   {name:<30}{16 * clips / s:>8.0f}{s / seconds[0]:>8.2f}x")


# --- questions ----------------------------------------------------------------------------------------------

class Teacher(asyncio.Protocol):
    """Answers every chat completion with the same trace, 50 ms after it has been asked."""
    TRACE = "<observation>one</observation> <think>one</think><answer>1</answer>"
    BODY = json.dumps(dict(choices=[dict(message=dict(content=TRACE))])).encode()
    REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)

    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        head, _, body = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length and len(body) == int(length[1]):
            self.data = b""
            asyncio.get_running_loop().call_later(0.05, self.transport.write, self.REPLY)


async def serve(listener):
    server = await asyncio.get_running_loop().create_server(Teacher, sock=listener, backlog=256)
    await server.serve_forever()


def bench_questions(questions=20_000, in_flight=64):
    listener = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.get_context("fork").Process(
        target=lambda: asyncio.run(serve(listener)), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(50):
            Image.new("RGB", (56, 56), (5 * i, 9, 9)).save(f"{folder}/{i}.png")
        question = dict(problem_type="numerical", data_type="image", solution="1", evidence=["one"])
        rows = (dict(question, problem_id=i, problem=f"Picture {i}: how many?", path=f"{i % 50}.png")
                for i in range(questions))
        Path(folder, "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, ROOT / "gen_cot.py", "--model", "own/server", "--media-root", folder,
             "--data", f"{folder}/questions.jsonl", "--output", f"{folder}/out/cot.jsonl", "--judge", "rule",
             "--teacher", f"openai:m@http://127.0.0.1:{listener.getsockname()[1]}/v1",
             "--teacher-concurrency", str(in_flight)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        for name in ("traces", "cot"):  # every reply was written down, every trace kept
            assert len(Path(folder, f"out/{name}.jsonl").read_text().splitlines()) == questions
    server.kill()
    ideal = questions * 0.05 / in_flight
    print(f"questions: {questions} in {seconds:.1f} s, the server's part {ideal:.1f} s: "
          f"{seconds / ideal:.2f}x")


# --- training -----------------------------------------------------------------------------------------------

def naive_logprobs(model, prompt, ids):
    """Log-probs (G, T) of full-length completions from G whole sequences; visual features given."""
    G, T = ids.shape
    P, qwen = len(prompt.input_ids), sft.unwrap(model).model
    embeds = torch.cat([prompt.embeds.expand(G, -1, -1), qwen.language_model.embed_tokens(ids)], 1)
    after = (prompt.next_position + torch.arange(T)).expand(3, -1)
    positions = torch.cat([prompt.positions, after], 1).to(ids.device)
    hidden = qwen.language_model(inputs_embeds=embeds, position_ids=positions[:, None].expand(-1, G, -1),
                                 use_cache=False).last_hidden_state[:, P - 1:-1]
    return sft.unwrap(model).lm_head(hidden).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def bench_training(model, tokenizer):
    training_passes(model, tokenizer, 25)
    config = sft.unwrap(model).config
    small = embedded(model, sft.encode_prompt("E", FRAMES[:2, :28, :28], 2.0, tokenizer, config))
    two, both = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool)
    s, = in_turn([lambda: torch.autograd.grad(
        pagrpo.token_logprobs(model, small, two, both).mean(), sft.trainable_parameters(model))], 25)
    print(f"   a pass over next to nothing, {len(small.input_ids)} + 2 x 2 tokens: {s:.3f} s")
    print("   the prompt's share: seconds of ours at T = 64, and per completion token")
    prompt, weights = embedded(model, make_prompt(model, tokenizer)), sft.trainable_parameters(model)
    for G in (2, 4, 8, 16):
        ids = torch.randint(0, 600, (G, 64))
        mask = torch.ones_like(ids, dtype=torch.bool)
        s, = in_turn([lambda: torch.autograd.grad(
            pagrpo.token_logprobs(model, prompt, ids, mask).mean(), weights)], 25)
        print(f"   G = {G:<3} {s:.2f} s, {1e3 * s / ids.numel():.2f} ms a token")
    with tempfile.TemporaryDirectory() as folder:
        training_passes(*load_wide(folder), 3)


def training_passes(model, tokenizer, repeats):
    prompt = embedded(model, make_prompt(model, tokenizer))
    P, weights = len(prompt.input_ids), sft.trainable_parameters(model)

    def gradient(logprobs):
        return torch.autograd.grad(logprobs.mean(), weights)

    print(f"training: forward and backward, {prompt.embeds.shape[1]} wide, P = {P}; "
          "token ratio is G (P + T) / (P + completion tokens)")
    for G, T, ragged in ((8, 64, False), (8, 128, False), (8, 256, False), (8, 256, True)):
        ids = torch.randint(0, 600, (G, T))
        mask = torch.ones_like(ids, dtype=torch.bool)
        if ragged:  # lengths T/8, 2T/8 … T; naively all are padded to T
            mask = torch.arange(T) < torch.arange(1, G + 1)[:, None] * T // G

        def ours():
            return gradient(pagrpo.token_logprobs(model, prompt, ids, mask))

        def naive():
            return gradient(naive_logprobs(model, prompt, ids))

        s_ours, s_naive = in_turn([ours, naive], repeats)
        m_naive, m_ours = peak_mib(naive), peak_mib(ours)
        ratio = G * (P + T) / (P + int(mask.sum()))
        print(f"   G = {G}, T = {T:<4}{'ragged ' * ragged} {s_ours:.2f} s against {s_naive:.2f} s: {s_naive / s_ours:.2f}x, "
              f"{s_naive / s_ours / ratio:.0%} of the token ratio {ratio:.2f}; "
              f"peak memory {m_ours:.0f} against {m_naive:.0f} MiB: {m_ours / m_naive:.2f}x")


# --- rollout ------------------------------------------------------------------------------------------------

def bench_rollout(model, tokenizer):
    prompt, G = make_prompt(model, tokenizer), 8
    media = dict(pixel_values_videos=prompt.pixel_values.repeat(G, 1),
                 video_grid_thw=prompt.grid_thw.repeat(G, 1),
                 second_per_grid_ts=[1.0] * G)
    types = (prompt.input_ids == sft.unwrap(model).config.video_token_id) * 2
    start, end = len(prompt.input_ids), tokenizer.eos_token_id
    print(f"rollout: {G} completions, P = {start}")
    for T, ragged in ((64, False), (256, False), (64, True), (256, True)):
        lengths = lengths_of(G, T, ragged)

        def ours():
            return pagrpo.rollout(model, [embedded(model, prompt)], tokenizer, G, T,
                                  pagrpo.draw_uniforms(0, 0, G, T))

        def theirs():
            ids = prompt.input_ids.expand(G, -1)
            return sft.unwrap(model).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types.expand(G, -1),
                do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=T,
                logits_processor=[ending_processor(start, lengths, end)], **media)

        with torch.no_grad(), ends_at(lengths, end):
            assert (ours()[1].sum(1) == lengths).all() and theirs().shape[1] == start + T
            s_ours, s_theirs = in_turn([ours, theirs], 5)
        print(f"   T = {T:<4}{'ragged ' * ragged} {s_ours:.2f} s against {s_theirs:.2f} s: {s_theirs / s_ours:.2f}x")


# --- a whole update -----------------------------------------------------------------------------------------

def bench_update(model, tokenizer):
    try:
        import trl  # noqa: F401
    except ImportError:
        print("update: left out, TRL is not installed")
        return
    G = 8
    args = SimpleNamespace(
        num_generations=G, without=None, scoring="paper", perception_length=(1, 99),
        reasoning_length=(1, 99), beta=0.04, num_iterations=1, prompts_per_rollout=1,
        completions_per_pass=None, clip_eps=0.2, seed=0,
        loss_average="completion", lr=1e-5, max_grad_norm=1.0, checkpointing=False)
    record = dict(problem="?", problem_type="numerical", solution="<answer>1</answer>", options=[])
    pagrpo.add_reference(model, SimpleNamespace(adapter="none"))
    optimizer = sft.setup_training(model, args)
    print(f"update: one prompt of 512 visual tokens, {G} completions: rollout, rewards, reference, one step")
    for T, ragged in ((64, False), (256, False), (64, True), (256, True)):
        args.max_completion_tokens, lengths = T, lengths_of(G, T, ragged)

        def ours():
            prompt = make_prompt(model, tokenizer)
            encoded = [(dict(record, sample_index=0), prompt)]
            groups = pagrpo.sample_groups(model, encoded, tokenizer, args)
            assert (groups[0].completion_mask.sum(1) == lengths).all()
            pagrpo.score_groups(groups, tokenizer, lambda records, observations: [
                bool(i % 2) for i in range(len(records))], args)
            for group in groups:
                group.reasoning_advantages = group.perception_advantages
            pagrpo.update_policy(model, optimizer, groups, args.lr, args)

        with ends_at(lengths, tokenizer.eos_token_id):
            s_ours, = in_turn([ours], 3)
        s_trl = trl_step_seconds(G, T, lengths)
        print(f"   T = {T:<4}{'ragged ' * ragged} {s_ours:.2f} s against {s_trl:.2f} s: {s_trl / s_ours:.2f}x")


def trl_step_seconds(G, T, lengths, steps=4):
    """Best seconds of a step of TRL's trainer after the first, on the same base, LoRA and lengths; eight
    images of 64 visual tokens each, since it takes no video."""
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import TrainerCallback
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import BatchFeature, ProcessorMixin
    from trl import GRPOConfig, GRPOTrainer
    model, tokenizer = sft.load_base(ROOT / "data/toy/base", four_bit=False)
    tokenizer.padding_side = "left"
    generate, end = model.generate, tokenizer.eos_token_id
    model.generate = lambda input_ids, **options: generate(
        input_ids=input_ids, **options,
        logits_processor=[ending_processor(input_ids.shape[1], lengths, end)])

    class Processor(ProcessorMixin):
        """Text and images only: the model's own processor wants torchvision for its videos."""

        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token = "<|image_pad|>"
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

        def __call__(self, images=None, text=None, **kwargs):
            media = self.image_processor(images=[i for row in images for i in row], return_tensors="pt")
            counts, texts = iter((media["image_grid_thw"].prod(-1) // 4).tolist()), []
            for part in text:
                pieces = part.split(self.image_token)
                texts.append(pieces[0] + "".join(self.image_token * next(counts) + p for p in pieces[1:]))
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            types = torch.tensor(ids) == self.tokenizer.convert_tokens_to_ids(self.image_token)
            return BatchFeature(dict(input_ids=ids, attention_mask=[[1] * len(row) for row in ids],
                                     mm_token_type_ids=types.int(), **media))

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (224, 224, 3)).astype(np.uint8)) for _ in range(8)]
    content = [dict(type="image") for _ in images] + [dict(type="text", text=" E" * 20)]
    prompt = [dict(role="user", content=content)]
    rows = Dataset.from_list([dict(prompt=prompt, images=images)] * 64)
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **__):
            times[-1] = time.perf_counter() - times[-1]

    processor = Processor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template)
    trainer = GRPOTrainer(
        model=model, peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=sft.LORA_TARGETS),
        processing_class=processor, train_dataset=rows, callbacks=[Clock()],
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=G, num_generations=G,
            max_steps=steps, max_completion_length=T, beta=0.04, loss_type="grpo", learning_rate=1e-5,
            report_to=[], bf16=False,
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=True))

    trainer.train()
    mean = trainer.state.log_history[-1]["completions/mean_length"]
    assert float(mean) == lengths.float().mean(), f"TRL's completions have {mean} tokens on average"
    return min(times[1:])


# --- this build against an older one ------------------------------------------------------------------------

COMMANDS = "gen_cot.py", "sft.py", "pagrpo.py", "evaluate.py"


def cpu_seconds(function, repeats=1):
    """Median CPU seconds of a call, after one warm-up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def own_seconds():
    """{what: CPU seconds} of the build at ROOT."""
    torch.set_num_threads(1)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, tokenizer) in {"128 wide": load(), "512 wide": load_wide(folder)}.items():
            prompt, weights = embedded(model, make_prompt(model, tokenizer)), sft.trainable_parameters(model)
            for shape in ("full", "ragged"):
                ids = torch.randint(0, 600, (8, 256))
                lengths = torch.full((8,), 256) if shape == "full" else torch.arange(1, 9) * 32
                mask = torch.arange(256) < lengths[:, None]
                seconds[f"training pass, {name}, {shape}"] = cpu_seconds(lambda: torch.autograd.grad(
                    pagrpo.token_logprobs(model, prompt, ids, mask).mean(), weights), 3)
    model, tokenizer = sft.load_model(ROOT / "data/toy/base", os.environ["BENCH_ADAPTER"])
    prompts = []
    for record in gen_cot.load_records(str(ROOT / "data/toy/rl.jsonl"), str(ROOT / "data/toy"))[:8]:
        text, (frames, fps) = gen_cot.build_prompt(record), gen_cot.read_media(record, 16, 4)
        prompt = sft.encode_prompt(text, frames, fps, tokenizer, sft.unwrap(model).config)
        prompts.append(embedded(model, prompt))
    uniforms = torch.from_numpy(np.random.default_rng(0).random((64, 112)))
    seconds["rollout, 64 rows of the toy's own lengths"] = cpu_seconds(
        lambda: pagrpo.rollout(model, prompts, tokenizer, 8, 112, uniforms), 3)
    return seconds


def command_seconds(root, script):
    """CPU seconds of a command of the quick start, its workers' too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, script, "--model", "tiny"], cwd=root, check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_since(commit, repeats):
    with tempfile.TemporaryDirectory() as folder:
        old, found = Path(folder, "old"), {}
        subprocess.run(["git", "worktree", "add", "--detach", old, commit], cwd=ROOT, check=True,
                       capture_output=True)
        new = Path(folder, "new")  # a clone, so that the runs that are here stay as they are
        subprocess.run(["git", "clone", "-q", ROOT, new], check=True)
        try:
            for _ in range(repeats):
                for root, script in itertools.product((old, new), COMMANDS):
                    found.setdefault((script, root), []).append(command_seconds(root, script))
                for root in (old, new):
                    shutil.rmtree(root / "runs/tiny/evaluate")  # or it has nothing left to answer
                    own = subprocess.run([sys.executable, __file__, "--own"], check=True, capture_output=True,
                                         text=True, env=os.environ | {
                                             "BENCH_ROOT": str(root), "BENCH_ADAPTER": f"{new}/runs/tiny/sft"})
                    for what, seconds in json.loads(own.stdout.splitlines()[-1]).items():
                        found.setdefault((what, root), []).append(seconds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    print(f"CPU seconds at {commit}, here, ratio; medians of {repeats}")
    for what in dict.fromkeys(what for what, _ in found):
        before, now = (statistics.median(found[what, root]) for root in (old, new))
        print(f"   {what:<45}{before:>8.2f}{now:>8.2f}{before / now:>8.2f}x", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["frames", "questions", "training", "rollout", "update"]
    parser.add_argument("parts", nargs="*", help=", ".join(names))
    parser.add_argument("--since", metavar="COMMIT", help="compare with this older build")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)  # for --since, in each build
    args = parser.parse_args()
    if args.since:
        return bench_since(args.since, args.repeats)
    if args.own:
        return print(json.dumps(own_seconds()))
    parts = args.parts or names
    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    if "frames" in parts:
        bench_frames()
    if "questions" in parts:
        bench_questions()
    for name, bench in (("training", bench_training), ("rollout", bench_rollout), ("update", bench_update)):
        if name in parts:
            bench(*load())


if __name__ == "__main__":
    main()
