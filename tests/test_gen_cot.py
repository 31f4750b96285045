"""Records, frames, the prompt and the three-step pipeline, on hand-worked cases and on real encoded media."""
import gc
import gzip
import itertools
import json
import multiprocessing
import os
import random
import re
import struct
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

import gen_cot
import prepare
from gen_cot import MediaError, build_prompt, fit_size, frame_indices, load_records, read_frames, read_image
from rewards import PROBLEM_TYPES, UserError, make_judge

ROOT = Path(__file__).resolve().parents[1]
RECORD = dict(problem_id=7, problem="What falls?", data_type="video", problem_type="multiple choice",
              options=["A. a cup", "B. a book"], solution="<answer>B</answer>", path="./STAR/a.mp4",
              data_source="STAR")


def changed(**fields):
    """The record with fields changed, or without those that are None."""
    return {k: v for k, v in (RECORD | fields).items() if v is not None}


def dump(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def error_of(function, *args, **kwargs):
    """The text of the UserError that the call raises; it must be one sentence on one line."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- records ---

def test_all_file_forms_load_alike(tmp_path):
    rows = [changed(problem_id=i, problem=f"Why {i}? ü\u2028\x85 end") for i in range(7)]  # odd line ends
    dump(tmp_path / "list.json", rows)
    gen_cot.write_jsonl(tmp_path / "lines.jsonl", rows)
    dump(tmp_path / "blank.jsonl", "\r\n\r\n".join(json.dumps(row) for row in rows) + "\n\n")
    for part, piece in ((3, rows[6:]), (1, rows[:2]), (2, rows[2:6])):  # written out of order
        with gzip.open(tmp_path / f"d_rl.part{part}of3.json.gz", "wt", encoding="utf-8") as file:
            json.dump(piece, file)
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for paths in ("list.json", "lines.jsonl", "blank.jsonl", "d_rl.part*.json.gz", "lines.jsonl.gz"):
        assert load_records(tmp_path / paths) == rows, paths
    both = load_records([str(tmp_path / "lines.jsonl"), tmp_path / "d_rl.part1*"])
    assert [r["problem_id"] for r in both] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("options, expected", [
    (["A. 1", "B. 2"], ["A. 1", "B. 2"]),
    ([], []),
    (None, []),
    ("", []),
    ("[]", []),
    ("null", []),
    ("None", []),
    ('["A. it\'s", "B. \\"no\\""]', ["A. it's", 'B. "no"']),  # as JSON prints it
    ("['A. a, b', \"B. it's\"]", ["A. a, b", "B. it's"]),  # as Python prints it
    ("('A) 1', 'B) 2')", ["A) 1", "B) 2"]),
    ([1, 2.5], ["1", "2.5"]),
])
def test_options_come_in_many_forms(tmp_path, options, expected):
    row = {k: str(v) for k, v in RECORD.items()} | {"options": options}  # all strings, as in the RL file
    [record] = load_records(dump(tmp_path / "rl.json", [row]))
    assert record["options"] == expected and record["problem_id"] == "7"


def test_options_are_parsed_and_never_evaluated(tmp_path):
    text = f"[open({str(tmp_path / 'made')!r}, 'w')]"
    assert "record 0" in error_of(load_records, dump(tmp_path / "a.json", [changed(options=text)]))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("fields, solution", [
    (dict(solution="<answer>B</answer>"), "<answer>B</answer>"),
    (dict(solution="B"), "<answer>B</answer>"),
    (dict(solution=None, answer="B"), "<answer>B</answer>"),
    (dict(solution="", answer="<answer>B</answer>"), "<answer>B</answer>"),
])
def test_solution_with_and_without_tags(tmp_path, fields, solution):
    [record] = load_records(dump(tmp_path / "a.json", [changed(**fields)]))
    assert record["solution"] == solution


@pytest.mark.parametrize("path", ["./Evaluation/arkit/1.mp4", "Evaluation/arkit/1.mp4", "./arkit/1.mp4",
                                  "arkit//1.mp4"])
@pytest.mark.parametrize("folder", ["Evaluation/arkit", "arkit"])
def test_evaluation_paths_with_and_without_their_first_folder(tmp_path, path, folder):
    (tmp_path / "root" / folder).mkdir(parents=True)
    medium = tmp_path / "root" / folder / "1.mp4"
    medium.write_bytes(b"")
    [record] = load_records(dump(tmp_path / "a.json", [changed(path=path)]), tmp_path / "root")
    assert Path(record["media"]) == medium


@pytest.mark.parametrize("row, says", [
    (changed(problem=None), "'problem'"),
    (changed(path=""), "'path'"),
    (changed(problem_type=None), "'problem_type'"),
    (changed(solution=None), "'solution'"),  # or every answer would be wrong, without a word
    (changed(solution=4), "'solution'"),
    (changed(problem_type="essay"), "'essay', known are multiple choice, numerical, OCR, free-form, "),
    (changed(data_type="audio"), "not image or video"),
    (changed(options="A. 1, B. 2"), "options"),
    (changed(options={"A": "1"}), "options"),
    ("What falls?", "an object"),
    (changed(path="/etc/passwd"), "leaves the media root"),
    (changed(path="./STAR/../../secret.mp4"), "leaves the media root"),
    (changed(path="../secret.mp4"), "leaves the media root"),
])
def test_a_bad_record_is_named_with_file_index_and_mend(tmp_path, row, says):
    file = dump(tmp_path / "data.json", [RECORD, row, RECORD])
    text = error_of(load_records, file, tmp_path)
    assert f"{file}, record 1" in text and says in text


def test_a_bad_file_is_named(tmp_path):
    packed = gzip.compress(json.dumps([RECORD] * 500).encode())
    spoilt = bytearray(packed)
    spoilt[20:40] = bytes(20)
    files = {"text.json": b"not json", "half.json": json.dumps([RECORD]).encode()[:-9],
             "line.jsonl": b'{"a": 1}\n{"a"\n', "latin.json": b'["\xe9"]',
             "cut.json.gz": packed[:-9], "spoilt.json.gz": spoilt, "plain.json.gz": b"[]"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert name in error_of(load_records, tmp_path / name)
    assert "--data" in error_of(load_records, tmp_path / "nothing*.json")


def test_few_bad_records_are_named_and_left_out_and_many_are_an_error(tmp_path, capsys):
    bad = changed(problem_type="essay")
    file = dump(tmp_path / "few.json", [RECORD] * 20 + [bad])
    assert len(load_records(file)) == 20
    assert f"left out: {file}, record 20: unknown problem_type 'essay'" in capsys.readouterr().out
    file = dump(tmp_path / "many.json", [RECORD] * 17 + [bad])  # 5.6 %
    assert f"{file}, record 17" in error_of(load_records, file)
    file = dump(tmp_path / "more.json", [bad] * 2 + [RECORD] * 17)
    assert "the first of 2 in 19 records" in error_of(load_records, file)


def selected(file, root, **flags):
    """Which problem_ids `select_records` gives for a stage's flags."""
    args = SimpleNamespace(**dict(data=str(file), media_root=str(root), limit=None, seed=0) | flags)
    return [r["problem_id"] for r in gen_cot.select_records(args)]


def test_records_without_their_medium_are_left_out_aloud_before_the_limit_draws(tmp_path, capsys):
    (tmp_path / "STAR").mkdir()
    (tmp_path / "STAR/a.mp4").write_bytes(b"")
    rows = [changed(problem_id=i) for i in range(60)]
    rows[3]["path"], rows[4]["path"] = "./STAR/gone.mp4", "./STAR"
    file, there = dump(tmp_path / "a.json", rows), [0, 1, 2, *range(5, 60)]
    assert selected(file, tmp_path) == there
    assert "2 of 60 records left out" in capsys.readouterr().out
    drawn = selected(file, tmp_path, limit=20)
    assert len(drawn) == 20 and drawn == sorted(drawn) and set(drawn) < set(there) and drawn != there[:20]
    assert drawn == selected(file, tmp_path, limit=20) != selected(file, tmp_path, limit=20, seed=1)
    assert "--media-root" in error_of(selected, file, tmp_path / "no")


# --- the prompt ---

def test_the_options_stand_once_in_the_prompt():
    appended = build_prompt(RECORD)
    assert "Question: What falls?\nOptions:\nA. a cup\nB. a book\n" in appended
    inside = changed(problem="What falls?\nA. a cup\nB. a book")  # as VideoRFT's file has it
    one_of_two = changed(problem="What falls, A. a cup or else?")
    for text in map(build_prompt, (RECORD, inside)):
        assert text.count("A. a cup") == text.count("B. a book") == 1
    assert build_prompt(one_of_two).count("B. a book") == 1  # half of the options is no list of options
    assert "Options" not in build_prompt(changed(options=[]))


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_prompt_shows_no_answer(problem_type):
    """A letter or a number as an example would be learnt as the answer; the gold answer would be copied."""
    record = changed(problem_type=problem_type, options=[])
    text = build_prompt(record)
    assert not re.search(r"\b[A-HJ]\b|\d", re.sub(r"^\d\. ", "", text, flags=re.MULTILINE)), text
    trace = dict(solution="<answer>A</answer>", answer="A", output="<think>A</think>")
    assert text == build_prompt(record | trace)
    assert all(f"<{tag}>" in text and f"</{tag}>" in text for tag in ("observation", "think", "answer"))


def test_the_prompt_is_the_same_whatever_the_stage(tmp_path):
    """SFT, RL and evaluation read different files of the same question; the policy must see one prompt."""
    forms = [RECORD, {k: str(v) for k, v in RECORD.items()},
             changed(process="<think>t</think>", output="<observation>o</observation>", evidence=["x"]),
             changed(path="./Evaluation/STAR/a.mp4", original_question_type="x")]
    records = load_records(dump(tmp_path / "a.json", forms), tmp_path)
    assert len({build_prompt(record) for record in records}) == 1


def test_a_question_cannot_fill_in_the_template():
    text = build_prompt(changed(problem="What does {question} or {answer_form} mean? {x}", options=[]))
    assert "What does {question} or {answer_form} mean? {x}" in text
    assert text.count("What does") == text.count("letter of the chosen option") == 1


def test_prompt_files(tmp_path):
    def template(file):
        return gen_cot.load_template(SimpleNamespace(prompt_file=file))

    assert template(None) == gen_cot.PROMPT
    own = dump(tmp_path / "own.txt", "Q: {question} {not_ours} A: {answer_form}")
    text = build_prompt(RECORD, template(own))
    assert text.startswith("Q: What falls?\nOptions:\nA. a cup\nB. a book {not_ours} A: Give the letter")
    bad = {"no_form.txt": b"{question}", "no_question.txt": b"{answer_form}", "latin.txt": b"\xe9{question}"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        assert name in error_of(template, tmp_path / name)
    assert "nowhere.txt" in error_of(template, tmp_path / "nowhere.txt")


# --- which frames, and how large ---

@pytest.mark.parametrize("total, rate, num_frames, expected", [
    (32, 8, 16, [0, 4, 9, 13, 18, 22, 27, 31]),  # 4 s at 2 per second; 31/7 = 4.43 apart
    (300, 30, 16, [0, 20, 40, 60, 80, 100, 120, 140, 159, 179, 199, 219, 239, 259, 279, 299]),  # 10 s, but 16
    (30, 30, 16, [0, 10, 19, 29]),  # 1 s: at least 4
    (5, 30, 16, [0, 1, 3, 4]),
    (3, 30, 16, [0, 2]),  # never more than there are, and even
    (2, 30, 16, [0, 1]),
    (1, 30, 16, [0, 0]),
    (105, 30, 16, [0, 21, 42, 62, 83, 104]),  # 3.5 s: 7, rounded down to even
    (300, 30, 5, [0, 100, 199, 299]),
])
def test_frame_indices_by_hand(total, rate, num_frames, expected):
    assert frame_indices(total, total / rate, num_frames).tolist() == expected


@pytest.mark.parametrize("rate", [5, 8, Fraction(24000, 1001), 25, Fraction(30000, 1001), 60])
def test_frame_indices_are_even_spacing_rounded(rate):
    """Against exact arithmetic: index i of n is a rounding of i · (total - 1) / (n - 1)."""
    for total in itertools.chain(range(1, 300), range(300, 10_001, 17), [10_000]):
        seconds = Fraction(total) / rate
        for most in (4, 16, 32):
            case, indices = (total, rate, most), frame_indices(total, float(seconds), most)
            n = len(indices)
            even = [k for k in range(2, most + 1, 2) if k <= total]
            assert n == max((k for k in even if k <= 4 or k <= 2 * seconds + Fraction(1, 2)), default=2), case
            off_by = np.abs(indices * (n - 1) - np.arange(n) * (total - 1))  # in parts of n - 1
            assert (2 * off_by <= n - 1).all(), case
            assert indices[0] == 0 and indices[-1] == total - 1 and indices.dtype == np.int64


@pytest.mark.parametrize("height, width, blocks, expected", [
    (1080, 1920, 128, (224, 420)),  # 16 frames of 16:9 are 8 · 8 · 15 = 960 tokens
    (480, 640, 128, (252, 364)),  # 4:3: 9 · 13 blocks, as 10 · 13 would exceed 128
    (1920, 1080, 128, (420, 224)),
    (56, 56, 4, (56, 56)),
    (75, 101, 128, (84, 112)),
    (10, 10, 128, (56, 56)),  # never under 4 blocks
    (20, 100_000, 128, (28, 128 * 28)),  # a strip stays within the budget, at the cost of its aspect
])
def test_fit_size_by_hand(height, width, blocks, expected):
    assert fit_size(height, width, blocks * 28**2) == expected


def test_fit_size_on_random_sizes():
    """Within the budget and true to the aspect, and equal to what the released models' own processor does."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    rng = random.Random(0)
    for _ in range(1000):
        height, width, blocks = rng.randint(28, 2500), rng.randint(28, 2500), rng.choice([16, 128, 256])
        if max(height, width) > 8 * min(height, width):
            continue
        h, w = fit_size(height, width, blocks * 28**2)
        assert h % 28 == w % 28 == 0 and 4 * 28**2 <= h * w <= blocks * 28**2
        # true to the aspect: some one scale brings both sides within a block of the result
        assert max((h - 28) / height, (w - 28) / width) < min((h + 28) / height, (w + 28) / width)
        assert (h, w) == smart_resize(height, width, 28, 4 * 28**2, blocks * 28**2)


# --- real videos ---

COLOURS = [(220, 20, 20), (20, 220, 20), (20, 20, 220), (220, 220, 220)]


def encode(path, frames, rate, pix_fmt="yuv420p", **container_options):
    """Write frames uint8 (T, H, W, 3) as H.264."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def coloured(frames_each, height=56, width=84, colours=COLOURS):
    """One colour after the other; the top left quarter of every frame is black."""
    frames = np.concatenate([np.full((frames_each, height, width, 3), c, np.uint8) for c in colours])
    frames[:, :height // 2, :width // 2] = 0
    return frames


def seen(frames):
    """Which of the colours the lower half of each frame has."""
    means = frames[:, frames.shape[1] * 2 // 3:].mean((1, 2))
    distances = np.abs(means[:, None] - np.array(COLOURS)[None]).max(2)
    assert distances.min(1).max() < 12, means
    return distances.argmin(1).tolist()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Real clips: path, seconds, the colours to be seen, height and width after resizing."""
    folder = tmp_path_factory.mktemp("clips")
    ntsc = Fraction(30000, 1001)
    each_twice, whole = [0, 0, 1, 1, 2, 2, 3, 3], (56, 84)
    return {
        "plain": (encode(folder / "plain.mp4", coloured(10), 10), 4.0, each_twice, whole),
        "ntsc": (encode(folder / "n.mp4", coloured(23), ntsc), 92 / float(ntsc), [0, 0, 1, 2, 3, 3], whole),
        "odd": (encode(folder / "odd.mp4", coloured(8, 75, 101), 8, "yuv444p"), 4.0, each_twice, (84, 112)),
        "portrait": (encode(folder / "p.mp4", coloured(8, 640, 360), 8), 4.0, each_twice, (420, 224)),
        "long": (encode(folder / "long.mp4", coloured(80), 8), 40.0, sorted([0, 1, 2, 3] * 4), whole),
        "three": (encode(folder / "3.mp4", coloured(1, colours=COLOURS[:3]), 8), 3 / 8, [0, 2], whole),
        "one": (encode(folder / "1.mp4", coloured(1, colours=COLOURS[:1]), 8), 1 / 8, [0, 0], whole),
    }


@pytest.mark.parametrize("name", ["plain", "ntsc", "odd", "portrait", "long", "three", "one"])
def test_read_frames_gets_the_right_frames_and_rate(clips, name):
    path, seconds, colours, size = clips[name]
    frames, fps = read_frames(path, 16, 128 * 28**2)
    assert frames.dtype == np.uint8 and frames.shape == (len(colours), *size, 3)
    assert seen(frames) == colours
    assert fps == pytest.approx(len(colours) / seconds)  # what the positions are made of
    assert frames[:, 5:size[0] // 3, 5:size[1] // 3].max() < 40  # the black quarter stays at the top left
    assert frames[:, 5:size[0] // 3, size[1] * 2 // 3:].max(-1).min() > 180


@pytest.mark.parametrize("name", ["plain", "ntsc", "odd", "long", "one"])
def test_decord_and_pyav_agree(clips, name):
    """A machine without decord must train on the same frames and positions."""
    pytest.importorskip("decord")
    ours, seconds = gen_cot.decode_with_decord(clips[name][0], 16)
    theirs, their_seconds = gen_cot.decode_with_pyav(clips[name][0], 16)
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 4
    assert seconds == pytest.approx(their_seconds) == pytest.approx(clips[name][1])


@pytest.mark.parametrize("matrix, turns", [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_clip_filmed_with_a_turned_phone_stands_upright(clips, tmp_path, matrix, turns):
    """The turn is a matrix in the file's header; a decoder that ignores it shows the scene on its side."""
    data = bytearray(clips["plain"][0].read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    a, b, c, d = (v << 16 for v in matrix)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    upright = np.rot90(gen_cot.decode_with_pyav(clips["plain"][0], 16)[0], turns, axes=(1, 2))
    with_decord = [gen_cot.decode_with_decord] if find_spec("decord") else []
    for decode in [gen_cot.decode_with_pyav] + with_decord:
        frames, _ = decode(tmp_path / "turned.mp4", 16)
        assert frames.shape == upright.shape and np.abs(frames.astype(int) - upright).max() <= 4, decode


def test_pyav_takes_over_where_decord_is_missing(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    frames, fps = read_frames(clips["plain"][0])
    assert seen(frames) == clips["plain"][2] and fps == 2.0


def test_a_damaged_video_is_a_media_error_that_names_it(clips, tmp_path):
    """Each would otherwise stop a run after hours, or be trained on as a shorter clip."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3)).astype(np.uint8)
    whole, index_first = (encode(tmp_path / f"{i}.mp4", noise, 10, **options).read_bytes()
                          for i, options in enumerate(({}, {"movflags": "faststart"})))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    damaged = {"cut.mp4": whole[:len(whole) // 2], "cut_with_index.mp4": index_first[:len(index_first) // 2],
               "almost.mp4": index_first[:len(index_first) * 95 // 100], "empty.mp4": b"",
               "zeros.mp4": bytes(5000), "text.mp4": b"hello " * 500,
               "sound.mp4": (tmp_path / "sound.mp4").read_bytes()}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError) as error:
            read_frames(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(MediaError, match="nowhere.mp4"):
        read_frames(tmp_path / "nowhere.mp4")


def vary_rate(path, codec):
    """Twenty frames in the first second, then one every 0.4 seconds: 4.6 s from the first to the last."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in [*range(0, 1000, 50), *range(1000, 5000, 400)]:
            frame = av.VideoFrame.from_ndarray(np.full((56, 84, 3), 90, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_the_rate_of_a_clip_of_variable_rate_comes_from_its_time_stamps(tmp_path, name, codec):
    """Thirty frames at a nominal 30 a second would be one second, and the positions off by a factor of 4.6."""
    path = vary_rate(tmp_path / name, codec)
    frames, fps = read_frames(path)
    assert len(frames) / fps == pytest.approx(4.6, abs=0.06)
    assert gen_cot.decode_with_pyav(path, 16)[1] == pytest.approx(4.6, abs=0.06)


def test_a_stream_without_a_duration_counts_its_frames(tmp_path):
    """A bare H.264 stream has no header: its frames over the decoder's nominal 25 a second."""
    with av.open(str(tmp_path / "bare.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for frame in coloured(25):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    frames, fps = read_frames(tmp_path / "bare.h264")
    assert seen(frames) == [0, 0, 1, 1, 2, 2, 3, 3] and fps == pytest.approx(2.0, rel=0.02)


def test_moving_pictures_that_are_no_videos(tmp_path):
    colours = [Image.new("RGB", (84, 56), c) for c in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp"):
        colours[0].save(tmp_path / name, save_all=True, append_images=colours[1:], duration=500)
        assert read_image(tmp_path / name)[0, 9, 9].argmax() == 0  # as an image: its first frame
    frames, fps = read_frames(tmp_path / "a.gif")
    assert frames[:, 9, 9].argmax(-1).tolist() == [0, 2] and len(frames) / fps == pytest.approx(1.5, abs=0.1)
    with pytest.raises(MediaError, match="a.webp"):
        read_frames(tmp_path / "a.webp")


# --- damage, and decoding ahead ---

def settings(**changes):
    return SimpleNamespace(**(dict(num_frames=4, max_pixels=4, workers=2) | changes))


def damage(data, kind, rng):
    if kind == "cut":
        return data[:rng.randrange(1, len(data) * 7 // 10)]
    if kind == "header":
        return data[:rng.randrange(8, 48)]
    if kind == "text":
        return b"not a video at all\n" * rng.randrange(1, 300)
    if kind == "empty":
        return b""
    data = bytearray(data)
    for _ in range(200):
        data[rng.randrange(len(data) // 4, len(data) * 3 // 4)] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """1,000 damaged clips of three codecs between 50 whole ones: records with `kind` of damage and `codec`."""
    folder, rng, records = tmp_path_factory.mktemp("damaged"), random.Random(0), []
    noise = np.cumsum(np.random.default_rng(0).integers(-9, 10, (20, 56, 56, 3)), 0).clip(-128, 127) + 128
    wholes = {}
    for codec, suffix in (("libx264", "mp4"), ("mpeg4", "mp4"), ("libvpx-vp9", "webm")):
        with av.open(str(folder / f"{codec}.{suffix}"), "w") as container:
            stream = container.add_stream(codec, rate=10, options={"threads": "1"})
            stream.width = stream.height = 56
            stream.pix_fmt, stream.bit_rate = "yuv420p", 300_000
            for frame in noise.astype(np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        wholes[codec] = suffix, (folder / f"{codec}.{suffix}").read_bytes()
    for n in range(1050):
        kind = "whole" if n % 21 == 0 else rng.choice(["cut", "header", "text", "empty", "flipped"])
        codec = rng.choice(list(wholes))
        suffix, data = wholes[codec]
        path = folder / f"{n}.{suffix}"
        path.write_bytes(data if kind == "whole" else damage(data, kind, rng))
        records.append(dict(media=str(path), data_type="video", kind=kind, codec=codec))
    return records


def test_a_thousand_damaged_files_cost_their_own_records_and_no_others(damaged):
    """A decoder paints over flipped bits where it can, so a flipped file may come back as frames, never as a stop."""
    results = list(gen_cot.read_ahead(damaged, settings()))
    assert [record["media"] for record, _ in results] == [record["media"] for record in damaged]
    for record, media in results:
        if record["kind"] == "whole":
            assert media[0].shape == (4, 56, 56, 3) and media[1] == 2.0
        elif isinstance(media, MediaError):
            assert record["media"] in str(media) and "\n" not in str(media)
        else:
            assert record["kind"] == "flipped" and media[0].shape[1:] == (56, 56, 3)


def stall_or_crash(record, num_frames, max_pixels):
    """Stands in for a decoder that hangs, or that takes its process down."""
    if record["media"] == "hangs":
        time.sleep(600)
    if record["media"] == "crashes":
        os.kill(os.getpid(), 9)
    return record["media"], num_frames


def test_a_hang_ends_at_the_time_limit_and_a_crash_costs_one_record(monkeypatch):
    monkeypatch.setattr(gen_cot, "DECODE_TIMEOUT", 1.5)
    names = ["a", "crashes", "b", "hangs", "c", "crashes", "d"] + list("efghij")
    results = [media for _, media in gen_cot.read_ahead(
        (dict(media=name) for name in names), settings(), stall_or_crash)]
    assert [m[0] for m in results if not isinstance(m, MediaError)] == [n for n in names if len(n) == 1]
    assert "crashes the decoder (exit code -9)" in str(results[1]) and "within 1.5 s" in str(results[3])


def collect_garbage(record, num_frames, max_pixels):
    return gc.collect()


def test_a_decoder_that_the_parent_has_lost_hangs_no_worker(clips, monkeypatch):
    """Freeing PyAV's in a forked process waits for threads that only the parent has."""
    import av
    monkeypatch.setattr(gen_cot, "DECODE_TIMEOUT", 5)
    gc.disable()
    try:
        container = av.open(str(clips["plain"][0]))
        lost = [container, next(container.decode(container.streams.video[0]))]
        lost.append(lost)
        del container, lost
        (_, media), = gen_cot.read_ahead([dict(media="none")], settings(workers=1), collect_garbage)
    finally:
        gc.enable()
    assert not isinstance(media, MediaError)


def test_an_endless_stream_is_read_no_further_than_needed():
    taken = []
    stream = gen_cot.read_ahead((taken.append(i) or dict(media=str(i)) for i in itertools.count()), settings(),
                                stall_or_crash)
    assert [next(stream)[1] for _ in range(20)] == [(str(i), 4) for i in range(20)]
    assert len(taken) < 40
    stream.close()  # and its processes are gone
    assert not multiprocessing.active_children()


# --- real pictures ---

RAMP = np.linspace(0, 255, 56 * 56).reshape(56, 56).astype(np.uint8)
TINTED = np.dstack([RAMP, 255 - RAMP, RAMP // 2])


@pytest.mark.parametrize("picture, suffix, expected", [
    (Image.fromarray(RAMP), "png", np.dstack([RAMP] * 3)),
    (Image.fromarray(RAMP.astype(np.uint16) * 257), "png", np.dstack([RAMP] * 3)),  # clipped: white
    (Image.fromarray(TINTED), "png", TINTED),
    # black writing on a transparent ground, a chart's usual form: on black it could not be read
    (Image.fromarray(np.dstack([RAMP * 0] * 3 + [255 - RAMP])), "png", np.dstack([RAMP] * 3)),
    (Image.fromarray(np.dstack([RAMP * 0, 255 - RAMP])), "png", np.dstack([RAMP] * 3)),
    (Image.fromarray(RAMP // 64 * 64).quantize(4), "png", np.dstack([RAMP // 64 * 64] * 3)),
    (Image.fromarray(RAMP > 128), "png", np.dstack([(RAMP > 128) * np.uint8(255)] * 3)),
    (Image.fromarray(np.dstack([255 - RAMP] * 3 + [RAMP * 0]), "CMYK"), "jpg", np.dstack([RAMP] * 3)),
], ids=["grey", "16-bit", "rgb", "alpha", "grey-alpha", "palette", "two-colour", "cmyk"])
def test_pictures_of_every_mode_look_as_they_should(tmp_path, picture, suffix, expected):
    picture.save(tmp_path / f"a.{suffix}", quality=98)
    frames = read_image(tmp_path / f"a.{suffix}")
    assert frames.shape == (1, 56, 56, 3) and frames.dtype == np.uint8
    assert np.abs(frames[0].astype(int) - expected).max() <= (12 if suffix == "jpg" else 1)


def test_a_picture_is_resized_within_its_budget_and_a_damaged_one_is_named(tmp_path):
    Image.new("RGB", (3000, 1200), "red").save(tmp_path / "big.png")
    assert read_image(tmp_path / "big.png").shape == (1, 10 * 28, 25 * 28, 3)  # at most 256 blocks
    whole = (tmp_path / "big.png").read_bytes()
    damaged = {"cut.png": whole[:len(whole) // 2], "empty.png": b"", "text.jpg": b"hello" * 99}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=name):
            read_image(tmp_path / name)


def test_read_media_of_toy_records(toy_records):
    for record in toy_records:
        frames, fps = gen_cot.read_media(record, 16, 4)
        still = record["data_type"] == "image"
        assert frames.shape[1:] == (56, 56, 3) and len(frames) == 1 if still else len(frames) >= 8
        assert fps is None if still else fps == 2.0  # the toy clips last whole seconds


# --- the pipeline ---

FLAWS = [None, "wrong answer", "broken template", "insufficient observation"]


@pytest.fixture
def scripted(tmp_path):
    """(records, traces, planted reasons by problem_id): questions of every kind, traces spoilt in turn."""
    rng, records, traces, planted = random.Random(1), [], [], {}
    for i in range(60):
        question = prepare.make_question(prepare.make_scene(rng), rng)
        flaw = FLAWS[i % 4]
        traces.append(dict(problem_id=str(i) if i % 3 else i, output=prepare.teach(question, flaw, rng)))
        records.append(dict(question, problem_id=i, path=f"./media/{i}.mp4", data_type="video"))
        planted[i] = flaw
    del traces[7::20]  # those questions have no trace at all
    planted |= {i: "no trace" for i in (7, 27, 47)}
    gen_cot.write_jsonl(tmp_path / "questions.jsonl", records)
    gen_cot.write_jsonl(tmp_path / "traces.jsonl", traces)
    return records, traces, planted


def run(folder, *flags):
    """`python gen_cot.py --model tiny` on the scripted questions, from the repository's root."""
    command = [sys.executable, "gen_cot.py", "--model", "tiny", "--data", folder / "questions.jsonl",
               "--traces", folder / "traces.jsonl", "--output", folder / "out" / "cot.jsonl", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_exactly_the_planted_flaws_are_rejected_each_for_its_reason(scripted, tmp_path):
    records, _, planted = scripted
    assert {r["problem_type"] for r in records} == set(PROBLEM_TYPES)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    kept = load_records(tmp_path / "out" / "cot.jsonl")
    assert [r["problem_id"] for r in kept] == [i for i, flaw in planted.items() if flaw is None]
    assert sorted(os.listdir(tmp_path / "out")) == ["cot.jsonl", "yield.json"]
    row, = [line.split() for line in done.stdout.splitlines() if line.split()[0] == "all"]
    counts = [list(planted.values()).count(reason) for reason in gen_cot.REASONS]
    assert row == ["all", "60", *map(str, counts), str(len(kept))]
    traces = gen_cot.load_traces(tmp_path / "traces.jsonl")
    outputs = [traces.get(str(i)) for i in range(60)]
    reasons, _ = gen_cot.verify(load_records(tmp_path / "questions.jsonl"), outputs, make_judge("rule"))
    assert reasons == list(planted.values())


def test_a_kept_record_has_the_fields_of_the_official_release(toy_records):
    for record in toy_records:
        kept = gen_cot.kept_record(record, record["output"], 0.9, "paper")
        for field in ("problem", "data_type", "problem_type", "options", "solution", "path", "data_source"):
            assert kept[field] == record[field]
        assert kept["output"] == record["output"] and kept["reward"] == 0.9 and "media" not in kept
        assert f"<answer>{kept['answer']}</answer>" == record["solution"]
        assert kept["observation"].startswith("<observation>Based")
        joined = f"{kept['observation']}{kept['process']}<answer>"
        assert "".join(record["output"].split()).startswith("".join(joined.split()))


def test_the_judge_sees_only_what_is_left_and_unknown_is_not_kept():
    """A judge costs money; a verdict that it fails to give is no yes."""
    def trace(answer):
        return f"<observation>o {answer}</observation><think>t</think><answer>{answer}</answer>"

    records = [changed(problem_id=i, problem_type="regression", options=[], solution="10") for i in range(5)]
    traces = [trace(6), trace(5.9), trace(14), trace("10 m"), trace(10)]
    asked = []

    def judge(records, observations):
        asked.append(([r["problem_id"] for r in records], observations))
        return [True, None, False]

    reasons, scores = gen_cot.verify(records, traces, judge)
    assert asked == [([0, 2, 4], ["o 6", "o 14", "o 10"])]
    assert reasons == [None, "wrong answer", "judge unknown", "wrong answer", "insufficient observation"]
    assert scores == pytest.approx([0.6, 0.59, 0.6, 0, 1])  # the threshold itself is kept


@pytest.mark.parametrize("flags, says", [
    (["--traces", "nowhere.jsonl"], "No traces file nowhere.jsonl: pass --traces"),
    (["--model", "qwen-72b"], "Unknown model 'qwen-72b': pass one of tiny, qwen2.5-vl-7b, qwen2.5-vl-3b"),
    (["--data", "nowhere.jsonl"], "No data file nowhere.jsonl: pass --data"),
    (["--threshold", "1.1"], "None of the 60 traces was kept"),
    (["--judge", "oracle"], "oracle"),
])
def test_a_mistake_gets_one_sentence_and_leaves_no_file(scripted, tmp_path, flags, says):
    done = run(tmp_path, *flags)
    assert done.returncode == 1 and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", ["text", dict(problem_id=1), dict(output="x"),
                                 dict(problem_id=1, output=None)])
def test_a_bad_traces_file_is_named(tmp_path, row):
    file = dump(tmp_path / "traces.jsonl", [{"problem_id": 0, "output": "x"}, row])
    assert f"{file}, record 1" in error_of(gen_cot.load_traces, file)


def test_two_different_traces_for_one_problem_id_are_an_error(tmp_path):
    rows = [dict(problem_id=1, output="x"), dict(problem_id="1", output="x"), dict(problem_id=2, output="y")]
    file = tmp_path / "traces.jsonl"
    assert gen_cot.load_traces(dump(file, rows)) == {"1": "x", "2": "y"}
    assert f"{file}, record 3: problem_id 1 has" in error_of(
        gen_cot.load_traces, dump(file, [*rows, dict(problem_id=1, output="z")]))
    of_files = [dict(row, question=row["output"]) for row in (rows[0], dict(problem_id=1, output="z"))]
    assert gen_cot.load_traces(dump(file, of_files)) == {"x": "x", "z": "z"}  # two files' first questions
