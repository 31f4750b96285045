#!/usr/bin/env python3
"""What is wrong with a data set, told once, before a long run meets it: the stages trust their data.

    python data/check_data.py --data "data/VideoP2R-263k_rl.part*.json.gz" --output data/usable.jsonl
    python pagrpo.py --data data/usable.jsonl

Every record is parsed as the stages parse it, and every medium is read as they read it. A clip is decoded
besides from its first frame to its last: decoders paint over damage where they can, and a stage, which looks
at a few frames, would learn from what was painted. Here they stop at the damage that they notice, which a
single changed bit need not be.

Each finding is a line, and they are counted by kind:

    bad record        the stages leave it out
    unmatched gold    no answer can score with it: `1/2` as a number, an option that is not there
    part of a clip    it has a field such as `video_start`, which no stage reads: they see the whole clip
    missing medium
    damaged medium    it can't be decoded
    cut clip          its pictures end well before its own end (cut within a picture, it is a damaged medium)
    clock             its frames' times jump back, as where two recordings were joined

`--output` gets the records without a finding, as JSON Lines, which every stage takes as --data. Those of
`part of a clip` are among them.
"""
import collections
import glob
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages are a folder up

import gen_cot  # noqa: E402
from rewards import answer_score, correct_answer, gold_answer, strip_invisible, write_jsonl  # noqa: E402

LOST = 0.05  # share of a clip that may be missing at its end


@dataclass
class Args:
    data: str  # records: JSON or JSON Lines, plain or .gz, globs allowed
    media_root: str = "data/Video-R1-data"  # what the records' paths are relative to
    scoring: Literal["paper", "lenient"] = "paper"  # by which golds are compared with themselves
    workers: int = os.cpu_count() or 1  # processes that decode
    output: str | None = None  # file for the records without a finding
    num_frames: tyro.conf.Suppress[int] = 16  # of the reading as in the stages
    max_pixels: tyro.conf.Suppress[int] = 128


def get_args():
    return tyro.cli(Args, description=__doc__.partition("\n\n")[0])


def main(args):
    counts, records = collections.Counter(), []

    def tell(kind, what):
        counts[kind] += 1
        tqdm.write(strip_invisible(f"{kind}: {what}"))

    # the records
    files = sorted(glob.glob(args.data))
    assert files, f"no file {args.data}"
    for file in files:
        for i, row in enumerate(gen_cot.read_json(file)):
            where, used = f"{file}, record {i}", len(records)
            try:
                record = gen_cot.parse_record(row, args.media_root, lost_golds=True)
                if unmatched(record, args.scoring):
                    tell("unmatched gold", f"{where}, {record['problem_type']}: {record['solution']!r}")
                else:
                    records.append(record)
            except (LookupError, ValueError, TypeError, AttributeError, SyntaxError) as error:
                tell("bad record", f"{where}: {type(error).__name__} {error}")
            fields = [name for name in row if gen_cot.PART.fullmatch(name) and row[name] is not None]
            if len(records) > used and fields:
                tell("part of a clip", f"{where}: {', '.join(fields)}")

    # their media, each once
    media = {record["media"]: record for record in records}
    for path in media:
        if not os.path.exists(path):
            tell("missing medium", path)
    there = [record for path, record in media.items() if os.path.exists(path)]
    usable = set()
    results = gen_cot.read_ahead(there, args, check_medium, timeout=600)  # all frames take longer than a few
    for record, found in tqdm(results, "media", len(there)):
        if isinstance(found, gen_cot.MediaError):
            tell("damaged medium", found)
        elif found:
            tell(*found)
        else:
            usable.add(record["media"])

    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing was found")
    kept = [record for record in records if record.pop("media") in usable]
    print(f"{len(media)} media, {len(usable)} of them good; {len(kept)} records without a finding")
    if args.output:
        write_jsonl(args.output, kept)


def unmatched(record, scoring):
    """Whether a record's gold answer scores nothing against itself, so that no answer can ever match it."""
    kind, gold = record["problem_type"], gold_answer(record["solution"])
    if kind == "multiple choice":
        return bool(record["options"]) and not correct_answer(record)[0]
    return "answer>" in gold.lower() or not answer_score(kind, gold, gold, scoring)  # a tag that isn't closed


def check_medium(record, num_frames, max_pixels):
    """None for a medium that is whole and can be read as the stages read it, else (kind, what) of a finding.
    Raises MediaError for one that can't be decoded."""
    gen_cot.read_media(record, num_frames, max_pixels)
    if record["data_type"] == "image" or os.path.isdir(record["media"]):
        return None
    return decode_strictly(record["media"])


def decode_strictly(path):
    """Decode a clip from its first frame to its last. MediaError where the decoder notices damage; (kind,
    what) where its clock jumps, or where it ends before it says."""
    shown = []
    with gen_cot.media_errors(path), gen_cot.open_video(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}  # else damage is concealed
        for i, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"frame {i} is corrupt")
            if frame.time is not None:
                shown.append((frame.time, float((frame.duration or 0) * frame.time_base)))
        if not shown:
            return None  # a bare stream without times
        jumps = [b for (a, _), (b, _) in zip(shown, shown[1:]) if b < a]
        if jumps:
            return "clock", f"{path} jumps back to {jumps[0]:.1f} s"
        seconds = shown[-1][0] + shown[-1][1] - shown[0][0]
        lost = promised_end(container, stream) - shown[-1][0] - shown[-1][1]
        if lost > LOST * (seconds + lost):
            return "cut clip", f"{path} lacks {lost:.1f} of its {seconds + lost:.1f} s"
    return None


def promised_end(container, stream):
    """The second at which a stream says that it ends; 0 where it doesn't say, or means the sound, too."""
    if container.format.name == "asf":
        return 0
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    told = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska
    return 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3]) if told else 0


if __name__ == "__main__":
    main(get_args())
