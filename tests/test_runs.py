"""What was meant is what happens: a run is known by what it is, and what is held out is not trained on. And
single changes to the code that no other test would notice."""
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import gen_cot
import pagrpo
import prepare
import rewards
import sft
from conftest import ROOT
from rewards import UserError
from test_endings import RL, SFT, interrupt, before_call, contents, run
from test_pagrpo import act, make_args

FROM_SFT = RL.replace("--adapter none", "--adapter {}")


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def rows_of(folder):
    return rewards.read_jsonl(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def trained(toy_records, tmp_path_factory):
    """The folder of a finished SFT."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    run(SFT, folder, toy_records)
    return folder


# --- a run is what it was -----------------------------------------------------------------------------------

def test_a_run_says_what_it_is(trained, toy_records, tmp_path):
    run(FROM_SFT.format(trained) + " --without separation", tmp_path / "rl", toy_records)
    first, second = run_json(trained), run_json(tmp_path / "rl")
    assert (first["algorithm"], second["algorithm"]) == ("SFT", "SFT + without separation")
    assert (first["steps"], second["steps"]) == (6, 4) and first["records"] == second["records"] == 11
    assert first["adapter"] is None and second["adapter"] == sft.weights_digest(trained)
    assert second["base"] == first["base"] == sft.base_digest(ROOT / "data/toy/base")
    assert second["flags"]["lr"] == 1e-2 and second["loss_average"] == "completion"


@pytest.mark.parametrize("flags, name", [
    ("", "SFT + PA-GRPO"), ("--algorithm grpo", "SFT + GRPO"), ("--without assignment", "SFT + GDPO"),
    ("--without length", "SFT + PA-GRPO without length"), ("--adapter none", "PA-GRPO from the base"),
    ("--adapter none --without perception", "GRPO from the base"),
    ("--adapter elsewhere", "elsewhere + PA-GRPO")])
def test_a_run_is_named_by_its_algorithm_and_its_start(trained, monkeypatch, flags, name):
    words = f"pagrpo.py --model tiny --adapter {trained} {flags}".split()
    monkeypatch.setattr(sys, "argv", words)
    assert pagrpo.run_name(pagrpo.get_args()) == name


def stop_after(n, command, output, records):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Stopped"):
        before_call(patch, sft, "optimiser_step", n, interrupt)
        run(command, output, records)


def changed_adapter(folder):
    file = folder / "sft/adapter_model.safetensors"
    save_file({name: 1.5 * weight for name, weight in load_file(file).items()}, file)


@pytest.mark.parametrize("change, flags, what", [
    (changed_adapter, "", "adapter"), (None, "--algorithm grpo", "algorithm"),
    (None, "--loss-average completion", "loss_average"), (None, "--limit 8", "data"),
    (None, "--adapter none", "adapter")])
def test_resume_refuses_to_become_another_run(trained, toy_records, tmp_path, change, flags, what):
    shutil.copytree(trained, tmp_path / "sft")
    command = FROM_SFT.format(tmp_path / "sft")
    stop_after(1, command, tmp_path / "rl", toy_records)
    before = contents(tmp_path / "rl")
    if change:
        change(tmp_path)
    with pytest.raises(UserError, match=f"begun with another {what}"):
        run(f"{command} {flags} --resume", tmp_path / "rl", toy_records)
    assert contents(tmp_path / "rl") == before


def test_resume_says_which_other_flags_differ_and_keeps_both(trained, toy_records, tmp_path, capsys):
    """An adapter that lies elsewhere meanwhile is the same one."""
    stop_after(1, FROM_SFT.format(trained), tmp_path / "rl", toy_records)
    shutil.copytree(trained, tmp_path / "moved")
    (tmp_path / "moved/run.json").unlink()
    run(FROM_SFT.format(tmp_path / "moved") + " --beta 0.1 --resume", tmp_path / "rl", toy_records)
    assert f"adapter: {trained}, now {tmp_path / 'moved'}; beta: 0.04, now 0.1" in capsys.readouterr().out
    kept = run_json(tmp_path / "rl")
    assert kept["flags"]["beta"] == 0.1 and [flags["beta"] for flags in kept["earlier_flags"]] == [0.04]
    sft.check_resume(again := dict(kept, earlier_flags=[]), kept)  # without a change nothing is forgotten
    assert again["earlier_flags"] == kept["earlier_flags"]


def test_a_base_is_known_by_its_weights(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(500_000)}, tmp_path / name / "model.safetensors")
    digest = sft.base_digest(tmp_path / "one")
    assert sft.base_digest(tmp_path / "two") == digest and sft.base_digest("Qwen/X") == "Qwen/X"
    with open(tmp_path / "two/model.safetensors", "r+b") as file:  # a run of bytes wherever a block is
        file.seek(1_000_000)
        file.write(b"\x01" * 140_000)
    assert sft.base_digest(tmp_path / "two") != digest


def test_an_sft_that_is_not_finished_is_no_missing_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pagrpo.py", "--model", "tiny"])
    assert pagrpo.get_args().adapter == "none"
    Path("runs/tiny/sft").mkdir(parents=True)
    Path("runs/tiny/sft/run.json").touch()  # killed before its first checkpoint
    with pytest.raises(UserError, match="sft.py --resume, or pass --adapter none"):
        pagrpo.get_args()
    Path("runs/tiny/sft/checkpoint.pt").touch()
    with pytest.raises(UserError, match="sft.py --resume, or pass --adapter none"):
        pagrpo.get_args()
    monkeypatch.setattr(sys, "argv", ["pagrpo.py", "--model", "tiny", "--adapter", "none"])
    assert pagrpo.get_args().adapter == "none"


def test_a_second_run_in_a_folder_is_refused(toy_records, tmp_path):
    output = tmp_path / "out"
    for command in (SFT, RL, "evaluate.py --adapters none"):
        with FileLock(tmp_path / ".out.lock"):
            with pytest.raises(UserError, match=f"Another run writes to {output}"):
                run(command, output, toy_records)
        assert not output.exists()
    (tmp_path / "link").symlink_to("out")
    with FileLock(tmp_path / ".out.lock"), pytest.raises(UserError, match="Another run writes to"):
        run(SFT, tmp_path / "link", toy_records)


def test_where_all_media_are_held_out_there_is_nothing_to_learn(toy_records, tmp_path):
    for command in (SFT, RL):
        with pytest.raises(UserError, match="All media are held out"):
            run(command, tmp_path / "out", toy_records, "--held-out 1")


def test_the_toys_settings_are_those_of_its_model_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pagrpo.py", "--model", "qwen2.5-vl-3b", "--adapter", "tiny"])
    assert pagrpo.get_args().max_pixels == 128
    monkeypatch.setattr(sys, "argv", ["pagrpo.py", "--model=tiny", "--adapter", "none"])
    assert pagrpo.get_args().max_pixels == 4


@pytest.mark.parametrize("output", [".", "rl", ".."])
def test_an_output_within_its_own_start_is_refused(trained, toy_records, output):
    before = (trained / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="share a folder"):
        run(FROM_SFT.format(trained), trained / output, toy_records)
    assert (trained / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", [dict(use_dora=True), dict(lora_bias=True), dict(bias="lora_only")])
def test_an_adapter_that_cannot_be_merged_is_refused(trained, tmp_path, change):
    """`merged` would decode another model than the one that was trained."""
    model, _ = sft.load_base(ROOT / "data/toy/base")
    config = sft.LoraConfig(r=4, lora_alpha=8, target_modules=sft.LORA_TARGETS, **change)
    model = sft.get_peft_model(model, config, adapter_name="policy")
    act(model)
    model.save_pretrained(tmp_path, selected_adapters=["policy"])
    with pytest.raises(AssertionError, match="DoRA or biases"):
        sft.load_model(ROOT / "data/toy/base", tmp_path / "policy")


# --- what is held out ---------------------------------------------------------------------------------------

def test_neither_trainer_sees_a_medium_that_is_held_out_and_evaluation_sees_it_alone(
        toy_records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gen_cot, "hold_out", hold_out := lambda records, share: (records[:3], records[3:]))
    monkeypatch.setattr(sft, "hold_out", hold_out)
    seen, encode = [], sft.encode_batch
    monkeypatch.setattr(sft, "encode_batch", lambda media, *args: encode(
        (seen.append(record["path"]) or (record, medium) for record, medium in media), *args))
    held = {record["path"] for record in toy_records[:3]}
    run(SFT.replace("--held-out 0", ""), tmp_path / "sft", toy_records, "--epochs 2")
    assert len(seen) == 16 and not held & set(seen) and run_json(tmp_path / "sft")["records"] == 8
    assert seen[:8] != seen[8:] and set(seen[:8]) == set(seen[8:])  # each epoch in an order of its own
    seen.clear()
    run(RL.replace("--held-out 0", "--show-every 2"), tmp_path / "rl", toy_records)
    assert set(seen[:3]) == held and not held & set(seen[3:])  # for the curves, once
    assert ["fixed/reasoning" in row for row in rows_of(tmp_path / "rl")] == [True, False, True, True]  # and the last
    gone = dict(toy_records[0], path="media/gone.mp4")  # which no trainer would have seen
    rewards.write_jsonl(tmp_path / "gone.jsonl", [gone, *toy_records])
    run("evaluate.py --adapters none --only-held-out --rescore", tmp_path / "e", toy_records,
        f"--data {tmp_path / 'gone.jsonl'}")
    assert "3 questions, of which 0 have no medium" in capsys.readouterr().out


def test_the_toys_held_out_media_are_one_in_twenty():
    records = [dict(path=f"media/{i:04}.mp4") for i in range(700, 1500) for _ in range(2)]
    held, _ = gen_cot.hold_out(records, pagrpo.TINY["held_out"])
    assert 25 <= len(held) / 2 <= 55 and sft.TINY["held_out"] == evaluate.TINY["held_out"] == 0.05


def test_without_held_out_media_there_is_no_curve_and_that_is_said(toy_records, tmp_path, capsys):
    run(RL, tmp_path / "rl", toy_records, "--show-every 1 --beta 0")
    assert "0 prompts of held-out media" in capsys.readouterr().out
    rows = rows_of(tmp_path / "rl")
    assert not any(key.startswith("fixed/") or key == "kl" for row in rows for key in row)  # β 0: no KL


# --- one record, one judge ----------------------------------------------------------------------------------

def test_a_prompt_over_the_limit_is_left_out_counted_and_named(toy_records, tmp_path, capfd):
    records = [dict(record) for record in toy_records]
    long = records[2]
    long["problem"] = "and then she said that " * 150 + long["problem"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    for command in (SFT, RL + " --updates 6"):
        run(command, tmp_path / command[:3], toy_records, f"--data {tmp_path / 'records.json'}")
        assert f"skipped: {long['media']}: its prompt of" in capfd.readouterr().err
        assert sum(row["skipped_media"] for row in rows_of(tmp_path / command[:3])) == 1
    command = f"evaluate.py --adapters none --data {tmp_path / 'records.json'} --max-completion-tokens 2"
    run(command, tmp_path / "e", toy_records, f"--data {tmp_path / 'records.json'} --max-prompt-tokens 400")
    rows = rewards.read_jsonl(tmp_path / "e/completions-none.jsonl")
    assert [row["path"] for row in rows if row["completion"] is None] == [long["path"]]


@pytest.mark.parametrize("verdict", [math.nan, math.inf, None])
def test_a_verdict_that_is_no_number_is_unknown_everywhere(toy_records, verdict):
    judge = lambda records, observations: [verdict] * len(records)
    reasons, _ = gen_cot.verify(toy_records, [record["output"] for record in toy_records], judge)
    assert reasons == ["judge unknown"] * 11
    rows = [dict(record, completion=record["output"], file="q.json") for record in toy_records]
    assert {row["perception"] for row in evaluate.score_rows(rows, judge, "paper")} == {None}


@pytest.mark.parametrize("verdict, reason", [(0.9, None), (0.3, "insufficient observation"), (True, None)])
def test_a_judge_may_give_floats(toy_records, verdict, reason):
    judge = lambda records, observations: [verdict] * len(records)
    reasons, _ = gen_cot.verify(toy_records[:2], [r["output"] for r in toy_records[:2]], judge, threshold=0)
    assert reasons == [reason] * 2


def test_the_rule_knows_what_would_change_a_count():
    record = dict(problem="How many times is red there?", problem_type="numerical", solution="2",
                  evidence=["first red", "third red"], counter_evidence=["second red", "fourth red"])
    texts = ["first red, second blue, third red, fourth green", "first red, third red, fifth pink",
             "first red, second red, third red", "first red, second blue"]
    assert rewards.rule_judge([record] * 4, texts) == [True, True, False, False]
    assert rewards.rule_judge([dict(record, counter_evidence="a blue car")], ["first red, third red a"]) == [True]
    del record["counter_evidence"]
    assert rewards.rule_judge([record] * 4, texts) == [True, True, True, False]


def test_the_toys_counting_questions_carry_the_moments_that_do_not_count():
    rng, seen = random.Random(1), 0
    while seen < 20:
        scene = prepare.make_scene(rng)
        question = prepare.make_question(scene, rng)
        counted = question["data_source"] in ("toy-count", "toy-points")
        seen += counted
        if not counted:
            assert question["counter_evidence"] == []
            continue
        told = [item.split() for item in question["evidence"] + question["counter_evidence"]]
        moments = {prepare.ORDINALS.index(words[0]) for words in told}
        assert len(told) == len(moments) == len(question["facts"]) and len({words[1] for words in told}) == 1


@pytest.mark.parametrize("verdict", [False, True])
def test_a_process_that_never_had_a_gradient_is_told(toy_records, tmp_path, monkeypatch, capsys, verdict):
    def rewarded(record, text, verdict, *args):
        made = rewards.process_rewards(record, text, verdict, *args)
        return dict(made, perception=float(verdict), reasoning=random.random())

    judge = lambda records, observations: [verdict] * len(records)
    monkeypatch.setattr(gen_cot, "judge_from", lambda *args, **options: judge)
    monkeypatch.setattr(pagrpo, "process_rewards", rewarded)
    run(RL, tmp_path / "rl", toy_records)
    said = capsys.readouterr().out
    assert "no gradient of perception in any update" in said and "no gradient of reasoning" not in said


def test_a_judge_without_a_verdict_ends_the_run_with_its_words(toy_records, tmp_path, monkeypatch):
    monkeypatch.setattr(pagrpo, "self_judge", lambda *args: ["Well,\nwho knows"] * len(args[2]))
    monkeypatch.setattr(pagrpo, "parse_trace", lambda text: rewards.Trace("seen", "so", "red"))
    with pytest.raises(UserError, match="in 2 updates in a row. One of its replies: Well, who knows"):
        run(RL.replace("--updates 4", "--updates 2"), tmp_path / "rl", toy_records, "--judge self")
    assert all("loss" not in row and "frac_no_gradient" not in row for row in rows_of(tmp_path / "rl"))


# --- single changes that no other test would notice ---------------------------------------------------------

def test_a_temporal_patch_of_two_frames_lasts_two_frames(tiny):
    """At one frame a second, and two positions a second, the second patch is four positions on."""
    model, tokenizer = tiny
    config, frames = sft.unwrap(model).config, np.zeros((4, 56, 56, 3), np.uint8)
    prompt = sft.encode_prompt("x", frames, 1.0, tokenizer, config)
    visual = prompt.input_ids == config.video_token_id
    first = int(visual.int().argmax())
    assert (prompt.positions[0, visual] - first).tolist() == [0] * 4 + [4] * 4


def test_the_reference_is_not_the_policy_that_has_learnt(tiny, toy_records):
    model, tokenizer = sft.load_model(ROOT / "data/toy/base", lora_rank=8)
    pagrpo.add_reference(model, make_args(adapter="none"))
    act(model)
    record = dict(toy_records[0], sample_index=0)
    [(record, prompt)], _ = sft.encode_batch([(record, gen_cot.read_media(record, 4, 4))], 1, gen_cot.PROMPT,
                                             tokenizer, sft.unwrap(model).config)
    args = make_args(adapter="none", max_completion_tokens=24, seed=0)
    modes, logprobs = [], pagrpo.token_logprobs
    optimizer = sft.setup_training(model, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagrpo, "token_logprobs", lambda *rest: modes.append(
            (torch.is_grad_enabled(), model.training)) or logprobs(*rest))
        judge = rewards.rule_judge
        _, metrics = pagrpo.update(model, tokenizer, optimizer, [(record, prompt)], judge, 0.0, args)
    assert metrics["kl"] > 1e-3
    assert modes == [(False, False), (True, True)]  # where activations are to be checkpointed


def test_a_clip_has_its_pixel_budget_and_its_frames(tmp_path):
    (tmp_path / "clip").mkdir()
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for i in range(24):
            image = Image.new("RGB", (640, 480), (i, i, i))
            image.save(tmp_path / f"clip/{i}.png")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    for name in ("clip", "clip.mp4"):
        record = dict(data_type="video", media=str(tmp_path / name), fps=2)
        for num_frames, max_pixels in ((8, 4), (16, 12)):
            frames, _ = gen_cot.read_media(record, num_frames, max_pixels)
            height, width = frames.shape[1:3]
            assert len(frames) == num_frames and max_pixels / 2 <= height * width / 28**2 <= max_pixels


def test_completions_are_this_runs_alone(monkeypatch, trained):
    def digest_of(flags=""):
        monkeypatch.setattr(sys, "argv", f"evaluate.py --model tiny --adapters {trained} {flags}".split())
        return evaluate.run_digest(str(trained), evaluate.get_args())

    flags = ["--max-pixels 8", "--num-frames 8", f"--prompt-file {trained / 'prompt.txt'}", "--input text",
             "--max-completion-tokens 7", "--max-prompt-tokens 7", "--no-4bit"]
    (trained / "prompt.txt").write_text("{question} {answer_form}")
    digests = {digest_of(), *map(digest_of, flags)}
    (trained / "prompt.txt").unlink()
    assert len(digests) == 1 + len(flags) and digest_of("--batch-size 3 --workers 1") in digests


def test_the_learning_rate_of_rl_is_scheduled(toy_records, tmp_path, monkeypatch):
    rates, step = [], sft.optimiser_step
    monkeypatch.setattr(sft, "optimiser_step", lambda model, optimizer, lr, *rest: rates.append(lr) or step(
        model, optimizer, lr, *rest))
    run(RL, tmp_path / "rl", toy_records)
    assert rates == [sft.cosine_lr(i, 4, 1e-2) for i in range(4)] and len(set(rates)) > 2
    assert [row["lr"] for row in rows_of(tmp_path / "rl")] == pytest.approx(rates, rel=1e-5)


@pytest.mark.parametrize("without", [None, "length", "perception", "reasoning", "separation", "assignment"])
def test_the_starred_rows_have_one_mean_over_a_completion(monkeypatch, without):
    words = ["pagrpo.py", "--model", "tiny", *(["--without", without] if without else [])]
    monkeypatch.setattr(sys, "argv", words)
    assert pagrpo.get_args().loss_average == ("segment" if without in (None, "length") else "completion")
    monkeypatch.setattr(sys, "argv", [*words, "--loss-average", "segment"])
    assert pagrpo.get_args().loss_average == "segment"


def test_the_last_trace_of_a_teacher_that_thinks_is_its_trace():
    traces = [f"<observation>{i}</observation> <think>t</think><answer>{i}</answer>" for i in "12"]
    assert gen_cot.bare_trace(f"Let me try {traces[0]} no. </think>\n\n{traces[1]}") == traces[1]


def test_weights_decay(tiny):
    model, _ = sft.load_model(ROOT / "data/toy/base", lora_rank=8)
    act(model)
    optimizer = sft.setup_training(model, make_args())
    before = [p.detach().clone() for p in sft.trainable_parameters(model)]
    sft.optimiser_step(model, optimizer, 0.1, 5.0)  # without gradients
    for old, new in zip(before, sft.trainable_parameters(model)):
        assert torch.allclose(new, old * (1 - 0.1 * 0.01), atol=1e-7)


def test_an_unknown_verdict_earns_no_length_bonus():
    text = "<observation>o</observation> <think>t</think><answer>2</answer>"
    record = dict(problem_type="numerical", solution="2")
    scores = rewards.process_rewards(record, text, None, (9, 9), ((1, 99), (1, 99)))
    assert math.isnan(scores["perception_length"]) and scores["reasoning_length"] == 0.2
    assert rewards.length_reward(9, math.nan, 1.0, 1, 99) == 0.0
