"""From a question to a verified trace: process-aware chain-of-thought data in three steps
(VideoP2R, Sec. 3.1 and 7).

1. Generate   a strong vision-language model sees the media and the question, never the gold answer, and
              writes a trace `<observation>…</observation> <think>…</think><answer>…</answer>`.
2. Verify     drop a trace that breaks the template, or whose answer scores under 0.6 by the metric of its
              problem type.
3. Sufficient a text-only judge sees question, correct answer and observation; drop the trace unless it says
              that the answer follows from the observation alone.

This file is also where every stage gets its flags, its records, its frames and its prompt: `Flags`,
`load_records`, `read_frames`, `build_prompt`. It needs no torch.

    python gen_cot.py --model tiny             # the toy world, traces by a scripted teacher: seconds
    python gen_cot.py --teacher openai:MODEL@http://localhost:8000/v1 --judge anthropic:MODEL --data FILE

A run with a teacher can be killed at any moment and started again: every reply is written to traces.jsonl
next to the output before anything is made of it, and is not asked for again. Steps 2 and 3 are a pure
function of that file and of what the judge said, which is in its cache.

Our choices where the paper is silent:
G1. T frames are sampled, 2 per second, but at least 4, at most `--num-frames`, and no more than the clip has.
    T is rounded down to an even number. (A clip of one frame gives it twice.) Their times are evenly spaced
    from the middle of the clip's first frame to the middle of its last. At each we take the frame that a
    player has on screen. The sampled rate, from which sft.py computes positions, is T over the clip's whole
    duration, not over the span of the T times.
G2. Both sides of a frame are rounded to multiples of 28 (patch 14 × merge 2) within the pixel budget, aspect
    kept. Frames of a clip under 128·28² pixels are enlarged to that, as far as the budget allows.
G3. The options appear once in the prompt: they are appended unless the question holds them, with labels.
G4. The teacher gets each sampled frame as a JPEG after its time stamp, then the prompt of all stages. A
    question that its server refuses or does not answer is "no trace". One on which the judge gives no verdict
    is "judge unknown". The next run asks both again.
G5. Options are shown with the letters A, B, … Other labels in the file are mapped to these letters, the
    gold's too. If the options have no labels, the gold is an option's text or the letter of its place.
"""
import ast
import collections
import contextlib
import ctypes
import functools
import gc
import glob
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import av
import numpy as np
import tyro
from filelock import FileLock, Timeout
from pebble import ProcessExpired, ProcessPool
from PIL import Image, ImageOps
from tqdm import tqdm

from rewards import (LETTERS, OPTION, PROBLEM_TYPES, RIGHT, ChatClient, UserError, accuracy_reward, ask_judge,
                     digest, format_rewards, gold_answer, label_options, load_prompt, make_judge,
                     option_index, parse_trace, question_text, read_labels, strip_invisible, write_jsonl,
                     write_text)

MODELS = {"tiny": "data/toy/base", "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
          "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct"}
# questions and raw traces of the toy; the verified ones go to runs/tiny/gen_cot/cot.jsonl
TINY = dict(data="data/toy/cot.jsonl", media_root="data/toy", traces="data/toy/traces.jsonl", judge="rule")


@dataclass
class Flags:
    """What all stages have."""
    model: str = "qwen2.5-vl-7b"  # tiny, qwen2.5-vl-7b, qwen2.5-vl-3b, a local folder or a hub id
    data: str | None = None  # records: JSON list or JSON Lines, plain or .gz, globs allowed
    media_root: str = "data/Video-R1-data"  # folder that the records' paths are relative to
    limit: int | None = None  # use N of the records, drawn with --seed
    workers: int = min(4, os.cpu_count() or 1)  # processes that decode media ahead of the model
    prompt_file: str | None = None  # a text file with {question} and {answer_form} in place of our prompt
    num_frames: int = 16  # most frames per video (paper: 16 for training, 32 for inference)
    max_pixels: int = 128  # most pixels per frame of a video, in units of 28x28 (paper: 128; inference: 256)
    judge: str | None = None  # rule, anthropic:MODEL, openai:MODEL@URL, FILE.py:FUNCTION (paper: Claude 3.7)
    judge_prompt_file: str | None = None  # in our prompt's place, with {question}, {answer}, {observation}
    judge_max_calls: int | None = None  # the run stops after so many questions to the judge
    scoring: Literal["paper", "lenient"] = "paper"  # how answers are compared
    seed: int = 0  # of the draw of --limit, the data's order, a fresh adapter, and the sampling
    output: Path | None = None  # file or folder of the results (default: in runs/<model>)

    def __post_init__(self):
        # no flag may be negative: a negative --max-grad-norm would silently reverse the gradient
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be a number of at least 0")


@dataclass
class Args(Flags):
    data: str = "data/VideoP2R-263k_rl.part*.json.gz"  # questions: JSON or JSON Lines, .gz, globs allowed
    traces: str | None = None  # raw traces, where there is no --teacher: JSON Lines of {problem_id, output}
    teacher: str | None = None  # anthropic:MODEL or openai:MODEL@URL (paper: Qwen2.5-VL-72B-Instruct)
    teacher_concurrency: int = 64  # questions in flight at most
    teacher_max_calls: int | None = None  # the run stops after so many questions
    teacher_extra: str | None = None  # more fields of a request (default with a URL: {"temperature": 0})
    threshold: float = RIGHT  # least answer score that is kept (paper: 0.6)


def get_args():
    return parse_args(Args, TINY, "gen_cot/cot.jsonl", __doc__)


def main(args):
    if not args.judge or not (args.traces or args.teacher):
        raise UserError("gen_cot.py needs a teacher and a judge: pass --teacher or --traces, and --judge.")
    assert args.output.name != "traces.jsonl", "--output would replace the raw traces: name another file"
    judge = judge_from(args)
    lock(args.output)

    # step 1: a raw trace for each question
    if args.teacher:
        records = select_records(args)
        outputs = generate(records, args)
    else:
        records = load_records(args.data, args.media_root)  # no media are needed
        pairs = list(zip(records, load_traces(args.traces, records)))
        records, outputs = zip(*draw(pairs, args.limit, args.seed))

    # steps 2 and 3: which of them are kept
    reasons, scores = verify(records, outputs, judge, args.threshold, args.scoring)
    kept = [kept_record(record, output, score, args.scoring)
            for record, output, reason, score in zip(records, outputs, reasons, scores) if reason is None]
    print_yield(records, reasons, args)
    print_stats("judge", judge)
    if not kept:
        raise UserError(f"None of the {len(records)} traces was kept, so {args.output} is not written.")
    write_jsonl(args.output, kept)
    print(f"{len(kept)} verified traces in {args.output}")


# --- the prompt ---------------------------------------------------------------------------------------------

PROMPT = """Question: {question}

Work through three parts in this order, and do not stop after the first one.
1. Decide what the question asks and which visual evidence would settle it. Then write that evidence down in \
a single paragraph between <observation> and </observation>, opening with "Based on the question, I need to \
notice".
2. Between <think> and </think>, reason step by step from what you observed, the way one talks to oneself, \
checking and correcting where needed. Open with "Based on the observations,".
3. Between <answer> and </answer>, state a concise final answer that agrees with both. {answer_form}"""

ANSWER_FORMS = {
    "multiple choice": "Give the letter of the chosen option and nothing else.",
    "numerical": "Give a number and nothing else.",
    "OCR": "Give the text exactly as it is written and nothing else.",
    "free-form": "Give a short phrase or sentence.",
    "regression": "Give your best estimate as a number and nothing else.",
}


def build_prompt(record, template=PROMPT):
    """The one prompt of generation, SFT, RL and evaluation: question, options (once, G3), three parts, answer
    form."""
    return template.replace("{answer_form}", ANSWER_FORMS[record["problem_type"]]).replace(
        "{question}", question_text(record))


def load_template(args):
    """The prompt's template: ours, or the text of --prompt-file."""
    return load_prompt(args.prompt_file, PROMPT, ("question", "answer_form"))


# --- step 1: a teacher's raw traces -------------------------------------------------------------------------

def generate(records, args):
    """Step 1: the raw trace (str) of each record; None without a reply, MediaError for an unreadable medium.

    Replies are kept in traces.jsonl next to the output, rows {question, problem_id, key, output}. `question`
    and `problem_id` are for --traces. `key` is a hash of the teacher, its extra fields, the prompt, the path
    and the frames' settings. A question whose key the file has is not asked again, nor its medium decoded.
    """
    extra, template = json.loads(args.teacher_extra or "{}"), load_template(args)
    if args.teacher_extra is None and args.teacher.startswith("openai:") and "@http" in args.teacher:
        extra = {"temperature": 0}  # the paper's; newer models of the hosted APIs refuse it
    teacher = ChatClient(args.teacher, args.output.with_name("traces.jsonl"), args.teacher_concurrency, 600,
                         args.teacher_max_calls, max_tokens=2048, extra=extra)
    keys = [digest([args.teacher, extra, build_prompt(record, template), record["path"], args.num_frames,
                    args.max_pixels]) for record in records]
    todo = {key: record for key, record in zip(keys, records) if key not in teacher.replies}  # each once

    def ask(key, record, media):
        if isinstance(media, MediaError):
            return media
        return teacher.reply([*media_parts(*media), build_prompt(record, template)], key=key,
                             question=question_key(record), problem_id=record.get("problem_id"))

    # To pull an item of the generator `jobs` waits for the next decoded medium and submits its question. With
    # 64 threads `in_order` has up to 128 of them submitted at a time: 64 are at the server, and the next 64
    # are decoded already, so that a thread that gets free has one at once.
    jobs = (teacher.pool.submit(ask, key, record, media)
            for key, (record, media) in zip(todo, read_ahead(todo.values(), args)))
    outputs = dict(teacher.replies)
    try:
        with tqdm(in_order(jobs, 2 * args.teacher_concurrency), "questions", len(todo)) as bar:
            outputs |= {key: job.result() for key, job in zip(todo, bar)}
    finally:  # Ctrl-C, a refusal: ask nothing more
        teacher.stop.set()
    print_stats("teacher", teacher)
    return [outputs[key] for key in keys]


def media_parts(frames, fps):
    """The media part of a request (G4): time stamps (of video) and JPEGs, in time order."""
    parts = []
    for stamp, jpeg in stamped_jpegs(frames, fps):
        parts += [f"{stamp}:", jpeg] if stamp else [jpeg]
    return parts


def stamped_jpegs(frames, fps, quality=90, side=65_500):
    """(time stamp, JPEG) of each frame, made smaller where a side is over `side`, by default the most that a
    JPEG can have. The stamps go evenly from 0 to the clip's end, len(frames) / fps. (Approximately: the
    sampled times begin and end half a frame within, see G1.) A picture's is ""."""
    for i, frame in enumerate(frames):
        stamp = "" if fps is None else f"{i * len(frames) / fps / (len(frames) - 1):.1f} s"
        image, jpeg = Image.fromarray(frame), io.BytesIO()
        image.thumbnail((side, side))
        image.save(jpeg, "JPEG", quality=quality)
        yield stamp, jpeg.getvalue()


def question_key(record):
    """What tells a question from all others: problem_id does so within one file only."""
    return digest([record["problem"], record["options"], record["path"]])


def id_of(number):
    """A problem_id as a text. pandas writes 7.0 for 7 next to a gap."""
    return re.sub(r"\A(\d+)\.0\Z", r"\1", str(number).strip())


def load_traces(path, records):
    """The raw trace (str) of each record from a file of {problem_id, output}, or None. A row with the
    `question` of `generate` is found by that, any other by its id. An id is not used if two questions have
    it, or if two traces have it that differ."""
    traces, numbers = {}, [record.get("problem_id") for record in records]
    ids = collections.Counter(id_of(number) for number in numbers if number is not None)
    for row in read_json(path):
        if not isinstance(row, dict) or not isinstance(row.get("output"), str):
            continue  # a line that a kill tore, or an error
        own = re.fullmatch("[0-9a-f]{24}", str(row.get("question")))
        key = own[0] if own else id_of(row.get("problem_id"))
        if traces.setdefault(key, row["output"]) != row["output"]:
            traces[key] = None  # two that differ: it stays None, which no text equals
    outputs = []
    for record, number in zip(records, map(id_of, numbers)):
        outputs.append(traces.get(question_key(record)) or (traces.get(number) if ids[number] == 1 else None))
    return outputs


# --- steps 2 and 3: what is kept ----------------------------------------------------------------------------

def bare_trace(reply):
    """The trace in a teacher's reply, without what can be around it: a fence; a stop token; the teacher's own
    thoughts, up to a </think>."""
    found = re.fullmatch(r"(?:.*</think>)?(?:\s|```\w*)*(<observation>.*?</answer>)(?:\s|```|<\|\w+\|>)*",
                         reply, re.DOTALL)
    return found[1] if found else reply


REASONS = ["unreadable medium", "no trace", "broken template", "wrong answer", "insufficient observation",
           "judge unknown"]


def verify(records, outputs, judge, threshold=RIGHT, scoring="paper"):
    """Steps 2 and 3 (Sec. 3.1): why each record's trace is rejected, None where it is kept; and the answer
    scores.

    Args:
        outputs: the raw traces, list of str; None where there is none, MediaError for an unreadable medium.

    Returns (reasons, scores): list of str (one of REASONS) or None, list of float.
    """
    reasons, scores = [], []
    for record, text in zip(records, outputs, strict=True):
        scores.append(0.0)
        if not isinstance(text, str):
            reasons.append("unreadable medium" if isinstance(text, MediaError) else "no trace")
            continue
        text = bare_trace(text)
        if format_rewards(text) != (1.0, 1.0):
            reasons.append("broken template")
        else:
            scores[-1] = accuracy_reward(record["problem_type"], text, record["solution"], scoring,
                                         record.get("options"))
            reasons.append(None if scores[-1] >= threshold else "wrong answer")
    left = [i for i, reason in enumerate(reasons) if reason is None]
    observations = [parse_trace(bare_trace(outputs[i])).observation for i in left]
    for i, verdict in zip(left, ask_judge(judge, [records[i] for i in left], observations), strict=True):
        if verdict is None:
            reasons[i] = "judge unknown"
        elif verdict < RIGHT:  # of a judge that gives floats
            reasons[i] = "insufficient observation"
    return reasons, scores


def kept_record(record, output, score, scoring):
    """A record of the official release's schema from a question and its verified trace."""
    output = bare_trace(output).encode("utf-8", "ignore").decode()  # half a surrogate pair is no text
    trace = parse_trace(output)
    kept = {k: v for k, v in record.items() if k != "media"}
    return dict(kept, answer=gold_answer(record["solution"]), output=output, reward=score,
                observation=f"<observation>{trace.observation}</observation>",
                process=f"<think>{trace.think}</think>", scoring=scoring)


def print_yield(records, reasons, args):
    """The paper's Table 3 for this run: questions, rejections by reason and what was kept, by problem and
    data type; on screen, and in yield.json next to the output."""
    table = collections.defaultdict(collections.Counter)
    for record, reason in zip(records, reasons):
        for name in (f"{record['problem_type']}, {record['data_type']}", "all"):
            table[name].update(["questions", reason or "kept"])
    columns = ["questions", *REASONS, "kept"]
    print("   problem type          " + "   ".join(columns))
    for name in sorted(table, key=lambda name: (name == "all", name)):
        print(f"   {name:<22}" + "".join(f"{table[name][c]:>{len(c) + 3}}" for c in columns))
    text = json.dumps(dict(scoring=args.scoring, table=table), indent=1)
    write_text(args.output.with_name("yield.json"), text)


# === below: what every stage borrows ========================================================================

# --- a script from its command line on ----------------------------------------------------------------------

def parse_args(flags, tiny, output, description):
    """The command line as `flags`, a dataclass. With --model tiny the dict `tiny` replaces its defaults. Adds
    base, run_dir and, within it, the default output."""
    # tyro needs the defaults before it reads the command line
    default = flags(**tiny) if re.search(r"--model[= ]tiny( |\Z)", " ".join(sys.argv)) else None
    args = tyro.cli(flags, default=default, description=description.partition("\n\n")[0],
                    config=(tyro.conf.FlagCreatePairsOff,))
    args.base, args.run_dir = MODELS.get(args.model, args.model), Path("runs") / Path(args.model).name
    args.output = args.output or args.run_dir / output
    return args


LOCKS = contextlib.ExitStack()  # of this run's outputs, until its end


def run_script(main, get_args):
    """A script from its command line on. Ctrl-C and SIGTERM end it in a sentence. A terminal that lacks a
    character shows another."""
    for screen in (sys.stdout, sys.stderr):
        screen.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with LOCKS:
            main(get_args())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one doesn't wait for requests on their way
        raise UserError("Stopped.") from None


def lock(path):
    """Keep all other runs from writing to this file or folder until this one ends. UserError where another
    does so already."""
    real = path.resolve()  # behind a link, too
    try:  # a process may take it twice
        LOCKS.enter_context(FileLock(real.with_name(f".{real.name}.lock"), 0, is_singleton=True))
    except Timeout:
        raise UserError(f"Another run writes to {path}: wait for it, or pass another --output.") from None


def move_aside(path):
    """Keeps what an earlier run left at this path, under another name."""
    name = next(itertools.filterfalse(os.path.exists, (f"{path}.{n}" for n in itertools.count(1))))
    os.rename(path, name)
    print(f"{path} held an earlier run, which is now in {name}.")


def judge_from(args, generate=None):
    """The judge that the flags ask for. A remote one is tried first, on an easy question that no cache knows.
    Raises UserError where it gives no verdict."""
    make = functools.partial(make_judge, args.judge, args.judge_prompt_file, generate)
    trial = dict(problem="What colour is the car?", problem_type="free-form", solution="red")
    # `make()` is a judge without a cache, for the trial only
    if str(args.judge).startswith(("anthropic:", "openai:")) and make()([trial], ["A red car."])[0] is None:
        raise UserError(f"The judge {args.judge} gave no verdict on a question of trial: see above.")
    cache = f"runs/judge-cache-{os.environ.get('RANK', 0)}.jsonl"  # one file a rank
    return make(cache=cache, max_calls=args.judge_max_calls)


def print_stats(name, client):
    """One line of what a remote judge or teacher was asked."""
    if stats := getattr(client, "stats", None):
        print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in stats.items()))


# --- records ------------------------------------------------------------------------------------------------

MAX_BAD = 0.05  # share of bad records that is left out; more says that something else is wrong with the file
FOLDER_FPS = 3.0  # of a folder of frames whose record names no rate (TVQA's in MVBench)
# fields by which others name a part of a clip: start, video_start, clip_start_time, …
PART = re.compile(r"((video|clip|segment)_)?(start|end|begin)(_(time|sec|frame))?|timestamps|time_range|span")
VISION = r"<\|vision_start\|>.*?<\|vision_end\|>"  # Qwen's own tokens
# placeholders of the medium: <image> and <video> are removed at both ends of the question, Qwen's anywhere
PLACE = rf"(<image>|<video>|{VISION})"
PLACEHOLDER = re.compile(rf"\A({PLACE}\s*)+|({PLACE}\s*)+\Z|{VISION}", re.DOTALL)


def load_records(paths, media_root=None, left_out=(), lost_golds=False):
    """Read records from JSON lists or JSON Lines, plain or gzip. A record that can't be used is left out; the
    first is named, and their number.

    Args:
        paths: a path or a glob pattern, whose files are read in sorted order.
        media_root: folder of the media; where given, each record gets `media`, its medium's path below it.
        left_out: problem types of records that are left out, in lower case.
        lost_golds: keep a record even if its gold is none of its options.

    Returns:
        list of dict with the data set's field names: `problem_id, problem, data_type, problem_type, options`
        (list of str), `solution` (with its answer tags), `path`, and whatever else the file carries.

    Raises:
        UserError: no such file, one that can't be read, or more than MAX_BAD of the records are bad.
    """
    if str(paths).startswith("data/toy/"):
        with FileLock("runs/.toy.lock"):  # another rank may prepare it
            if not os.path.exists("data/toy/test.jsonl"):
                print("The toy data is not there yet: preparing it.", flush=True)
                subprocess.run([sys.executable, "data/toy/prepare.py"], check=True)
    records, bad = [], []
    files = [str(paths)] if os.path.exists(paths) else sorted(glob.glob(str(paths)))
    if not files:
        raise UserError(f"No data file {paths}: pass --data, run the stage before, or download it (README).")
    for file in files:
        for i, row in enumerate(tqdm(read_json(file), Path(file).name, delay=1)):
            try:
                if row["problem_type"].strip().lower() not in left_out:
                    records.append(parse_record(row, media_root, lost_golds))
            except (LookupError, ValueError, TypeError, AttributeError, SyntaxError) as error:
                bad.append(f"{file}, record {i}: {type(error).__name__} {error}")
    if bad:
        print(strip_invisible(f"{len(bad)} records are left out. The first one is {bad[0]}"))
    if not records or len(bad) > MAX_BAD * (len(records) + len(bad)):
        raise UserError(f"{paths}: {len(records)} records are good, {len(bad)} are bad. Mend the file.")
    # tell of fields that name a part of a clip, which no stage uses, and of folders of frames without a rate
    fields = sorted(filter(PART.fullmatch, {field for record in records for field in record}))
    parts = sum(not record.keys().isdisjoint(fields) for record in records)
    rates = [r for r in records if media_root and not (r.get("fps") or r.get("sample_fps"))
             and r["data_type"] == "video" and os.path.isdir(r["media"])]
    if parts:
        print(f"{parts} records name a part of their clip ({', '.join(fields)}), but the whole clip is used.")
    if rates:
        print(f"{len(rates)} folders of frames have no fps or sample_fps: {FOLDER_FPS:g} a second assumed.")
    return records


def parse_record(row, media_root=None, lost_golds=False):
    """One record with every field in its one form. Raises ValueError and its like."""
    types = {name.lower(): name for name in PROBLEM_TYPES}
    media = {"image": "image", "video": "video", "frame": "video"}  # MVBench's word for a folder of frames
    options = parse_options(row.get("options"))
    record = dict(row, problem_type=types[row["problem_type"].strip().lower()],
                  data_type=media[row["data_type"].strip().lower()],
                  problem=PLACEHOLDER.sub("", strip_invisible(row["problem"])).strip(),
                  options=label_options(list(options.values())))
    if not record["problem"]:
        raise ValueError("it holds no question")
    record["solution"] = f"<answer>{parse_gold(record, options, lost_golds)}</answer>"
    record["path"] = path_below(media_root or ".", row["path"])
    if media_root is not None:
        record["media"] = media_path(media_root, record["path"])
    return record


def select_records(args):
    """The records that a stage works on: those whose media exist, and of them --limit, drawn. UserError where
    none is left."""
    records = load_records(args.data, args.media_root)
    kept, missing = [], []
    for record in records:
        (kept if os.path.exists(record["media"]) else missing).append(record)
    example = strip_invisible(f", the first one {missing[0]['media']}") if missing else ""
    drawn = draw(kept, args.limit, args.seed)
    if not drawn:
        raise UserError(f"No record has its medium below {args.media_root}{example}: pass --media-root.")
    print(f"{len(drawn)} of {len(records)} records of {args.data}; {len(missing)} have no medium{example}")
    return drawn


def hold_out(records, share=0.02):
    """(records of the media that are held out, all others). A `share` of the media is held out, by a hash of
    their paths: the same ones in every stage and file, with one exception. Where there are ten media or more
    and the hash picks none of them, the one with the least hash is held out, for this file only. 0 holds out
    none."""
    ranks = sorted((int(digest(path), 16) / 16**24, path) for path in {record["path"] for record in records})
    # at least one of ten media or more (True counts as 1)
    count = max(sum(rank < share for rank, _ in ranks), share > 0 and len(ranks) >= 10)
    chosen = {path for _, path in ranks[:count]}
    return ([record for record in records if record["path"] in chosen],
            [record for record in records if record["path"] not in chosen])


def draw(records, limit, seed):
    """`limit` of the records, drawn with this seed, in their order; None: all."""
    if limit is None or limit >= len(records):
        return records
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))]


# --- frames -------------------------------------------------------------------------------------------------

FACTOR = 28  # one visual token covers 28 × 28 pixels: patches of 14, merged two by two
IMAGE_PIXELS = (4 * FACTOR**2, 256 * FACTOR**2)  # least and most pixels of a still image
VIDEO_PIXELS = 128 * FACTOR**2  # to which smaller frames of a clip are enlarged, as by Qwen's own code
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # others could start programs
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,asf,flv,ogg,gif,h264,hevc,ivf,dv,mxf,rm"
SEEK_OVER = 32  # frames; to jump over fewer costs more than to decode them
DECODE_TIMEOUT = 60  # seconds for one medium
Image.MAX_IMAGE_PIXELS = 32_000_000  # Pillow refuses pictures of more than twice as many


class MediaError(Exception):
    """A medium that can't be read, with the reason in one sentence; it costs its one record."""


@contextlib.contextmanager
def media_errors(path):
    """A context in which whatever goes wrong is a MediaError that names the path."""
    try:
        yield
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        reason = f"{path} can't be read ({type(error).__name__}: {error})."
        raise MediaError(strip_invisible(reason)) from None


def sample_indices(starts, end, num_frames=16, fps=2.0, min_frames=4):
    """Indices, int64 (T,), of the frames that a player shows at T evenly spaced times, from the middle of the
    first to the middle of the last (G1). Of N frames at a constant rate: linspace(0, N - 1, T), rounded.

    Args:
        starts: (N,) seconds at which each frame appears, ascending. end: second at which the last one goes.
        num_frames: most frames. fps: frames wanted per second.
    """
    edges = np.append(starts, end)  # frame i is on screen from edges[i] to edges[i + 1]
    wanted = math.floor((end - edges[0]) * fps + 1e-6)
    wanted = min(max(wanted, min_frames), num_frames, max(len(starts), 2))
    # an even number; a clip of one frame gives it twice
    times = np.linspace(edges[:2].mean(), edges[-2:].mean(), max(wanted // 2 * 2, 2))
    return np.searchsorted(edges, times, side="right") - 1


def fit_size(height, width, max_pixels, min_pixels=VIDEO_PIXELS):
    """(height, width) as multiples of 28 with the aspect kept, of at least min_pixels and, above all, at most
    max_pixels in area (G2). A very long shape can exceed max_pixels, as no side is under 28."""
    h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(max_pixels / (height * width))
        h, w = (max(FACTOR, math.floor(side * scale / FACTOR) * FACTOR) for side in (height, width))
    return h, w


def read_frames(path, num_frames=16, max_pixels=128 * FACTOR**2, min_frames=4):
    """Sample and decode frames of a video as a player shows them, turned and stretched as the file says (G1).

    The packets say when each frame appears and which ones are keyframes. Where the frames then come with
    other time stamps than their packets (some .avi, .mpg, .ts), the clip is decoded twice from its beginning.

    Returns:
        frames: uint8 (T, H, W, 3), T even, H and W multiples of 28 with H·W ≤ max_pixels.
        fps: float, sampled frames per second of the clip, whose duration is that of its pictures alone.
    """
    with media_errors(path):
        with open_video(path) as (container, stream):
            stamps = [(packet.pts, packet.duration, packet.is_keyframe) for packet in container.demux(stream)
                      if packet.size and not packet.is_discard]
        try:
            return pick_frames(path, stamps, num_frames, max_pixels, min_frames)
        except LookupError:
            with open_video(path) as (container, stream):
                stamps = [(frame.pts, frame.duration, False) for frame in container.decode(stream)]
            return pick_frames(path, stamps, num_frames, max_pixels, min_frames)


def read_media(record, num_frames=16, max_pixels=128, min_frames=4):
    """The record's frames and sampled fps (None for an image); `max_pixels` in units of 28×28. Raises
    MediaError."""
    if record["data_type"] == "image":
        return read_image(record["media"]), None
    if os.path.isdir(record["media"]):
        rate = record.get("fps") or record.get("sample_fps") or FOLDER_FPS
        return read_folder(record["media"], num_frames, max_pixels * FACTOR**2, rate, min_frames)
    return read_frames(record["media"], num_frames, max_pixels * FACTOR**2, min_frames)


def read_ahead(records, args, read=None, timeout=None):
    """Decode the records' media in worker processes, ahead of whoever takes them; `records` may be endless.

    A medium that hangs or crashes its decoder is tried once more, since lack of memory or a clock that jumps
    can make a good medium look like that. Then it costs its own record.

    Args:
        args: with num_frames, max_pixels (in units of 28×28), workers.

    Yields:
        (record, media) in the order of the records, where media is what `read` (default: `read_media`)
        returns, or a MediaError.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pools = []  # the last one is in use

    def begin(record):
        if not pools or not pools[-1].active:  # pebble closes a pool if the system kills an idle worker
            pools.append(ProcessPool(args.workers, context=context, initializer=init_worker))
        return pools[-1].schedule(read or read_media, (record, args.num_frames, args.max_pixels),
                                  timeout=timeout or DECODE_TIMEOUT)

    def result(record, job, again=True):
        try:
            return job.result()
        except MediaError as error:
            return error
        except (TimeoutError, BrokenExecutor, ProcessExpired) as error:
            # the second try, with `again` False, is the last
            return result(record, begin(record), False) if again else MediaError(
                f"{record['media']} hangs or crashes its decoder ({error}).")

    try:
        for record, job in in_order(((record, begin(record)) for record in records), 4 * args.workers):
            yield record, result(record, job)
    finally:
        for pool in pools:
            pool.stop()
            pool.join()


def in_order(jobs, ahead):
    """The items of the generator `jobs`, in order. Pulling an item from it begins that item's job. Up to
    `ahead` of them are pulled before the first is yielded, and one more after each that is."""
    waiting = collections.deque(itertools.islice(jobs, ahead))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(jobs, 1))


# === skip on a first reading ================================================================================

# --- fields as people write them ----------------------------------------------------------------------------

def read_json(file):
    """The list of objects in a JSON or JSON Lines file, plain or gzip. A line that is no JSON comes as text,
    which is a bad record. Raises UserError where the file can't be read."""
    load = functools.partial(json.loads, parse_constant=lambda nan: None)  # pandas' gaps are NaN
    try:
        with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as f:
            text = f.read()
        if text.lstrip()[:1] in ("[", ""):  # an empty file goes to json.loads, too, which raises
            return load(text)
    except Exception as error:  # of the system, gzip, zlib or json
        raise UserError(f"{file} can't be read ({error}): download or make it again.") from None
    rows = [line for line in text.split("\n") if line.strip()]  # not at U+2028 and its like
    for i, line in enumerate(rows):
        with contextlib.suppress(ValueError):
            rows[i] = load(line)
    return rows


def parse_gold(record, options, lost_golds):
    """The gold answer without tags, from a text or number. Of multiple choice it is an option's new letter,
    where the file has the option's old label or its text."""
    gold = gold_answer(as_text(record.get("solution"))) or gold_answer(as_text(record.get("answer")))
    if not gold:
        raise ValueError("it has no gold answer")
    if record["problem_type"] != "multiple choice":
        return gold
    # `options` is {the file's letter: option}. Of ["", "red", "blue"] it is {"B": "red", "C": "blue"}: a
    # letter in the file counts the empty places, too. The file's gold "B" is index 0, red, whose new letter
    # is A. Where the record has no options (they may be in the question), any letter is a gold.
    texts, labelled = list(options.values()), OPTION.fullmatch(gold)
    index = option_index(gold, texts, list(options or LETTERS))
    texts = [text for _, text in read_labels(texts)] or texts
    if labelled and index is not None and labelled[2] in texts and texts[index] not in (gold, labelled[2]):
        index = None  # "B. red", where red is another option
    if index is None and options:
        gold = f"none of the options: {gold}"  # alone it could be the new letter of another option
        if not lost_golds:
            raise ValueError(f"its gold is {gold}")
    return gold if index is None else LETTERS[index]


def as_text(value):
    """A field as a text. pandas writes 3.0 for 3 next to a gap, and the gap as nan."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"{value} is no text")
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return "" if value is None or str(value) == "nan" else strip_invisible(str(value))


def parse_options(options):
    """{letter of its place: option}, from a list, null, or a list printed as JSON or Python (as in the
    authors' RL file). What only fills a table up is left out: empty texts, null, NaN."""
    if isinstance(options, str):
        try:
            options = json.loads(options.strip() or "[]")
        except ValueError:
            if re.search(r"""['"]\s+['"]""", options):  # as numpy prints them, and Python would join them
                raise ValueError("its options lack their commas") from None
            options = ast.literal_eval(options)  # parses literals only, evaluates nothing
    if not isinstance(options, (list, tuple, type(None))) or len(options or []) > 14:
        raise ValueError("its options are no list of at most 14, A to N")
    kept = {letter: text for letter, text in zip(LETTERS, map(as_text, options or [])) if text}
    # the texts without labels, to recognise "C. nan" as empty
    bare = [text for _, text in read_labels(list(kept.values()))] or kept.values()
    return {letter: kept[letter] for letter, text in zip(kept, bare) if text.lower() not in ("", "nan")}


def path_below(media_root, path):
    """A record's path below the media root, in NFC, from one that may be absolute, a URL or of Windows."""
    path = re.sub("^file://(.*)", lambda url: unquote(url[1]), path.strip()).replace("\\", "/")
    if path.startswith("/"):
        path = path.removeprefix(f"{os.path.abspath(media_root)}/")
        path = path.removeprefix(f"{os.path.realpath(media_root)}/")
    path = os.path.normpath(unicodedata.normalize("NFC", path.lstrip("/")))
    if path == "." or path.startswith(".."):
        raise ValueError("its path names no file below the media root")
    return path


def media_path(media_root, path):
    """The file of a path below the media root, with or without a leading `Evaluation/`, in NFC or NFD; or a
    folder of frames of that name without its suffix."""
    names = [path, path.removeprefix("Evaluation/"), f"Evaluation/{path}"]
    names += [re.sub(r"\.[A-Za-z]\w*\Z", "", name) for name in names]  # but not of clip_1.5
    if not path.isascii():
        names += [unicodedata.normalize("NFD", name) for name in names]
    media = [f"{media_root}/{name}" for name in names]
    return next(filter(os.path.exists, media), media[0])


# --- media as cameras write them ----------------------------------------------------------------------------

@contextlib.contextmanager
def open_video(path):
    """(container, stream) of a video's pictures, which are never the cover of a sound file. No format is
    opened that names other files."""
    options = dict(format_whitelist=VIDEO_FORMATS, protocol_whitelist="file")
    with av.open(str(path), options=options) as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("it holds no pictures")
        stream.codec_context.thread_count = 1  # there are other workers
        yield container, stream


def pick_frames(path, stamps, num_frames, max_pixels, min_frames):
    """(frames, fps) as in `read_frames`, from the (pts, duration, is keyframe) of all frames.

    Where the stamps name keyframes, it seeks to them, and a decoded frame's time says which one it is. Where
    they name none (`read_frames`' second try) it decodes all, and frame i is the i-th one. LookupError, of
    which KeyError is a kind, where a frame is not where its packet said."""
    # at: the index of the frame that was decoded last; -1 before the first; None between a seek and the next
    # frame, whose time says where we are
    frames, at = [], -1
    with open_video(path) as (container, stream):
        # when each frame appears: its packet's time, else one after the other at the stream's rate
        step = float(1 / (stream.average_rate or 25) / stream.time_base)
        if any(pts is None for pts, _, _ in stamps):
            stamps = [(i * step, step, False) for i in range(len(stamps))]
        stamps = sorted(stamps)
        index = {pts: i for i, (pts, _, _) in enumerate(stamps)}
        keyframes = [i for i, (_, _, is_keyframe) in enumerate(stamps) if is_keyframe]
        starts = np.array([pts for pts, _, _ in stamps]) * float(stream.time_base)
        end = (stamps[-1][0] + (stamps[-1][1] or step)) * float(stream.time_base)

        # decode on to each sampled frame; if the last keyframe up to it is over SEEK_OVER frames ahead, jump
        # there first
        decoded = container.decode(stream)
        for i in sample_indices(starts, end, num_frames, min_frames=min_frames):
            key = max((k for k in keyframes if k <= i), default=-1)
            if key > at + SEEK_OVER:
                container.seek(stamps[key][0], stream=stream)
                decoded, at = container.decode(stream), None
            # decode until frame i; if `at` is i already, `frame` is used again
            while at is None or at < i:
                frame = next(decoded, None)
                # a seek can end at a frame that is no keyframe
                if frame is None or (at is None and frame.pict_type != av.video.frame.PictureType.I):
                    raise LookupError("no frame, or no keyframe though its packet says so")
                at = index[frame.pts] if keyframes else at + 1  # KeyError: a time that no packet has
            if at > i:
                raise LookupError("a frame beyond the one that is wanted")
            frames.append(to_pixels(frame, stream, frames[0].shape if frames else None, max_pixels))
    return np.stack(frames), len(frames) / (end - starts[0])


def to_pixels(frame, stream, shape, max_pixels):
    """A decoded frame as uint8 (H, W, 3), turned and mirrored by its display matrix, resized to the `shape`
    of the clip's first one; a tilt counts as the nearest quarter."""
    image, matrix = frame.to_image(), frame.side_data.get("DISPLAYMATRIX")
    sides = [frame.height, frame.width * float(stream.sample_aspect_ratio or 1)]
    # The matrix shows the pixel (x, y), y down, at (a x + c y, b x + d y), and the result is moved into view.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
    # Upright, b and c are about 0: the pixel is shown at (a x, d y), and a negative a or d mirrors. In a
    # quarter turn a and d are about 0: it is shown at (c y, b x). A transposed picture has its x and y
    # swapped, so there it is (c x, b y): c has the place of a, and b that of d. Of 90° clockwise c is
    # negative and b positive: transposed, then mirrored left to right.
    if abs(b) > abs(a):
        image, a, d, sides = image.transpose(Image.TRANSPOSE), c, b, sides[::-1]
    image = ImageOps.mirror(image) if a < 0 else image
    image = ImageOps.flip(image) if d < 0 else image
    height, width = shape[:2] if shape else fit_size(*sides, max_pixels)
    return np.asarray(image.resize((width, height), Image.BICUBIC))


def read_image(path, max_pixels=IMAGE_PIXELS[1], min_pixels=IMAGE_PIXELS[0]):
    """A still image as frames uint8 (1, H, W, 3), turned as its EXIF data say, on white, sides as in
    `fit_size`."""
    with media_errors(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.mode in ("I", "F"):
            raise ValueError("what is white in 32 bits is not known: save it with 8 or 16 bits a channel")
        image.load()  # first, as it turns a TIFF, which `exif_transpose` then leaves as it is
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert("L") alone would clip it to white
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        height, width = fit_size(image.height, image.width, max_pixels, min_pixels)
        return np.asarray(image.convert("RGB").resize((width, height), Image.BICUBIC))[None]


def read_folder(path, num_frames, max_pixels, rate=FOLDER_FPS, min_frames=4):
    """As `read_frames`, of a folder of pictures at `rate` per second in the order of their names, in which 10
    comes after 9."""
    with media_errors(path):
        rate = float(rate)  # records have it as a text, too
        formats = Image.registered_extensions()
        names = [name for name in os.listdir(path) if not name.startswith(".")  # .DS_Store, ._1.jpg
                 and formats.get(Path(name).suffix.lower()) in IMAGE_FORMATS]
        number = lambda match: f"{Decimal(match[0]):040.9f}"  # zero-padded: text order is number order
        names.sort(key=lambda name: re.sub(r"\d+(\.\d+)?", number, Path(name).stem))
        assert names, "a folder without pictures"
        wanted = sample_indices(np.arange(len(names)) / rate, len(names) / rate, num_frames,
                                min_frames=min_frames)
        frames = [read_image(os.path.join(path, names[i]), max_pixels, VIDEO_PIXELS)[0] for i in wanted]
        size = frames[0].shape[1::-1]  # (W, H) of the first one, for all
        frames = [np.asarray(Image.fromarray(frame).resize(size, Image.BICUBIC)) for frame in frames]
        return np.stack(frames), len(frames) * rate / len(names)


def init_worker():
    """What a worker does first: no decoder chatter on the screen. Ctrl-C is for its parent to answer. It dies
    with its parent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    gc.freeze()  # never free the parent's objects here: a decoder would wait for threads that it lacks here


if __name__ == "__main__":
    run_script(main, get_args)
