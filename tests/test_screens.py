"""What reaches the screen, and other systems: terminals that lack characters, texts that would steer them,
Python without what Linux alone has, decoders that are spawned."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gen_cot
import pagrpo
import sft
from conftest import ROOT
from rewards import UserError, write_jsonl

STAGES = ("gen_cot", "sft", "pagrpo", "evaluate")
EVIL = "\x1b[2J\x07\x9b2J\r\u202e"  # clears a screen, rings, goes back, turns the text round


def run_here(monkeypatch, folder, command, records, root):
    """`python COMMAND` with small settings on these records, in this process, from the clone's root."""
    (folder / f"{EVIL[:4]}.json").write_text(json.dumps(records))
    monkeypatch.chdir(ROOT)
    flags = ["--model", "tiny", "--media-root", str(root), "--data", f"{folder}/*.json", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", [*command.split(), *flags, "--num-frames", "4"])
    stage = importlib.import_module(command.split(".py")[0])
    stage.main(stage.get_args())


def run_python(folder, text, *arguments, **environment):
    """A program of this text that knows where the stages are; returns its output, once it has ended well."""
    (folder / "program.py").write_text(text)
    path = os.pathsep.join([str(ROOT), str(folder)])
    command = [sys.executable, str(folder / "program.py"), *map(str, arguments)]
    environment = dict(os.environ, PYTHONPATH=path, **environment)
    done = subprocess.run(command, cwd=ROOT, timeout=280, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("latin-1")


# --- screens ---

def test_a_terminal_that_is_not_utf_8_shows_help_and_results(tmp_path, toy_records):
    """With question marks for what it lacks; a UnicodeEncodeError would end the run at its table."""
    root = Path(toy_records[0]["media"]).parents[1]
    flags = ["--model", "tiny", "--adapters", "none", "--data", root / "records.json", "--media-root", root,
             "--output", tmp_path / "out", "--limit", 2, "--max-completion-tokens", 8, "--workers", 1]
    said = run_python(tmp_path, """
import sys, gen_cot, sft, pagrpo, evaluate
flags = sys.argv[1:]
def run(stage, *words):
    sys.argv = [f"{stage.__name__}.py", *words]
    try:
        gen_cot.run_script(stage.main, stage.get_args)
    except SystemExit as end:
        assert end.code == 0, end
for stage in (gen_cot, sft, pagrpo, evaluate):
    run(stage, "--help")
run(evaluate, *flags)
""", *flags, PYTHONIOENCODING="ascii")
    words = " ".join(said.split())
    assert said.isascii() and all(f"usage: {name}.py" in words for name in STAGES)
    assert "in %, ? 95 % interval" in words and "each with ? optimiser steps" in words


def harmless(text):
    """Whether nothing of a text steers a terminal but line ends and our own three colours."""
    text = re.sub("\x1b\\[(36|33|0)m", "", text)
    return not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", text) and "\r\n" not in text


@pytest.mark.parametrize("command", [
    "gen_cot.py --traces TRACES --judge rule", "sft.py",
    "pagrpo.py --adapter none --updates 1 --show-every 1 --prompts-per-update 42 --num-generations 2 "
    "--max-completion-tokens 8",
    "evaluate.py --adapters none --max-completion-tokens 8"], ids=STAGES)
def test_records_and_file_names_do_not_steer_the_terminal(toy_records, tmp_path, monkeypatch, capfd, command):
    """Those that are used, those that are left out, those with a damaged or missing medium."""
    (tmp_path / f"{EVIL[:4]}.mp4").write_text("no clip")
    rows = [dict(row, problem=f"{row['problem']} {EVIL}", problem_id=f"{EVIL}{i}", path=row["media"][1:],
                 solution=f"<answer>{EVIL}red{EVIL}</answer>") for i, row in enumerate(toy_records[:3])]
    rows.append(dict(rows[0], path=f"{tmp_path}/{EVIL[:4]}.mp4"[1:], data_type="video"))
    rows.append(dict(rows[0], path=f"{EVIL}.png"))
    rows += rows[:3] * 12 + [dict(rows[0], problem_type=EVIL), dict(rows[0], options=EVIL)]
    rows += [dict(rows[0], problem_type="numerical", solution=EVIL + "one", options=[])]
    write_jsonl(tmp_path / "traces", [dict(problem_id=1, output=EVIL)])
    command = command.replace("TRACES", str(tmp_path / "traces")) + f" --output {tmp_path}/out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "plot_curves", lambda *args: None)
        try:
            run_here(patch, tmp_path, command, rows, "/")
        except UserError as error:  # gen_cot.py keeps none of these traces
            print(error, file=sys.stderr)
    out, err = capfd.readouterr()
    assert harmless(out) and harmless(err.replace("\x1b[A", "")), repr(out + err)
    assert "2 records are left out" in out
    assert ("skipped: " in err) == ("gen_cot" not in command)


def test_completions_replies_and_reasons_do_not_steer_the_terminal(capsys):
    texts = [["<observation>", "P"], [EVIL, "P"], [f"</observation> <think>{EVIL}", "R"]], [[EVIL, "R"]]
    completions = [dict(tokens=tokens, scores=dict(perception=1.0, reasoning=1.0, reward=2.0 - i))
                   for i, tokens in enumerate(texts)]
    pagrpo.show(dict(record=dict(problem="Which?", options=["A. x"], solution="A"), completions=completions,
                     algorithm="GRPO", advantages={"GRPO": [[0.5, -0.5]] * 2}))
    said = capsys.readouterr().out
    assert harmless(said) and said.count("<observation>") == 1 and "-0.50" in said
    assert harmless(str(UserError(EVIL)))
    with pytest.raises(gen_cot.MediaError) as error:
        gen_cot.read_image(f"nowhere/{EVIL}.png")
    assert harmless(str(error.value))


# --- systems ---

def test_no_stage_needs_what_linux_alone_has(tmp_path):
    """Neither modules nor functions that Windows or a Mac lack, while it is imported."""
    run_python(tmp_path, """
import os, sys
import filelock, psutil  # which have other files of their own there
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "forkpty"):
    delattr(os, name)
import rewards, gen_cot, sft, pagrpo, evaluate
""")


def test_spawned_workers_decode(tmp_path, toy_records):
    """As on Windows and a Mac."""
    rows = [dict(row, observation=None) for row in toy_records[:4]]
    write_jsonl(tmp_path / "data.jsonl", rows)
    said = run_python(tmp_path, """
import sys
import sft, gen_cot
if __name__ == "__main__":
    sys.platform = "darwin"
    sys.argv[1:1] = ["--model", "tiny", "--workers", "1", "--num-frames", "4"]
    gen_cot.run_script(sft.main, sft.get_args)
""", "--data", tmp_path / "data.jsonl", "--media-root", Path(rows[0]["media"]).parents[1],
                      "--output", tmp_path / "sft")
    assert "1 steps, 0 media skipped" in said and (tmp_path / "sft/adapter_model.safetensors").exists()
