"""data/check_data.py on records and encoded media, whole and spoilt in each way that it names."""
import re
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

import gen_cot
from conftest import ROOT
from rewards import write_jsonl

sys.path.append(str(ROOT / "data"))
import check_data  # noqa: E402


def write_clip(path, frames=40, **options):
    """Noise, so that most of the file is pictures."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def row(i, path, **fields):
    return dict(problem_id=i, problem=f"Question {i}?", problem_type="numerical", solution="1", path=path,
                data_type="image" if path.endswith("png") else "video") | fields


def check(folder, rows):
    """What data/check_data.py says of these records, by lines, and the records that it writes."""
    write_jsonl(folder / "all.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "data/check_data.py", "--data", folder / "all.jsonl", "--media-root", folder,
         "--output", folder / "usable.jsonl"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), gen_cot.read_json(folder / "usable.jsonl")


def test_every_kind_of_finding_is_told_once_and_the_other_records_are_written(tmp_path):
    """Each medium is decoded to its end, and once, whoever asks about it."""
    whole = write_clip(tmp_path / "whole.mp4", movflags="faststart")  # its header is in front of the pictures
    with av.open(str(tmp_path / "whole.mp4")) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    middle, cut = len(whole) // 2, max(end for end in ends if end < 0.9 * len(whole))
    flipped = bytes(255 - byte for byte in whole[middle:middle + 500])
    (tmp_path / "flipped.mp4").write_bytes(whole[:middle] + flipped + whole[middle + 500:])
    (tmp_path / "torn.mp4").write_bytes(whole[:cut + 9])  # within a picture
    (tmp_path / "cut.mp4").write_bytes(whole[:cut])  # between two of them
    matroska = write_clip(tmp_path / "whole.mkv")
    (tmp_path / "cut.mkv").write_bytes(matroska[:len(matroska) * 9 // 10])
    recording = write_clip(tmp_path / "whole.ts")
    (tmp_path / "joined.ts").write_bytes(recording + recording)
    Image.new("RGB", (60, 60), "red").save(tmp_path / "picture.png")
    (tmp_path / "spoilt.png").write_bytes(b"spoilt")
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (60, 60), "red").save(tmp_path / "frames" / "1.png")
    names = ["whole.mp4", "whole.mkv", "whole.ts", "picture.png", "frames", "./whole.mp4"]
    good = [row(i, name) for i, name in enumerate(names)]
    bad = [row(9, name) for name in ("flipped.mp4", "torn.mp4", "cut.mp4", "cut.mkv", "joined.ts",
                                     "missing.mp4", "spoilt.png", "spoilt.png")]
    bad += [row(9, "whole.mp4", problem_type="essay"), row(9, "whole.mp4", solution="1/2")]
    part = row(10, "whole.mp4", video_start=3.0)
    stages_see, _ = gen_cot.read_media(gen_cot.parse_record(bad[0], tmp_path))
    assert len(stages_see) == 8  # they would take what the decoder painted over

    (*findings, counts, _), usable = check(tmp_path, [*good, *bad, part])
    found = [re.match(rf"([\w ]+): (?:.*jsonl, (record \d+)|{tmp_path}/(\S+))", line) for line in findings]
    assert sorted((match[1], match[2] or match[3]) for match in found) == [
        ("bad record", "record 14"), ("clock", "joined.ts"), ("cut clip", "cut.mkv"), ("cut clip", "cut.mp4"),
        ("damaged medium", "flipped.mp4"), ("damaged medium", "spoilt.png"), ("damaged medium", "torn.mp4"),
        ("missing medium", "missing.mp4"), ("part of a clip", "record 16"), ("unmatched gold", "record 15")]
    assert sorted(counts.split(", ")) == ["1 bad record", "1 clock", "1 missing medium", "1 part of a clip",
                                          "1 unmatched gold", "2 cut clip", "3 damaged medium"]
    records = [gen_cot.parse_record(fields, tmp_path) for fields in [*good, part]]
    assert usable == [{k: v for k, v in record.items() if k != "media"} for record in records]


def test_a_file_that_is_not_there_is_no_file_without_findings(tmp_path):
    done = subprocess.run([sys.executable, "data/check_data.py", "--data", tmp_path / "nowhere.jsonl"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "nowhere.jsonl" in done.stderr


LOST = [("numerical", gold) for gold in ("1/2", "$5", "\u22125", "4 km", "<answer>4", "<ANSWER>4</ANSWER>")]
LOST += [("OCR", "<answer>STOP"), ("free-form", "你好世界"),
         ("multiple choice", "E"), ("multiple choice", "neither")]
MATCHED = [("numerical", "-5"), ("OCR", "STOP"), ("free-form", "a cup"), ("multiple choice", "a cup"),
           ("multiple choice", "B")]


@pytest.mark.parametrize("kind, gold", LOST + MATCHED)
def test_golds_that_nothing_can_match_are_told_from_others(kind, gold):
    options = ["A. a cup", "B. a book"] if kind == "multiple choice" else []
    fields = row(1, "a.mp4", problem_type=kind, solution=gold, options=options)
    record = gen_cot.parse_record(fields, lost_golds=True)
    assert check_data.unmatched(record, "paper") == ((kind, gold) in LOST)
    if kind == "numerical":  # "lenient" takes 4 km for 4 km, as anything for itself
        assert check_data.unmatched(record, "lenient") == ("answer>" in gold.lower())


def test_options_may_be_in_the_question():
    record = gen_cot.parse_record(row(1, "a.mp4", problem_type="multiple choice", solution="B"))
    assert not check_data.unmatched(record, "paper")
