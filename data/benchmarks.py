#!/usr/bin/env python3
"""The benchmarks' own question files in Video-R1's form, as `evaluate.py --bench` reads it.

    python data/benchmarks.py mmvu validation.json data/Video-R1-eval/eval_mmvu.json
    python data/benchmarks.py vcr meta_info_video.json data/Video-R1-eval/eval_vcrbench.json
    python data/benchmarks.py tempcompass multi-choice.json yes_no.json OUT/eval_tempcompass.json

The last name is the file to write. Questions without options are "open-ended", which is not scored. Paths are
relative to --media-root: MMVU/videos/…, TempCompass/videos/…, and VCR-Bench's as in its file.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages live a folder up

import gen_cot  # noqa: E402
from rewards import UserError, label_options, option_key, write_text  # noqa: E402


def record(problem, options, answer, path, **fields):
    """A record in Video-R1's form; its gold answer becomes the option's letter."""
    options = label_options([option for option in options if option])
    gold = option_key(answer, options) if options else answer
    return dict(problem=problem.strip(), data_type="video", path=path, options=options,
                problem_type="multiple choice" if options else "open-ended",
                solution=f"<answer>{gold}</answer>", **fields)


def mmvu(rows):
    for row in rows:
        path = "MMVU/videos/" + row["video"].split("/videos/")[-1]
        chosen = row["choices"].values() if row["question_type"] == "multiple-choice" else []
        yield record(row["question"], chosen, row["answer"], path, subject=row["metadata"]["subject"])


def vcr(rows):
    for row in rows:
        options, question = [], row["question"]
        if row["multiple-choice"]:  # whose options stand in the question, too
            options, question = row["choices"].values(), re.split(r"\n\s*A\. ", question)[0]
        yield record(question, options, row["answer"], row["video_path"], dimension=row["dimension"])


def tempcompass(videos):
    for video, dimensions in videos.items():
        for dim, questions in dimensions.items():
            for row in questions:
                question, *options = row["question"].removesuffix("\nGenerated Caption:").split("\n")
                if row["answer"] in ("yes", "no"):
                    options = ["yes", "no"]
                yield record(question, options, row["answer"], f"TempCompass/videos/{video}.mp4", dim=dim)


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["mmvu", "vcr", "tempcompass"])
    parser.add_argument("files", nargs="+", help="its question files, then the file to write")
    return parser.parse_args()


def main(args):
    if len(args.files) < 2 or Path(args.files[-1]).exists():
        raise UserError("Name the question files, and last a file to write that is not there yet.")
    rows = []
    for file in args.files[:-1]:
        try:
            rows += globals()[args.benchmark](json.loads(Path(file).read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no question file of {args.benchmark} ({error!r}).") from None
    rows = [dict(row, problem_id=i) for i, row in enumerate(rows)]
    write_text(Path(args.files[-1]), json.dumps(rows, ensure_ascii=False, indent=1))
    print(f"{len(rows)} questions in {args.files[-1]}")


if __name__ == "__main__":
    gen_cot.run_script(main, get_args)
