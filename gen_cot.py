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

A run with a teacher can be killed at any moment and started again: every reply stands in traces.jsonl beside
the output before anything is made of it, and is not asked for again. Steps 2 and 3 are a pure function of
that file; what the judge said is in its cache.

Our choices where the paper is silent:
G1. Frames are sampled at 2 per second, T of them, between 4 and `--num-frames`, never more than the clip has,
    and rounded down to a multiple of two (a clip of one frame gives it twice): at T evenly spaced times from
    the middle of the first frame to the middle of the last, each time the frame that a player shows then.
    The sampled rate that later sets the positions is T over the duration of the pictures.
G2. Both sides of a frame are rounded to multiples of 28 (patch 14 × merge 2) within the pixel budget, aspect
    kept.
G3. The options stand once in the prompt: they are appended unless the question holds them as "A. text".
G4. The teacher gets each sampled frame as a JPEG after its time stamp, then the prompt of all stages. A
    question that it refuses or does not answer is "no trace", one on which the judge gives no verdict is
    "judge unknown", and the next run asks again.
"""
import argparse
import ast
import collections
import contextlib
import ctypes
import errno
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
import tempfile
import threading
import time
import tokenize
import zlib
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from rewards import (PROBLEM_TYPES, ChatClient, UserError, accuracy_reward, answer_score, correct_answer,
                     digest, format_rewards, gold_answer, label_options, load_prompt, make_judge, option_key,
                     parse_trace, question_text, visible, write_atomically, write_text)

MODELS = {"tiny": "data/toy/base", "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
          "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct"}
TINY = dict(data="data/toy/cot.jsonl", media_root="data/toy", traces="data/toy/traces.jsonl", judge="rule")


def get_args():
    parser, _, data = make_parser(__doc__, "data/VideoP2R-263k_rl.part*.json.gz", "questions")
    data.add_argument("--traces", help="raw traces, where there is no --teacher: JSON Lines of {problem_id, "
                                       "output}")
    add = parser.add_argument_group("algorithm").add_argument
    add("--teacher", help="anthropic:MODEL or openai:MODEL@BASE_URL (paper: Qwen2.5-VL-72B-Instruct)")
    add("--teacher-concurrency", type=positive, default=64, help="questions in flight at most")
    add("--teacher-max-calls", type=positive, help="the run stops after so many requests")
    add("--teacher-extra", type=json_object, help="more fields of a request, as JSON (default for a server "
        "named by its URL: {\"temperature\": 0}, the paper's; for others none, as newer models refuse it)")
    add("--threshold", type=number(0), default=0.6, help="least answer score that is kept (paper: 0.6)")
    add_judge_args(add, default=None)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(0, int), default=0, help="seed of the draw of --limit")
    add("--output", type=Path, help="file for the kept records (default: runs/<model>/gen_cot/cot.jsonl)")
    args = parse_args(parser, TINY, "gen_cot/cot.jsonl")
    if args.output.is_dir() or args.output.name == "traces.jsonl":
        raise UserError(f"--output {args.output} is a folder or the raw traces' file: name another file.")
    return args


def main(args):
    if args.judge is None or (args.traces is None and args.teacher is None):
        raise UserError("gen_cot.py needs a teacher and a judge: pass --teacher or --traces, and --judge.")
    check_writable(args.output.parent)
    ids = collections.Counter()
    records = select_records(args, need_media=args.teacher is not None, ids=ids)
    judge = judge_from(args, records)
    if args.teacher:
        extra = args.teacher_extra
        if extra is None and args.teacher.startswith("openai:") and "@" in args.teacher:
            extra = {"temperature": 0}
        teacher = ChatClient(args.teacher, concurrency=args.teacher_concurrency, timeout=600, max_tokens=2048,
                             max_calls=args.teacher_max_calls, extra=extra)
        outputs = generate(records, teacher, args)
        print_stats("teacher", teacher)
    else:
        traces, outputs = load_traces(args.traces), []
        for record in records:
            number = str(record.get("problem_id"))  # counts only where no other record of all files has it
            by_number = traces.get(number) if ids[number] == 1 else None
            outputs.append(traces.get(question_key(record), by_number))
    reasons, scores = verify(records, outputs, judge, args.threshold, args.scoring)
    kept = [kept_record(record, output, score, args.scoring)
            for record, output, reason, score in zip(records, outputs, reasons, scores) if reason is None]
    if not kept:
        raise UserError(f"None of the {len(records)} traces was kept, so nothing was written: "
                        + ", ".join(f"{reasons.count(r)} {r}" for r in REASONS if r in reasons) + ".")
    print_yield(records, reasons, kept, args.scoring, args.output.with_name("yield.json"))
    print_stats("judge", judge)
    write_jsonl(args.output, kept)
    print(f"{len(kept)} verified traces in {args.output}")


# --- step 1: a teacher's raw traces -------------------------------------------------------------------------

def generate(records, teacher, args):
    """Step 1: the raw trace (str) of each record; None without a reply, MediaError for an unreadable medium.

    Every reply is appended to traces.jsonl beside the output as it comes, a row {question, request,
    problem_id, output}: `question` names the question, for --traces; `request` also holds teacher, prompt and
    frames, and what stands there for the same request is not asked again. Raises UserError, once the requests
    in flight are through, where the teacher refuses or the first 30 replies all break the template.
    """
    path, template = args.output.with_name("traces.jsonl"), load_template(args)
    file, lock, counts = open_jsonl(path), threading.Lock(), collections.Counter()
    outputs = {row.get("request"): row["output"] for row in read_json(path)
               if isinstance(row, dict) and isinstance(row.get("output"), str)}
    keys = [digest([args.teacher, args.teacher_extra, build_prompt(record, template), record["path"],
                    args.num_frames, args.max_pixels])[:24] for record in records]
    todo = {key: record for key, record in zip(keys, records) if key not in outputs}  # each question once

    def ask(key, record, content):
        output = teacher.reply([*content, dict(type="text", text=build_prompt(record, template))])
        with lock:
            if output is not None:
                row = dict(question=question_key(record), request=key, problem_id=record.get("problem_id"),
                           output=output)
                file.write(json_line(row))
                file.flush()
                counts["came"] += 1
                counts["broken"] += format_rewards(bare_trace(output)) != (1.0, 1.0)
                if counts["came"] == counts["broken"] == 30:
                    teacher.refuse("None of the first 30 replies is in the template; the last one is "
                                   f"{output[:300]!r}.")
            bar.set_postfix(broken=counts["broken"], tokens=teacher.stats["tokens_out"], refresh=False)
            bar.update()
        return output

    def jobs():
        for key, (record, content) in zip(todo, read_ahead(todo.values(), args, teacher_content)):
            if teacher.stop.is_set():  # it refuses: no need to decode on
                return
            if isinstance(content, MediaError):
                tqdm.write(f"skipped: {content}")
                outputs[key] = content
            else:
                yield key, teacher.pool.submit(ask, key, record, content)

    asked = in_order(jobs(), 8 * args.teacher_concurrency)  # so many are decoded ahead
    with file, tqdm(total=len(todo), desc="questions") as bar:
        try:
            for key, job in asked:
                outputs[key] = job.result()
        except (UserError, OSError, KeyboardInterrupt) as error:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would lose what is paid for
            tqdm.write("Stopping: the replies on their way are waited for, 10 minutes at most.", sys.stderr)
            asked.close()
            teacher.close()  # ask nothing more; what is on its way is written
            signal.signal(signal.SIGINT, handler)
            with contextlib.suppress(OSError):  # a full disk says so once more
                file.close()
            reason = str(error).removesuffix(".") or "Ctrl-C"
            raise UserError(f"Stopped: {reason}. {path} keeps every reply: run the same command to go on, or "
                            "pass it as --traces to do without the rest.") from None
    teacher.report([outputs[key] for key in keys])
    return [outputs[key] for key in keys]


def question_key(record):
    """What tells a question from all others: problem_id does so within one file only."""
    return digest([record["problem"], record["options"], record["path"]])[:24]


def teacher_content(record, num_frames, max_pixels):
    """The media part of a request (G4): time stamps (of video) and JPEGs, in time order."""
    parts = []
    for stamp, jpeg in stamped_jpegs(*read_media(record, num_frames, max_pixels), quality=90):
        if stamp:
            parts.append(dict(type="text", text=f"{stamp}:"))
        parts.append(dict(type="image", jpeg=jpeg))
    return parts


def stamped_jpegs(frames, fps, quality, side=65_500):
    """(time stamp, JPEG) of each frame, made smaller where a side is over `side`, by default the most that a
    JPEG can have. The stamps go evenly from 0 to the clip's end; that of a picture is ""."""
    for i, frame in enumerate(frames):
        stamp = "" if fps is None else f"{i * len(frames) / fps / (len(frames) - 1):.1f} s"
        image, jpeg = Image.fromarray(frame), io.BytesIO()
        image.thumbnail((side, side))
        image.save(jpeg, "JPEG", quality=quality)
        yield stamp, jpeg.getvalue()


def load_traces(path):
    """Raw traces (str) by their question, else by problem_id (as str). UserError where one has two traces."""
    if not os.path.isfile(path):
        raise UserError(f"No traces file {path}: pass --traces, JSON Lines of {{problem_id, output}}.")
    traces = {}
    for i, row in enumerate(read_json(path)):
        if isinstance(row, BadLine):
            raise UserError(f"{path}: {row} Mend the line, or leave it out.")
        if not isinstance(row, dict) or "problem_id" not in row or not isinstance(row.get("output"), str):
            raise UserError(f"{path}, record {i}: a trace needs problem_id and output (a text).")
        own = re.fullmatch("[0-9a-f]{24}", str(row.get("question")))  # a question_key, from `generate`
        key = own[0] if own else str(row["problem_id"])
        if traces.setdefault(key, row["output"]) != row["output"]:
            raise UserError(f"{path}, record {i}: problem_id {row['problem_id']} has two traces: leave one "
                            "out.")
    return traces


# --- steps 2 and 3: what is kept ----------------------------------------------------------------------------

BEFORE_TRACE = re.compile(r"(?:\A\ufeff?|</[\w:]*think\w*>|</reasoning>|\[/THINK\]|◁/think▷|"
                          r"<\|\w+\|>(?:assistant)?)\s*(?:(?:```|~~~)\w*\s*)?(?=<observation>)")
AFTER_TRACE = re.compile(r"(?:```|~~~|</s>|<eos>|<end_of_turn>|<[|｜][\w▁]+[|｜]>)\Z")


def bare_trace(reply):
    """The trace in a teacher's reply, without what such models put around it: a closed block of thoughts, a
    fence, a stop token."""
    starts = [match.end() for match in BEFORE_TRACE.finditer(reply)]
    reply = reply[starts[-1]:] if starts else reply
    while (bare := AFTER_TRACE.sub("", reply.rstrip())) != reply:
        reply = bare
    return reply


REASONS = ["unreadable medium", "no trace", "broken template", "wrong answer", "insufficient observation",
           "judge unknown"]


def verify(records, outputs, judge, threshold=0.6, scoring="paper"):
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
    for i, verdict in zip(left, judge([records[i] for i in left], observations)):
        reasons[i] = {True: None, False: "insufficient observation", None: "judge unknown"}[verdict]
    return reasons, scores


def kept_record(record, output, score, scoring):
    """A record of the official release's schema from a question and its verified trace."""
    output = bare_trace(output).encode("utf-8", "ignore").decode()  # half a surrogate pair is no text
    trace = parse_trace(output)
    kept = {k: v for k, v in record.items() if k != "media"}
    return dict(kept, answer=gold_answer(record["solution"]), output=output, reward=score,
                observation=f"<observation>{trace.observation}</observation>",
                process=f"<think>{trace.think}</think>", scoring=scoring)


def print_yield(records, reasons, kept, scoring, path):
    """The paper's Table 3 for this run: questions, rejections by reason and what was kept, by problem and
    data type, and the words per segment (Fig. 10); on screen, and as JSON in `path`."""
    columns, tally, table = ["questions"] + REASONS + ["kept"], collections.Counter(), {}
    for record, reason in zip(records, reasons):
        for name in (f"{record['problem_type']}, {record['data_type']}", "all"):
            tally[name, "questions"] += 1
            tally[name, reason or "kept"] += 1
    print("   problem type          " + "".join(f"{c:>{len(c) + 3}}" for c in columns))
    for name in [*map(", ".join, itertools.product(PROBLEM_TYPES, ("image", "video"))), "all"]:
        table[name] = {column: tally[name, column] for column in columns}
        if tally[name, "questions"]:
            print(f"   {name:<22}" + "".join(f"{n:>{len(c) + 3}}" for c, n in table[name].items()))
    words = {}
    for part in ("observation", "think", "answer"):
        lengths = [len(getattr(parse_trace(row["output"]), part).split()) for row in kept]
        words[part] = round(sum(lengths) / len(lengths), 1)
    print("   words per kept trace: " + ", ".join(f"{part} {n}" for part, n in words.items()))
    write_text(path, json.dumps(dict(scoring=scoring, table=table, words=words), indent=1))


# === below: what every stage borrows ========================================================================

# --- arguments ----------------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag's default where it has one."""

    def _get_help_string(self, action):
        if action.default is None or action.nargs == 0:  # nothing to tell of a switch
            return action.help
        return super()._get_help_string(action)


def make_parser(description, data, data_help, num_frames=16, max_pixels=128):
    """(parser, group 'model', group 'data') with the flags that all stages have, in the groups' order."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="qwen2.5-vl-7b",
                       help=f"{', '.join(MODELS)}, a local folder or a hub id (org/name)")
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", default=data, help=f"{data_help}: JSON list or JSON Lines, plain or .gz, globs allowed")
    add("--media-root", default="data/Video-R1-data", help="folder that the records' paths are relative to")
    add("--limit", type=positive, help="use N of the records, drawn with --seed")
    add("--workers", type=positive, default=min(4, os.cpu_count() or 1),
        help="processes that decode media ahead of the model")
    add("--prompt-file", help="a text file with {question} and {answer_form} in place of our prompt")
    add = parser.add_argument_group("vision").add_argument
    add("--num-frames", type=positive, default=num_frames,
        help="most frames per video, at least 2 (paper: 16 for training, 32 for inference)")
    add("--max-pixels", type=positive, default=max_pixels, help="most pixels per frame of a video, in units "
        "of 28x28, one visual token per two frames (paper: 128 for training, 256 for inference); a picture "
        "has 256")
    return parser, model, group


def add_judge_args(add, default):
    """Who says whether an observation is sufficient (Sec. 3.1 step 3, Eq. 3), and how answers are scored."""
    add("--judge", default=default, help="rule (exact, by the records' evidence; no LLM), anthropic:MODEL, "
        "openai:MODEL@BASE_URL, or in pagrpo.py self, the frozen base (paper: Claude 3.7 Sonnet)")
    add("--judge-prompt-file", help="a file in our prompt's place, with {question}, {answer}, {observation}")
    add("--judge-max-calls", type=positive, help="a process stops after so many requests to the judge")
    add("--scoring", default="paper", choices=["paper", "lenient"], help="how answers are compared")


def parse_args(parser, tiny, output):
    """The command line, with `tiny` for defaults where that is the model; adds base, run_dir and, by default
    within it, output. Raises UserError for an unknown model."""
    parser.epilog = "--model tiny sets other defaults: " + ", ".join(
        f"{name.replace('_', '-')} {value}" for name, value in tiny.items())
    if parser.parse_known_args()[0].model == "tiny":
        parser.set_defaults(**tiny)
    args = parser.parse_args()
    if args.model == "tiny" and not os.path.isdir(MODELS["tiny"]):
        raise UserError(f"There is no {MODELS['tiny']} here: run it in the clone, {Path(__file__).parent}.")
    if args.model not in MODELS and not os.path.isdir(args.model) and args.model.count("/") != 1:
        raise UserError(f"Unknown model {args.model!r}: pass one of {', '.join(MODELS)}, a local folder or a "
                        "hub id (org/name).")
    args.base, args.run_dir = MODELS.get(args.model, args.model), Path("runs") / Path(args.model).name
    args.output = args.output or args.run_dir / output
    script = Path(__file__).parent / "data/toy/prepare.py"
    if args.model == "tiny" and args.data == tiny["data"] and not (script.parent / "test.jsonl").exists():
        print("The toy data is not there yet: preparing it.", flush=True)
        if subprocess.run([sys.executable, str(script)]).returncode:
            raise UserError("The toy data could not be prepared: see above.")
    return args


def number(low, kind=float):
    """The type of a flag that is a finite number from `low` on."""
    def parse(text):  # raises ValueError, too
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no number from {low} on")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's sentence
    return parse


positive = number(1, int)


def json_object(text):
    """The type of a flag that is a JSON object."""
    return dict(json.loads(text))


def judge_from(args, records, generate=None, **client_options):
    """The judge that the arguments of `add_judge_args` ask for. A remote one is tried on an easy question,
    which no cache knows. Raises UserError where it gives no verdict."""
    judge = make_judge(args.judge, args.judge_prompt_file, generate, cache_dir="runs/judge-cache",
                       max_calls=args.judge_max_calls, **client_options)
    if args.judge == "rule" and not all(record.get("evidence") for record in records):
        print("Not all records have `evidence`: of these --judge rule says only whether every word of the "
              "correct answer stands in the observation.")
    trial = dict(problem=f"What colour is the car? ({time.time()})", problem_type="free-form", solution="red")
    if args.judge not in ("rule", "self") and judge([trial], ["The car is red."]) == [None]:
        raise UserError(f"The judge {args.judge} gave no verdict on a question of trial: see above.")
    return judge


def run_script(main, get_args):
    """A script from its command line on. Ctrl-C, SIGTERM, a full or read-only disk end it in one sentence,
    and a terminal that lacks a character shows another."""
    for screen in (sys.stdout, sys.stderr):
        screen.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(get_args())
    except KeyboardInterrupt:
        raise UserError("Stopped.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise UserError(f"{error.filename or 'A file'} can't be written: {error.strerror}.") from None


def check_writable(folder):
    """Makes the folder. Raises UserError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"Nothing can be written to {folder} ({error.strerror}): pass another "
                        "--output.") from None


def move_aside(folder):
    """Keeps what an earlier run left in a folder, under another name."""
    name = next(name for n in itertools.count(1) if not os.path.exists(name := f"{folder}.{n}"))
    try:
        os.rename(folder, name)
    except OSError as error:  # a mount, for example
        raise UserError(f"{folder} holds an earlier run and can't be moved aside ({error.strerror}): pass "
                        "another --output.") from None
    print(f"{folder} held an earlier run, which is now in {name}.")


def print_stats(name, client):
    """One line of what a remote judge or teacher cost."""
    if stats := getattr(client, "stats", None):
        print(f"{name}: " + ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in stats.items()))


# --- records ------------------------------------------------------------------------------------------------

MAX_BAD = 0.05  # share of bad records that is left out; more says that something else is wrong with the file


def load_records(paths, media_root=None, left_out=()):
    """Read records from JSON lists or JSON Lines, plain or gzip.

    A record that can't be used is left out; of each reason the first is named, with file and index, and their
    number.

    Args:
        paths: a path, a glob pattern, or a list of them; the files of a pattern are read in sorted order.
        media_root: folder of the media; where given, each record gets `media`, its medium's path below it.
        left_out: problem types of records that are counted and left out.

    Returns:
        list of dict with the data set's field names: `problem_id, problem, data_type, problem_type, options`
        (list of str), `solution` (with its answer tags), `path`, `data_source`, and whatever else the file
        carries.

    Raises:
        UserError: no such file, not JSON, or more than MAX_BAD of the records are bad.
    """
    files = []
    for pattern in [paths] if isinstance(paths, (str, Path)) else paths:
        found = [str(pattern)] if os.path.exists(pattern) else sorted(glob.glob(str(pattern)))
        if not found:
            raise UserError(f"No data file {pattern}: pass --data, run the stage before, or see the README "
                            "on what to download and where to.")
        files += found
    records, bad, others = [], {}, 0
    for file in files:
        rows = read_json(file)
        if not rows:
            raise UserError(f"{file} holds no records: leave it out, or download or make it again.")
        for i, record in enumerate(rows):
            if isinstance(record, dict) and str(record.get("problem_type")).strip().lower() in left_out:
                others += 1
                continue
            try:
                records.append(parse_record(record, f"{file}, record {i}", media_root))
            except UserError as error:
                reason = re.sub(r"""'.*'|".*"|\d+""", "…", str(error).partition(f"record {i}")[2])
                bad.setdefault(reason, []).append(str(error))
    if others:
        print(f"left out: {others} records of type {', '.join(left_out)}.")
    lost = sum(map(len, bad.values()))
    if not records and not lost:
        raise UserError(f"{' '.join(files)} holds none but these: there is nothing to do.")
    for examples in bad.values():
        print(f"left out: {examples[0]}" + f" {len(examples)} such records." * (len(examples) > 1))
    if not records or lost > MAX_BAD * (len(records) + lost):
        raise UserError(f"{lost} of the {len(records) + lost} records in {' '.join(files)} can't be used: "
                        "mend the file, or leave them out of it.")
    return records


class BadLine(str):
    """What is wrong with a line of a JSON Lines file."""


def read_json(file):
    """The list of objects in a JSON or JSON Lines file, plain or gzip; a BadLine for each line that is
    none."""
    try:
        with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as f:
            text = f.read()
        if text.lstrip().startswith("["):
            return json.loads(text, parse_constant=no_number)
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"{file} can't be read ({error}): download or make it again, in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}): it begins {text[:60]!r}.") from None
    rows = []
    for n, line in enumerate(text.split("\n"), 1):  # not at U+2028 and its like
        if line.strip():
            try:
                rows.append(json.loads(line, parse_constant=no_number))
            except (ValueError, RecursionError) as error:
                rows.append(BadLine(f"line {n} is no JSON ({error})."))
    if rows and all(isinstance(row, BadLine) for row in rows):
        raise UserError(f"{file} is neither a JSON list nor JSON Lines: it begins {text[:60]!r}.")
    return rows


def no_number(name):
    """NaN, as pandas writes it where there is nothing, is read as null."""


def parse_record(record, where, media_root=None):
    """One record with every field in its one form; `where` names it in errors. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: " + (record if isinstance(record, BadLine) else
                                        f"expected an object with fields, found {type(record).__name__}."))
    for field in ("problem", "problem_type", "data_type", "path"):
        if not isinstance(record.get(field), str) or not record[field]:
            raise UserError(f"{where}: the field {field} is missing or not a text.")
    for field in ("output", "observation", "process"):
        if not isinstance(record.get(field) or "", str):
            raise UserError(f"{where}: the field {field} is not a text.")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise UserError(f"{where}: it holds half a surrogate pair, or is nested too deeply.") from None
    # "frame" is MVBench's word for a folder of frames
    kinds = {kind.lower(): kind for kind in (*PROBLEM_TYPES, "image", "video")} | {"frame": "video"}
    kind, data_type = (kinds.get(record[field].strip().lower()) for field in ("problem_type", "data_type"))
    if kind not in PROBLEM_TYPES:
        raise UserError(f"{where}: unknown problem_type {record['problem_type']!r}, "
                        f"known are {', '.join(PROBLEM_TYPES)}.")
    if data_type not in ("image", "video"):
        raise UserError(f"{where}: data_type is {record['data_type']!r}, not image or video.")
    evidence = record.get("evidence") or []
    if not isinstance(evidence, (str, list)) or not all(isinstance(item, str) for item in evidence):
        raise UserError(f"{where}: the field evidence is no text or list of texts.")
    record = dict(record, problem_type=kind, data_type=data_type,
                  options=parse_options(record.get("options"), where),
                  problem=visible(re.sub("<(image|video)>", "", record["problem"])))
    if not record["problem"]:
        raise UserError(f"{where}: the field problem holds no question.")
    record["solution"] = parse_solution(record, where)
    if media_root is not None:
        record["media"] = media_path(media_root, record["path"], where)
    return record


def parse_solution(record, where):
    """The gold answer with its tags, from a text, number or boolean; an option's letter for its text."""
    solution = next((record[f] for f in ("solution", "answer") if record.get(f) not in (None, "")), None)
    if not isinstance(solution, (str, int, float)):
        raise UserError(f"{where}: the field solution is missing or not a text.")
    if isinstance(solution, float) and solution.is_integer():  # pandas' way to write 3 beside a gap
        solution = int(solution)
    solution = visible(solution if isinstance(solution, str) else json.dumps(solution))
    letter, _ = correct_answer(dict(record, solution=solution))
    if not record["options"]:  # they may stand in the question
        letter = option_key(gold_answer(solution), [])
    if record["problem_type"] == "multiple choice" and re.fullmatch("[A-N]", letter):
        return f"<answer>{letter}</answer>"
    return solution if "<answer>" in solution else f"<answer>{solution}</answer>"


def parse_options(options, where):
    """Options as a list of str, each with its letter, from a list, null, an empty string, or a list printed
    as JSON or Python."""
    bad, printed = UserError(f"{where}: the options are no list of texts: {str(options)[:80]!r}."), options
    if isinstance(options, str) and options.strip():
        try:
            options = json.loads(options)
        except (ValueError, RecursionError):
            try:
                options = ast.literal_eval(options)  # parses literals only, evaluates nothing
                tokens = tokenize.generate_tokens(io.StringIO(printed).readline)
                if sum(token.type == tokenize.STRING for token in tokens) > len(options or []):
                    raise bad  # numpy prints no commas, and Python joins such texts
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
                raise bad from None
    options = options or []
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, (str, int, float)) for o in options):
        raise bad
    if len(options) > 14:
        raise UserError(f"{where}: it has {len(options)} options, more than the letters A to N.")
    return label_options([visible(str(option)) for option in options])


def media_path(media_root, path, where):
    """The record's path below the media root, with or without a leading `Evaluation/`, or a folder of frames
    of that name without its suffix; it can't leave the root."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        raise UserError(f"{where}: the path {path!r} leaves the media root.")
    full = f"{media_root}/{'/'.join(parts)}"
    other = f"{media_root}/{'/'.join(parts[1:] if parts[:1] == ['Evaluation'] else ['Evaluation', *parts])}"
    names = [full, other, os.path.splitext(full)[0], os.path.splitext(other)[0]]
    return next((name for name in names if os.path.exists(name)), full)


def select_records(args, need_media=True, ids=None):
    """The records that a stage works on: loaded, their media there if needed, and of these --limit drawn;
    `ids` counts the problem_ids of all. Raises UserError where none is left."""
    records = load_records(args.data, args.media_root)
    if ids is not None:
        ids.update(str(record.get("problem_id")) for record in records)
    kept = [record for record in records if not need_media or os.path.exists(record["media"])]
    if not kept:
        raise UserError(f"None of the {len(records)} records has its medium below {args.media_root}: pass "
                        "--media-root, or see the README on what to download and where to.")
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} of {len(records)} records left out: their media are not below "
              f"{args.media_root}.")
    kept = draw(kept, args.limit, args.seed)
    print(f"{len(kept)} of {len(records)} records of {args.data}")
    if "scoring" in args:
        name_lost_golds(kept, args.scoring)
    return kept


def draw(records, limit, seed):
    """`limit` of the records, drawn with this seed, in their order; None: all."""
    if limit is None or limit >= len(records):
        return records
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))]


def name_lost_golds(records, scoring):
    """Says how many gold answers score 0 against themselves, so that nothing can ever match them."""
    lost = collections.defaultdict(list)
    for record in records:
        kind, gold = record["problem_type"], gold_answer(record["solution"])
        score = answer_score(kind, gold, gold, scoring, record["options"])
        no_option = kind == "multiple choice" and record["options"] and not correct_answer(record)[0]
        if not score or no_option or "answer>" in gold.lower():  # the last: a tag that isn't closed
            lost[kind].append(record)
    for kind, some in lost.items():
        print(f"{len(some)} gold answers of type {kind} can't be matched by any answer, for example that of "
              f"problem_id {some[0].get('problem_id')!r}, {gold_answer(some[0]['solution'])!r}.")


def json_line(row):
    """A row of a JSON Lines file, as bytes; half a surrogate pair is written as \\ud83d, as in JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_jsonl(path, rows):
    """A JSON Lines file of these rows, whole or not at all."""
    with write_atomically(path) as partial, open(partial, "wb") as file:
        file.writelines(map(json_line, rows))


def open_jsonl(path):
    """A JSON Lines file to append to, in bytes; a last line that a kill tore is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab+")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


# --- frames -------------------------------------------------------------------------------------------------

FACTOR = 28  # one visual token covers 28 × 28 pixels: patches of 14, merged two by two
IMAGE_PIXELS = (4 * FACTOR**2, 256 * FACTOR**2)  # least and most pixels of a still image
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_IMAGE = 64_000_000  # pixels of an image file, of which each takes up to 16 bytes while it is read
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,asf,flv,ogg,gif,h264,hevc,ivf,dv,mxf,rm"
SEEK_OVER = 32  # frames; to jump over fewer costs more than to decode them
DECODE_TIMEOUT = 60  # seconds for one medium


class MediaError(Exception):
    """A medium that can't be read, with the reason in one sentence; it costs its one record."""

    def __init__(self, sentence):
        super().__init__(visible(sentence))


def sample_indices(starts, end, num_frames=16, fps=2.0, min_frames=4):
    """Indices, int64 (T,), of the frames that a player shows at T evenly spaced times, from the middle of the
    first to the middle of the last (G1). Of N frames at a constant rate: linspace(0, N - 1, T), rounded.

    Args:
        starts: (N,) seconds at which each frame appears, ascending. end: second at which the last one goes.
        num_frames: most frames. fps: frames wanted per second.
    """
    edges = np.append(starts, end)
    wanted = min(max(round((end - edges[0]) * fps), min_frames), num_frames, max(len(starts), 2))
    times = np.linspace(edges[:2].mean(), edges[-2:].mean(), max(wanted // 2 * 2, 2))
    return np.searchsorted(edges, times, side="right") - 1


def fit_size(height, width, max_pixels, min_pixels=IMAGE_PIXELS[0]):
    """(height, width) as multiples of 28 with min_pixels ≤ area ≤ max_pixels and the aspect kept (G2). With
    max_pixels below 16 · 28² rounding can miss either bound."""
    h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        longest = max_pixels // FACTOR**2 * FACTOR  # that a strip one block wide may be
        h, w = (min(max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR), longest)
                for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width))
    return h, w


def read_frames(path, num_frames=16, max_pixels=128 * FACTOR**2):
    """Sample and decode frames of a video as a player shows them, turned and stretched as the file says (G1).

    Returns:
        frames: uint8 (T, H, W, 3), T even, H and W multiples of 28 with H·W ≤ max_pixels.
        fps: float, sampled frames per second of the clip, whose duration is that of its pictures alone.

    Raises:
        MediaError: the file can't be decoded, or its pictures end well before their stream's own duration.
    """
    try:
        with open_video(path) as (container, stream):
            stamps = [(packet.pts, packet.duration, packet.is_keyframe) for packet in container.demux(stream)
                      if packet.size and not packet.is_discard]
            clip, promised = Timeline(stamps, stream), promised_end(container, stream)
        frames = pick_frames(path, clip, num_frames, max_pixels)
        if frames is None:  # the frames have other time stamps than their packets, or none: decode twice
            with open_video(path) as (container, stream):
                stamps = [(frame.pts, frame.duration, False) for frame in container.decode(stream)]
                clip = Timeline(list(continue_clock(stamps, stream)), stream)
            frames = pick_frames(path, clip, num_frames, max_pixels)
        seconds, lost = clip.end - clip.starts[0], promised - clip.end
        if lost > 0.05 * (seconds + lost):
            raise ValueError(f"it is cut short: {lost:.1f} of its {seconds + lost:.1f} s are missing")
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise MediaError(f"{path} can't be decoded ({type(error).__name__}: {error}).") from None
    return np.stack(frames), len(frames) / seconds


@contextlib.contextmanager
def open_video(path):
    """(container, stream) of a video file's pictures: never its cover, no format that names other files."""
    options = dict(format_whitelist=VIDEO_FORMATS, protocol_whitelist="file")
    with av.open(str(path), options=options) as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("it holds no pictures")  # but at most the cover of a sound file
        stream.codec_context.thread_count = 1  # there are other workers
        yield container, stream


class Timeline:
    """When a clip's frames appear, from their (pts, duration, is keyframe): `ticks` ascending, the same in
    seconds as `starts`, and its `end`; without time stamps they follow each other at the stream's rate."""

    def __init__(self, stamps, stream):
        step = float(1 / (stream.average_rate or 25) / stream.time_base)
        if not stamps:
            raise ValueError("it holds no frames")
        if any(pts is None for pts, _, _ in stamps):
            stamps = [(i * step, step, False) for i in range(len(stamps))]
        stamps = sorted(stamps)
        self.ticks = [pts for pts, _, _ in stamps]
        self.keyframes = [i for i, (_, _, is_keyframe) in enumerate(stamps) if is_keyframe]
        self.starts = np.array(self.ticks) * float(stream.time_base)
        self.end = (self.ticks[-1] + (stamps[-1][1] or step)) * float(stream.time_base)


def continue_clock(stamps, stream):
    """The (pts, duration, is keyframe) of frames in the order of decoding, where recordings were joined: if
    the clock jumps back by more than a second, what follows begins where the frame before ended."""
    shift, end = 0, None
    for pts, duration, is_keyframe in stamps:
        if None not in (pts, end) and (end - pts - shift) * stream.time_base > 1:
            shift = end - pts
        if pts is not None:
            pts += shift
            end = pts + (duration or 0)
        yield pts, duration, is_keyframe


def promised_end(container, stream):
    """The second at which a stream says that it ends; 0 where it doesn't say, or means the sound, too."""
    if container.format.name == "asf":
        return 0
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    told = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska
    return 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3]) if told else 0


def pick_frames(path, clip, num_frames, max_pixels):
    """The sampled frames of a clip, uint8 (H, W, 3) each, resized as they are decoded. Keyframes are sought,
    and None says that a frame is not where its packet said; without keyframes, frames are counted."""
    frames, size, index = [], None, {pts: i for i, pts in enumerate(clip.ticks)}
    at, to_rgb = -1, VideoReformatter()  # the index of the frame decoded last, None right after a seek
    with open_video(path) as (container, stream):
        decoded = container.decode(stream)
        back = 2 if container.format.name in ("mpegts", "mpeg") else 1  # their seeks land a keyframe too late
        for i in sample_indices(clip.starts, clip.end, num_frames):
            before = [k for k in clip.keyframes if k <= i]
            if len(before) >= back and before[-1] > at + SEEK_OVER:
                container.seek(clip.ticks[before[-back]], stream=stream)
                decoded, at = container.decode(stream), None
            while at is None or at < i:
                frame = next(decoded, None)
                if frame is None or at is None and frame.pict_type != av.video.frame.PictureType.I:
                    return None  # its packet only says keyframe
                place = index.get(frame.pts) if clip.keyframes else at + 1
                if place is None or place > i or at not in (None, place - 1):
                    return None
                at = place
            pixels, turned = turn_pixels(to_rgb.reformat(frame, format="rgb24").to_ndarray(), frame)
            if size is None:  # of all frames, even if theirs changes on the way
                sides = [frame.height, frame.width * float(stream.sample_aspect_ratio or 1)]
                size = fit_size(*(sides[::-1] if turned else sides), max_pixels)
            frames.append(np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.BICUBIC)))
    return frames


def turn_pixels(pixels, frame):
    """(pixels as the frame's display matrix turns and mirrors them, whether the sides changed places); a tilt
    counts as the nearest quarter."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
    turned = abs(b) > abs(a)
    if turned:
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]), turned


TURNS = (None, Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
         Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90)  # of EXIF's orientations 1 to 8


def read_image(path, max_pixels=IMAGE_PIXELS[1]):
    """A still image as frames uint8 (1, H, W, 3), turned as its EXIF data say, sides as in `fit_size`. Raises
    MediaError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE:
                raise ValueError(f"{image.width} x {image.height} pixels are too many: make it smaller")
            if image.mode in ("I", "F"):
                raise ValueError("what is white in 32 bits is not known: save it with 8 or 16 bits a channel")
            image.load()  # after which a TIFF, which Pillow turns itself, doesn't ask for it again
            orientation = 1
            with contextlib.suppress(Exception):  # broken tags spoil no picture
                orientation = int(image.getexif().get(0x0112, 1))
            if orientation in range(2, 9):
                image = image.transpose(TURNS[orientation - 1])
            if image.mode.startswith("I;16"):  # convert("L") alone would clip it to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:  # on white, where what it shows is usually meant to be seen
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            height, width = fit_size(image.height, image.width, max_pixels)
            return np.asarray(image.convert("RGB").resize((width, height), Image.BICUBIC))[None]
    except Exception as error:  # Pillow's plug-ins raise many kinds on damaged files
        raise MediaError(f"{path} can't be read as an image ({type(error).__name__}: {error}).") from None


def read_folder(path, num_frames, max_pixels, rate=3.0):
    """As `read_frames`, of a folder of pictures at `rate` per second in the order of their names, in which 10
    comes after 9."""
    names = [entry.name for entry in os.scandir(path) if not entry.name.startswith(".")]  # .DS_Store, ._1.jpg
    formats = Image.registered_extensions()
    names = [name for name in names if formats.get(Path(name).suffix.lower()) in IMAGE_FORMATS]
    names.sort(key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(20), name))
    if not names:
        raise MediaError(f"{path} is a folder without pictures.")
    wanted = sample_indices(np.arange(len(names)) / rate, len(names) / rate, num_frames)
    frames = [read_image(os.path.join(path, names[i]), max_pixels)[0] for i in wanted]
    size = frames[0].shape[1::-1]  # of all of them
    frames = [np.asarray(Image.fromarray(frame).resize(size, Image.BICUBIC)) for frame in frames]
    return np.stack(frames), len(frames) * rate / len(names)


def read_media(record, num_frames=16, max_pixels=128):
    """The record's frames and sampled fps (None for an image);
    `max_pixels` in units of 28×28. Raises MediaError."""
    if record["data_type"] == "image":
        return read_image(record["media"]), None
    if os.path.isdir(record["media"]):
        return read_folder(record["media"], num_frames, max_pixels * FACTOR**2)
    return read_frames(record["media"], num_frames, max_pixels * FACTOR**2)


def init_worker():
    """What a worker process does first: no decoder chatter on the screen, errors go back to the parent as
    they are; Ctrl-C is the parent's to answer, whose end is its own, too; and no collecting of the parent's
    garbage: freeing a decoder waits for threads that it has."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    gc.freeze()


def read_ahead(records, args, read=read_media, timeout=None):
    """Decode the records' media in worker processes, ahead of whoever takes them; `records` may be endless.

    A medium that hangs or crashes its decoder costs its own record and one worker, which is replaced.

    Args:
        args: with num_frames, max_pixels (in units of 28×28), workers.

    Yields:
        (record, media) in the order of the records, where media is what `read` returns, or a MediaError.
    """
    # Forked workers start at once and share the parent's memory. Elsewhere than on Linux forking is unsafe,
    # and a new worker would import the whole script, torch included, if it knew where that is.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    if context.get_start_method() == "spawn" and read.__module__ != "__main__":
        vars(sys.modules["__main__"]).pop("__file__", None)
    pool = ProcessPool(max_workers=args.workers, context=context, initializer=init_worker)
    limit = timeout or DECODE_TIMEOUT
    jobs = ((record, pool.schedule(read, (record, args.num_frames, args.max_pixels), timeout=limit))
            for record in records)
    try:
        for record, job in in_order(jobs, 4 * args.workers):
            try:
                media = job.result()
            except MediaError as error:
                media = error
            except TimeoutError:
                media = MediaError(f"{record['media']} takes more than {limit:g} s to decode.")
            except ProcessExpired as error:
                media = MediaError(f"{record['media']} crashes the decoder (exit code {error.exitcode}).")
            except (OSError, MemoryError) as error:
                media = MediaError(f"{record['media']} can't be read ({type(error).__name__}: {error}).")
            yield record, media
    finally:
        pool.stop()
        pool.join()


def in_order(jobs, ahead):
    """The items of an iterator that begins a job with each, in order; `ahead` of them are under way while one
    is used."""
    waiting = collections.deque(itertools.islice(jobs, ahead))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(jobs, 1))


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


if __name__ == "__main__":
    run_script(main, get_args)
