"""Kill evaluate.py at random moments, and see that it ends with the completions and table of a run that was
left alone (a few minutes, so no test).

    python tests/kill_evaluate.py --kills 20
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewards import read_jsonl  # noqa: E402


def start(output, args):
    flags = f"--model tiny --limit {args.limit} --batch-size {args.batch_size} --output {output}"
    return subprocess.Popen([sys.executable, "evaluate.py", *flags.split()], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)


def outcome(folder):
    """(completions by question, rows of results.json) of a run that is over."""
    said = {}
    for path in sorted(folder.glob("completions-*.jsonl")):
        for row in read_jsonl(path):  # but for lines that a kill tore
            assert (path.name, row["problem_id"], row["problem"]) not in said, "a question was answered twice"
            said[path.name, row["problem_id"], row["problem"]] = row
    return said, json.loads((folder / "results.json").read_text())["rows"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, rounds = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, begin = Path(folder, "whole"), time.monotonic()
        assert start(whole, args).wait() == 0
        seconds, expected = time.monotonic() - begin, outcome(whole)
        print(f"undisturbed: {len(expected[0])} completions in {seconds:.0f} s", flush=True)
        while kills < args.kills:
            rounds += 1
            output, over = Path(folder, f"killed-{rounds}"), False
            while not over:
                process = start(output, args)
                try:
                    if kills < args.kills:
                        process.wait(rng.uniform(0, seconds))
                    over = process.wait(None if kills >= args.kills else 0) == 0
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    rows = sum(path.read_bytes().count(b"\n") for path in output.glob("completions-*.jsonl"))
                    print(f"kill {kills}: {rows} completions are there", flush=True)
            said, table = outcome(output)
            different = [key for key in expected[0] if said.get(key) != expected[0][key]]
            print(f"round {rounds}: {len(different)} of {len(expected[0])} completions differ, the table is "
                  f"{'the same' if table == expected[1] else 'another'}", flush=True)
            assert not different and len(said) == len(expected[0]) and table == expected[1]


if __name__ == "__main__":
    main()
