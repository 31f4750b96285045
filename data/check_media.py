#!/usr/bin/env python3
"""Which records have media that the stages can use: decodes every medium once, before a long run meets it.

    python data/check_media.py --data "data/VideoP2R-263k_rl.part*.json.gz" --output data/usable.jsonl
    python pagrpo.py --data data/usable.jsonl

A picture is read as the stages read it; a clip, besides, from its first frame to its last. Decoders paint
over damage where they can, so that a stage, which looks at a few frames, would learn from what was painted;
here they stop at what damage they notice, which a single changed bit need not be. Each unreadable file is
named with its reason, missing ones are counted. `--output` gets the records whose media can be used, as JSON
Lines, which every stage takes as --data.
"""
import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages live a folder up

import gen_cot  # noqa: E402


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=gen_cot.HelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="records: JSON or JSON Lines, plain or .gz, globs allowed")
    add("--media-root", default="data/Video-R1-data", help="what the records' paths are relative to")
    add("--workers", type=gen_cot.positive, default=os.cpu_count() or 1, help="processes that decode")
    add("--output", help="file for the records whose media can be used")
    parser.set_defaults(num_frames=16, max_pixels=128)  # of the reading as in the stages
    return parser.parse_args()


def main(args):
    records = gen_cot.load_records(args.data, args.media_root)
    media = {record["media"]: record for record in records}  # each once, whoever asks about it
    there = [record for path, record in media.items() if os.path.exists(path)]
    usable = set()
    results = gen_cot.read_ahead(there, args, check_media, timeout=600)  # all frames take longer than a few
    for record, found in tqdm(results, "media", len(there)):
        if isinstance(found, gen_cot.MediaError):
            tqdm.write(str(found))
        else:
            usable.add(record["media"])
    print(f"{len(media)} media: {len(usable)} usable, {len(media) - len(there)} missing, "
          f"{len(there) - len(usable)} unreadable")
    if args.output:
        kept = [record for record in records if record.pop("media") in usable]
        gen_cot.write_jsonl(args.output, kept)
        print(f"{len(kept)} of {len(records)} records in {args.output}")


def check_media(record, num_frames, max_pixels):
    """None for a record whose medium is whole and can be read as the stages read it. Raises MediaError."""
    if record["data_type"] == "video" and not os.path.isdir(record["media"]):
        try:
            decode_strictly(record["media"])
        except Exception as error:  # a damaged file can fail anywhere in a decoder
            reason = f"{type(error).__name__}: {error}"
            raise gen_cot.MediaError(f"{record['media']} is damaged ({reason}).") from None
    gen_cot.read_media(record, num_frames, max_pixels)


def decode_strictly(path):
    """Decode a clip from its first frame to its last; an exception where the decoder notices damage."""
    with gen_cot.open_video(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}  # else damage is concealed
        for i, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"frame {i} is corrupt")


if __name__ == "__main__":
    main(get_args())
