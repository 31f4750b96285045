"""Frames of real encoded files against a sequential decode of the same file: at each of the even times the frame that
a player shows there; images as every viewer shows them; damaged files and workers."""
import gc
import itertools
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

import gen_cot
from gen_cot import MediaError, fit_size, read_frames, read_image, sample_indices

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
def test_indices_by_hand(total, rate, num_frames, expected):
    assert sample_indices(np.arange(total) / rate, total / rate, num_frames).tolist() == expected


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
def test_at_a_constant_rate_the_indices_are_linspace_rounded_for_every_length(rate):
    starts = np.arange(10_001) / float(rate)
    for total in range(1, 10_001):
        indices = sample_indices(starts[:total], starts[total])
        assert np.array_equal(indices, np.rint(np.linspace(0, total - 1, len(indices)))), total


def test_at_a_variable_rate_the_times_are_even_and_a_slide_comes_twice():
    """Six frames in the first 0.6 s, then one slide for 9 s and one for 0.4 s."""
    starts = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9.6]
    assert sample_indices(starts, 10.0, 8).tolist() == [0, 6, 6, 6, 6, 6, 6, 7]  # 0.05 … 9.8, 1.39 s apart


@pytest.mark.parametrize("frames, rate, wanted", [
    (239, 30, 14), (240, 30, 16), (382, 24, 30), (90, 30, 6), (300, 30000 / 1001, 20), (31, 10, 6), (2, 25, 2)])
def test_frames_are_two_a_second_rounded_down_to_even(frames, rate, wanted):
    """As many as qwen-vl-utils and Video-R1 take."""
    assert len(sample_indices(np.arange(frames) / rate, frames / rate, 32)) == wanted


@pytest.mark.parametrize("height, width, blocks, expected", [
    (1080, 1920, 128, (224, 420)),  # 16 frames of 16:9 are 8 · 8 · 15 = 960 tokens
    (480, 640, 128, (252, 364)),  # 4:3: 9 · 13 blocks, as 10 · 13 would exceed 128
    (1920, 1080, 128, (420, 224)),
    (56, 56, 4, (56, 56)),
    # small clips are enlarged to 128 blocks, as by qwen-vl-utils 0.0.14, but never over the maximum
    (224, 224, 256, (336, 336)), (240, 320, 256, (280, 392)), (144, 176, 256, (308, 364)),
    (224, 224, 128, (308, 308)), (75, 101, 128, (252, 364)), (10, 10, 128, (308, 308)), (28, 28, 4, (56, 56)),
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
        assert fit_size(height, width, blocks * 28**2, 4 * 28**2) == smart_resize(
            height, width, 28, 4 * 28**2, blocks * 28**2)  # of a picture
        # true to the aspect: some one scale brings both sides within a block of the result
        assert max((h - 28) / height, (w - 28) / width) < min((h + 28) / height, (w + 28) / width)
        if blocks == 256 or height * width > 2 * blocks * 28**2:
            assert (h, w) == smart_resize(height, width, 28, min(128, blocks) * 28**2, blocks * 28**2)


# --- forty real files ---

def moving(total, height=84, width=112):
    """Frames uint8 (T, H, W, 3) of which no two look alike: a bright bar on a ground that grows lighter."""
    frames = np.zeros((total, height, width, 3), np.uint8)
    for i in range(total):
        frames[i] = 20 + 120 * i // total
        frames[i, :, i * width // total:i * width // total + 8] = (250, 40 + i % 200, 30)
    return frames


def encode(path, codec, frames, rate=25, pix_fmt="yuv420p", times=None, container_format=None, **options):
    """Write frames; times: their time stamps in milliseconds, for a variable rate."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ffmpeg(*arguments):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg program")
    subprocess.run(["ffmpeg", "-y", "-loglevel", "error", *map(str, arguments)], check=True)
    return arguments[-1]


def turned(path, matrix):
    """The mp4 with another matrix in its track's header, as phones write it."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    a, b, c, d = (v << 16 for v in matrix)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def replaced(path, old, new):
    """The file, in which every box of one name, or flag, is called otherwise."""
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def grow(path):
    """A webm whose frame size changes in the middle, as video calls are recorded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.height, stream.width, stream.pix_fmt = 84, 112, "yuv420p"
        for pixels in moving(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        other = av.CodecContext.create("libvpx", "w")
        other.height, other.width, other.pix_fmt, other.time_base = 120, 160, "yuv420p", Fraction(1, 25)
        packets = []
        for i, pixels in enumerate(moving(50, 120, 160)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 50 + i, Fraction(1, 25)
            packets += other.encode(frame)
        for packet in packets + other.encode(None):
            packet.stream = stream
            container.mux(packet)
    return path


def with_cover(clip, path):
    """A cover picture as the first of the video streams."""
    Image.new("RGB", (64, 64), "white").save(path.with_suffix(".png"))
    return ffmpeg("-i", path.with_suffix(".png"), "-i", clip, "-map", 0, "-map", 1, "-c", "copy",
                  "-disposition:v:0", "attached_pic", path)


def with_subtitles(clip, path):
    path.with_suffix(".srt").write_text("1\n00:00:00,000 --> 00:00:01,000\na\n\n2\n00:00:30,000 --> 00:00:59,000\nb\n")
    return ffmpeg("-i", clip, "-i", path.with_suffix(".srt"), "-map", 0, "-map", 1, "-c:v", "copy", "-c:s", "srt", path)


SLIDES = [*range(0, 1000, 50), *range(1000, 21_000, 1000)]  # twenty frames in the first second, then one a second
X264, NO_B, B = "libx264", dict(bf="0"), dict(bf="2")
MADE = {  # name: how the file is made in its folder
    **{f"{codec}.{suffix}": (lambda p, c=codec, o=options: encode(p, c, moving(100), **o)) for codec, suffix, options in [
        (X264, "mp4", dict(bf="3", g="24")), (X264, "mov", B), (X264, "mkv", B), (X264, "ts", B), (X264, "flv", B),
        (X264, "avi", NO_B), ("libx265", "mp4", {"x265-params": "log-level=error"}),
        ("libx265", "mkv", {"x265-params": "log-level=error"}), ("libvpx", "webm", {}),
        ("libvpx-vp9", "webm", {}), ("libvpx-vp9", "mp4", {}), ("libsvtav1", "mp4", {}), ("libsvtav1", "webm", {}),
        ("mpeg1video", "mpg", {}), ("mpeg2video", "mpg", B), ("mpeg2video", "ts", B), ("mpeg2video", "vob", B),
        ("mpeg4", "avi", NO_B), ("mpeg4", "mp4", B), ("msmpeg4v3", "avi", {}), ("wmv2", "wmv", {}), ("wmv1", "asf", {}),
        ("mjpeg", "avi", dict(pix_fmt="yuvj420p")), ("mjpeg", "mov", dict(pix_fmt="yuvj420p")),
        ("prores_ks", "mov", dict(pix_fmt="yuv422p10le")), ("gif", "gif", dict(pix_fmt="rgb8", rate=10)),
        ("mpeg2video", "mkv", B)]},
    "b-frames.avi": lambda p: ffmpeg("-i", encode(p.with_suffix(".mp4"), X264, moving(100)), "-c:v", "mpeg4", "-bf", 2,
                                     "-vtag", "xvid", p),
    "alt-ref.webm": lambda p: encode(p, "libvpx", moving(100), **{"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "edit-list.mp4": lambda p: ffmpeg("-ss", 1.3, "-i", encode(p.with_suffix(".mov"), X264, moving(100), g="24"),
                                      "-c", "copy", p),
    "cut-copy.mkv": lambda p: ffmpeg("-ss", 1.3, "-i", encode(p.with_suffix(".mp4"), X264, moving(100), g="24"),
                                     "-c", "copy", p),
    **{f"turned-{turn}.mp4": (lambda p, m=matrix: turned(encode(p, X264, moving(100)), m)) for turn, matrix in [
        (90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))]},
    "slides.mp4": lambda p: encode(p, X264, moving(40), times=SLIDES),
    "slides.webm": lambda p: encode(p, "libvpx-vp9", moving(40), times=SLIDES),
    "late.mkv": lambda p: encode(p, X264, moving(100), times=range(5000, 9000, 40)),
    "late.mp4": lambda p: encode(p, X264, moving(100), times=range(5000, 9000, 40)),
    "cover.mkv": lambda p: with_cover(encode(p.with_suffix(".mp4"), X264, moving(100)), p),
    "subtitles.mkv": lambda p: with_subtitles(encode(p.with_suffix(".mp4"), X264, moving(100)), p),
    "odd.mp4": lambda p: encode(p, X264, moving(100, 75, 101), pix_fmt="yuv444p"),
    **{f"{n}-frames.mp4": (lambda p, n=n: encode(p, X264, moving(n), rate=8)) for n in (1, 2, 3)},
    "grows.webm": grow,
    "bare.h264": lambda p: encode(p, X264, moving(100), container_format="h264"),
    "live.webm": lambda p: encode(p, "libvpx", moving(100), live="1"),
    "no-keyframe-table.mp4": lambda p: replaced(encode(p, "mpeg4", moving(1300, 56, 56), g="1300"), b"stss", b"free"),
    "sound-is-longer.wmv": lambda p: ffmpeg("-i", encode(p.with_suffix(".mp4"), X264, moving(100)), "-f", "lavfi",
                                            "-i", "sine=d=9", "-c:v", "wmv2", "-c:a", "wmav2", p),
    "long.mp4": lambda p: encode(p, X264, moving(1500, 56, 56), g="50", preset="ultrafast"),
}


def shown(path, num_frames=16):
    """Pictures and duration by decoding the whole file in order: at each even time the last frame that has appeared."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        rate = float(stream.average_rate or 25)
        frames = [(frame.time, float((frame.duration or 0) * frame.time_base), frame.rotation,
                   frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    starts = [frame[0] for frame in frames]
    if None in starts:  # a bare stream
        starts = [i / rate for i in range(len(frames))]
    edges = starts + [starts[-1] + (frames[-1][1] or 1 / rate)]
    most = min(max(int(2 * (edges[-1] - edges[0]) + 1e-6), 4), num_frames, max(len(frames), 2)) // 2 * 2
    first, last = (edges[0] + edges[1]) / 2, (edges[-2] + edges[-1]) / 2
    pictures = []
    for k in range(most):
        now = first + k * (last - first) / (most - 1)
        i = max(i for i, start in enumerate(starts) if start <= now)
        pictures.append(np.rot90(frames[i][3], frames[i][2] // 90))
    return pictures, edges[-1] - edges[0]


@pytest.mark.parametrize("name", MADE)
def test_frames_are_those_that_a_player_shows_at_even_times(tmp_path, name):
    path = MADE[name](tmp_path / name)
    frames, fps = read_frames(path)
    expected, seconds = shown(path)
    size = fit_size(*expected[0].shape[:2], 128 * 28**2)
    assert frames.dtype == np.uint8 and frames.shape == (len(expected), *size, 3)
    for ours, picture in zip(frames, expected):
        assert np.array_equal(ours, np.asarray(Image.fromarray(picture).resize(size[::-1], Image.BICUBIC)))
    assert len({frame.tobytes() for frame in frames}) >= min(len(frames), 8) or len(frames) <= 4  # they move
    assert len(frames) / fps == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("matrix, expected", [
    ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]), ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)), ((0, -1, -1, 0), lambda x: x[:, ::-1, ::-1].swapaxes(1, 2)),
    ((0, 0, 0, 0), lambda x: x), ((1, 0, 0, 1), lambda x: x)])
def test_clips_are_mirrored_as_the_file_says(tmp_path, matrix, expected):
    plain = encode(tmp_path / "a.mp4", X264, moving(50, 112, 112))
    other = turned(Path(shutil.copy(plain, tmp_path / "b.mp4")), matrix)
    as_it_is = 16, 16 * 28**2  # enlarged, a turned picture differs by the rounding of two passes
    assert np.array_equal(read_frames(other, *as_it_is)[0], expected(read_frames(plain, *as_it_is)[0]))


def test_a_sound_files_cover_is_no_video(tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    sound = ffmpeg("-f", "lavfi", "-i", "sine=d=5", "-attach", tmp_path / "a.png", "-metadata:s:t",
                   "mimetype=image/png", tmp_path / "a.mkv")
    with pytest.raises(MediaError, match="no pictures"):
        read_frames(sound)


def test_a_folders_pictures_come_in_the_order_of_their_numbers(tmp_path):
    """Also of another size than the first one's, and beside what file managers leave there."""
    for i in range(1, 13):
        Image.new("RGB", (56, 56) if i != 5 else (112, 56), (20 * i, 0, 0)).save(tmp_path / f"frame_{i}.png")
    for name in (".DS_Store", "._frame_1.png", "Thumbs.db", "notes.txt", "notes.pdf", "clip.mpg"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "more").mkdir()
    frames, fps = gen_cot.read_folder(tmp_path, 16, 4 * 28**2)
    assert frames.shape == (8, 56, 56, 3) and fps == 2.0
    assert frames[:, 0, 0, 0].tolist() == [20, 60, 80, 120, 140, 180, 200, 240]
    with pytest.raises(MediaError, match="a folder without pictures"):
        gen_cot.read_folder(tmp_path / "more", 16, 4 * 28**2)


def test_anamorphic_clips_have_the_shape_that_a_player_shows(tmp_path):
    clip = encode(tmp_path / "a.mp4", X264, moving(30, 144, 180))
    wide = ffmpeg("-i", clip, "-vf", "setsar=64/45", tmp_path / "wide.mp4")  # 180 x 144 shown as 256 x 144
    assert read_frames(wide)[0].shape[1:3] == (140, 252) and read_frames(clip)[0].shape[1:3] == (140, 168)
    upright = turned(tmp_path / "wide.mp4", (0, 1, -1, 0))
    assert read_frames(upright)[0].shape[1:3] == (252, 140)


def test_keyframes_are_sought_in_a_long_clip(tmp_path, monkeypatch):
    """Of 3,000 frames a few hundred are decoded, and they are the same as those of a sequential decode."""
    path, decoded = encode(tmp_path / "a.mp4", X264, moving(3000, 56, 56), g="50", preset="ultrafast"), []
    opened = gen_cot.av.open

    class Counting:
        def __init__(self, container):
            self.container, self.streams = container, container.streams

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    expected, _ = shown(path)
    monkeypatch.setattr(gen_cot.av, "open", lambda *args, **options: Counting(opened(*args, **options)))
    frames, _ = read_frames(path, 16, 4 * 28**2)
    assert 16 <= len(decoded) <= 16 * 50
    assert all(np.array_equal(ours, picture) for ours, picture in zip(frames, expected))


# --- what can't be read ---

def test_a_damaged_video_is_a_media_error_that_names_it(tmp_path):
    """Each would otherwise stop a run after hours, or be trained on as a shorter clip."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3)).astype(np.uint8)
    whole = encode(tmp_path / "whole.mp4", X264, noise, 10).read_bytes()
    ffmpeg_free = {"cut.mp4": whole[:len(whole) // 2], "empty.mp4": b"", "zeros.mp4": bytes(5000),
                   "text.mp4": b"hello " * 500, "playlist.mp4": b"ffconcat version 1.0\nfile whole.mp4\n"}
    with av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream, sound = container.add_stream(X264, rate=10), container.add_stream("aac", rate=44100, layout="mono")
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(sound.encode(silence))
        container.mux(stream.encode(None) + sound.encode(None))
    assert read_frames(tmp_path / "fast.mp4")[0].shape[0] == 8
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    for name, data in ffmpeg_free.items():
        (tmp_path / name).write_bytes(data)
    for name in [*ffmpeg_free, "sound.mp4", "nowhere.mp4"]:
        with pytest.raises(MediaError) as error:
            read_frames(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(MediaError, match="it holds no pictures"):
        read_frames(tmp_path / "sound.mp4")


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
        path = encode(folder / f"{codec}.{suffix}", codec, noise.astype(np.uint8), 10, b="300000")
        wholes[codec] = suffix, path.read_bytes()
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
            assert record["kind"] in ("flipped", "cut") and media[0].shape[1:] == (56, 56, 3)


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
    assert [str(m).split()[0] for m in results if isinstance(m, MediaError)] == ["crashes", "hangs", "crashes"]


def collect_garbage(record, num_frames, max_pixels):
    return gc.collect()


def test_a_decoder_that_the_parent_has_lost_hangs_no_worker(tmp_path, monkeypatch):
    """Freeing PyAV's in a forked process waits for threads that only the parent has."""
    path = encode(tmp_path / "a.mp4", X264, moving(40))
    monkeypatch.setattr(gen_cot, "DECODE_TIMEOUT", 5)
    gc.disable()
    try:
        container = av.open(str(path))
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
    (Image.fromarray((RAMP * 257.0).astype(">u2")), "tiff", np.dstack([RAMP] * 3)),
], ids=["grey", "16-bit", "rgb", "alpha", "grey-alpha", "palette", "two-colour", "cmyk", "16-bit big-endian"])
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, orientation):
    photo, exif = Image.fromarray(np.repeat(TINTED, 2, axis=1)), Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    frames = read_image(tmp_path / "a.png")
    assert np.array_equal(frames[0], expected)
    for name in ("a.tiff", "a.webp"):  # of which Pillow turns the first one itself
        photo.save(tmp_path / name, exif=exif, lossless=True)
        assert np.array_equal(read_image(tmp_path / name), frames), name
    assert frames.shape[1:3] == ((56, 112) if orientation < 5 else (112, 56))


@pytest.mark.parametrize("mode, value", [("I", 2**20), ("F", 0.5)])
def test_pictures_of_32_bits_are_refused(tmp_path, mode, value):
    Image.new(mode, (56, 56), value).save(tmp_path / "a.tiff")
    with pytest.raises(MediaError, match="save it with 8 or 16 bits a channel"):
        read_image(tmp_path / "a.tiff")


def test_a_picture_is_refused_for_its_size_before_it_is_decoded(tmp_path, monkeypatch):
    """A file of 0.1 MiB can hold a gigabyte of white."""
    Image.new("1", (9000, 9000), 1).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="81000000 pixels. exceeds limit"):
        read_image(tmp_path / "a.png")


def test_only_formats_of_pictures_are_opened(tmp_path):
    """PostScript would start another program."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 56\n%%EndComments\nshowpage\n")
    with pytest.raises(MediaError, match="cannot identify image file"):
        read_image(tmp_path / "a.png")


def test_read_media_of_toy_records(toy_records):
    for record in toy_records:
        frames, fps = gen_cot.read_media(record, 16, 4)
        still = record["data_type"] == "image"
        assert frames.shape[1:] == (56, 56, 3) and (len(frames) == 1 if still else len(frames) >= 8)
        assert fps is None if still else fps == 2.0  # the toy clips last whole seconds
