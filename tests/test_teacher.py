"""Step 1 against the chat server, which answers from the toy world's script, fails, and is cut off."""
import base64
import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import gen_cot
import prepare
from conftest import ROOT, Fault
from gen_cot import build_prompt, load_records
from rewards import UserError, read_jsonl, rule_judge, write_jsonl

FLAWS = [None, "wrong answer", "broken template", "insufficient observation"]
FAULTS = [Fault(500), Fault(429), Fault(trick="drop"), ""]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """800 questions about 40 real clips and pictures: (folder, records, traces by prompt, flaws by id)."""
    folder, rng, scenes, rows, outputs = tmp_path_factory.mktemp("world"), random.Random(3), [], [], []
    (folder / "media").mkdir()
    for i in range(40):
        scenes.append(prepare.make_scene(rng))
        scenes[i]["path"] = f"media/{i}.{'mp4' if scenes[i]['kind'] == 'clip' else 'png'}"
        prepare.write_medium(scenes[i], folder / scenes[i]["path"])
    for i in range(800):
        scene = scenes[i % 40]
        question = prepare.make_question(scene, rng)
        outputs.append(prepare.teach(question, FLAWS[i % 4], rng))
        row = {name: value for name, value in question.items() if name in prepare.FIELDS}
        rows.append(dict(row, problem_id=i, problem=f"{question['problem']} (number {i})", path=scene["path"],
                         data_type="video" if scene["kind"] == "clip" else "image"))
    write_jsonl(folder / "questions.jsonl", rows)
    records = load_records(folder / "questions.jsonl", folder)
    traces = dict(zip(map(build_prompt, records), outputs))
    assert len(traces) == 800
    return folder, records, traces, {i: FLAWS[i % 4] for i in range(800)}


class Script:
    """Answers a prompt with its trace, but for `failing` of the replies; `answered` are those that came."""

    def __init__(self, traces, failing=0.0, delay=0.0):
        self.traces, self.failing, self.delay, self.answered = traces, failing, delay, []

    def __call__(self, prompt, attempt):
        time.sleep(self.delay)
        rng = random.Random(f"{prompt}, attempt {attempt}")  # the same faults whatever the threads do
        if rng.random() < self.failing:
            return rng.choice(FAULTS)
        self.answered.append(prompt)
        return self.traces[prompt]


def command(world, teacher, output, *flags, data="questions.jsonl"):
    own = ["--data", world[0] / data, "--media-root", world[0], "--num-frames", 4, "--max-pixels", 4]
    return [sys.executable, *map(str, [ROOT / "gen_cot.py", "--model", "tiny", *own, "--teacher", teacher,
                                       "--output", output, *flags])]


def run(world, teacher, output, *flags, **changes):
    """The finished run, started next to the output, where it also puts what judges say."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command(world, teacher, output, *flags, **changes), cwd=output.parent,
                          capture_output=True, text=True, timeout=300)


def rows_of(output):
    return read_jsonl(output.with_name("traces.jsonl"))


def sentence(done):
    """The last line of a run that failed, which holds no traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_through_a_server_that_fails_one_call_in_five_exactly_the_planted_flaws_are_rejected(
        world, server, tmp_path):
    _, _, traces, planted = world
    output = tmp_path / "cot.jsonl"
    server.behave = Script(traces, failing=0.2)
    done = run(world, server.spec(), output)
    assert done.returncode == 0 and "teacher: 800 calls" in done.stdout, done.stderr
    kept = load_records(output)
    assert [r["problem_id"] for r in kept] == [i for i, flaw in planted.items() if flaw is None]
    assert {build_prompt(r): r["output"] for r in kept}.items() <= traces.items()
    assert sorted(server.behave.answered) == sorted(traces)  # each once
    counts = json.loads((tmp_path / "yield.json").read_text())["table"]["all"]
    assert counts == {"questions": 800, "kept": 200} | dict.fromkeys(FLAWS[1:], 200)

    # another threshold and the other scoring: no call to the teacher
    before = len(server.seen)
    again = run(world, server.spec(), output, "--threshold", "0.95", "--scoring", "lenient")
    assert again.returncode == 0 and len(server.seen) == before
    stricter = load_records(output)
    assert 0 < len(stricter) <= 200 and {r["scoring"] for r in stricter} == {"lenient"}


def test_killed_at_any_moment_it_pays_for_nothing_twice_but_what_was_in_flight(world, server, tmp_path):
    flags, rng = ["--limit", 400, "--teacher-concurrency", 8], random.Random(0)
    whole, killed = tmp_path / "whole/cot.jsonl", tmp_path / "killed/cot.jsonl"
    script = server.behave = Script(world[2], delay=0.02)
    assert run(world, server.spec(), whole, *flags).returncode == 0
    prompts = {record["problem_id"]: build_prompt(record) for record in world[1]}
    paid = set()
    for _ in range(20):
        before = len(script.answered)
        process = subprocess.Popen(command(world, server.spec(), killed, *flags),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stop = before + rng.randrange(30)
        while len(script.answered) < stop and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)  # what was in flight reaches the server
        answered = set(script.answered[before:])
        assert not paid & answered
        text = killed.with_name("traces.jsonl").read_bytes() if killed.parent.exists() else b""
        paid = {prompts[json.loads(line)["problem_id"]] for line in text.split(b"\n")[:-1]}
        assert len(answered - paid) <= 8 and not killed.exists()  # what was in flight is lost, and no more
    assert 100 < len(paid) < 400
    before = len(script.answered)
    assert run(world, server.spec(), killed, *flags).returncode == 0
    assert not paid & set(script.answered[before:])
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("api, fields", [
    ("openai", {"temperature": 0}), ("anthropic", {"max_tokens": 2048})])  # newer models refuse a temperature
def test_what_the_teacher_is_sent(world, server, tmp_path, api, fields):
    """Frames in time order after their time stamps, then the prompt of all stages; never the gold answer."""
    _, records, traces, planted = world
    output = tmp_path / "cot.jsonl"
    server.behave = Script(traces)
    assert run(world, server.spec(api), output, "--limit", 12).returncode == 0
    asked = sorted(row["problem_id"] for row in rows_of(output))
    assert [r["problem_id"] for r in load_records(output)] == [i for i in asked if planted[i] is None]
    by_prompt = {build_prompt(record): record for record in records}
    assert len(server.seen) == 12
    for _, _, body in server.seen:
        content = body.pop("messages")[0]["content"]
        assert body == fields | {"model": "model-1"}
        record = by_prompt[content[-1]["text"]]
        frames, _ = gen_cot.read_media(record, 4, 4)
        sent = [picture_in(part) for part in content if part["type"] != "text"]
        assert len(sent) == len(frames)
        assert all(np.abs(a.astype(int) - b).mean() < 20 for a, b in zip(sent, frames))
        stamps = [float(part["text"].removesuffix(" s:")) for part in content[:-1] if part["type"] == "text"]
        assert len(stamps) == (len(frames) if record["data_type"] == "video" else 0)
        assert stamps == sorted(set(stamps))
        assert not stamps or stamps[0] == 0 and stamps[-1] in (4, 5)  # the clips' seconds
        assert record["solution"] not in json.dumps(content)


def picture_in(part):
    """The pixels of an image part, in the form of either API."""
    if part["type"] == "image_url":
        data = part["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    else:
        assert part["source"]["type"] == "base64" and part["source"]["media_type"] == "image/jpeg"
        data = part["source"]["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


# --- what ends a run ---

def test_the_call_limit_ends_in_one_sentence_and_loses_nothing(world, server, tmp_path):
    output = tmp_path / "cot.jsonl"
    script = server.behave = Script(world[2], delay=0.02)
    flags = ["--limit", 60, "--teacher-concurrency", 4]
    said = sentence(run(world, server.spec(), output, *flags, "--teacher-max-calls", 25))
    assert said == "model-1 has had its 25 calls: raise the limit." and not output.exists()
    assert 21 <= len(rows_of(output)) == len(script.answered) <= 25
    assert run(world, server.spec(), output, *flags).returncode == 0
    assert len(set(script.answered)) == 60 == len(script.answered)


@pytest.mark.parametrize("fault, says, calls", [
    (Fault(401, "who are you?"), "refuses, HTTP 401, who are you?", 1),
    (Fault(413, "too many frames"), "left 30 questions in a row unanswered: HTTP 413, too many frames", 30)])
def test_a_teacher_that_refuses_is_asked_no_more(world, server, tmp_path, fault, says, calls):
    server.behave = lambda prompt, attempt: fault
    said = sentence(run(world, server.spec(), tmp_path / "cot.jsonl", "--teacher-concurrency", 4))
    assert says in said and calls <= len(server.seen) < calls + 4


def test_a_judge_with_a_wrong_key_has_cost_no_call_to_the_teacher(world, server, tmp_path):
    script = Script(world[2])
    server.behave = lambda prompt, attempt: Fault(401) if "=== BEGIN" in prompt else script(prompt, attempt)
    done = run(world, server.spec(), tmp_path / "cot.jsonl", "--judge", server.spec(model="judge-1"))
    said = sentence(done)
    assert "judge-1 refuses, HTTP 401" in said
    assert not script.answered and len(server.seen) == 1


TRACE = "<observation>It is red.</observation> <think>fine</think><answer>red</answer>"


@pytest.mark.parametrize("reply, kept", [
    ("I see red.\n</think>\n\n" + TRACE, TRACE), ("<think>\n\n</think>\n" + TRACE, TRACE),
    ("<think>An <observation>, a <think> block, then <answer>.</think>" + TRACE, TRACE),  # plans name tags
    (f"```xml\n{TRACE}\n```", TRACE), (f"{TRACE}<|im_end|>", TRACE),
    (f"{TRACE}\n```\n<|endoftext|>\n", TRACE), (f"<think>Hm.</think>\n```\n{TRACE}\n```<|im_end|>", TRACE),
    (f"Sure! {TRACE}", None), (f"<think>never closed {TRACE}", None), (f"{TRACE} Hope that helps!", None),
    ("", None), ("</think>", None)])
def test_what_a_thinking_teacher_puts_around_a_trace_is_cut_off(reply, kept):
    """And nothing else is: a trace that broke the template still does."""
    record = dict(problem="Which?", problem_type="free-form", options=[], solution="red", evidence=["red"])
    (reason,), (score,) = gen_cot.verify([record], [reply], rule_judge)
    assert reason == (None if kept else "broken template")
    if kept:
        row = gen_cot.kept_record(record, reply, score, "paper")
        assert row["output"] == kept and row["observation"] == "<observation>It is red.</observation>"


def test_ctrl_c_ends_all_waiting_and_what_is_on_its_way_is_kept(world, server, tmp_path):
    """Of the four questions in flight two are waited for, and two wait for their next try."""
    script, calls, release = Script(world[2]), itertools.count(), threading.Event()

    def behave(prompt, attempt):
        call = next(calls)
        if call >= 20 and call % 2:
            return Fault(503, headers={"Retry-After": "100"})
        if call >= 20:
            release.wait(60)
        return script(prompt, attempt)

    server.behave = behave
    process = subprocess.Popen(
        command(world, server.spec(), tmp_path / "cot.jsonl", "--teacher-concurrency", "4"), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while len(server.seen) < 24 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the decoders too
        time.sleep(0.5)
        release.set()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert sentence(SimpleNamespace(returncode=process.returncode, stderr=error)) == "Stopped."
    assert len(server.seen) == 24 and len(rows_of(tmp_path / "cot.jsonl")) == 22 == len(script.answered)


def test_a_full_disk_ends_the_run_and_asks_nothing_more(world, server, tmp_path):
    script = server.behave = Script(world[2], delay=0.05)
    full = (resource.RLIMIT_FSIZE, (8000, 8000))  # no file can grow beyond 8,000 bytes
    done = subprocess.run(command(world, server.spec(), tmp_path / "cot.jsonl", "--teacher-concurrency", 4),
                          capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(*full))
    text = (tmp_path / "traces.jsonl").read_bytes()
    assert done.returncode == 1 and "File too large" in done.stderr and len(text) == 8000
    assert 0 < len(script.answered) - text.count(b"\n") <= 4 + 4  # in flight, and begun before it was seen


# --- step 1 by itself ---

def generate(records, server, tmp_path, **changes):
    args = dict(teacher=server.spec(), teacher_extra=None, teacher_concurrency=2, teacher_max_calls=None,
                prompt_file=None, num_frames=4, max_pixels=4, workers=1, output=tmp_path / "cot.jsonl")
    return gen_cot.generate(records, SimpleNamespace(**args | changes))


def test_a_refused_question_has_no_trace_and_is_asked_again_by_the_next_run(world, server, tmp_path):
    _, records, traces, _ = world
    script, refused = Script(traces), [build_prompt(record) for record in records[3:5]]
    server.behave = lambda prompt, attempt: Fault(400) if prompt in refused else script(prompt, attempt)
    expected = [traces[build_prompt(record)] for record in records[:8]]
    outputs = generate(records[:8], server, tmp_path)
    assert outputs == [*expected[:3], None, None, *expected[5:]]
    server.behave = script
    script.answered.clear()
    assert generate(records[:8], server, tmp_path) == expected
    assert sorted(script.answered) == sorted(refused)


def test_what_is_asked_again_is_another_request(world, server, tmp_path):
    """The same question with another gold answer is the same request; with another prompt or other frames,
    or to another teacher, it is not."""
    record = world[1][0]
    twin = dict(record, problem_id=9999, solution="<answer>something else entirely</answer>")
    server.behave = lambda prompt, attempt: f"reply {len(server.seen)}"
    assert generate([record, twin], server, tmp_path) == ["reply 1"] * 2
    assert generate([twin, record], server, tmp_path) == ["reply 1"] * 2
    (tmp_path / "prompt.txt").write_text("{question} {answer_form}")
    changes = [dict(prompt_file=tmp_path / "prompt.txt"), dict(num_frames=6), dict(max_pixels=5),
               dict(teacher_extra='{"temperature": 1}'), dict(teacher=server.spec(model="model-2"))]
    for count, change in enumerate(changes, 2):
        for _ in range(2):
            assert generate([record], server, tmp_path, **change) == [f"reply {count}"]


def test_an_unreadable_medium_costs_its_own_question(world, server, tmp_path):
    _, records, traces, _ = world
    server.behave = Script(traces)
    (tmp_path / "text.mp4").write_text("no video")
    bad = dict(records[1], media=str(tmp_path / "text.mp4"), path="text.mp4", data_type="video")
    first, error, third = generate([records[0], bad, records[2]], server, tmp_path)
    assert [first, third] == [traces[build_prompt(record)] for record in (records[0], records[2])]
    assert isinstance(error, gen_cot.MediaError) and len(server.seen) == 2
    reasons, _ = gen_cot.verify([records[0], bad], [first, error], lambda records, observations: [True])
    assert reasons == [None, "unreadable medium"]


def test_one_problem_id_in_two_files_never_exchanges_traces(world, server, tmp_path):
    folder, records, traces, _ = world
    server.behave = Script(traces)
    for name, part in (("twins1.jsonl", records[:20]), ("twins2.jsonl", records[20:40])):
        write_jsonl(folder / name, [dict(record, problem_id=i) for i, record in enumerate(part)])
    output = tmp_path / "cot.jsonl"
    assert run(world, server.spec(), output, data="twins*.jsonl").returncode == 0
    kept = load_records(output)
    assert [r["problem_id"] for r in kept] == [0, 4, 8, 12, 16] * 2
    assert {build_prompt(r): r["output"] for r in kept}.items() <= traces.items()
    elsewhere = [sys.executable, "gen_cot.py", "--model", "tiny", "--data", folder / "twins*.jsonl",
                 "--traces", tmp_path / "traces.jsonl", "--output", tmp_path / "again/cot.jsonl"]
    subprocess.run(elsewhere, cwd=ROOT, check=True, capture_output=True)
    assert load_records(tmp_path / "again/cot.jsonl") == kept
    twins = [load_records(folder / f"twins{i}.jsonl") for i in (1, 2)]
    first = set(map(gen_cot.question_key, twins[0]))
    rows = [row for row in rows_of(output) if row["question"] in first]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    found = [gen_cot.load_traces(tmp_path / "traces.jsonl", records) for records in twins]
    assert found == [[traces[build_prompt(record)] for record in twins[0]], [None] * 20]
    for row in rows:
        del row["question"]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    elsewhere[5] = folder / "twins1.jsonl"  # without `question` they can be told by one file alone
    subprocess.run(elsewhere, cwd=ROOT, check=True, capture_output=True)
    elsewhere[5] = folder / "twins*.jsonl"
    for number, flags in ((40, []), (5, ["--limit", "5"])):  # nor where only one of the two was drawn
        done = subprocess.run([*elsewhere, *flags], cwd=ROOT, capture_output=True, text=True)
        assert f"None of the {number} traces was kept" in sentence(done)
        table = json.loads((tmp_path / "again/yield.json").read_text())["table"]["all"]
        assert table == {"questions": number, "no trace": number}


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(world, server, tmp_path):
    _, (record, *_), traces, _ = world
    text = traces[build_prompt(record)].replace("<think>", "<think>\ud83d ")
    server.behave = lambda prompt, attempt: text
    for _ in range(2):  # as it comes, and from the file
        assert generate([record], server, tmp_path) == [text]
    assert len(server.seen) == 1
    write_jsonl(tmp_path / "kept.jsonl", [gen_cot.kept_record(record, text, 1.0, "paper")])
    assert load_records(tmp_path / "kept.jsonl")[0]["output"] == traces[build_prompt(record)].replace(
        "<think>", "<think> ")  # and no record holds it


def test_what_a_kill_tore_is_asked_again_and_the_file_serves_as_traces(world, server, tmp_path):
    _, records, traces, _ = world
    script = server.behave = Script(traces)
    expected = generate(records[:4], server, tmp_path)
    path = tmp_path / "traces.jsonl"
    for torn in (-1, -30):  # of its line end alone, and in its midst
        path.write_bytes(path.read_bytes()[:torn])
        script.answered.clear()
        assert generate(records[:4], server, tmp_path) == expected
        assert len(script.answered) == (torn == -30)
        assert gen_cot.load_traces(path, records[:5]) == [*expected, None]


def test_no_teacher_and_no_traces_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gen_cot.py", "--model", "qwen2.5-vl-7b"])
    with pytest.raises(UserError, match="--teacher or --traces, and --judge"):
        gen_cot.main(gen_cot.get_args())
