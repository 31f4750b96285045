"""What the tests share: the small model, and toy records whose media are really encoded."""
import json
import os
import random
import sys
from pathlib import Path

import pytest

# Before anything imports torch, and for the scripts that the tests start: float32 on a CPU, offline.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only wait for each other on matrices this small

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data/toy")]


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer): the toy base in 4 bits with a fresh LoRA adapter, which changes nothing yet."""
    import sft
    from gen_cot import PRESETS
    sft.seed_everything(0)
    return sft.load_model(ROOT / PRESETS["tiny"]["base"], lora_rank=8)


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
