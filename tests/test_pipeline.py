"""The stages as a newcomer runs them: on a copy of the repository, by their commands, one after the other."""
import contextlib
import importlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import evaluate
import gen_cot
import pagrpo
import sft
from conftest import ROOT, Fault
from rewards import UserError, accuracy_reward, parse_trace, process_rewards, rule_judge


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory):
    """The repository without anything that a run leaves behind."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("rewards.py", "gen_cot.py", "sft.py", "pagrpo.py", "evaluate.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "data" / "toy").mkdir(parents=True)
    shutil.copy(ROOT / "data/toy/prepare.py", folder / "data/toy")
    shutil.copy(ROOT / "data/trace_page.html", folder / "data")
    shutil.copytree(ROOT / "data/toy/base", folder / "data/toy/base")
    return folder


@pytest.fixture(scope="module")
def clone(fresh_clone):
    """The same with the toy data and a short SFT, which the first test leaves there."""
    if not (fresh_clone / "runs/tiny/sft").exists():  # that test was not asked for
        run(fresh_clone, "gen_cot.py --model tiny")
        run(fresh_clone, "sft.py --model tiny --limit 32")
    return fresh_clone


def run(folder, command, code=0):
    """Run `python COMMAND` in the folder; returns stderr and then stdout."""
    done = subprocess.run([sys.executable, *command.split()], cwd=folder, capture_output=True, text=True,
                          timeout=280)
    text = done.stderr + done.stdout
    assert done.returncode == code, text
    return text


def test_all_stages_in_order(fresh_clone):
    """`pagrpo.py` alone prepares the toy data and starts from the base, and says so; then each stage finds
    the one before it."""
    alone = run(fresh_clone, "pagrpo.py --model tiny --updates 1 --limit 40 --output runs/alone")
    assert "preparing it" in alone and not (fresh_clone / "runs/tiny").exists()
    assert alone.index("Starting from the base, without SFT (RL only).") < alone.index("in 4 bits")

    rejected = Counter(row["flaw"] for row in gen_cot.read_json(fresh_clone / "data/toy/traces.jsonl"))
    assert len(rejected) == 4 and min(rejected.values()) > 50
    table = run(fresh_clone, "gen_cot.py --model tiny").splitlines()
    counts = next(line.split() for line in table if line.strip().startswith("all "))
    flaws = "broken template", "wrong answer", "insufficient observation"
    planted = [str(rejected[flaw]) for flaw in flaws]
    assert counts == ["all", "1400", "0", "0", *planted, "0", str(rejected[None])]

    run(fresh_clone, "sft.py --model tiny --limit 32")
    rl = run(fresh_clone, "pagrpo.py --model tiny --updates 2 --prompts-per-update 2 --num-iterations 2 "
                    "--limit 200 --show-every 1")
    assert "advantage" in rl and "Starting from the SFT adapter runs/tiny/sft." in rl
    rows = gen_cot.read_json(fresh_clone / "runs/tiny/pagrpo/metrics.jsonl")
    assert len(rows) == 2 and rows[0]["kl"] >= 0 and 0 < rows[0]["length/reasoning"] <= 112
    assert all(0 <= row[key] <= 1 for row in rows for key in ("fixed/perception", "fixed/reasoning"))
    assert (fresh_clone / "runs/tiny/pagrpo/curves.png").stat().st_size > 10_000

    table = run(fresh_clone, "evaluate.py --model tiny --limit 20").splitlines()
    names = [line[:16].strip() for line in table if re.search(r"\d ± \d", line)]
    assert names == ["constant", "base", "SFT", "SFT + PA-GRPO"]
    results = json.loads((fresh_clone / "runs/tiny/evaluate/results.json").read_text())
    row = results["rows"]["SFT + PA-GRPO"]["test.jsonl"]
    assert row["questions"] == 20 and results["settings"]["scoring"] == "paper"
    completions = gen_cot.read_json(fresh_clone / "runs/tiny/evaluate/completions-pagrpo.jsonl")
    total = sum(accuracy_reward(c["problem_type"], c["completion"], c["solution"]) for c in completions)
    assert len(completions) == 20 and abs(5 * total - row["numbers"]["answer"][0]) < 0.01

    command = re.search("python (evaluate.py .*), then open traces.html there", table[-1])[1]
    assert "4 groups of training and 60 evaluated completions" in run(fresh_clone, command)
    page = (fresh_clone / "runs/tiny/traces.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") >= 20


def test_the_block_of_serving_md_goes_from_adapter_to_answers(clone, monkeypatch, capsys):
    """As it stands there, it leaves a model that needs none of our code, and whose answers about a picture and
    a clip are those of `evaluate.py`."""
    monkeypatch.chdir(clone)
    block, = re.findall("```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    shutil.copytree(clone / "runs/tiny/sft", clone / "runs/tiny/pagrpo", dirs_exist_ok=True)
    names = {}
    exec(block, names)
    printed = capsys.readouterr().out.splitlines()[-2:]

    args = SimpleNamespace(batch_size=1, prompt_file=None, max_prompt_tokens=None, max_completion_tokens=112)
    media = [(record, gen_cot.read_media(record, 32, 4)) for record in (names["picture"], names["clip"])]
    ours, tokenizer = sft.load_model("data/toy/base", "runs/tiny/pagrpo", trainable=False)
    ids = torch.tensor(tokenizer("<observation>first red, second blue")["input_ids"])[None]
    with torch.no_grad(), ours.disable_adapter():
        base = sft.unwrap(ours)(input_ids=ids).logits
    with torch.no_grad():
        expected, got = sft.unwrap(ours)(input_ids=ids).logits, names["model"](input_ids=ids).logits
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-3)
    assert (expected - base).abs().max() > 0.1
    rows = [row for _, row in evaluate.local_rows(ours, tokenizer, iter(media), {}, args)]
    assert printed == [row["completion"] for row in rows]
    assert all(parse_trace(text).observation and parse_trace(text).answer for text in printed)


def run_here(clone, monkeypatch, command):
    """Run `python COMMAND` in the clone, but in here, where all is imported."""
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", command.split())
    stage = importlib.import_module(command.split(".py")[0])
    stage.main(stage.get_args())


def test_two_ranks_learn_what_one_learns(clone, monkeypatch):
    """Their shares of the prompts, gradients added up: five steps with the same losses, in both stages. Of
    three prompts the ranks have two and one; of one prompt the second rank has none."""
    commands = ["sft.py --model tiny --limit 40 --batch-size 8 --micro-batch 2 --output runs/NAME/sft",
                "pagrpo.py --model tiny --updates 5 --prompts-per-update 3 --num-generations 4 "
                "--max-completion-tokens 32 --limit 100 --held-out 1e-9 --output runs/NAME/pagrpo"]  # of one medium
    commands += [commands[1].replace("-update 3", "-update 1").replace("NAME/pagrpo", "NAME/alone")]
    script = ["import sys, sft, pagrpo", "assert sft.process().num_processes == 2"]
    for command in commands:
        words, stage = command.replace("NAME", "two").split(), command.partition(".py")[0]
        script += [f"sys.argv = {words}", f"{stage}.main({stage}.get_args())"]
    (clone / "both.py").write_text("\n".join(script))
    run(clone, f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()} both.py")
    for command in commands:
        run_here(clone, monkeypatch, command.replace("NAME", "one"))
    for stage in ("sft", "pagrpo", "alone"):
        one, two = (without_times(clone / "runs" / name / stage) for name in ("one", "two"))
        assert len(one) == 5 and one[0]["loss"] != one[4]["loss"]
        for row, other in zip(one, two, strict=True):
            assert row == pytest.approx(other, abs=1e-4)


def test_two_ranks_answer_what_one_answers_and_one_goes_on_where_two_were_killed(clone, monkeypatch):
    """No question is answered twice: not by two ranks, nor by the one that goes on after rank 1 has died. Each
    rank waits where the other one is late: rank 0 for the answers, rank 1 for the move of other settings'."""
    command = ("evaluate.py --model tiny --limit 14 --batch-size 3 --max-completion-tokens 32 "
               "--adapters none runs/tiny/sft --output runs/NAME/evaluate")
    words = {name: command.replace("NAME", name).split() for name in ("shared", "killed")}
    (clone / "answer.py").write_text(f"""
import os, signal, sys, time, evaluate, gen_cot, sft
rows_of, move_aside, write_results = evaluate.rows_of, gen_cot.move_aside, evaluate.write_results

def late_or_dying(adapter, *args):
    time.sleep(sft.process().process_index)
    for n, pair in enumerate(rows_of(adapter, *args)):
        if n == 4 and adapter != "none" and "runs/killed/evaluate" in sys.argv and not sft.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair

def write_alone(*args):
    assert sft.process().num_processes == 2 and sft.is_first()
    write_results(*args)

evaluate.rows_of, evaluate.write_results = late_or_dying, write_alone
gen_cot.move_aside = lambda path: time.sleep(1) or move_aside(path)
for sys.argv in {list(words.values())}:
    evaluate.main(evaluate.get_args())
""")
    old = [row | dict(completion="", run="") for row in gen_cot.read_json(clone / "data/toy/test.jsonl")]
    gen_cot.write_jsonl(clone / "runs/shared/evaluate/completions-none.jsonl", old)
    run(clone, f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()} answer.py", code=1)
    killed = clone / "runs/killed/evaluate/completions-sft.jsonl"
    assert 4 <= len(gen_cot.read_json(killed)) <= 11  # rank 1's, and at most the seven of rank 0
    for name in ("killed", "alone"):
        run_here(clone, monkeypatch, command.replace("NAME", name))
    alone, *others = (clone / "runs" / name / "evaluate" for name in ("alone", "shared", "killed"))
    tables = [json.loads((folder / "results.json").read_text())["rows"] for folder in (alone, *others)]
    assert tables[0] == tables[1] == tables[2] and tables[0]["SFT"]["test.jsonl"]["questions"] == 14
    for file in sorted(alone.glob("completions-*.jsonl")):
        lines = sorted(file.read_text().splitlines())
        assert len(set(lines)) == 14
        for folder in others:
            assert sorted((folder / file.name).read_text().splitlines()) == lines


@pytest.mark.parametrize("stage, command", [
    ("sft", "sft.py --batch-size 4 --epochs 2 --lr 2e-3"),
    ("pagrpo", "pagrpo.py --updates 6 --prompts-per-update 2 --num-generations 4 --max-completion-tokens 24 "
               "--lr 1e-2"),
])
def test_a_run_that_was_killed_goes_on_to_the_same_end(clone, monkeypatch, capsys, stage, command):
    """Killed in its sixth step, two steps behind its last checkpoint; a medium was unreadable before that."""
    source = clone / ("runs/tiny/gen_cot/cot.jsonl" if stage == "sft" else "data/toy/rl.jsonl")
    rows = gen_cot.read_json(source)[:12]
    rows[7]["path"] = "damaged.mp4"
    (clone / "data/toy/damaged.mp4").write_bytes(b"no video")
    gen_cot.write_jsonl(clone / "some.jsonl", rows)
    command += " --model tiny --data some.jsonl --media-root data/toy --save-every 2"

    run_here(clone, monkeypatch, f"{command} --output runs/whole/{stage}")
    whole, errors = capsys.readouterr()
    assert set(re.findall(r"skipped: \S+", errors)) == {"skipped: data/toy/damaged.mp4"}
    logs = {"metrics.jsonl", "run.json"} | ({"rollouts.jsonl"} if stage == "pagrpo" else set())
    assert {file.name for file in (clone / "runs/whole" / stage).iterdir()} == logs | {
        "adapter_config.json", "adapter_model.safetensors", "curves.png"}
    calls, step = itertools.count(1), sft.optimiser_step

    def killed(*args):
        if next(calls) == 6:
            patch.setattr(sft, "save_checkpoint", lambda *args: None)  # what is killed saves nothing
            raise RuntimeError("killed")
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(sft, "optimiser_step", killed)
        run_here(clone, patch, f"{command} --output runs/killed/{stage}")
    folder = clone / "runs/killed" / stage
    assert {file.name for file in folder.iterdir()} == logs | {"checkpoint.pt"}

    capsys.readouterr()
    run_here(clone, monkeypatch, f"{command} --output runs/killed/{stage} --resume")
    text = capsys.readouterr().out
    assert "Going on from step 4." in text
    said, again = (re.findall(r"6 steps, [12] media skipped;.*", out) for out in (whole, text))
    assert [line.replace("whole", "killed") for line in said] == again and len(again) == 1
    assert not list(folder.glob("checkpoint*"))
    rows, again = (without_times(clone / "runs" / name / stage) for name in ("whole", "killed"))
    assert rows == again and len(rows) == 6 and rows[0]["loss"] != rows[5]["loss"]
    weights, again = ((clone / "runs" / name / stage / "adapter_model.safetensors").read_bytes()
                      for name in ("whole", "killed"))
    assert weights == again


def without_times(folder):
    """The rows of a run's log without what no two runs have in common."""
    rows = gen_cot.read_json(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("sec", "gib", "peak_gib"))}
            for row in rows]


def test_a_judge_that_refuses_costs_no_update(clone, monkeypatch, capsys):
    """What was learnt until then is kept, and the same command with --resume asks it again where it
    refused."""
    calls = itertools.count(1)

    def refuses_once(records, observations):
        if next(calls) == 4:  # the first one is about the fixed prompts
            raise UserError("The judge has had enough.")
        return rule_judge(records, observations)

    monkeypatch.setattr(gen_cot, "judge_from", lambda *args, **options: refuses_once)
    command = ("pagrpo.py --model tiny --updates 4 --prompts-per-update 2 --num-generations 4 "
               "--max-completion-tokens 24 --output runs/refused")
    with pytest.raises(UserError, match="The judge has had enough."):
        run_here(clone, monkeypatch, command)
    assert {file.name for file in (clone / "runs/refused").iterdir()} == {
        "checkpoint.pt", "metrics.jsonl", "rollouts.jsonl", "run.json"}
    run_here(clone, monkeypatch, command + " --resume")
    assert "Going on from step 2." in capsys.readouterr().out
    rows = gen_cot.read_json(clone / "runs/refused/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(row["logprob_gap"] < 1e-4 for row in rows)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("answers, flags, taken", [
    ("1000", "", "1000"), ("001001", "", "001001"), ("0000", "--without perception", "1111")])
def test_an_update_in_which_the_judge_never_answered_is_not_taken(
        clone, monkeypatch, answers, flags, taken):
    """And three in a row end the run, where perception's reward is used: else it would go on with reasoning
    alone."""
    updates, weights, step = iter(answers), [], sft.optimiser_step

    def judge(records, observations):
        verdict = True if next(updates) == "1" else None
        return [verdict if observation else False for observation in observations]

    def kept(model, *args):
        metrics = step(model, *args)
        weights.append([p.detach().clone() for p in sft.trainable_parameters(model)])
        return metrics

    monkeypatch.setattr(gen_cot, "judge_from", lambda *args, **options: judge)
    monkeypatch.setattr(sft, "optimiser_step", kept)
    ends = "000" in taken
    stopped = pytest.raises(UserError, match="no verdict in 3 updates in a row")
    with stopped if ends else contextlib.nullcontext():
        run_here(clone, monkeypatch, f"pagrpo.py --model tiny --updates {len(answers)} --prompts-per-update "
                 f"4 --num-generations 4 --max-completion-tokens 64 --output runs/silent --held-out 0 "
                 f"{flags}")
    rows = gen_cot.read_json(clone / "runs/silent/metrics.jsonl")
    assert "".join("01"["loss" in row] for row in rows) == taken[:3 if ends else None]
    assert len(weights) == taken.count("1") and all(row["judge_unknown"] for row in rows if "loss" not in row)
    if ends:
        saved = torch.load(clone / "runs/silent/checkpoint.pt", weights_only=True)
        assert saved["step"] == 3 and all(map(torch.equal, saved["weights"], weights[0]))


@pytest.mark.parametrize("command", [
    "pagrpo.py", "evaluate.py --adapters none", "gen_cot.py --teacher openai:t@URL"])
def test_a_judge_that_cannot_be_reached_ends_a_run_before_a_model_is_loaded(
        clone, monkeypatch, server, command):
    server.behave = lambda prompt, attempt: Fault(404, "no such model")
    monkeypatch.setattr(sft, "load_base", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UserError, match="model-1 refuses, HTTP 404, no such model"):
        command = command.replace("URL", server.url)
        run_here(clone, monkeypatch, f"{command} --model tiny --judge {server.spec()}")
    assert len(server.seen) == 1


def test_a_probe_measures_each_phase_and_leaves_nothing(clone, monkeypatch, capsys):
    before = sorted(clone.rglob("*.json*"))
    trace = pagrpo.parse_trace("<observation>It is red.</observation> <think>so</think><answer>red</answer>")
    monkeypatch.setattr(pagrpo, "parse_trace", lambda text: trace)  # the judge is asked, and says nothing
    run_here(clone, monkeypatch, "pagrpo.py --model tiny --probe --judge self --num-frames 2 --max-pixels 1 "
             "--prompts-per-update 2 --num-generations 2 --prompts-per-rollout 1 --max-completion-tokens 16")
    text = capsys.readouterr().out
    measured = re.findall(r"^(\w+) +([\d.]+) s +([\d.]+) GiB at most$", text, re.MULTILINE)
    assert [phase for phase, _, _ in measured] == ["rollout", "judge", "update"]
    assert all(float(gib) > 0.1 for _, _, gib in measured)
    assert sorted(clone.rglob("*.json*")) == before


@pytest.mark.parametrize("ranks, batch_size", [(1, 7), (2, 7), (3, 7), (8, 7), (2, 8), (4, 1)])
def test_the_ranks_share_every_batch(monkeypatch, ranks, batch_size):
    """Each item goes to one rank, in the batch where one rank alone would have it."""
    shares = []
    for rank in range(ranks):
        own = SimpleNamespace(num_processes=ranks, process_index=rank)
        monkeypatch.setattr(sft, "process", lambda: own)
        stream, size = sft.shard(range(3 * batch_size), batch_size), sft.shard_size(batch_size)
        shares.append([list(itertools.islice(stream, size)) for _ in range(3)])
        assert not list(stream)
    for batch, parts in enumerate(zip(*shares)):
        assert sorted(sum(parts, [])) == list(range(batch * batch_size, (batch + 1) * batch_size))


@pytest.mark.parametrize("command, says", [
    ("pagrpo.py --model qwen2.5-vl-7b --device cpu", "No data file data/VideoP2R-263k_rl.part*.json.gz"),
    ("evaluate.py --model tiny --adapters none runs/nowhere", "No adapter in runs/nowhere"),
    ("pagrpo.py --model tiny --adapter runs/nowhere", "No adapter in runs/nowhere"),
    ("pagrpo.py --model tiny --lora-rank 8", "has rank 32: pass --lora-rank 32"),
    ("sft.py --model tiny --data data/toy/absent.jsonl", "No data file data/toy/absent.jsonl"),
    ("pagrpo.py --model tiny --media-root nowhere", "has its medium below nowhere"),
    ("pagrpo.py --model tiny --judge mystery", "mystery"),
])
def test_mistakes_get_one_sentence_and_leave_nothing(clone, command, says, monkeypatch):
    before = sorted(clone.rglob("*.json*"))
    with pytest.raises(UserError) as error:
        run_here(clone, monkeypatch, command)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1
    assert sorted(clone.rglob("*.json*")) == before


@pytest.mark.parametrize("change, flags, error, says", [
    (dict(output="", process=""), "", AssertionError, "trace"),
    (dict(output="<think>t</think>"), "--process-agnostic", AssertionError, "without a think or an answer"),
    (dict(path="damaged.mp4"), "", UserError, "Nothing was learnt"),
])
def test_records_that_teach_nothing_leave_no_adapter(clone, monkeypatch, change, flags, error, says):
    """Else one that has learnt nothing, or to think nothing, is saved."""
    rows = gen_cot.read_json(clone / "runs/tiny/gen_cot/cot.jsonl")[:3]
    gen_cot.write_jsonl(clone / "new-cot.jsonl", [row | change for row in rows])
    (clone / "data/toy/damaged.mp4").write_bytes(b"no video")
    with pytest.raises(error, match=says):
        run_here(clone, monkeypatch, f"sft.py --model tiny --data new-cot.jsonl --output runs/none {flags}")
    assert not (clone / "runs/none/adapter_config.json").exists()


def test_no_records_are_an_error_before_a_model_is_loaded(clone, monkeypatch):
    """pagrpo.py would look for the next of none for ever."""
    monkeypatch.setattr(sft, "load_base", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        run_here(clone, monkeypatch, "pagrpo.py --model tiny --limit 0 --output runs/none")


@pytest.mark.parametrize("scoring, score", [("paper", 0.0), ("lenient", 1.0)])
def test_every_stage_takes_an_options_text_for_its_letter_where_scoring_is_lenient(scoring, score):
    record = dict(path="1.png", problem_type="multiple choice", problem="Which?", evidence=["blue"], file="q",
                  options=["A. red", "B. dark blue"], solution="<answer>B</answer>")
    text = "<observation>blue.</observation> <think>so blue</think><answer>dark blue</answer>"
    assert gen_cot.verify([record], [text], rule_judge, scoring=scoring)[1] == [score]
    rewards = process_rewards(record, text, True, (9, 9), ((1, 2), (1, 2)), scoring=scoring)
    assert rewards["reasoning_accuracy"] == score
    assert evaluate.score_rows([dict(record, completion=text)], rule_judge, scoring)[0]["score"] == score
    rival = dict(record, solution="<answer>dark blue</answer>")  # as good a guess for both, if it counts as B
    assert [r["score"] for r in evaluate.constant_answers([record, rival], scoring)].count(1.0) == 1 + score


def test_a_mistake_on_the_command_line_shows_no_traceback(clone):
    text = run(clone, "pagrpo.py --model tiny --algorithm grpo --without length", code=2)
    said = " ".join(text.replace("│", " ").split())  # it comes in a box
    assert "leave out --without length" in said and "Traceback" not in said
