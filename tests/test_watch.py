"""What a run shows while it trains and what it keeps: curves, trackers, adapters, entropy."""
import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import gen_cot
import pagrpo
import sft
from conftest import ROOT
from rewards import read_jsonl


def run(words, output, records, monkeypatch):
    """A training script on these records, with small settings, in here; returns the rows of its log."""
    root, stage = Path(records[0]["media"]).parents[1], importlib.import_module(words.split(".py")[0])
    flags = f"--model tiny --data {root}/records.json --media-root {root} --num-frames 4 --output {output}"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words.split(), *flags.split()])
    gen_cot.run_script(stage.main, stage.get_args)
    return read_jsonl(output / "metrics.jsonl")


RL = "pagrpo.py --adapter none --prompts-per-update 2 --num-generations 3 --max-completion-tokens 12 --held-out 0.2 "


def test_adapters_are_kept_looked_at_and_taken_by_evaluate(toy_records, tmp_path, monkeypatch, capsys):
    """The best of those kept is said, where there are held-out prompts; the last update is looked at, too."""
    rows = run(RL + "--updates 5 --keep-every 2 --show-every 100", tmp_path / "rl", toy_records, monkeypatch)
    assert [row.get("kept") for row in rows] == [None, "adapter-000002", None, "adapter-000004", None]
    assert [row["step"] for row in rows if "fixed/reasoning" in row] == [0, 1, 3, 4]
    assert "answers the held-out prompts best" in capsys.readouterr().out
    folders = [tmp_path / "rl", *(tmp_path / "rl" / row["kept"] for row in rows if row.get("kept"))]
    weights = {(folder / "adapter_model.safetensors").read_bytes() for folder in folders}
    steps = [json.loads((folder / "run.json").read_text())["steps"] for folder in folders]
    assert len(weights) == 3 and steps == [5, 2, 4]
    names = evaluate.row_names(list(map(str, folders)))
    assert [name for _, name in names.values()] == [
        f"PA-GRPO from the base ({folder.name})" for folder in folders]
    run(RL.replace("0.2", "0") + "--updates 2 --keep-every 1", tmp_path / "all", toy_records, monkeypatch)
    assert "held-out prompts best" not in capsys.readouterr().out  # nothing to choose by


def test_curves_are_drawn_while_a_run_goes_on(toy_records, tmp_path, monkeypatch):
    """Without an empty axis; SFT's, too."""
    drawn, draw = [], sft.plot_curves

    def watched(curves, folder):
        draw(curves, folder)
        drawn.append((len(read_jsonl(folder / "metrics.jsonl")), Image.open(folder / "curves.png").size))

    monkeypatch.setattr(sft, "plot_curves", watched)
    run(RL + "--updates 4 --show-every 2 --held-out 0 --beta 0", tmp_path / "rl", toy_records, monkeypatch)
    # neither KL nor fixed prompts: six of eight curves, in two lines of three
    assert drawn == [(2, (1200, 600)), (4, (1200, 600)), (4, (1200, 600))]  # and at the end
    drawn.clear()
    rows = [dict(row, observation="o", process="t") for row in gen_cot.read_json(
        Path(toy_records[0]["media"]).parents[1] / "records.json")]
    gen_cot.write_jsonl(tmp_path / "cot.jsonl", rows)
    run(f"sft.py --batch-size 4 --show-every 2 --data {tmp_path}/cot.jsonl", tmp_path / "sft", toy_records, monkeypatch)
    assert [size for _, size in drawn] == [(800, 300)] * len(drawn) and drawn[0][0] == 2 and len(drawn) > 1


def test_tensorboard_gets_every_row_of_the_log(toy_records, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rows = run(RL + "--updates 3 --tracker tensorboard", tmp_path / "rl", toy_records, monkeypatch)
    events = EventAccumulator(str(tmp_path / "rl/videop2r"))
    events.Reload()
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, float | int)}
    assert set(events.Tags()["scalars"]) == numbers and "reward" in numbers
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(row["step"], pytest.approx(row["reward"], rel=1e-5)) for row in rows]


def test_a_tracker_that_is_not_installed_is_named(toy_records, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match="trackio"):
        run(RL + "--updates 3 --tracker trackio", tmp_path / "rl", toy_records, monkeypatch)


def test_entropy_is_the_mean_of_each_process_by_its_sampled_tokens(toy_records, tmp_path, monkeypatch):
    groups, update = [], pagrpo.update

    def watched(*args):
        groups[:], metrics = update(*args)
        return groups, metrics

    monkeypatch.setattr(pagrpo, "update", watched)
    row, = run(RL + "--updates 1", tmp_path / "rl", toy_records, monkeypatch)
    for process in ("perception", "reasoning"):
        total = tokens = 0
        for group in groups:
            mask = getattr(group, f"{process}_mask")
            for i, t in mask.nonzero().tolist():
                total, tokens = total - float(group.sampled_logprobs[i, t]), tokens + 1
        expected = total / tokens if tokens else None
        assert row[f"entropy/{process}"] == (expected and pytest.approx(expected, rel=1e-4)), process
    assert any(row[f"entropy/{process}"] for process in ("perception", "reasoning"))
