"""data/toy/reproduce.py: the statistics by hand, and the documents from the rows that are kept."""
import random
import sys

import numpy as np
import pytest

import gen_cot
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data/toy"))
import prepare  # noqa: E402
import reproduce  # noqa: E402


def test_the_toys_media_are_the_same_bytes_each_time(tmp_path):
    """Or two clones would not give the same figures."""
    rng, junk = random.Random(0), []
    for scene in [prepare.make_scene(rng) for _ in range(20)]:
        made = []
        for _ in range(2):
            file = tmp_path / ("a.mp4" if scene["kind"] == "clip" else "a.png")
            prepare.write_medium(scene, file)
            made.append(file.read_bytes())
            junk.append(np.random.default_rng(len(junk)).bytes(10**6))  # the heap looks different each time
        assert made[0] == made[1]


def test_sign_flip_by_hand():
    assert reproduce.sign_flip([1.0] * 8) == 2 / 256  # all alike or all turned round
    assert reproduce.sign_flip([1.0, -1.0]) == 1.0
    assert reproduce.sign_flip([3.0, 1.0, -1.0]) == 6 / 8  # only ±(3 - 1 - 1) is nearer to 0


def test_verdicts_follow_the_differences():
    def rows(name, values):
        return [dict(row=name, seed=seed, answers=value) for seed, value in enumerate(values)]

    up = rows("a", range(1, 9)) + rows("b", range(8))
    assert reproduce.claim(up, "answers", "a", "b") == (1.0, 0.0, 2 / 256, "holds", 8)
    assert reproduce.claim(up, "answers", "b", "a")[3] == "does not hold"
    few = rows("a", [1, 2]) + rows("b", [0, 1])
    assert reproduce.claim(few, "answers", "a", "b")[3].startswith("undecided")
    assert reproduce.claim(rows("a", [1]), "answers", "a", "b") is None
    alike = rows("a", [2] * 8) + rows("b", [1])  # the base has no seed
    assert reproduce.claim(alike, "answers", "a", "b")[3].startswith("can't be tested")


def test_curves_say_when_the_ceiling_is_reached():
    rows = [dict(row="a", seed=0, updates=60, curve=[[0, 0.2, 0.1], [25, 0.8, 0.5], [50, 0.85, 0.6]]),
            dict(row="b", seed=0, updates=60, curve=[[0, 0.2, 0.1], [25, 0.5, 0.5], [50, 0.3, 0.6]])]
    reproduce.add_curves(rows)
    assert [row["updates to 90 % of the ceiling"] for row in rows] == [25, 60]
    assert rows[0]["perception, fixed prompts, update 25"] == pytest.approx(80)


def test_pa_grpo_alone_gives_an_observation_its_own_advantage():
    """Four completions, each kind of right and wrong once: in the sum the two mixed ones are alike."""
    group = [dict(perception=1.0 + p, reasoning=1.0 + r, perception_accuracy=float(p),
                  reasoning_accuracy=float(r))
             for p in (0, 1) for r in (0, 1)]
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in
             reproduce.advantage_table([group]).splitlines()}
    assert float(lines["PA-GRPO"][3]) == 1 and float(lines["GRPO"][3]) == 0
    assert float(lines["without separation"][3]) == 0.5 == float(lines["GDPO"][3])


def test_the_documents_follow_from_the_rows_that_are_kept():
    rows = gen_cot.read_json(ROOT / "docs/toy_runs.jsonl")
    assert reproduce.report(rows) == (ROOT / "docs/toy_results.md").read_text()
    assert np.mean([row["answers"] for row in rows if row["row"] == "PA-GRPO"]) > 60
