"""A night on one card survives: numbers that are not finite, signals, errors, full disks, runs started twice.

Signals are real, sent to this process; `tests/kill_runs.py` adds kills of the scripts at random moments.
"""
import errno
import importlib
import itertools
import json
import math
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
import zipfile
from pathlib import Path

import pytest
import torch
from bitsandbytes.autograd._functions import MatMul4Bit
from safetensors.torch import load_file, save_file

import evaluate
import gen_cot
import pagrpo
import sft
from conftest import ROOT
from rewards import UserError

SFT = "sft.py --batch-size 2 --lr 2e-3"
RL = ("pagrpo.py --adapter none --updates 4 --prompts-per-update 2 --num-generations 4 --lr 1e-2 "
      "--max-completion-tokens 16")
COMMANDS = {"sft": SFT, "pagrpo": RL, "mu2": RL + " --num-iterations 2"}


# --- runs ---

def run(command, output, records, more=""):
    """A script on these records, with small settings, in this process."""
    root = Path(records[0]["media"]).parents[1]
    words = (f"{command} --model tiny --data {root}/records.json --media-root {root} --num-frames 4 "
             f"--output {output} {more}").split()
    run_words(words + ["--save-every", "2"] * (words[0] in ("sft.py", "pagrpo.py")))


def run_words(words):
    """`python WORDS` in this process."""
    stage, handler = importlib.import_module(words[0].removesuffix(".py")), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", words)
        patch.setattr(sft, "plot_curves", lambda *args: None)  # a good part of a run's time
        try:
            gen_cot.run_script(stage.main, stage.get_args)
        finally:
            signal.signal(signal.SIGTERM, handler)


def left_by(folder):
    """A finished run's adapter in bytes, and its logs without timings. It leaves nothing else."""
    names, rollouts = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"}, "rollouts.jsonl"
    assert {file.name for file in folder.iterdir()} - {rollouts} == names
    rows = gen_cot.read_json(folder / "metrics.jsonl")
    if (folder / rollouts).exists():  # of pagrpo.py
        rows[0]["shown"] = gen_cot.read_json(folder / rollouts)
    return (folder / "adapter_model.safetensors").read_bytes(), [
        {k: v for k, v in row.items() if not k.startswith(("sec", "gib", "peak_gib"))} for row in rows]


def saved(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


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


def fail(*args, **options):
    raise RuntimeError("of another kind")


def throw(number):
    raise OSError(number, os.strerror(number))


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
    """The folder of an SFT run that was stopped after five updates; its checkpoints are of five and four."""
    folder = tmp_path_factory.mktemp("stopped") / "sft"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError):
        before_call(patch, sft, "sft_step", 6, interrupt)
        run(SFT, folder, toy_records)
    assert [saved(folder, f"checkpoint{x}.pt")["step"] for x in ("", "-before")] == [5, 4]
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
def test_a_step_that_is_not_finite_is_not_taken(toy_records, tmp_path, monkeypatch, capsys, number):
    kept = []
    before_call(monkeypatch, sft, "optimiser_step", 2, poison(kept, 1), poison(kept, number), poison(kept, 1))
    run(SFT, tmp_path / "sft", toy_records)
    assert [same(*kept[:2]), same(*kept[1:])] == [False, True]
    _, rows = left_by(tmp_path / "sft")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1] and rows[2]["grad_norm"] is None
    assert "NaN" not in (text := (tmp_path / "sft/metrics.jsonl").read_text()) and "Infinity" not in text
    assert capsys.readouterr().err.count("step not taken: the loss is") == 1
    assert all(w.isfinite().all() for w in load_file(tmp_path / "sft/adapter_model.safetensors").values())


def test_three_in_a_row_end_the_run_before_them(toy_records, tmp_path, monkeypatch):
    """And once more when it goes on in the same way; later it can go on in a better one."""
    kept, bad = [], []
    for n in (3, 1):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="Three steps .* a checkpoint"):
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
def test_an_adapter_that_holds_such_numbers_is_refused(tiny, tmp_path, number):
    sft.save_adapter(tiny[0], tmp_path / "sft")
    file = tmp_path / "sft/adapter_model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    next(iter(weights.values()))[0, 0] = number
    save_file(weights, file)
    with pytest.raises(UserError, match="The adapter in .*sft holds numbers that are not finite"):
        sft.load_model(ROOT / gen_cot.MODELS["tiny"], tmp_path / "sft")


def test_training_that_does_nothing_is_an_error(toy_records, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(UserError, match="Every LoRA B is still 0"):
        run(SFT, tmp_path / "sft", toy_records)
    assert not (tmp_path / "sft/adapter_config.json").exists()


@pytest.mark.parametrize("command", [
    "sft.py --lr nan", "sft.py --lr -1", "sft.py --lr inf", "sft.py --max-grad-norm -1", "sft.py --seed -1",
    "sft.py --epochs 0", "sft.py --memory-limit nan", "pagrpo.py --beta -1", "pagrpo.py --clip-eps nan",
    "pagrpo.py --perception-length 64 16", "pagrpo.py --reasoning-length -2 16", "evaluate.py --seed -1",
    "gen_cot.py --threshold nan", "gen_cot.py --seed 0.5"])
def test_flags_that_make_no_sense_are_refused(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as error:
        run_words([*command.split(), "--model", "tiny"])
    flag, value = command.split()[1:3]
    said = str(error.value) + capsys.readouterr().err
    assert f"argument {flag}: " in said or f"No length is from {value} to 16" in said


# --- ending and going on ---

ADAMW = torch.optim.AdamW  # before `step` its weights are those of the last update, before `zero_grad` new


@pytest.mark.parametrize("command, step, disturbances", [
    ("sft", 3, [(MatMul4Bit, "backward", 85, interrupt)]),
    ("sft", 4, [(sft, "encode_batch", 5, terminate)]),
    ("sft", 4, [(sft, "save_checkpoint", 2, interrupt)]),
    ("sft", 4, [(ADAMW, "step", 4, terminate)]),  # held until the row is logged
    ("sft", 4, [(ADAMW, "step", 4, interrupt), (ADAMW, "zero_grad", 4, interrupt)]),  # both are
    ("sft", 2, [(ADAMW, "step", 4, fail)]),  # which weights has it changed? The last checkpoint stays
    ("pagrpo", 2, [(pagrpo, "sample_from", 36, interrupt)]),
    ("pagrpo", 2, [(pagrpo, "score_groups", 4, fail)]),  # the first is of the fixed prompts
    ("pagrpo", 3, [(ADAMW, "step", 3, interrupt)]),
    ("mu2", 3, [(ADAMW, "zero_grad", 5, interrupt)]),  # after the first of the third update's two steps
    ("mu2", 2, [(ADAMW, "zero_grad", 5, interrupt), (pagrpo, "pa_grpo_loss", 12, interrupt)]),  # not held
    ("mu2", 2, [(pagrpo, "pa_grpo_loss", 12, fail)]),
])
def test_whatever_ends_a_run_it_goes_on_to_the_same_end(
        toy_records, tmp_path, monkeypatch, capsys, whole, command, step, disturbances):
    folder = tmp_path / command
    with monkeypatch.context() as patch, pytest.raises((UserError, RuntimeError)) as error:
        for disturbance in disturbances:
            before_call(patch, *disturbance)
        run(COMMANDS[command], folder, toy_records)
    said = str(error.value) if error.type is UserError else capsys.readouterr().err
    reason = "Stopped" if error.type is UserError else "of another kind"
    [line] = re.findall(f"{reason}. {folder} holds a checkpoint: go on with `python (.*)`.", said)
    assert saved(folder)["step"] == step and not list(folder.glob("*partial*"))
    run_words(shlex.split(line))
    assert f"Going on from step {step}." in capsys.readouterr().out and left_by(folder) == whole[command]


@pytest.mark.parametrize("first, left", [
    (True, ["checkpoint.pt", "metrics.jsonl"]), (False, ["metrics.jsonl"])])
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


def flip(path):
    """One bit, in the middle of the largest tensor."""
    largest = max(zipfile.ZipFile(path).infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def kill_the_save(path):
    path.rename(path.with_name("checkpoint.pt.1-1.partial"))


@pytest.mark.parametrize("damage", [flip, cut, kill_the_save])
def test_for_a_damaged_checkpoint_the_one_before_it_is_taken(
        stopped, toy_records, tmp_path, capsys, whole, damage):
    folder = shutil.copytree(stopped, tmp_path / "sft")
    damage(folder / "checkpoint.pt")
    run(SFT, folder, toy_records, "--resume")
    said = capsys.readouterr().out
    assert ("checkpoint.pt is damaged" in said) == (damage is not kill_the_save)
    assert "Going on from step 4." in said and left_by(folder) == whole["sft"]


def test_two_damaged_checkpoints_are_one_sentence(stopped, toy_records, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "sft")
    flip(folder / "checkpoint.pt")
    cut(folder / "checkpoint-before.pt")
    with pytest.raises(UserError, match="^No checkpoint in .*sft fits: start again without --resume.$"):
        run(SFT, folder, toy_records, "--resume")
    assert sorted(os.listdir(folder)) == sorted(os.listdir(stopped))


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_bytes(bytes(100))])
def test_a_missing_or_torn_log_is_no_traceback(stopped, toy_records, tmp_path, whole, damage):
    folder = shutil.copytree(stopped, tmp_path / "sft")
    damage(folder / "metrics.jsonl")
    run(SFT, folder, toy_records, "--resume")
    adapter, rows = left_by(folder)
    assert adapter == whole["sft"][0] and rows[-1] == whole["sft"][1][-1]


def test_resume_of_a_finished_run_changes_nothing(toy_records, tmp_path, capsys):
    run(SFT, tmp_path / "sft", toy_records, "--resume")  # in a loop it stands from the start
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*/*")}
    with pytest.raises(SystemExit) as error:
        run(SFT, tmp_path / "sft", toy_records, "--resume")
    assert error.value.code == 0 and "holds a finished run: nothing to do" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*/*")}


@pytest.mark.parametrize("command, owner, name, n", [
    ("pagrpo", sft, "save_adapter", 1), ("sft", os, "replace", 2), ("sft", Path, "unlink", 2)],
    ids=["before the adapter", "within it", "behind it"])
def test_what_is_killed_behind_its_last_update_is_not_trained_again(
        toy_records, tmp_path, monkeypatch, whole, command, owner, name, n):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Stopped"):
        before_call(patch, sft, "finish", 1, lambda *args: before_call(patch, owner, name, n, interrupt))
        run(COMMANDS[command], tmp_path / command, toy_records)
    monkeypatch.setattr(sft, "optimiser_step", lambda *args: pytest.fail("trained again"))
    run(COMMANDS[command], tmp_path / command, toy_records, "--resume")
    assert left_by(tmp_path / command) == whole[command]


# --- folders and disks ---

@pytest.mark.parametrize("file", ["adapter_model.safetensors", "checkpoint.pt", "checkpoint-before.pt"])
def test_a_start_without_resume_moves_what_is_there_aside(toy_records, tmp_path, capsys, file):
    for folder in ("sft", "sft.1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(folder)
    run("sft.py --batch-size 11", tmp_path / "sft", toy_records)
    assert f"sft held an earlier run, which is now in {tmp_path}/sft.2." in capsys.readouterr().out
    assert [(tmp_path / folder / file).read_text() for folder in ("sft.1", "sft.2")] == ["sft.1", "sft"]
    assert len(left_by(tmp_path / "sft")[1]) == 1


@pytest.mark.parametrize("command", ["sft.py", "pagrpo.py --adapter none", "evaluate.py --adapters none",
                                     "gen_cot.py --traces nowhere"])
@pytest.mark.parametrize("output", ["file/run", "file", "read-only"])
def test_an_output_that_cannot_be_written_ends_before_the_model(
        toy_records, tmp_path, monkeypatch, command, output):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr(sft, "load_base", lambda *args: pytest.fail("loaded"))
    if output == "read-only":  # a test may run as root, who can write everywhere
        monkeypatch.setattr(gen_cot.tempfile, "TemporaryFile", lambda **options: throw(errno.EROFS))
    if "gen_cot" in command:
        output += "/cot.jsonl"
    with pytest.raises(UserError, match="^Nothing can be written to .*: pass another --output.$"):
        run(command, tmp_path / output, toy_records)


@pytest.mark.parametrize("name, room", [("save_checkpoint", 2 * 10**6), ("save_adapter", 10**5)])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_torn(
        toy_records, tmp_path, monkeypatch, whole, name, room):
    """The kernel says so, by a limit on the size of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_call(monkeypatch, sft, name, 1,
                lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1])))
    try:
        with pytest.raises(UserError, match="can't be written: "):
            run(SFT, tmp_path / "sft", toy_records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {"save_checkpoint": ["metrics.jsonl"], "save_adapter": [
        "checkpoint-before.pt", "checkpoint.pt", "metrics.jsonl"]}[name]
    assert sorted(os.listdir(tmp_path / "sft")) == left and os.listdir(tmp_path) == ["sft"]
    run(SFT, tmp_path / "sft", toy_records, "--resume")  # there is room again
    assert left_by(tmp_path / "sft") == whole["sft"]


def test_an_output_folder_may_be_a_mount(toy_records, tmp_path, monkeypatch, stopped):
    """Nothing can be moved into it from outside, nor can it be moved itself."""
    folder, replace = shutil.copytree(stopped, tmp_path / "sft"), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if folder in Path(a).parents
                        else throw(errno.EXDEV))
    monkeypatch.setattr(os, "rename", lambda *args: throw(errno.EBUSY))
    with pytest.raises(UserError, match="can.t be moved aside"):
        run(SFT, folder, toy_records)
    run(SFT, folder, toy_records, "--resume")
    left_by(folder)


def test_a_run_may_go_on_with_unreadable_media_alone(toy_records, tmp_path, monkeypatch, capsys):
    """And evaluation counts them as wrong."""
    root = tmp_path / "toy"
    shutil.copytree(Path(toy_records[0]["media"]).parent, root / "media")
    (root / "records.json").write_text(json.dumps(toy_records[:4]))
    records = gen_cot.load_records(root / "records.json", root)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Stopped"):
        before_call(patch, sft, "encode_batch", 3, interrupt)
        run("sft.py --batch-size 1", tmp_path / "sft", records)
    for record in random.Random(0).sample(records, 4)[2:]:
        Path(record["media"]).write_bytes(b"no picture")
    run("sft.py --batch-size 1", tmp_path / "sft", records, "--resume")
    assert "SFT on 2 traces, 2 skipped" in capsys.readouterr().out
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
    assert os.listdir(tmp_path / "out") == ["completions-none.jsonl"] * command.startswith("evaluate")


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


def test_a_disk_that_is_full_from_the_start_is_no_traceback(bare):
    full = (resource.RLIMIT_FSIZE, (1500, 1500))
    done = subprocess.run([sys.executable, "gen_cot.py", "--model", "tiny"], cwd=bare, capture_output=True,
                          text=True, preexec_fn=lambda: resource.setrlimit(*full))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "can't be written: File too large." in done.stderr
    assert done.stderr.splitlines()[-1] == "The toy data could not be prepared: see above."


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
