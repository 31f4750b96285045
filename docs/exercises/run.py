"""The field's own questions over seeds, two runs at a time, against PA-GRPO of the matrix.

    python docs/exercises/run.py                             # what is missing of ROWS with seeds 3 and 4
    python docs/exercises/run.py 3 4 5 6 7 8 9 10            # with these seeds; add rows to have only these:
    python docs/exercises/run.py 3 4 5 6 7 8 9 10 gate blend
    python docs/exercises/run.py table                       # only the comparison of what is there

Run data/toy/reproduce.py in this clone before: these runs start from its SFT adapters in runs/toy, and are
compared with its PA-GRPO. A finished run is a row of docs/exercises/toy_runs.jsonl, and is not run again. By
sign flips two seeds can't give a p below 0.5. Six can give 0.03, and eight 0.008.
"""
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data/toy"))

import reproduce  # noqa: E402

ROWS = {  # name: (flags of pagrpo.py, the row that it is compared with); its patch, if any, has its name
    "gate": ([], "PA-GRPO"), "blend": ([], "PA-GRPO"), "resample": ([], "PA-GRPO"),
    "two_steps": (["--num-iterations", 2], "PA-GRPO"), "clip_higher": (["--num-iterations", 2], "two_steps")}
COLUMNS = "answers", "perception", reproduce.STILL, reproduce.UPDATES
call = reproduce.call


def patched(name):
    """Copies the stages to a folder in runs/toy, with the patch of this name, if there is one."""
    folder = reproduce.RUNS / f"patched-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    if (HERE / f"{name}.patch").exists():
        subprocess.run(["git", "apply", "--directory", folder, HERE / f"{name}.patch"], check=True)


def call_patched(script, *flags):
    """`reproduce.call`, but a row's pagrpo.py is its patched one. The row is told by the name of --output."""
    if script == "pagrpo.py":
        row = Path(flags[flags.index("--output") + 1]).name.rpartition("-")[0].replace("-", "_")
        script = Path(f"{reproduce.RUNS}/patched-{row}/pagrpo.py").resolve()
    call(script, *flags)


def main(words):
    seeds = [int(word) for word in words if word.isdigit()] or [3, 4]
    rows = [name for name in ROWS if name in words or all(map(str.isdigit, words))]
    reproduce.ROWS, reproduce.CLAIMS = {"PA-GRPO": reproduce.ROWS["PA-GRPO"]}, []
    for name, (flags, other) in ROWS.items():
        reproduce.ROWS[name] = [], flags, seeds, None
        reproduce.CLAIMS += [(f"{name} above {other}, {column}", (column, name, other)) for column in COLUMNS]
    for name in rows:
        patched(name)
    reproduce.DOCS, reproduce.call = HERE, call_patched
    reproduce.run_matrix(rows)
    files = ROOT / "docs/toy_runs.jsonl", HERE / "toy_runs.jsonl"
    print(reproduce.report(sum(map(reproduce.read_jsonl, files), [])))


if __name__ == "__main__":
    main(sys.argv[1:])
