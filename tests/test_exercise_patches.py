"""docs/exercises: every patch applies to the code as it is, changes what it says, and trains."""
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pagrpo
from conftest import ROOT
from rewards import parse_trace, read_jsonl
from test_endings import run

PATCHES = sorted(ROOT.glob("docs/exercises/*.patch"))
RL = ("pagrpo.py --updates 1 --prompts-per-update 4 --num-generations 4 --held-out 0 --show-every 1 "
      "--max-completion-tokens 80 --adapter {}")


def load(name, file):
    """The module in a file, by itself."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], before = module, sys.modules.get(name)  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.modules[name] = before
    return module


@pytest.fixture(scope="module")
def trained(toy_records, tmp_path_factory):
    """The folder of an SFT that has learnt the template on eleven traces."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    run("sft.py --epochs 12 --batch-size 4 --micro-batch 4 --held-out 0", folder, toy_records)
    return folder


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """patched(name): `pagrpo` with the patch of that name, applied by git where there is no repository."""
    def apply(name):
        shutil.copy(ROOT / "pagrpo.py", tmp_path)
        subprocess.run(["git", "apply", ROOT / f"docs/exercises/{name}.patch"], cwd=tmp_path, check=True,
                       env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
        module = load("pagrpo", tmp_path / "pagrpo.py")
        monkeypatch.setitem(sys.modules, "pagrpo", module)  # for `run`
        return module
    return apply


def train(module, trained, records, folder, monkeypatch, flags=""):
    """One update; returns its row of the log, the groups that it kept, and the advantages that the loss got,
    (perception's, reasoning's) of each group."""
    given, loss = [], module.pa_grpo_loss

    def watched(*args):
        given.append([advantages.tolist() for advantages in args[5:7]])
        return loss(*args)

    monkeypatch.setattr(module, "pa_grpo_loss", watched)
    run(RL.format(trained) + f" {flags}", folder, records)
    row, = read_jsonl(folder / "metrics.jsonl")
    assert row["grad_norm"] > 0 and (folder / "adapter_model.safetensors").exists()
    return row, read_jsonl(folder / "rollouts.jsonl"), given


def test_gate(patched, trained, toy_records, tmp_path, monkeypatch):
    """Perception's tokens have the sum, or after a wrong answer their own; reasoning's have the sum."""
    module, kinds = patched("gate"), itertools.cycle(itertools.product((0.0, 1.0), repeat=2))
    real = module.process_rewards

    def each_kind_once(*args):  # of observations and answers, wrong and right, in a group of four
        p, r = next(kinds)
        return real(*args) | dict(perception=p, reasoning=r, perception_accuracy=p, reasoning_accuracy=r)

    monkeypatch.setattr(module, "process_rewards", each_kind_once)
    _, groups, given = train(module, trained, toy_records, tmp_path / "rl", monkeypatch)
    a = 0.5 / (1 / 3) ** 0.5  # the advantage of a process that is right in two of four
    shown = [group["advantages"]["PA-GRPO"] for group in groups]  # on the page
    for on_p, on_r in given + shown:
        assert on_p == pytest.approx([-a, 0, a, 2 * a], abs=1e-3)
        assert on_r == pytest.approx([-2 * a, 0, 0, 2 * a], abs=1e-3)
    assert groups[0]["advantages"]["GDPO"][0] == pytest.approx([-2 * a, 0, 0, 2 * a], abs=1e-3)


def test_blend(patched, trained, toy_records, tmp_path, monkeypatch):
    _, groups, given = train(patched("blend"), trained, toy_records, tmp_path / "rl", monkeypatch)
    for group, got in zip(groups, given):
        for process, advantages in zip(("perception", "reasoning"), got):
            rewards = torch.tensor([completion["scores"][process] for completion in group["completions"]])
            both = group["advantages"]["GDPO"][0]
            expected = [a + 0.5 * b for a, b in zip(pagrpo.group_advantages(rewards).tolist(), both)]
            assert advantages == pytest.approx(expected, abs=1e-4)
    assert any(value for got in given for values in got for value in values)


def test_resample(patched, trained, toy_records, tmp_path, monkeypatch):
    """Where the plain code has pairs without gradient, other questions take their places."""
    plain, _, _ = train(pagrpo, trained, toy_records, tmp_path / "plain", monkeypatch, "--num-generations 2")
    row, _, given = train(patched("resample"), trained, toy_records, tmp_path / "rl", monkeypatch,
                          "--num-generations 2")
    assert row["batches"] > 1 and len(given) == 4 and row["frac_no_gradient"] < plain["frac_no_gradient"]
    assert row["batches"] == 3 or row["frac_no_gradient"] == 0


def test_clip_higher(patched, trained, toy_records, tmp_path, monkeypatch):
    """Between 1 + 0.2 and 1 + 0.28 what is rewarded still has a gradient; nothing else has changed."""
    module, masks = patched("clip_higher"), (torch.tensor([[True, False]]), torch.tensor([[False, True]]))

    def gradient(code, ratio, advantage):
        logprobs = torch.full((1, 2), ratio).log().requires_grad_()
        advantages = torch.tensor([advantage])
        loss, _ = code.pa_grpo_loss(logprobs, torch.zeros(1, 2), None, *masks, advantages, advantages, beta=0)
        loss.backward()
        return logprobs.grad.abs().sum().item()

    assert gradient(pagrpo, 1.25, 1.0) == 0 < gradient(module, 1.25, 1.0)
    for ratio, advantage in ((1.3, 1.0), (0.75, -1.0), (1.1, 1.0), (0.75, 1.0), (1.25, -1.0)):
        assert gradient(pagrpo, ratio, advantage) == gradient(module, ratio, advantage)
    train(module, trained, toy_records, tmp_path / "rl", monkeypatch, "--num-iterations 2")


def test_a_patch_says_what_it_is_and_its_command_is_one(monkeypatch):
    assert [patch.stem for patch in PATCHES] == ["blend", "clip_higher", "gate", "resample"]
    for patch in PATCHES:
        prose, _, diff = patch.read_text().partition("diff --git ")
        assert "Question: " in prose and "arXiv" in prose and f"git apply {patch.relative_to(ROOT)}" in prose
        assert len([line for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]) <= 15
        command, = re.findall("python (pagrpo.py .*)", prose)
        monkeypatch.setattr(sys, "argv", command.split())
        assert str(pagrpo.get_args().output) == f"runs/ex/{patch.stem}"


def test_run_takes_the_code_and_the_flags_of_each_row(tmp_path, monkeypatch, capsys):
    """In the folder that it is called in; a second call has nothing to do."""
    exercises = load("run", ROOT / "docs/exercises/run.py")
    calls, reproduce = [], exercises.reproduce

    def run_row(name, seed):  # as `reproduce.run_row` does
        reproduce.call("pagrpo.py", *reproduce.ROWS[name][1], "--output", reproduce.folder_of(name, seed))
        return dict(row=name, seed=seed, answers=70.0 + seed, perception=90.0 + seed)

    monkeypatch.setattr(reproduce, "run_row", run_row)
    for name in ("ROWS", "CLAIMS", "DOCS", "call"):  # `main` sets these
        monkeypatch.setattr(reproduce, name, getattr(reproduce, name))
    keep = lambda script, *flags: calls.append((Path(script).read_text(), flags))
    monkeypatch.setattr(exercises, "call", keep)
    monkeypatch.setattr(exercises, "HERE", tmp_path / "exercises")
    shutil.copytree(ROOT / "docs/exercises", exercises.HERE, ignore=shutil.ignore_patterns("*.jsonl"))
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny/gen_cot").mkdir(parents=True)
    Path("runs/tiny/gen_cot/cot.jsonl").touch()
    for _ in range(2):
        exercises.main(["3", "4", "two_steps", "clip_higher"])
        said = capsys.readouterr().out
        assert "clip_higher above two_steps, answers | +0.0" in said
        assert "two_steps above PA-GRPO, perception | +" in said
    assert sorted(("1 + 0.28" in text, *flags[:2], flags[-1].name) for text, flags in calls) == [
        (False, "--num-iterations", 2, "two-steps-3"), (False, "--num-iterations", 2, "two-steps-4"),
        (True, "--num-iterations", 2, "clip-higher-3"), (True, "--num-iterations", 2, "clip-higher-4")]


def test_the_blind_judge_never_sees_the_gold(trained, toy_records, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BLIND_ADAPTER", str(trained))
    judge = load("blind_judge", ROOT / "docs/exercises/blind_judge.py")
    seen = [parse_trace(record["output"]).observation for record in toy_records]
    verdicts = judge.blind(toy_records + toy_records[:2], seen + [None, " "])
    assert any(verdicts) and verdicts[-2:] == [False, False]
    texts = judge.go_on(toy_records, seen)
    others = [dict(record, solution="<answer>7</answer>", evidence=[]) for record in toy_records]
    assert texts == judge.go_on(others, seen) and all("<think>" in text for text in texts)
    assert sum(judge.exact(others, seen)) < sum(verdicts)
