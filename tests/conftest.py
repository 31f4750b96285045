"""What the tests share: the small model, toy records whose media are really encoded, and a chat server."""
import json
import os
import random
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

# Before anything imports torch, and for the scripts that the tests start: float32 on a CPU, offline.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only wait for each other on matrices this small

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data/toy")]
KEY = "sk-secret-0123456789"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")  # the longest file first, for -n 3


@pytest.fixture(autouse=True)
def signal_handlers():
    """Puts back what a run in this process replaces, as Ctrl-C would else end no later test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer): the toy base in 4 bits with a fresh LoRA adapter, which changes nothing yet."""
    import torch
    import sft
    from gen_cot import MODELS
    torch.manual_seed(0)
    return sft.load_model(ROOT / MODELS["tiny"], lora_rank=8)


@pytest.fixture(scope="session")
def toy_records(tmp_path_factory):
    """Eleven records as `load_records` gives them, each with the teacher's good trace in `output`.

    All five problem types about a clip and about a picture each, and one question about a flash of light.
    """
    import prepare
    from gen_cot import load_records
    root, rng, records = tmp_path_factory.mktemp("toy"), random.Random(0), {}
    (root / "media").mkdir()
    while len(records) < 11:
        scene = prepare.make_scene(rng)
        question = prepare.make_question(scene, rng)
        kind, suffix = {"clip": ("video", "mp4"), "picture": ("image", "png")}[scene["kind"]]
        key = question["problem_type"], kind, question["data_source"] == "toy-flash"
        if key in records:
            continue
        output = prepare.teach(question, None, rng)
        path = f"./media/{len(records):02}.{suffix}"
        prepare.write_medium(scene, root / path)
        fields = {name: value for name, value in question.items() if name in prepare.FIELDS}
        records[key] = dict(fields, problem_id=len(records), path=path, data_type=kind, output=output)
    (root / "records.json").write_text(json.dumps(list(records.values())))
    return load_records(root / "records.json", root)


# --- a chat server that misbehaves on demand ---

class Fault(NamedTuple):
    """What the server does in place of an answer: a status with a body, or a `trick` on the connection."""
    status: int = 200
    body: str = ""
    headers: dict = {}
    trick: str = ""  # drop: no reply; cut: it lacks its end; hang: it is late; drip: it comes byte by byte


class Server(ThreadingHTTPServer):
    """A chat server on loopback, over both APIs.

    `behave(prompt, attempt)` gives a reply's text or a Fault; the prompt is the last text of a request, and
    its attempts count from 0. `seen` holds (path, headers, body) of every request, `dripped` counts bytes.
    """
    request_queue_size = 256
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.seen, self.attempts = threading.Lock(), [], {}
        self.in_flight = self.most_in_flight = self.dripped = 0
        self.behave = lambda prompt, attempt: "Yes."

    def spec(self, api="openai", model="model-1"):
        return f"{api}:{model}@{self.url}" + ("/v1" if api == "openai" else "")

    def handle_error(self, request, client_address):
        pass  # a client that has given up, or was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            attempt = server.attempts.get(prompt, 0)
            server.attempts[prompt] = attempt + 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        reply = server.behave(prompt, attempt)
        with server.lock:  # before the client knows that this request is over and sends its next one
            server.in_flight -= 1
        self.answer(reply if isinstance(reply, Fault) else Fault(body=reply_body(reply, self.path)))

    def answer(self, reply):
        self.close_connection = reply.trick in ("drop", "cut")
        if reply.trick == "drop":
            return
        if reply.trick == "hang":
            time.sleep(1.5)
        data = reply.body.encode()
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(data) + 9 * (reply.trick == "cut")))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if reply.trick == "drip":
            for i in range(len(data)):
                self.wfile.write(data[i:i + 1])
                self.server.dripped += 1
                time.sleep(0.02)
        else:
            self.wfile.write(data)


def reply_body(text, path="/v1/chat/completions", cut_off=False):
    """A reply as the API at this path gives it, with thoughts next to it, which nobody must read."""
    thoughts = "<judgement>No</judgement><judgement>Yes</judgement>"
    if path == "/v1/messages":
        blocks = [{"type": "thinking", "thinking": thoughts}]
        blocks += [{"type": "text", "text": part} for part in (text[:len(text) // 2], text[len(text) // 2:])]
        return json.dumps({"content": blocks, "stop_reason": "max_tokens" if cut_off else "end_turn"})
    message = {"role": "assistant", "reasoning_content": thoughts, "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": "length" if cut_off else "stop"}]})


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
