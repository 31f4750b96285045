"""data/check_media.py on real clips: whole, damaged in the middle, cut, missing."""
import subprocess
import sys

import av
import numpy as np
from PIL import Image

import gen_cot
from conftest import ROOT


def write_clip(path, frames=40):
    """Noise, so that most of the file is pictures; its header stands in front, where a cut leaves it."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def test_every_medium_is_decoded_to_its_end_and_the_usable_records_are_written(tmp_path):
    write_clip(tmp_path / "whole.mp4")
    whole = (tmp_path / "whole.mp4").read_bytes()
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle:middle + 500])
    (tmp_path / "flipped.mp4").write_bytes(whole[:middle] + flipped + whole[middle + 500:])
    (tmp_path / "cut.mp4").write_bytes(whole[:middle])
    Image.new("RGB", (60, 60), "red").save(tmp_path / "picture.png")
    (tmp_path / "spoilt.png").write_bytes(b"spoilt")
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (60, 60), "red").save(tmp_path / "frames" / "1.png")
    names = ["whole.mp4", "flipped.mp4", "cut.mp4", "missing.mp4", "picture.png", "spoilt.png",
             "./whole.mp4", "frames"]
    gen_cot.write_jsonl(tmp_path / "all.jsonl", [
        dict(problem_id=i, problem=f"Question {i}?", problem_type="numerical", solution="1", path=name,
             data_type="image" if name.endswith("png") else "video") for i, name in enumerate(names)])
    records = gen_cot.load_records(tmp_path / "all.jsonl", tmp_path)
    assert len(gen_cot.read_media(records[1])[0]) == 8  # the stages would take what the decoder painted over

    done = subprocess.run(
        [sys.executable, "data/check_media.py", "--data", tmp_path / "all.jsonl", "--media-root", tmp_path,
         "--output", tmp_path / "usable.jsonl"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *unreadable, counts, written = done.stdout.splitlines()
    assert [line.split()[0] for line in unreadable] == [
        str(tmp_path / name) for name in ("flipped.mp4", "cut.mp4", "spoilt.png")]
    assert all("Error: " in line for line in unreadable)  # the decoder's own reason
    assert counts == "7 media: 3 usable, 1 missing, 3 unreadable" and written.startswith("4 of 8 records in ")
    assert gen_cot.load_records(tmp_path / "usable.jsonl", tmp_path) == [records[i] for i in (0, 4, 6, 7)]
