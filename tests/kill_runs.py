"""Kill both trainers at random moments, go on with --resume, and compare with a run that was left alone.

    python tests/kill_runs.py            # 20 SIGKILLs, 10 SIGTERMs, Ctrl-Cs and SIGHUPs each: an hour
    python tests/kill_runs.py --leaks    # 1,000 tiny updates: memory, open files, threads, workers

Not collected by pytest. A row of the table is right where every run ended as it should ("good end"), and then
finished with the same adapter, byte by byte, the same log, but for timings, and no other files than the
undisturbed run's, with no worker left behind. What went wrong comes on stderr with the end of its output.
"""
import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
TINY = "--model tiny --save-every 2 --workers 2"
RL = f"pagrpo.py {TINY} --adapter none --prompts-per-update 2 --num-generations 4 --max-completion-tokens 24"
COMMANDS = {"sft.py": f"sft.py {TINY} --limit 48 --batch-size 4 --lr 1e-3", "pagrpo.py": f"{RL} --updates 12",
            "pagrpo.py, μ = 2": f"{RL} --updates 12 --num-iterations 2"}
SIGNALS = {signal.SIGKILL: 20, signal.SIGTERM: 10, signal.SIGINT: 10, signal.SIGHUP: 10}  # of each script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--leaks", action="store_true", help="measure 1,000 updates instead")
    parser.add_argument("--share", type=float, default=1.0, help="of the kills, for a quick look")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
    with tempfile.TemporaryDirectory() as folder:
        if args.leaks:
            return leaks(Path(folder))
        verified = Path(folder) / "cot.jsonl"
        subprocess.run([sys.executable, "gen_cot.py", "--model", "tiny", "--output", verified], check=True)
        COMMANDS["sft.py"] += f" --data {verified}"
        print(f"{'command':<18}{'signal':<9}{'kills':>6}{'too late':>9}{'finished':>9}{'same adapter':>13}"
              f"{'same log':>9}{'same files':>11}{'no worker left':>15}{'good end':>9}"
              f"{'longest end':>12}")
        for name, command in COMMANDS.items():
            whole = Path(folder) / name.replace(", μ = ", "") / "whole"
            start(command, whole).wait()
            for number, count in SIGNALS.items():
                count = max(1, round(count * args.share))
                seeds = [f"{args.seed} {name} {number} {i}" for i in range(count)]
                with ThreadPoolExecutor(args.parallel) as pool:
                    rows = list(pool.map(lambda seed: kill_once(command, whole, number, seed), seeds))
                late, *sums, seconds = zip(*rows)
                cells = [len(rows), sum(late), *map(sum, sums), f"{max(seconds):.1f} s"]
                print(f"{name:<18}{number.name:<9}" + "".join(
                    f"{cell:>{width}}" for cell, width in zip(cells, (6, 9, 9, 13, 9, 11, 15, 9, 12))),
                    flush=True)


def start(command, output):
    """A run in a session of its own, as one of a terminal or of a batch system."""
    output.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *command.split(), "--output", output, "--resume"]
    with open(output.with_suffix(".txt"), "ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)


def kill_once(command, whole, number, seed):
    """One run, killed once, and then started until it has finished. Returns (too late, finished, same
    adapter, same log, same files, no worker left, good end, seconds from the signal to the end)."""
    rng, output = random.Random(seed), whole.with_name(seed.replace(" ", "-")) / "run"
    process, updates = start(command, output), len(log(whole))
    moment = rng.randint(-2, updates + 3)  # a row of the log; four of them are the end, two are the beginning
    while moment > 0 and process.poll() is None and len(log(output)) < min(moment, updates):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 6 if moment <= 0 else 1.0 if moment >= updates else 0.15))
    late, since = process.poll() is not None, time.time()
    if not late:
        from_terminal = number in (signal.SIGINT, signal.SIGHUP)  # which tells all
        (os.killpg if from_terminal else os.kill)(process.pid, number)
        process.wait()
    seconds = time.time() - since
    deadline = since + 10
    while (left := members(process.pid)) and time.time() < deadline:
        time.sleep(0.05)
    text, codes = output.with_suffix(".txt").read_text(), [process.returncode]
    ended = number == signal.SIGKILL or good_end(text, process.returncode, number)
    while codes[-1] and len(codes) < 4:
        codes.append(start(command, output).wait())
    finished = codes[-1] == 0 and (output / "adapter_model.safetensors").exists()
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (output, whole) if finished]
    files = names(output) == names(whole) and names(output.parent) == [".run.lock", "run", "run.txt"]
    good = (late, finished, finished and weights[0] == weights[1], log(output) == log(whole), files, not left,
            ended, seconds)
    if not all(good[1:-1]):
        print(f"  {seed}: moment {moment} of {updates}, exit codes {codes}, {names(output)}, "
              f"{names(output.parent)}\n{text[-2000:]}", file=sys.stderr)
    return good


def good_end(text, code, number):
    """Whether a run that got this signal saved, said how it goes on, and ended; or was so far that it could
    finish. Before its loop has begun there is nothing to save, and behind its last words nothing to do."""
    if code == -number and re.search(r"curves\.png in \S+\n\Z", text):
        return True
    if not re.search("SFT:|PA-GRPO:", text) and (code == -number or text.endswith("Stopped.\n")):
        return True
    stopped = re.search(r"Stopped\. .* holds a checkpoint: go on with `python .* --resume`\.\n$", text)
    return "Traceback" not in text and (code == 0 or code == 1 and bool(stopped))


def log(folder):
    """The rows of a run's log without its timings."""
    if not (folder / "metrics.jsonl").exists():
        return []
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # the last one may be on its way
    return [{key: value for key, value in json.loads(line).items()
             if not key.startswith(("sec/", "gib/", "peak_gib"))} for line in lines]


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def members(session):
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended just now
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def leaks(folder, updates=1000):
    """pagrpo.py's loop with the smallest settings in this process; what it holds, every hundred updates."""
    sys.path.insert(0, str(ROOT))
    import pagrpo
    import sft
    write = sft.log_row

    def measure(file, row):
        write(file, row)
        if (row["step"] + 1) % 100 == 0:
            status = dict(line.split(":", 1) for line in open("/proc/self/status"))
            children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
            print(f"{row['step'] + 1:>7}{int(status['VmRSS'].split()[0]) / 1024:>14.1f}"
                  f"{len(os.listdir('/proc/self/fd')):>12}{int(status['Threads']):>9}"
                  f"{sum(map(len, children)):>9}", flush=True)

    sft.log_row = measure
    sys.argv = (f"pagrpo.py --model tiny --adapter none --updates {updates} --prompts-per-update 1 "
                "--num-generations 2 --max-completion-tokens 4 --save-every 100000 --show-every 100000 "
                f"--output {folder}/run").split()
    print(f"{'updates':>7}{'resident MiB':>14}{'open files':>12}{'threads':>9}{'workers':>9}")
    pagrpo.main(pagrpo.get_args())


if __name__ == "__main__":
    main()
