"""A night on one card survives: numbers that are not finite, signals, errors, full disks, dead workers.

Signals are real, most of them sent to this process; `tests/kill_runs.py` adds kills at random moments.
"""
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.autograd._functions import MatMul4Bit
from safetensors.torch import load_file, save_file

import evaluate
import gen_cot
import pagrpo
import rewards
import sft
from conftest import ROOT
from rewards import UserError

SFT = "sft.py --batch-size 2 --lr 2e-3 --held-out 0"
RL = ("pagrpo.py --adapter none --updates 4 --prompts-per-update 2 --num-generations 4 --lr 1e-2 "
      "--max-completion-tokens 16 --held-out 0")
COMMANDS = {"sft": SFT, "pagrpo": RL, "mu2": RL + " --num-iterations 2"}
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has its children ignore it


# --- runs ---

def run(command, output, records, more=""):
    """A script on these records, with small settings, in here."""
    root = Path(records[0]["media"]).parents[1]
    words = (f"{command} --model tiny --data {root}/records.json --media-root {root} --num-frames 4 "
             f"--output {output} {more}").split()
    run_words(words + ["--save-every", "2"] * (words[0] in ("sft.py", "pagrpo.py")))


def run_words(words):
    """`python WORDS` in here."""
    stage = importlib.import_module(words[0].removesuffix(".py"))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", words)
        patch.setattr(sft, "plot_curves", lambda *args: None)  # a good part of a run's time
        try:
            gen_cot.run_script(stage.main, stage.get_args)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def left_by(folder):
    """A finished run's adapter in bytes, and its logs without timings. It leaves nothing else."""
    names = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json"}
    rollouts = "rollouts.jsonl"
    assert {file.name for file in folder.iterdir()} - {rollouts} == names
    rows = gen_cot.read_json(folder / "metrics.jsonl")
    if (folder / rollouts).exists():  # of pagrpo.py
        rows[0]["shown"] = gen_cot.read_json(folder / rollouts)
    return (folder / "adapter_model.safetensors").read_bytes(), [
        {k: v for k, v in row.items() if not k.startswith(("sec", "gib", "peak_gib"))} for row in rows]


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def before_call(patch, owner, name, n, *actions):
    """Before the n-th call of owner.name comes the first action, before the next call the next one. They get
    the call's arguments."""
    function, calls, actions = getattr(owner, name), itertools.count(-n + 1), dict(enumerate(actions))

    def wrapped(*args, **options):
        actions.get(next(calls), lambda *args, **options: None)(*args, **options)
        return function(*args, **options)

    patch.setattr(owner, name, wrapped)


def interrupt(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)


def terminate(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)


def hang_up(*args, **options):
    os.kill(os.getpid(), signal.SIGHUP)


class Terminates:
    __del__ = terminate  # an exception that a handler raises in here is lost


def fail(*args, **options):
    raise RuntimeError("of another kind")


@pytest.fixture(scope="module")
def whole(toy_records, tmp_path_factory):
    """{command: what its undisturbed run leaves}."""
    folder, left = tmp_path_factory.mktemp("whole"), {}
    for name, command in COMMANDS.items():
        run(command, folder / name, toy_records)
        left[name] = left_by(folder / name)
        assert all(row["grad_norm"] for row in left[name][1])  # each step changes something
    assert [row["step"] for row in left["sft"][1]] == list(range(6)) and left["pagrpo"] != left["mu2"]
    return left


@pytest.fixture(scope="module")
def stopped(toy_records, tmp_path_factory):
    """The folder of an SFT run that was stopped in its fifth step, which it finished."""
    folder = tmp_path_factory.mktemp("stopped") / "sft"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError):
        before_call(patch, sft, "sft_step", 5, interrupt)
        run(SFT, folder, toy_records)
    assert saved(folder)["step"] == 5
    return folder


# --- numbers ---

def poison(kept, number):
    """An action before `optimiser_step`: keeps the weights and multiplies the gradients by the number."""
    def act(model, *args):
        kept.append([p.detach().clone() for p in sft.trainable_parameters(model)])
        for parameter in sft.trainable_parameters(model):
            parameter.grad *= number
    return act


def same(weights, others):
    return all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_taken(toy_records, tmp_path, monkeypatch, number):
    kept = []
    before_call(monkeypatch, sft, "optimiser_step", 2, poison(kept, 1), poison(kept, number), poison(kept, 1))
    run(SFT, tmp_path / "sft", toy_records)
    assert [same(*kept[:2]), same(*kept[1:])] == [False, True]
    _, rows = left_by(tmp_path / "sft")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1] and rows[2]["grad_norm"] is None
    assert "NaN" not in (text := (tmp_path / "sft/metrics.jsonl").read_text()) and "Infinity" not in text
    assert all(w.isfinite().all() for w in load_file(tmp_path / "sft/adapter_model.safetensors").values())


def test_three_in_a_row_end_the_run_before_them(toy_records, tmp_path, monkeypatch):
    """And once more when it goes on in the same way; later it can go on in a better one."""
    kept, bad = [], []
    for n in (3, 1):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="Three steps in a row"):
            before_call(patch, sft, "optimiser_step", n, *[poison(kept, math.nan)] * 9)
            run(SFT, tmp_path / "sft", toy_records, "--resume")
        bad.append(saved(tmp_path / "sft")["weights"])
    assert same(kept[0], bad[0]) and same(kept[0], bad[1])
    run(SFT, tmp_path / "sft", toy_records, "--resume")
    assert [row["step"] for row in left_by(tmp_path / "sft")[1]] == list(range(6))


def test_logits_that_are_not_numbers_do_not_break_the_rollout(toy_records, tmp_path):
    assert pagrpo.sample_from(torch.full((2, 5), math.nan), torch.tensor([0.1, 0.9])).max() < 5
    with pytest.raises(UserError, match="Three steps in a row were not finite"):
        run(RL, tmp_path / "rl", toy_records, "--lr 1e3")
    assert not (tmp_path / "rl/adapter_config.json").exists()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nothing_that_is_not_finite_is_saved_or_loaded(tiny, tmp_path, number):
    model, _ = tiny
    sft.save_adapter(model, tmp_path / "sft")
    file = tmp_path / "sft/adapter_model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    next(iter(weights.values()))[0, 0] = number
    save_file(weights, file)
    refused = pytest.raises(AssertionError, match="numbers that are not finite")
    with refused:
        sft.load_model(ROOT / gen_cot.MODELS["tiny"], tmp_path / "sft")
    parameter = sft.trainable_parameters(model)[0]
    before = parameter.detach().clone()
    parameter.data[0, 0] = number
    try:
        with refused:
            sft.save_adapter(model, tmp_path / "new")
        with refused:
            sft.save_checkpoint(1, model, torch.optim.AdamW([parameter]), tmp_path)
    finally:
        parameter.data.copy_(before)
    assert os.listdir(tmp_path) == ["sft"]


@pytest.mark.parametrize("command", [
    "sft.py --max-grad-norm -1", "sft.py --lr nan", "sft.py --seed 0.5", "pagrpo.py --beta -1",
    "pagrpo.py --perception-length 64 16", "pagrpo.py --num-generations 1"])
def test_flags_that_make_no_sense_are_refused(monkeypatch, capsys, command):
    """With a negative norm each step would go up the gradient."""
    script, flag, value = command.split()[:3]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--model", "tiny"])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script.removesuffix(".py")).get_args()
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())  # it comes in a box
    assert error.value.code == 2 and value in said and (flag in said or "no length is from 64 to 16" in said)


# --- ending and going on ---

ADAMW = torch.optim.AdamW  # before `step` its weights are those of the last update, before `zero_grad` new


@pytest.mark.parametrize("command, step, disturbances", [
    # a signal: the update in hand is finished and saved
    ("sft", 4, [(MatMul4Bit, "backward", 85, interrupt)]),  # of 28 layers a step
    ("sft", 5, [(sft, "encode_batch", 5, lambda *args: Terminates())]),
    ("sft", 4, [(sft, "save_checkpoint", 2, hang_up)]),  # no step is in hand
    ("sft", 4, [(ADAMW, "step", 4, terminate), (ADAMW, "zero_grad", 4, hang_up)]),  # as a log-out sends both
    ("pagrpo", 3, [(pagrpo, "sample_from", 36, interrupt)]),
    ("pagrpo", 3, [(ADAMW, "step", 3, hang_up)]),
    ("mu2", 3, [(ADAMW, "zero_grad", 5, terminate)]),  # between the third one's two steps of AdamW
    # an error before AdamW's step: the updates until then are saved
    ("sft", 3, [(sft, "sft_loss", 4, fail)]),
    ("pagrpo", 3, [(pagrpo, "score_groups", 4, fail)]),
    ("pagrpo", 3, [(pagrpo, "token_logprobs", 13, fail)]),  # while `ref` is active: two groups, two passes each
    ("mu2", 3, [(pagrpo, "pa_grpo_loss", 13, fail)]),  # two groups, two steps: four calls an update
    # an error in it or after it: which weights has it changed? The last checkpoint stays
    ("sft", 2, [(ADAMW, "zero_grad", 4, fail)]),
    ("sft", 2, [(sft, "log_row", 4, fail)]),
    ("mu2", 2, [(pagrpo, "pa_grpo_loss", 16, fail)]),
])
def test_whatever_ends_a_run_it_goes_on_to_the_same_end(
        toy_records, tmp_path, monkeypatch, capsys, whole, command, step, disturbances):
    folder = tmp_path / command
    with monkeypatch.context() as patch, pytest.raises((UserError, RuntimeError)) as error:
        for disturbance in disturbances:
            before_call(patch, *disturbance)
        run(COMMANDS[command], folder, toy_records)
    assert saved(folder)["step"] == step and not (folder / "checkpoint.new").exists()
    if error.type is UserError:
        sentence = f"Stopped. {folder} holds a checkpoint: go on with `python (.*)`."
        [line] = re.fullmatch(sentence, str(error.value)).groups()
        run_words(shlex.split(line))
    else:
        run(COMMANDS[command], folder, toy_records, "--resume")
    assert f"Going on from step {step}." in capsys.readouterr().out and left_by(folder) == whole[command]


def test_where_a_closed_terminal_is_ignored_it_stays_so(toy_records, tmp_path, monkeypatch, whole):
    """As under nohup."""
    before_call(monkeypatch, sft, "sft_step", 2, hang_up)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(SFT, tmp_path / "sft", toy_records)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert left_by(tmp_path / "sft") == whole["sft"]


def start(command, output, records, before="", program=(sys.executable,)):
    """The same as `run`, but as a command; `before` is Python that runs ahead of it."""
    root = Path(records[0]["media"]).parents[1]
    words = (f"{command} --model tiny --data {root}/records.json --media-root {root} --num-frames 4 "
             f"--save-every 2 --output {output}").split()
    stage, script = words[0].removesuffix(".py"), output.with_name("run.py")
    lines = [f"import os, signal, sys, gen_cot, sft, {stage}", f"sys.argv = {words}", before,
             f"gen_cot.run_script({stage}.main, {stage}.get_args)"]
    script.write_text("\n".join(lines))
    done = subprocess.run([*program, script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout


@pytest.mark.parametrize("signals, code, step", [
    ("SIGINT SIGINT", -signal.SIGINT, 4),  # at once, with the last checkpoint
    ("SIGTERM SIGINT", -signal.SIGINT, 4),
    ("SIGHUP SIGHUP", 1, 5)])  # as a closed terminal does: its shell sends one, and then the kernel
def test_a_second_signal_ends_a_run_at_once(toy_records, tmp_path, capsys, whole, signals, code, step):
    twice = f"""if True:
        step, calls = sft.sft_step, []
        def stopped(*args):
            calls.append(1)
            for name in "{signals}".split() * (len(calls) == 5):
                os.kill(os.getpid(), getattr(signal, name))
            return step(*args)
        sft.sft_step = stopped"""
    returned, said = start(SFT, tmp_path / "sft", toy_records, twice)
    assert (returned, saved(tmp_path / "sft")["step"]) == (code, step), said
    run(SFT, tmp_path / "sft", toy_records, "--resume")
    assert f"Going on from step {step}." in capsys.readouterr().out
    assert left_by(tmp_path / "sft") == whole["sft"]


@pytest.mark.parametrize("first, left", [
    (True, ["checkpoint.pt", "metrics.jsonl", "run.json"]), (False, ["metrics.jsonl", "run.json"])])
def test_the_first_process_saves_and_waits_for_nobody(toy_records, tmp_path, monkeypatch, first, left):
    """The others may be gone."""
    def alone(*args):
        monkeypatch.setattr(sft, "gather_object", lambda *args: pytest.fail("collective"))
        monkeypatch.setattr(sft, "reduce", sft.gather_object)
        monkeypatch.setattr(sft, "is_first", lambda: first)
        fail()

    before_call(monkeypatch, sft, "sft_loss", 2, alone)
    with pytest.raises(RuntimeError, match="of another kind"):
        run(SFT, tmp_path / "sft", toy_records)
    assert sorted(os.listdir(tmp_path / "sft")) == left


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_bytes(bytes(100))])
def test_a_missing_or_torn_log_is_no_traceback(stopped, toy_records, tmp_path, whole, damage):
    folder = shutil.copytree(stopped, tmp_path / "sft")
    damage(folder / "metrics.jsonl")
    run(SFT, folder, toy_records, "--resume")
    adapter, rows = left_by(folder)
    assert adapter == whole["sft"][0] and rows[-1] == whole["sft"][1][-1]


def contents(folder):
    """{path: (time of the last change, bytes)}"""
    files = [path for path in folder.glob("**/*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_resume_of_a_finished_run_changes_nothing(toy_records, tmp_path, capsys):
    """On two ranks, too: neither waits for the other."""
    run(SFT, tmp_path / "sft", toy_records, "--resume")  # as in a loop, where it is there from the start
    before = contents(tmp_path / "sft")
    run(SFT, tmp_path / "sft", toy_records, "--resume")
    assert "holds a finished run of" in capsys.readouterr().out
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    code, said = start(SFT + " --resume", tmp_path / "sft", toy_records, program=two)
    assert code == 0 and said.count("nothing to do") == 1 and "Traceback" not in said, said
    assert contents(tmp_path / "sft") == before


@pytest.mark.parametrize("command, owner, name, n", [
    ("pagrpo", sft, "save_adapter", 1), ("sft", os, "replace", 2), ("sft", Path, "unlink", 1),
    ("sft", Path, "unlink", 2)], ids=["before the adapter", "within it", "behind it", "while it tidies up"])
def test_what_is_killed_behind_its_last_update_is_not_trained_again(
        toy_records, tmp_path, monkeypatch, whole, command, owner, name, n):
    """And a torn checkpoint of an earlier kill goes, in whatever order a file system lists the two."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern), reverse=True))

    def killed(model, curves, run, folder):
        (folder / "checkpoint.new").write_bytes(b"torn")
        before_call(patch, owner, name, n, fail)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="of another kind"):
        before_call(patch, sft, "finish", 1, killed)
        run(COMMANDS[command], tmp_path / command, toy_records)
    monkeypatch.setattr(sft, "optimiser_step", lambda *args: pytest.fail("trained again"))
    run(COMMANDS[command], tmp_path / command, toy_records, "--resume")
    assert left_by(tmp_path / command) == whole[command]


# --- folders and disks ---

@pytest.mark.parametrize("file", ["adapter_model.safetensors", "checkpoint.pt"])
def test_a_start_without_resume_moves_what_is_there_aside(toy_records, tmp_path, capsys, file):
    for folder in ("sft", "sft.1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(folder)
    run("sft.py --batch-size 11", tmp_path / "sft", toy_records)
    assert f"sft held an earlier run, which is now in {tmp_path}/sft.2." in capsys.readouterr().out
    assert [(tmp_path / folder / file).read_text() for folder in ("sft.1", "sft.2")] == ["sft.1", "sft"]
    assert len(left_by(tmp_path / "sft")[1]) == 1


@pytest.mark.parametrize("mistake", [
    "--judge mystery", "--judge openai:model@http://127.0.0.1:9/v1", "--adapter nowhere", "--data nowhere",
    "--lr nan", "--prompt-file nowhere"])
def test_a_start_that_fails_moves_nothing_aside(toy_records, tmp_path, monkeypatch, mistake):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(rewards, "RETRIES", 1)
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/adapter_model.safetensors").write_text("an old run")
    before = contents(tmp_path / "rl")
    with pytest.raises((SystemExit, OSError)):
        run(RL, tmp_path / "rl", toy_records, mistake)
    assert contents(tmp_path / "rl") == before and {p.name for p in tmp_path.iterdir()} <= {"rl", ".rl.lock"}


def test_what_was_killed_before_its_first_checkpoint_begins_again_in_its_folder(toy_records, tmp_path, whole):
    """In a loop with --resume, kill after kill would leave a folder more."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/metrics.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"step"')
    run(SFT, tmp_path / "sft", toy_records, "--resume")
    assert left_by(tmp_path / "sft") == whole["sft"] and sorted(os.listdir(tmp_path)) == [".sft.lock", "sft"]


@pytest.mark.parametrize("name, n, room, step", [
    ("save_checkpoint", 2, 2 * 10**6, 2), ("save_adapter", 1, 10**5, 6)])
def test_a_full_disk_costs_no_checkpoint(toy_records, tmp_path, monkeypatch, whole, name, n, room, step):
    """The kernel says so, by a limit on the size of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_call(monkeypatch, sft, name, n,
                lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1])))
    try:
        with pytest.raises(Exception, match="File too large|unexpected pos|I/O error"):
            run(SFT, tmp_path / "sft", toy_records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path / "sft")["step"] == step
    run(SFT, tmp_path / "sft", toy_records, "--resume")  # there is room again
    assert left_by(tmp_path / "sft") == whole["sft"]


def test_an_output_folder_may_be_a_mount(toy_records, tmp_path, monkeypatch, stopped, whole):
    """Nothing can be moved into it from outside."""
    folder, replace = shutil.copytree(stopped, tmp_path / "sft"), os.replace

    def within(source, target):
        assert folder in Path(source).parents
        replace(source, target)

    monkeypatch.setattr(os, "replace", within)
    run(SFT, folder, toy_records, "--resume")
    assert left_by(folder) == whole["sft"]


def test_a_run_may_go_on_with_unreadable_media_alone(toy_records, tmp_path, monkeypatch, capsys):
    """And evaluation counts them as wrong."""
    root = tmp_path / "toy"
    shutil.copytree(Path(toy_records[0]["media"]).parent, root / "media")
    (root / "records.json").write_text(json.dumps(toy_records[:4]))
    records = gen_cot.load_records(root / "records.json", root)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Stopped"):
        before_call(patch, sft, "encode_batch", 2, interrupt)
        run("sft.py --batch-size 1", tmp_path / "sft", records)
    for record in random.Random(0).sample(records, 4)[2:]:
        Path(record["media"]).write_bytes(b"no picture")
    run("sft.py --batch-size 1", tmp_path / "sft", records, "--resume")
    assert "4 steps, 2 media skipped" in capsys.readouterr().out
    assert [row["skipped_media"] for row in left_by(tmp_path / "sft")[1]] == [0, 0, 1, 1]
    run("evaluate.py --adapters none --max-completion-tokens 2", tmp_path / "evaluate", records)
    assert "2 media are missing or unreadable" in capsys.readouterr().out


# --- the other scripts, and the workers ---

@pytest.mark.parametrize("act", [interrupt, terminate])
@pytest.mark.parametrize("command, owner, name", [
    ("evaluate.py --adapters none --batch-size 2", evaluate, "rollout"),
    ("gen_cot.py --judge rule --traces TRACES", gen_cot, "parse_trace")])
def test_the_other_scripts_end_in_a_sentence(toy_records, tmp_path, monkeypatch, command, owner, name, act):
    gen_cot.write_jsonl(tmp_path / "traces.jsonl", toy_records)
    before_call(monkeypatch, owner, name, 1, act)
    output = tmp_path / "out" / ("cot.jsonl" if "gen_cot" in command else "")
    with pytest.raises(UserError, match="^Stopped.$"):
        run(command.replace("TRACES", str(tmp_path / "traces.jsonl")), output, toy_records)
    left = [path.name for path in tmp_path.glob("out/[!.]*")]
    assert left == ["completions-none.jsonl"] * command.startswith("evaluate")


@pytest.fixture
def bare(tmp_path):
    """A clone of no more than the first command of the quick start needs."""
    (tmp_path / "data/toy/base").mkdir(parents=True)
    for name in ("rewards.py", "gen_cot.py", "data/toy/prepare.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of their parent's end")
def test_a_first_command_that_is_stopped_leaves_nobody_at_work(bare):
    process = subprocess.Popen([sys.executable, "gen_cot.py", "--model", "tiny"], cwd=bare, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while not list(bare.glob("data/toy/media/*")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]  # the pipe ends when the last worker that holds it does
    assert process.returncode == 1 and "Stopped." in said and "Traceback" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of their parent's end")
def test_workers_die_with_their_parent():
    script = """if True:
        import os, time, types, gen_cot
        def read(*args):
            os.write(1, b"at work\\n")
            time.sleep(600)
        args = types.SimpleNamespace(num_frames=1, max_pixels=1, workers=2)
        for _ in gen_cot.read_ahead([{}] * 8, args, read):
            pass"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    process.kill()
    assert lines == ["at work\n"] * 2
    assert process.communicate(timeout=60)[0] == ""  # the pipe ends when the last worker that holds it does


RECORDS = [dict(media=f"{i}.mp4") for i in range(24)]


def read_quickly(record, *args):
    return record["media"]


def read_slowly(record, *args):
    time.sleep(0.3)
    return record["media"]


def read_and_die(record, *args):
    """Of two files at the first try only, of another one always."""
    again = os.path.exists(record["media"])
    Path(record["media"]).touch()
    if record["media"] == "7.mp4" or record["media"] in ("3.mp4", "9.mp4") and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    return record["media"]


def read_ahead(read):
    """What `gen_cot.read_ahead` yields for the 24 files, one by one."""
    args = SimpleNamespace(num_frames=1, max_pixels=1, workers=2)
    for record, media in gen_cot.read_ahead(RECORDS, args, read):
        yield record["media"], media


def test_an_idle_worker_that_is_killed_costs_no_file():
    """The usual state in training: they are far ahead."""
    for n, (name, media) in enumerate(read_ahead(read_quickly)):
        if n in (4, 15):
            time.sleep(0.5)  # by then they have nothing to do
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.5)
        assert media == name
    assert n == 23


def test_a_busy_worker_that_is_killed_costs_no_file(tmp_path, monkeypatch):
    """A system out of memory does so. A file that kills its worker twice is damaged."""
    monkeypatch.chdir(tmp_path)
    lost = {name: str(media) for name, media in read_ahead(read_and_die) if media != name}
    assert list(lost) == ["7.mp4"] and "7.mp4 hangs or crashes its decoder" in lost["7.mp4"]


def test_a_clock_that_jumps_costs_no_file(monkeypatch):
    """A laptop sleeps, or the clock is set, while files are being decoded."""
    clock, jump = time.time, 0
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    for n, (name, media) in enumerate(read_ahead(read_slowly)):
        jump = 1000 if n >= 3 else 0
        assert media == name
    assert n == 23
