"""Step 1 against a real HTTP server on loopback that answers from the toy world's script, fails, and is cut off."""
import base64
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import gen_cot
import prepare
from gen_cot import load_records
from rewards import UserError

ROOT = Path(__file__).resolve().parents[1]
FLAWS = [None, "wrong answer", "broken template", "insufficient observation"]


class Server(ThreadingHTTPServer):
    """Answers a request by its last JPEG and its question; `failing` of the calls end in one of four ways."""
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, replies, failing=0.0, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.failing, self.delay, self.rng = replies, failing, delay, random.Random(0)
        self.bodies, self.answered, self.lock, self.refusing = [], [], threading.Lock(), False
        self.cutting = False  # as servers with a reasoning parser do
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def api(self, name):
        """The server as a teacher, over the one API or the other."""
        return self.spec if name == "openai" else f"anthropic:scripted@http://127.0.0.1:{self.server_port}"

    @property
    def spec(self):
        return f"openai:scripted@http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = request_key(body)
        with server.lock:
            server.bodies.append(body)
            fails = server.rng.random() < server.failing
            way = server.rng.choice(["error", "limit", "lost", "empty"])
        time.sleep(server.delay)
        if fails and way == "lost":
            self.close_connection = True
            return
        status, text = 200, server.replies.get(key, "no such question")
        if fails:
            status, text = dict(error=(500, "x"), limit=(429, "x"), empty=(200, ""))[way]
        else:
            with server.lock:
                server.answered.append(key)
        if server.refusing:
            status = 401
        message = dict(content=text)
        if server.cutting and "</think>" in text:
            message = dict(content=text.split("</think>")[1], reasoning_content=text.split("<think>")[-1])
        reply = dict(choices=[dict(message=message)], usage=dict(prompt_tokens=7, completion_tokens=3))
        if self.path.endswith("/messages"):
            reply = dict(content=[dict(type="thinking", thinking="so"), dict(type="text", text=text)],
                         usage=dict(input_tokens=7, output_tokens=3))
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def request_key(body):
    *media, prompt = body["messages"][0]["content"]
    return hashlib.sha256((image_url(media[-1]) + prompt["text"]).encode()).hexdigest()


def image_url(part):
    """An image part's data URL, in the form of either API."""
    if part["type"] == "image_url":
        return part["image_url"]["url"]
    assert part["type"] == "image" and part["source"]["type"] == "base64"
    return f"data:{part['source']['media_type']};base64,{part['source']['data']}"


def key_of(record, args):
    """The key under which the server finds this record's trace."""
    jpeg = gen_cot.teacher_content(record, args.num_frames, args.max_pixels)[-1]["jpeg"]
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return hashlib.sha256((url + gen_cot.build_prompt(record)).encode()).hexdigest()


def make_world(folder, questions, scenes):
    """Questions about real clips and pictures on disk: (records, replies by key, planted flaw by problem_id)."""
    rng, rows, planted, drawn = random.Random(3), [], {}, {}
    (folder / "media").mkdir(parents=True)
    args = SimpleNamespace(num_frames=4, max_pixels=4)
    traces = []
    for i in range(questions):
        n = i % scenes
        if n not in drawn:
            scene = prepare.make_scene(rng)
            path = f"media/{n}.{'mp4' if scene['kind'] == 'clip' else 'png'}"
            prepare.write_medium(scene, folder / path)
            drawn[n] = scene, path
        scene, path = drawn[n]
        question = prepare.make_question(scene, rng)
        planted[i] = FLAWS[i % 4]
        traces.append(prepare.teach(question, planted[i], rng))
        rows.append({k: v for k, v in question.items() if k in prepare.FIELDS}
                    | dict(problem_id=i, problem=f"{question['problem']} (number {i})", path=path,
                           data_type="video" if scene["kind"] == "clip" else "image"))
    gen_cot.write_jsonl(folder / "questions.jsonl", rows)
    records = load_records(folder / "questions.jsonl", folder)
    media = {r["media"]: gen_cot.teacher_content(r, 4, 4)[-1]["jpeg"] for r in records[:scenes]}
    replies = {hashlib.sha256(("data:image/jpeg;base64," + base64.b64encode(media[r["media"]]).decode()
                               + gen_cot.build_prompt(r)).encode()).hexdigest(): trace
               for r, trace in zip(records, traces)}
    assert len(replies) == questions and key_of(records[-1], args) in replies
    return records, replies, planted


def command(folder, server, *flags, api="openai"):
    return [sys.executable, "gen_cot.py", "--model", "tiny", "--data", folder / "questions.jsonl", "--media-root",
            folder, "--teacher", server.api(api), "--num-frames", "4", "--max-pixels", "4", *map(str, flags)]


def run(folder, server, *flags, api="openai"):
    return subprocess.run(command(folder, server, *flags, api=api), cwd=ROOT, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, *make_world(folder, 2000, 40)


def test_two_thousand_questions_through_a_server_that_fails_one_call_in_five(world, tmp_path):
    """Exactly the planted flaws are rejected, each for its reason, and every other trace is kept as it was."""
    folder, records, replies, planted = world
    server = Server(replies, failing=0.2)
    done = run(folder, server, "--output", tmp_path / "cot.jsonl")
    assert done.returncode == 0, done.stderr
    line = done.stderr.rstrip().splitlines()[-1]  # the live line's last state
    assert "2000/2000" in line and "kept=500" in line and all(f"{flaw}=500" in line for flaw in FLAWS[1:])
    kept = load_records(tmp_path / "cot.jsonl")
    assert [r["problem_id"] for r in kept] == [i for i, flaw in planted.items() if flaw is None]
    assert sorted(server.answered) == sorted(replies)  # each once
    counts = json.loads((tmp_path / "yield.json").read_text())["table"]["all"]
    assert counts == {"questions": 2000, "unreadable medium": 0, "no trace": 0, "judge unknown": 0, "kept": 500}\
        | {flaw: 500 for flaw in FLAWS[1:]}

    # another threshold and the other scoring: from the journal, and no call to the teacher
    before = len(server.bodies)
    again = run(folder, server, "--output", tmp_path / "cot.jsonl", "--threshold", "0.95", "--scoring", "lenient")
    assert again.returncode == 0 and len(server.bodies) == before
    stricter = load_records(tmp_path / "cot.jsonl")
    assert 0 < len(stricter) <= 500 and {r["scoring"] for r in stricter} == {"lenient"}
    server.shutdown()


def test_killed_at_any_moment_it_pays_for_nothing_twice(world, tmp_path):
    folder, records, replies, _ = world
    server, rng = Server(replies, delay=0.02), random.Random(0)
    keys = dict(zip((record["problem_id"] for record in records), replies))
    flags = ["--limit", 400, "--teacher-concurrency", 8]
    assert run(folder, server, *flags, "--output", tmp_path / "whole" / "cot.jsonl").returncode == 0
    journal = tmp_path / "killed" / "journal.jsonl"
    paid, before = set(), len(server.answered)
    for _ in range(20):
        process = subprocess.Popen(command(folder, server, *flags, "--output", tmp_path / "killed" / "cot.jsonl"),
                                   cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stop = len(server.answered) + rng.randrange(30)
        while len(server.answered) < stop and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)  # what was in flight reaches the server
        assert not set(server.answered[before:]) & paid
        before = len(server.answered)
        for line in (journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []):
            row = json.loads(line)
            paid |= {keys[row["problem_id"]]} if "output" in row else set()
        assert not (tmp_path / "killed" / "cot.jsonl").exists()
    assert 100 < len(paid) < 400
    done = run(folder, server, *flags, "--output", tmp_path / "killed" / "cot.jsonl")
    assert done.returncode == 0 and not set(server.answered[before:]) & paid
    assert (tmp_path / "killed/cot.jsonl").read_bytes() == (tmp_path / "whole/cot.jsonl").read_bytes()
    server.shutdown()


@pytest.mark.parametrize("api, fields", [
    ("openai", {"temperature": 0}), ("anthropic", {"max_tokens": 2048})])  # newer models refuse a temperature
def test_what_the_teacher_is_sent(world, tmp_path, api, fields):
    """Frames in time order after their time stamps, then the prompt of all stages; never the gold answer."""
    folder, records, replies, planted = world
    server = Server(replies)
    done = run(folder, server, "--limit", 12, "--output", tmp_path / "cot.jsonl", api=api)
    assert done.returncode == 0 and "84 tokens in, 36 tokens out" in done.stdout
    asked = {row["problem_id"] for row in map(json.loads, open(tmp_path / "journal.jsonl")) if "output" in row}
    assert [r["problem_id"] for r in load_records(tmp_path / "cot.jsonl")] == sorted(
        i for i in asked if planted[i] is None)
    prompts = {gen_cot.build_prompt(r): r for r in records}
    assert len(server.bodies) == 12
    for body in server.bodies:
        assert {name: value for name, value in body.items() if name != "messages"} == fields | {"model": "scripted"}
        *media, prompt = body["messages"][0]["content"]
        record = prompts[prompt["text"]]
        frames, _ = gen_cot.read_media(record, 4, 4)
        jpegs = [image_url(part) for part in media if part["type"] != "text"]
        sent = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in jpegs]
        assert len(sent) == len(frames) and all(np.abs(a.astype(int) - b).mean() < 20 for a, b in zip(sent, frames))
        stamps = [float(part["text"].removesuffix(" s:")) for part in media if part["type"] == "text"]
        assert stamps == sorted(set(stamps)) and len(stamps) == (len(frames) if record["data_type"] == "video" else 0)
        assert not stamps or stamps[0] == 0 and stamps[-1] in (4, 5)  # the clips' seconds
        assert record["solution"] not in json.dumps(body)
    server.shutdown()


def test_limits_refusals_and_lost_media_end_in_one_sentence_and_lose_nothing(world, tmp_path):
    folder, records, replies, _ = world
    server = Server(replies)
    out = ["--output", tmp_path / "cot.jsonl", "--limit", "60"]
    done = run(folder, server, *out, "--teacher-max-calls", 25, "--teacher-concurrency", 4)
    assert done.returncode == 1 and "had its 25 calls" in done.stderr and "The journal keeps 25 replies" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "cot.jsonl").exists()
    assert run(folder, server, *out).returncode == 0
    assert sorted(server.answered) == sorted(set(server.answered)) and len(server.answered) == 60
    server.refusing, before = True, len(server.bodies)
    done = run(folder, server, "--output", tmp_path / "none" / "cot.jsonl", "--teacher-concurrency", 4)
    assert done.returncode == 1 and "check the key" in done.stderr.splitlines()[-1]
    assert 10 <= len(server.bodies) - before < 10 + 8 * 4 + 4 and not (tmp_path / "none" / "cot.jsonl").exists()
    server.refusing, server.cutting = False, True
    done = run(folder, server, "--output", tmp_path / "none" / "cot.jsonl", "--teacher-concurrency", 4)
    assert done.returncode == 1 and "switch its reasoning parser off" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "none" / "cot.jsonl").exists()
    server.shutdown()


def make_run(world, tmp_path, count, **changes):
    """What `generate` takes for the first `count` good questions: records, a teacher that counts what it is asked,
    a judge that agrees, the journal and the arguments."""
    _, records, replies, planted = world
    texts = {gen_cot.build_prompt(record): text for record, text in zip(records, replies.values())}
    asked = []

    def ask_here(content):
        asked.append(content[-1]["text"])
        return texts[content[-1]["text"]]

    args = SimpleNamespace(**dict(
        teacher="t", teacher_extra=None, teacher_concurrency=2, prompt_file=None, num_frames=4, max_pixels=4, workers=1,
        decode_timeout=60, threshold=0.6, scoring="paper", judge="j", judge_prompt_file=None) | changes)
    teacher = SimpleNamespace(ask_here=ask_here, stats=dict(tokens_in=0, tokens_out=0), asked=asked)
    good = [record for record in records if planted[record["problem_id"]] is None][:count]
    return good, teacher, lambda records, observations: [True] * len(records), gen_cot.Journal(
        tmp_path / "journal.jsonl"), args


def test_a_verdict_holds_for_its_own_gold_answer_alone(world, tmp_path):
    """The same question twice, with two gold answers: one call, two verdicts, whichever comes first; and a gold
    answer that is mended between two runs is scored again without a call."""
    (right, other), teacher, judge, journal, args = make_run(world, tmp_path, 2)
    wrong = dict(right, solution="<answer>something else entirely</answer>")
    for pair, expected in (((right, wrong), [None, "wrong answer"]), ((wrong, right), ["wrong answer", None])):
        folder = tmp_path / str(expected[0])
        journal = gen_cot.Journal(folder / "journal.jsonl")
        teacher.asked.clear()
        outputs, reasons, scores = gen_cot.generate([*pair, other], teacher, judge, journal, args)
        assert reasons == [*expected, None] and len(teacher.asked) == 2 and outputs[0] == outputs[1]
    journal = gen_cot.Journal(tmp_path / "mended" / "journal.jsonl")
    assert gen_cot.generate([wrong], teacher, judge, journal, args)[1] == ["wrong answer"]
    calls = len(teacher.asked)
    assert gen_cot.generate([right], teacher, judge, journal, args)[1:] == ([None], [1.0])
    assert len(teacher.asked) == calls
    args.judge_prompt_file = tmp_path / "prompt.txt"
    for prompt, verdict in (("strict", False), ("mild", True), ("strict", False)):  # the last is in the journal
        args.judge_prompt_file.write_text(prompt)
        judges = [] if len(journal.checks) == 4 else [verdict]
        reason, = gen_cot.generate([right], teacher, lambda records, observations: [judges.pop()], journal, args)[1]
        assert reason == (None if verdict else "insufficient observation") and not judges
    assert len(teacher.asked) == calls
    args.teacher_extra = dict(temperature=1)  # another request
    gen_cot.generate([right], teacher, judge, journal, args)
    assert len(teacher.asked) == calls + 1


def test_a_judge_that_refuses_costs_one_verdict_and_ten_in_a_row_stop_the_run(world, tmp_path):
    records, teacher, agree, journal, args = make_run(world, tmp_path, 14)

    ids, refused = [record["problem_id"] for record in records], set()

    def judge(asked, observations):
        if asked[0]["problem_id"] in refused:
            raise UserError("the judge says no.")
        return agree(asked, observations)

    unsure = gen_cot.generate(records, teacher, lambda records, observations: [None] * len(records), journal, args)
    assert unsure[1] == ["judge unknown"] * 14 and not journal.checks
    refused |= set(ids[3:5])
    reasons = gen_cot.generate(records, teacher, judge, journal, args)[1]
    assert [i for i, reason in enumerate(reasons) if reason] == [3, 4] and reasons[3] == "judge unknown"
    assert len(teacher.asked) == 14
    reasons = gen_cot.generate(records, teacher, agree, gen_cot.Journal(tmp_path / "journal.jsonl"), args)[1]
    assert reasons == [None] * 14 and len(teacher.asked) == 14  # the two verdicts were not journalled

    again = gen_cot.Journal(tmp_path / "again" / "journal.jsonl")
    refused |= set(ids) - {ids[9]}  # nine in a row, and four
    assert gen_cot.generate(records, teacher, judge, again, args)[1].count("judge unknown") == 13
    refused |= {ids[9]}
    again = gen_cot.Journal(tmp_path / "refused" / "journal.jsonl")
    with pytest.raises(UserError, match=r"Stopped: the judge says no\. The journal keeps 1\d replies"):
        gen_cot.generate(records, teacher, judge, again, args)


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_asks_nothing_more(world, tmp_path, trouble):
    records, teacher, judge, journal, args = make_run(world, tmp_path, 60, teacher_concurrency=1)
    write, ask = journal.write, teacher.ask_here
    teacher.ask_here = lambda content: time.sleep(0.05) or ask(content)  # decoding is quicker: the queue is full

    def fails_at_last(**row):
        if len(journal.outputs) == 5 and "output" in row:
            raise trouble
        write(**row)

    journal.write = fails_at_last
    with pytest.raises(UserError if isinstance(trouble, OSError) else KeyboardInterrupt) as error:
        gen_cot.generate(records, teacher, judge, journal, args)
    assert 6 <= len(teacher.asked) <= 8  # not the eight in the queue as well
    if isinstance(trouble, OSError):
        assert "No space left on device. The journal keeps 5 replies" in str(error.value)


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(world, tmp_path):
    (record,), teacher, judge, journal, args = make_run(world, tmp_path, 1)
    text, = {teacher.ask_here([dict(text=gen_cot.build_prompt(record))])}
    teacher.ask_here = lambda content: text.replace("<think>", "<think>\ud83d ")
    (output,), reasons, scores = gen_cot.generate([record], teacher, judge, journal, args)
    assert reasons == [None] and gen_cot.Journal(tmp_path / "journal.jsonl").outputs == journal.outputs
    gen_cot.write_jsonl(tmp_path / "cot.jsonl", [gen_cot.kept_record(record, output, 1.0)])
    assert "<think>\ud83d " in load_records(tmp_path / "cot.jsonl")[0]["output"]


def test_a_journal_with_a_torn_last_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"question": "a", "problem_id": 1, "output": "x"}\n{"question": "b", "prob')
    journal = gen_cot.Journal(path)
    assert journal.outputs == {"a": "x"}
    journal.write(question="c", problem_id=3, output="y")
    again = gen_cot.Journal(path)
    assert again.outputs == {"a": "x", "c": "y"}
    for line in ("nonsense", "3", '{"output": "x"}'):
        path.write_text('{"question": "a", "problem_id": 1, "output": "x"}\n' + line + "\n")
        with pytest.raises(UserError, match="journal.jsonl, line 2 is no row of a journal: delete the line"):
            gen_cot.Journal(path)


def test_no_teacher_and_no_traces_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gen_cot.py", "--model", "qwen2.5-vl-7b"])
    with pytest.raises(UserError, match="--teacher or --traces, and --judge"):
        gen_cot.main(gen_cot.get_args())
