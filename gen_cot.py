"""From a question to a verified trace: process-aware chain-of-thought data in three steps
(VideoP2R, Sec. 3.1 and 7).

1. Generate   a strong vision-language model sees the media and the question, never the gold answer, and
              writes a trace `<observation>…</observation> <think>…</think><answer>…</answer>`.
2. Verify     drop a trace that breaks the template, or whose answer scores under 0.6 by the metric of its
              problem type.
3. Sufficient a text-only judge sees question, correct answer and observation; drop the trace unless it says
              that the answer follows from the observation alone.

This file is also where every stage gets its records, its frames and its prompt: `load_records`,
`read_frames`, `build_prompt`. It needs no torch.

    python gen_cot.py --model tiny             # the toy world, traces by a scripted teacher: seconds
    python gen_cot.py --teacher openai:MODEL@http://localhost:8000/v1 --judge anthropic:MODEL --data FILE

A run with a teacher can be killed at any moment and started again: every reply is in the journal beside the
output before anything is made of it, and what has its reply there is not sent again. Another threshold or
judge reads the same journal and asks no teacher.

Our choices where the paper is silent (cited by number in the code):
 1. Frames are sampled at 2 per second, evenly from the first to the last, an even number between 4 and
    `--num-frames` (never more than the clip has, rounded down to even; a clip of one frame gives it twice).
    The sampled rate that later sets the positions is the number of sampled frames over the clip's duration.
 2. Both sides of a frame are rounded to multiples of 28 (patch 14 × merge 2) within the pixel budget, aspect
    kept.
 3. The options stand once in the prompt: they are appended unless the question already holds them.
 4. The teacher gets each sampled frame as a JPEG after its time stamp, then the prompt of all stages. A
    question that it refuses or does not answer is "no trace", one on which the judge refuses is "judge
    unknown", and the next run asks again; ten refusals in a row stop the run.
"""
import argparse
import ast
import collections
import contextlib
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
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from rewards import (PROBLEM_TYPES, CallLimit, ChatClient, UserError, accuracy_reward, digest, format_rewards,
                     make_judge, parse_trace, question_text)

FACTOR = 28  # one visual token covers 28 × 28 pixels: patches of 14, merged two by two
IMAGE_PIXELS = (4 * FACTOR**2, 256 * FACTOR**2)  # least and most pixels of a still image

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

# What a model name stands for. A stage takes the entries that are its own flags; everything can be
# overridden.
TINY = dict(
    base="data/toy/base", media_root="data/toy", cot_data="data/toy/cot.jsonl",
    traces="data/toy/traces.jsonl", rl_data="data/toy/rl.jsonl", test_data="data/toy/test.jsonl",
    judge="rule",
)
OFFICIAL = dict(
    media_root="data/Video-R1-data", cot_data="data/VideoP2R-162k_sft.part*.json.gz",
    rl_data="data/VideoP2R-263k_rl.part*.json.gz", test_data="data/Video-R1-eval/eval_*.json",
)
PRESETS = {
    "tiny": TINY,
    "qwen2.5-vl-7b": dict(OFFICIAL, base="Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen2.5-vl-3b": dict(OFFICIAL, base="Qwen/Qwen2.5-VL-3B-Instruct"),
}


CORES = os.sched_getaffinity(0) if sys.platform == "linux" else {0}  # that this process may use
MANIFEST = "media-manifest.jsonl"  # below the media root, written by --check-data


class MediaError(Exception):
    """A medium that can't be read, with the reason in one sentence; it costs its one record."""


# --- arguments that every stage shares ----------------------------------------------------------------------

def positive(text):
    """The type of a flag that counts something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few")
    return int(text)


def seconds(text):
    """The type of a flag that is a time."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time")
    return float(text)


def json_object(text):
    """The type of a flag that is a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no object such as {{\"temperature\": 0}}")
    return value


def add_data_args(parser, data_help):
    """Add the groups 'model' and 'data' as every stage has them; returns the two groups."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="qwen2.5-vl-7b",
                       help=f"{', '.join(PRESETS)}, a local folder or a hub id (org/name)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", help=data_help)
    data.add_argument("--media-root", help="folder that the records' paths are relative to")
    data.add_argument("--sources", nargs="+", metavar="NAME",
                      help="only records whose data_source, or path, starts with one of these")
    data.add_argument("--problem-types", nargs="+", choices=PROBLEM_TYPES, metavar="TYPE",
                      help="only these: " + ", ".join(PROBLEM_TYPES))
    data.add_argument("--data-types", nargs="+", choices=["image", "video"], metavar="TYPE",
                      help="only these: image, video")
    data.add_argument("--limit", type=positive, help="use N of the records that are left, drawn with --seed")
    data.add_argument("--allow-bad", action="store_true",
                      help="go on where more than 5 %% of the records can't be used")
    data.add_argument("--workers", type=positive, default=min(4, os.cpu_count() or 1),
                      help="processes that decode media ahead of the model")
    data.add_argument("--decode-timeout", type=seconds, default=60,
                      help="seconds after which a medium counts as unreadable")
    data.add_argument("--prompt-file",
                      help="a text file with {question} and {answer_form} in place of our prompt")
    return model, data


def add_vision_args(parser, num_frames=16, max_pixels=128):
    """Add the group 'vision': the budget per video (data set card: 16 frames of 128·28² pixels for
    training)."""
    vision = parser.add_argument_group("vision")
    vision.add_argument("--num-frames", type=positive, default=num_frames,
                        help="most frames per video (paper: 16 for training, 32 for evaluation)")
    vision.add_argument("--max-pixels", type=positive, default=max_pixels,
                        help="most pixels per frame in units of 28x28, one visual token per two frames "
                             "(paper: 128 for training, 256 for evaluation)")


def parse_args(parser, stage_presets, data_key):
    """Parse the command line with the defaults of the chosen model: its preset,
    then the stage's own settings."""
    name = parser.parse_known_args()[0].model
    if name not in PRESETS and not os.path.isdir(name) and name.count("/") != 1:
        raise UserError(f"Unknown model {name!r}: pass one of {', '.join(PRESETS)}, a local folder "
                        "or a hub id (org/name).")
    preset = PRESETS.get(name, dict(OFFICIAL, base=name))
    preset = {**preset, **stage_presets.get(name, {})}
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in preset.items() if k in known}, base=preset["base"])
    args = parser.parse_args()
    args.run_dir, args.data_given = Path("runs") / Path(name).name, args.data is not None
    args.data = args.data or preset[data_key]
    if args.data == preset[data_key] and name == "tiny":
        prepare_toy_data()
    return args


def prepare_toy_data():
    """Make the toy data set where it is missing (under a minute, deterministic)."""
    script = Path(__file__).parent / "data/toy/prepare.py"
    if not (script.parent / "test.jsonl").exists():
        print("The toy data is not there yet: preparing it.", flush=True)
        subprocess.run([sys.executable, str(script)], check=True)


# --- records ------------------------------------------------------------------------------------------------

def load_records(paths, media_root=None, allow_bad=False):
    """Read records from JSON lists or JSON Lines, plain or gzip.

    A record that can't be used is left out and named with file, index and reason.

    Args:
        paths: a path, a glob pattern, or a list of them; the files are read in sorted order and concatenated.
        media_root: folder of the media; where given, each record gets `media`,
            its medium's path below that folder.
        allow_bad: accept that more than 5 % of the records can't be used.

    Returns:
        list of dict with the data set's field names: `problem_id, problem, data_type, problem_type, options`
        (list of str), `solution` (with its answer tags), `path`, `data_source`, and whatever else the file
        carries.

    Raises:
        UserError: no such file, not JSON, or more bad records than allowed.
    """
    patterns = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files = []
    for pattern in map(str, patterns):
        found = sorted(glob.glob(pattern))
        if not found:
            raise UserError(f"No data file {pattern}: pass --data, or see the README on what to download "
                            "and where to.")
        files += found
    records, bad = [], []
    for file in files:
        for i, record in enumerate(read_json(file)):
            try:
                records.append(normalise(record, f"{file}, record {i}", media_root))
            except UserError as error:
                bad.append(str(error))
    if len(bad) > 0.05 * (len(records) + len(bad)) and not allow_bad:
        others = f" (the first of {len(bad)} in {len(records) + len(bad)} records)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0].removesuffix('.')}{others}: mend the file, or pass --allow-bad to go on "
                        "without.")
    for reason in bad:
        print(f"left out: {reason}")
    return records


def read_json(file):
    """The list of objects in a JSON or JSON Lines file, plain or gzip."""
    try:
        with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8") as f:
            text = f.read()
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # not at U+2028 and its like
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{file} can't be read as JSON or JSON Lines ({error}): download or make it "
                        "again.") from None


def normalise(record, where, media_root=None):
    """One record with every field in its one form; `where` names it in errors."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with fields, found {type(record).__name__}.")
    for field in ("problem", "problem_type", "data_type", "path"):
        if not isinstance(record.get(field), str) or not record[field]:
            raise UserError(f"{where}: the field {field!r} is missing or not a text.")
    if record["problem_type"] not in PROBLEM_TYPES:
        raise UserError(f"{where}: unknown problem_type {record['problem_type']!r}, "
                        f"known are {', '.join(PROBLEM_TYPES)}.")
    if record["data_type"] not in ("image", "video"):
        raise UserError(f"{where}: data_type is {record['data_type']!r}, not image or video.")
    record = dict(record, options=parse_options(record.get("options"), where))
    solution = record.get("solution") or record.get("answer", record.get("solution"))
    if not isinstance(solution, str):
        raise UserError(f"{where}: the field 'solution' is missing or not a text.")
    record["solution"] = solution if "<answer>" in solution else f"<answer>{solution}</answer>"
    if media_root is not None:
        record["media"] = media_path(media_root, record["path"], where)
    return record


def parse_options(options, where):
    """Options as a list of str, from a list, null, an empty string, or a list printed as JSON or Python."""
    if isinstance(options, str) and options.strip():
        try:
            options = json.loads(options)
        except ValueError:
            try:
                options = ast.literal_eval(options)  # parses literals only, evaluates nothing
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                raise UserError(f"{where}: the options can't be parsed as a list: "
                                f"{options[:80]!r}.") from None
    options = options or []
    if not isinstance(options, (list, tuple)):
        raise UserError(f"{where}: the options are no list: {str(options)[:80]!r}.")
    return [str(option) for option in options]


def media_path(media_root, path, where):
    """The record's path below the media root, with or without a leading `Evaluation/`;
    it can't leave the root."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        raise UserError(f"{where}: the path {path!r} leaves the media root.")
    full = f"{media_root}/{'/'.join(parts)}"
    if os.path.exists(full):
        return full
    other = f"{media_root}/{'/'.join(parts[1:] if parts[:1] == ['Evaluation'] else ['Evaluation', *parts])}"
    return other if os.path.exists(other) else full


def keep_with_media(records, media_root):
    """The records whose medium is there, and readable where a manifest of `check_data` says so;
    the rest are counted aloud. Raises UserError where none is left."""
    present = [record for record in records if os.path.isfile(record["media"])]
    if not present:
        raise UserError(f"None of the {len(records)} records has its medium below {media_root}: pass "
                        "--media-root, or see the README on what to download and where to.")
    if len(present) < len(records):
        print(f"{len(records) - len(present)} of {len(records)} records left out: "
              f"their media are not below {media_root}.")
    manifest = Path(media_root) / MANIFEST
    if manifest.exists():
        unreadable = {row["media"] for row in read_json(manifest) if row.get("status") == "unreadable"}
        usable = [record for record in present
                  if os.path.relpath(record["media"], media_root) not in unreadable]
        if len(usable) < len(present):
            print(f"{len(present) - len(usable)} of {len(present)} records left out: "
                  f"their media are unreadable according to {manifest}.")
        if not usable:
            raise UserError(f"All media of the records are unreadable according to {manifest}: mend the "
                            "media and run --check-data again.")
        present = usable
    return present


def select_records(args, need_media=True):
    """The records that a stage works on: loaded, filtered as the data flags say, media there if needed.
    Raises UserError where none is left."""
    records = load_records(args.data, args.media_root, args.allow_bad)
    kept = [record for record in records
            if (not args.problem_types or record["problem_type"] in args.problem_types)
            and (not args.data_types or record["data_type"] in args.data_types)
            and (not args.sources or any(name.startswith(tuple(args.sources)) for name in (
                str(record.get("data_source", "")), record["path"].removeprefix("./"))))]
    if not kept:
        raise UserError(f"None of the {len(records)} records in {args.data} passes --sources, "
                        "--problem-types and --data-types.")
    if need_media:
        kept = keep_with_media(kept, args.media_root)
    if args.limit is not None and args.limit < len(kept):
        kept = [kept[i] for i in sorted(random.Random(args.seed).sample(range(len(kept)), args.limit))]
    print(f"{len(kept)} of {len(records)} records of {args.data}")
    return kept


def check_data(args):
    """Decode every medium of the records once and write the manifest, which later runs take: JSON Lines of
    {media, status: usable, missing or unreadable, reason}, `media` relative to the media root. What it says
    of other media stays."""
    records = select_records(args, need_media=False)
    media = list({record["media"]: record for record in records}.values())
    present = [record for record in media if os.path.isfile(record["media"])]
    rows = [dict(media=record["media"], status="missing", reason=None)
            for record in media if not os.path.isfile(record["media"])]
    for record, error in tqdm(read_ahead(present, args, check_media), total=len(present), desc="media"):
        reason = str(error) if error else None
        rows.append(dict(media=record["media"], status="unreadable" if reason else "usable", reason=reason))
    for row in rows:
        row["media"] = os.path.relpath(row["media"], args.media_root)
        if row["reason"]:
            print(f"unreadable: {row['reason']}")
    manifest = Path(args.media_root) / MANIFEST
    before = read_json(manifest) if manifest.exists() else []
    write_jsonl(manifest, {row["media"]: row for row in before + rows}.values())
    statuses = [row["status"] for row in rows]
    print(", ".join(f"{statuses.count(status)} {status}" for status in ("usable", "missing", "unreadable"))
          + f": {manifest}")


# --- frames -------------------------------------------------------------------------------------------------

def frame_indices(total, duration, num_frames=16, fps=2.0, min_frames=4):
    """Indices of the sampled frames of a clip, int64 (T,), evenly spaced from the first to the last
    (choice 1).

    Args:
        total: frames in the clip. duration: seconds. num_frames: most frames. fps: frames wanted per second.
    """
    wanted = min(max(round(duration * fps), min_frames), num_frames, max(total, 2))
    return np.linspace(0, total - 1, max(wanted // 2 * 2, 2)).round().astype(np.int64)


def fit_size(height, width, max_pixels, min_pixels=IMAGE_PIXELS[0]):
    """(height, width) as multiples of 28 with min_pixels ≤ area ≤ max_pixels and the aspect kept
    (choice 2)."""
    h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        longest = max_pixels // FACTOR**2 * FACTOR  # of a strip that is one block wide
        h, w = (min(max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR), longest)
                for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width))
    return h, w


def read_frames(path, num_frames=16, max_pixels=128 * FACTOR**2):
    """Sample and decode frames of a video with decord, or with PyAV where decord is missing or fails.

    Returns:
        frames: uint8 (T, H, W, 3), T even, H and W multiples of 28 with H·W ≤ max_pixels.
        fps: float, sampled frames per second of the clip.

    Raises:
        MediaError: the file can't be decoded.
    """
    for decode in (decode_with_decord, decode_with_pyav):
        try:
            frames, seconds = decode(path, num_frames)
            promised = header_seconds(path)
            if seconds < 0.9 * promised:
                raise ValueError(f"cut short, {seconds:.1f} of {promised:.1f} s are there")
            return resize(frames, max_pixels), len(frames) / seconds
        except Exception as error:  # no decord here, or a damaged file, which can fail anywhere in a decoder
            reason = f"{type(error).__name__}: {error}"
    raise MediaError(f"{path} can't be decoded ({reason}).")


def header_seconds(path):
    """The duration in a video file's header, in seconds; 0 where it says nothing of the pictures alone."""
    import av
    with av.open(str(path)) as container:
        return 0 if container.streams.audio else (container.duration or 0) / av.time_base


def decode_with_decord(path, num_frames):
    """Frames uint8 (T, H, W, 3) and the clip's duration in seconds."""
    import decord  # has no wheel for Macs with Apple silicon; PyAV reads the video there
    reader = decord.VideoReader(str(path), num_threads=1)
    (start, _), (_, end) = reader.get_frame_timestamp([0, len(reader) - 1])
    seconds = clip_seconds(len(reader), reader.get_avg_fps(), float(end - start))
    return reader.get_batch(frame_indices(len(reader), seconds, num_frames)).asnumpy(), seconds


def decode_with_pyav(path, num_frames):
    """As `decode_with_decord`; decodes the clip twice, to count its frames and to keep the sampled ones.

    Raises ValueError where fewer frames can be decoded than the file's header promises.
    """
    import av
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        promised, rate = stream.frames, float(stream.average_rate or stream.guessed_rate or 2)
        times = [(frame.time, float((frame.duration or 0) * frame.time_base))
                 for frame in container.decode(stream)]
    if len(times) < max(promised, 1):
        raise ValueError(f"only {len(times)} of {promised or 'its'} frames can be decoded")
    (start, _), (end, last) = times[0], times[-1]
    seconds = clip_seconds(len(times), rate, 0 if None in (start, end) else end - start + last)
    wanted = frame_indices(len(times), seconds, num_frames)
    with av.open(str(path)) as container:
        kept = {i: np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                for i, frame in enumerate(container.decode(container.streams.video[0])) if i in wanted}
    return np.stack([kept[i] for i in wanted]), seconds


def clip_seconds(total, rate, stamped):
    """A clip's duration in seconds: its frames over their rate, or what its time stamps say where that
    differs by two frames or more (a variable rate)."""
    seconds = total / rate
    return stamped if stamped > 0 and abs(stamped - seconds) * rate >= 2 else seconds


def check_video(path):
    """Decode a whole clip and stop at the first damage, which decoders otherwise paint over.
    Raises MediaError."""
    import av
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            damaged = next((i for i, frame in enumerate(container.decode(stream)) if frame.is_corrupt), None)
    except Exception as error:
        raise MediaError(f"{path} is damaged ({type(error).__name__}: {error}).") from None
    if damaged is not None:
        raise MediaError(f"{path} is damaged at frame {damaged}.")


def read_image(path, max_pixels=IMAGE_PIXELS[1]):
    """A still image as frames uint8 (1, H, W, 3), sides as in `fit_size`. Raises MediaError."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # convert() would clip it to white
                image = image.point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:  # on white, where what it shows is usually meant to be seen
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            frames = np.asarray(image.convert("RGB"))[None]
    except Exception as error:  # Pillow's plug-ins raise many kinds on damaged files
        raise MediaError(f"{path} can't be read as an image ({type(error).__name__}: {error}).") from None
    return resize(frames, max_pixels)


def resize(frames, max_pixels):
    """Frames uint8 (T, H, W, 3) resized (bicubic) to sides within the budget."""
    height, width = fit_size(*frames.shape[1:3], max_pixels)
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.BICUBIC)) for f in frames])


def read_media(record, num_frames=16, max_pixels=128):
    """The record's frames and sampled fps (None for an image);
    `max_pixels` in units of 28×28. Raises MediaError."""
    if record["data_type"] == "image":
        return read_image(record["media"]), None
    return read_frames(record["media"], num_frames, max_pixels * FACTOR**2)


def check_media(record, num_frames, max_pixels):
    """None for a record whose medium is whole and can be read as the stages read it. Raises MediaError."""
    if record["data_type"] == "video":
        check_video(record["media"])
    read_media(record, num_frames, max_pixels)


def settle_in():
    """What a worker process does first: no decoder chatter on the screen, errors go back to the parent as
    they are; and no collecting of the parent's garbage: freeing a decoder waits for threads that it has."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    gc.freeze()
    keep_to(CORES)  # even if the parent keeps to one of them


def read_ahead(records, args, read=read_media):
    """Decode the records' media in worker processes, ahead of whoever takes them; `records` may be endless.

    A medium that hangs or crashes its decoder costs its own record and one worker, which is replaced.

    Args:
        args: with num_frames, max_pixels (in units of 28×28), workers, decode_timeout (seconds).

    Yields:
        (record, media) in the order of the records, where media is what `read` returns, or a MediaError.
    """
    # Forked workers start at once and share the parent's memory; elsewhere than on Linux forking is unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPool(max_workers=args.workers, context=context, initializer=settle_in)
    records, waiting = iter(records), collections.deque()
    try:
        while True:
            for record in itertools.islice(records, 4 * args.workers - len(waiting)):
                waiting.append((record, pool.schedule(
                    read, (record, args.num_frames, args.max_pixels), timeout=args.decode_timeout)))
            if not waiting:
                break
            record, future = waiting.popleft()
            try:
                media = future.result()
            except MediaError as error:
                media = error
            except TimeoutError:
                media = MediaError(f"{record['media']} can't be decoded within {args.decode_timeout:g} s.")
            except ProcessExpired as error:
                media = MediaError(f"{record['media']} crashes the decoder (exit code {error.exitcode}).")
            yield record, media
    finally:
        pool.stop()
        pool.join()


# --- the prompt ---------------------------------------------------------------------------------------------

def build_prompt(record, template=PROMPT):
    """The one prompt of generation, SFT, RL and evaluation: question, options (once, choice 3),
    three parts, answer form."""
    return template.replace("{answer_form}", ANSWER_FORMS[record["problem_type"]]).replace(
        "{question}", question_text(record))


def load_template(prompt_file):
    """The prompt template: ours, or the text of `--prompt-file`, which must hold both placeholders."""
    if prompt_file is None:
        return PROMPT
    try:
        template = Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt file {prompt_file} can't be read ({error}).") from None
    if "{question}" not in template or "{answer_form}" not in template:
        raise UserError(f"The prompt file {prompt_file} must contain {{question}} and {{answer_form}}.")
    return template


# --- the pipeline -------------------------------------------------------------------------------------------

def add_judge_args(group, default):
    """Who says whether an observation is sufficient (Sec. 3.1 step 3, Eq. 3), and how answers are scored."""
    group.add_argument("--judge", default=default,
                       help="rule (exact, by the records' evidence; no LLM), anthropic:MODEL, "
                            "openai:MODEL@BASE_URL"
                            + (", or self (the frozen base)" if default == "self" else ""))
    group.add_argument("--judge-prompt-file", help="a text file with {question}, {answer} and {observation} "
                                                   "in place of our prompt to the judge")
    group.add_argument("--judge-cache", default="runs/judge-cache", help="folder of a remote judge's replies")
    group.add_argument("--judge-concurrency", type=positive, default=8, help="a process's requests in flight")
    group.add_argument("--judge-max-calls", type=positive, help="a process stops after this many requests")
    group.add_argument("--scoring", default="paper", choices=["paper", "lenient"],
                       help="how answers are compared")


def judge_from(args, generate=None):
    """The judge that the arguments of `add_judge_args` ask for."""
    return make_judge(args.judge, args.judge_prompt_file, generate, cache_dir=args.judge_cache,
                      concurrency=args.judge_concurrency, max_calls=args.judge_max_calls)


def print_stats(judge, name="judge"):
    """One line of what a judge or teacher cost; nothing for the rule, which costs nothing."""
    if judge.stats["calls"] or judge.stats["cache_hits"]:
        print(f"{name}: " + ", ".join(f"{value:.0f} {name.replace('_', ' ')}"
                                    for name, value in judge.stats.items()))


def get_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _, data = add_data_args(parser, "questions: JSON list or JSON Lines, .gz or plain, globs allowed")
    add_vision_args(parser)
    data.add_argument("--check-data", action="store_true",
                      help="only decode every medium once and write which can be used to "
                           f"<media root>/{MANIFEST}, which every stage then goes by")
    data.add_argument("--traces", help="raw traces made elsewhere: JSON Lines of {problem_id, output}")
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--teacher", help="the model of step 1, asked in place of --traces: "
                                             "anthropic:MODEL, or openai:MODEL@BASE_URL")
    algorithm.add_argument("--teacher-concurrency", type=positive, default=64,
                           help="questions in flight at most")
    algorithm.add_argument("--teacher-max-calls", type=positive,
                           help="the run stops after this many requests")
    algorithm.add_argument("--teacher-extra", type=json_object,
                           help="more fields of a request, as JSON (default: {\"temperature\": 0} for a "
                                "server named by its URL, none for the others, whose newer models refuse it)")
    algorithm.add_argument("--threshold", type=float, default=0.6,
                           help="least answer score that is kept (paper: 0.6)")
    add_judge_args(algorithm, default=None)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="seed of the draw of --limit")
    run.add_argument("--output", type=Path,
                     help="file for the kept records (default: runs/<model>/gen_cot/cot.jsonl)")
    args = parse_args(parser, {}, data_key="cot_data")
    args.output = args.output or args.run_dir / "gen_cot" / "cot.jsonl"
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: name the file in it.")
    return args


def load_traces(path):
    """Raw traces by problem_id (as str). Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"No traces file {path}: pass --traces, JSON Lines of {{problem_id, output}}.")
    traces = {}
    for i, row in enumerate(read_json(path)):
        if not isinstance(row, dict) or "problem_id" not in row or not isinstance(row.get("output"), str):
            raise UserError(f"{path}, record {i}: a trace needs problem_id and output (a text).")
        traces[str(row["problem_id"])] = row["output"]
    return traces


def verify(records, outputs, judge, threshold=0.6, scoring="paper"):
    """Steps 2 and 3 (Sec. 3.1): why each record's trace is rejected, None where it is kept;
    and the answer scores.

    Args:
        outputs: the raw traces, list of str, None where there is none.

    Returns (reasons, scores): list of str (one of REASONS) or None, list of float.
    """
    reasons, scores = [], []
    for record, text in zip(records, outputs, strict=True):
        scores.append(0.0)
        if text is None:
            reasons.append("no trace")
        elif format_rewards(text) != (1.0, 1.0):
            reasons.append("broken template")
        else:
            scores[-1] = accuracy_reward(record["problem_type"], text, record["solution"], scoring,
                                         record.get("options"))
            reasons.append(None if scores[-1] >= threshold else "wrong answer")
    left = [i for i, reason in enumerate(reasons) if reason is None]
    observations = [parse_trace(outputs[i]).observation for i in left]
    for i, verdict in zip(left, judge([records[i] for i in left], observations)):
        reasons[i] = {True: None, False: "insufficient observation", None: "judge unknown"}[verdict]
    return reasons, scores


REASONS = ["unreadable medium", "no trace", "broken template", "wrong answer", "insufficient observation",
           "judge unknown"]


def kept_record(record, output, score):
    """A record of the official release's schema from a question and its verified trace."""
    trace = parse_trace(output)
    kept = {k: v for k, v in record.items() if k != "media"}
    return dict(kept, answer=record["solution"].replace("<answer>", "").replace("</answer>", ""),
                output=output, reward=score, observation=f"<observation>{trace.observation}</observation>",
                process=f"<think>{trace.think}</think>")


def write_jsonl(path, rows):
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomically(path, text):
    """Write a file that appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a pair: \ud83d, as in JSON
    os.replace(partial, path)


class Journal:
    """What a run has paid for: JSON Lines that are only appended to, each flushed before it is made use of.

    A line is {question, problem_id, output}, a reply of the teacher; or {question, settings, score, reason},
    what steps 2 and 3 under these settings (judge, threshold, scoring) made of it, reason null where kept.
    """

    def __init__(self, path):
        self.outputs, self.checks, self.lock = {}, {}, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            whole = 0
            for i, line in enumerate(file):
                if not line.endswith(b"\n"):  # killed while writing it
                    file.truncate(whole)
                    break
                whole += len(line)
                try:
                    self.remember(json.loads(line))
                except (ValueError, LookupError, TypeError):
                    raise UserError(f"{path}, line {i + 1} is no row of a journal: delete the line, or move "
                                    "the file away to ask everything anew.") from None
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")

    def remember(self, row):
        if "output" in row:
            self.outputs[row["question"]] = row["output"]
        else:
            self.checks[row["question"], row["settings"]] = row["score"], row["reason"]

    def write(self, **row):
        with self.lock:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
            self.remember(row)


def teacher_content(record, num_frames, max_pixels):
    """The media part of a request (choice 4): time stamps (of video) and JPEGs, in time order."""
    frames, fps = read_media(record, num_frames, max_pixels)
    parts = []
    for i, frame in enumerate(frames):
        if fps is not None:
            parts.append(dict(type="text", text=f"{i * len(frames) / fps / (len(frames) - 1):.1f} s:"))
        jpeg = io.BytesIO()
        Image.fromarray(frame).save(jpeg, "JPEG", quality=90)
        parts.append(dict(type="image", jpeg=jpeg.getvalue()))
    return parts


def trace_question(record, content, template, teacher, judge, journal, args):
    """(score, reason) of one question after steps 1 to 3; the teacher is not asked where content is None."""
    key, settings = record["check"]
    if content is not None:
        prompt = dict(type="text", text=build_prompt(record, template))
        output = teacher.ask_here([*content, prompt])
        if output is None:
            return 0.0, "no trace"
        journal.write(question=key, problem_id=record.get("problem_id"), output=output)
    (reason,), (score,) = verify([record], [journal.outputs[key]], judge, args.threshold, args.scoring)
    if reason != "judge unknown":
        journal.write(question=key, settings=settings, score=score, reason=reason)
    return score, reason


def verdict_settings(args, records):
    """For each record, what a verdict of steps 2 and 3 depends on beside the trace, as the journal has it."""
    prompt = Path(args.judge_prompt_file).read_text(encoding="utf-8") if args.judge_prompt_file else None
    run = f"{args.judge} {digest(prompt)[:12] if prompt else ''} {args.threshold} {args.scoring}"
    return [f"{run} {digest([record['solution'], record['options'], record.get('evidence')])[:12]}"
            for record in records]


@contextlib.contextmanager
def one_core():
    """Within the block the threads that this one starts share its core. What they do is wait for replies, and
    handing the interpreter's lock from core to core costs more than a second core gives."""
    keep_to({sorted(CORES)[os.getpid() % len(CORES)]})
    try:
        yield
    finally:
        keep_to(CORES)


def keep_to(cores):
    """Run on these cores only, where the system lets a process choose (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, cores)


def generate(records, teacher, judge, journal, args):
    """All three steps for each record, `--teacher-concurrency` at a time, through the journal.

    Returns (outputs, reasons, scores), lists in the order of the records. Raises UserError where the teacher
    or the judge refuses ten times in a row or has had its calls, or where the journal can't be written, once
    the questions in flight are through.
    """
    template, results, refusals = load_template(args.prompt_file), {}, 0
    keys = [digest([args.teacher, args.teacher_extra, build_prompt(record, template), record["path"],
                    args.num_frames, args.max_pixels])[:24] for record in records]
    checks = list(zip(keys, verdict_settings(args, records)))
    todo = {check[0]: dict(record, check=check) for check, record in zip(checks, records)
            if check not in journal.checks}
    unasked = [record for key, record in todo.items() if key not in journal.outputs]
    answered = [record for key, record in todo.items() if key in journal.outputs]
    jobs = itertools.chain(((record, None) for record in answered),
                           read_ahead(unasked, args, teacher_content))
    tally = collections.Counter(journal.checks[check][1] or "kept"
                                for check in set(checks) if check in journal.checks)
    shown = 0.0

    def settle(record, future):
        nonlocal refusals, shown
        check = record["check"]
        try:
            results[check], refusals = future.result(), 0
        except UserError as error:  # the judge's, where there is a trace
            results[check] = 0.0, "judge unknown" if check[0] in journal.outputs else "no trace"
            refusals += 1
            tqdm.write(f"problem_id {record.get('problem_id')}: {error}")
            if refusals == 10 or isinstance(error, CallLimit):
                raise
        tally[results[check][1] or "kept"] += 1
        if time.monotonic() - shown > 1 or bar.n + 1 == bar.total:  # more often costs more than the settling
            shown = time.monotonic()
            tokens = {f"tokens {way}": teacher.stats[f"tokens_{way}"] for way in ("in", "out")}
            bar.set_postfix(dict(sorted(tally.items())) | tokens, refresh=False)
        bar.update()

    with one_core(), ThreadPoolExecutor(args.teacher_concurrency) as pool, tqdm(
            total=len(set(checks)), initial=tally.total(), desc="questions", smoothing=0.02) as bar:
        waiting = collections.deque()
        try:
            for record, content in jobs:
                if isinstance(content, MediaError):
                    tqdm.write(f"skipped: {content}")
                    results[record["check"]] = 0.0, "unreadable medium"
                    tally["unreadable medium"] += 1
                    bar.update()
                    continue
                waiting.append((record, pool.submit(
                    trace_question, record, content, template, teacher, judge, journal, args)))
                if len(waiting) == 8 * args.teacher_concurrency:  # decoded and not yet answered, in memory
                    settle(*waiting.popleft())
            while waiting:
                settle(*waiting.popleft())
            for check, record in zip(checks, records):  # a question asked above, with another gold answer
                if check not in results and check not in journal.checks:
                    if check[0] in journal.outputs:
                        record = dict(record, check=check)
                        settle(record, pool.submit(
                            trace_question, record, None, template, teacher, judge, journal, args))
                    else:
                        results[check] = results[todo[check[0]]["check"]]
        except BaseException as error:  # Ctrl-C too: ask nothing more, journal what is on its way
            pool.shutdown(cancel_futures=True)
            if not isinstance(error, (UserError, OSError)):
                raise
            raise UserError(f"Stopped: {str(error).removesuffix('.')}. The journal keeps "
                            f"{len(journal.outputs)} replies: run the same command to go on.") from None
    final = [results.get(check) or journal.checks[check] for check in checks]
    return ([journal.outputs.get(key) for key in keys], [reason for _, reason in final],
            [score for score, _ in final])


def print_yield(records, reasons, kept, scoring, path):
    """The paper's Table 3 for this run: questions, rejections by reason and what was kept, by problem and
    data type, and the words per segment (Fig. 10); on screen, and as JSON in `path`."""
    columns = ["questions"] + REASONS + ["kept"]
    table = {}
    print("".join(f"{c:>{len(c) + 3}}" for c in ["problem type          "] + columns))
    tally = collections.Counter()
    for record, reason in zip(records, reasons):
        for name in (f"{record['problem_type']}, {record['data_type']}", "all"):
            tally[name, "questions"] += 1
            tally[name, reason or "kept"] += 1
    for name in [*map(", ".join, itertools.product(PROBLEM_TYPES, ("image", "video"))), "all"]:
        table[name] = {column: tally[name, column] for column in columns}
        if tally[name, "questions"]:
            print(f"   {name:<22}" + "".join(f"{n:>{len(c) + 3}}" for c, n in table[name].items()))
    traces = [parse_trace(row["output"]) for row in kept]
    words = {name: round(sum(len(getattr(trace, name).split()) for trace in traces) / len(traces), 1)
             for name in ("observation", "think", "answer")}
    print("   words per kept trace: " + ", ".join(f"{name} {n}" for name, n in words.items()))
    write_atomically(path, json.dumps(dict(scoring=scoring, table=table, words=words), indent=1))


def main(args):
    if args.check_data:
        return check_data(args)
    if args.judge is None or (args.traces is None and args.teacher is None):
        raise UserError("gen_cot.py needs a teacher and a judge: pass --teacher or --traces, and --judge.")
    records = select_records(args, need_media=args.teacher is not None)
    judge = judge_from(args)
    if args.teacher:
        extra = args.teacher_extra
        if extra is None and args.teacher.startswith("openai:") and "@" in args.teacher:
            extra = dict(temperature=0)
        teacher = ChatClient(args.teacher, concurrency=args.teacher_concurrency, timeout=600, max_tokens=2048,
                             max_calls=args.teacher_max_calls, extra=extra, wants_think=True)
        journal = Journal(args.output.with_name("journal.jsonl"))
        outputs, reasons, scores = generate(records, teacher, judge, journal, args)
        print_stats(teacher, "teacher")
    else:
        traces = load_traces(args.traces)
        outputs = [traces.get(str(record.get("problem_id"))) for record in records]
        reasons, scores = verify(records, outputs, judge, args.threshold, args.scoring)
    kept = [dict(kept_record(record, output, score), scoring=args.scoring)
            for record, output, reason, score in zip(records, outputs, reasons, scores) if reason is None]
    if not kept:
        raise UserError(f"None of the {len(records)} traces was kept, so nothing was written: "
                        + ", ".join(f"{reasons.count(r)} {r}" for r in REASONS if r in reasons) + ".")
    print_yield(records, reasons, kept, args.scoring, args.output.with_name("yield.json"))
    print_stats(judge)
    write_jsonl(args.output, kept)
    print(f"{len(kept)} verified traces in {args.output}")


if __name__ == "__main__":
    main(get_args())
