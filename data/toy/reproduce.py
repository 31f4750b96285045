"""The paper's claims, watched on the toy: the rows of Table 2 and GDPO over seeds, with a verdict on each.

    python data/toy/reproduce.py --advantages   # what each algorithm's advantage says: a minute, no training
    python data/toy/reproduce.py --quick        # one seed of the claims' rows, but for the plain base's
    python data/toy/reproduce.py                # the matrix: hours, two runs at a time; goes on where it was
    python data/toy/reproduce.py --table        # table, verdicts and figure from docs/toy_runs.jsonl alone

Every run is an ordinary command line of sft.py, pagrpo.py and evaluate.py, with one thread. A finished run is
a row of docs/toy_runs.jsonl, and what stands there is not run again: move the file away to begin anew. The
world was chosen on seeds 0 to 2; the matrix runs on others.
"""
import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # the stages live two folders up

from rewards import (accuracy_reward, json_line, parse_trace, read_jsonl, rule_judge,  # noqa: E402
                     write_text)

DOCS, RUNS = ROOT / "docs", Path("runs/toy")
CLAIM_SEEDS, OTHER_SEEDS = range(3, 11), range(3, 5)
ROWS = {  # name: (flags of sft.py or None, flags of pagrpo.py or None, seeds, the paper's average at 7B)
    "base": (None, None, [0], 52.9),
    "SFT": ([], None, CLAIM_SEEDS, 55.6),
    "PA-GRPO": ([], [], CLAIM_SEEDS, 58.7),
    "GRPO (without R_P)": ([], ["--algorithm", "grpo"], CLAIM_SEEDS, 56.4),
    "GDPO": ([], ["--without", "assignment"], CLAIM_SEEDS, None),
    "without separation": ([], ["--without", "separation"], CLAIM_SEEDS, 57.4),
    "RL only": (None, ["--adapter", "none"], CLAIM_SEEDS, 56.0),
    "GRPO, mean by segment": ([], ["--algorithm", "grpo", "--loss-average", "segment"], CLAIM_SEEDS, None),
    "GDPO, mean by segment": (
        [], ["--without", "assignment", "--loss-average", "segment"], CLAIM_SEEDS, None),
    "without separation, mean by segment": (
        [], ["--without", "separation", "--loss-average", "segment"], CLAIM_SEEDS, None),
    "without R_R": ([], ["--without", "reasoning"], OTHER_SEEDS, 55.3),
    "without R_len": ([], ["--without", "length"], OTHER_SEEDS, 57.7),
    "process-agnostic SFT": (["--process-agnostic"], None, OTHER_SEEDS, 53.5),
    "SFT, plain base": ([], None, CLAIM_SEEDS, 55.6),
    "PA-GRPO, plain base": ([], [], CLAIM_SEEDS, 58.7),
    "RL only, plain base": (None, ["--adapter", "none"], CLAIM_SEEDS, 56.0),
}
PLAIN = RUNS / "plain"  # a base that does not know the template in the stages' prompt, as a released one
COLUMNS = {"answers": "{:.1f}", "perception": "{:.1f}", "answers, observation sufficient": "{:.1f}",
           "mismatch": "{:.1f}", "template": "{:.1f}", "groups without gradient": "{:.1f}",
           "answers, fixed prompts, update 25": "{:.1f}", "perception, fixed prompts, update 25": "{:.1f}",
           "updates to 90 % of the ceiling": "{:.0f}", "tokens of perception": "{:.0f}",
           "tokens of reasoning": "{:.0f}"}


# --- the matrix ---------------------------------------------------------------------------------------------

def run_matrix(rows, seeds=None):
    """Runs what docs/toy_runs.jsonl doesn't hold yet, two at a time: all SFT, then row by row."""
    path, lock = DOCS / "toy_runs.jsonl", Lock()
    done = {(row["row"], row["seed"]) for row in read_jsonl(path)}
    jobs = [(name, seed) for name in rows for seed in ROWS[name][2] if seeds is None or seed in seeds]
    jobs = [job for job in jobs if job not in done]
    sft_jobs = [job for job in jobs if ROWS[job[0]][1] is None]
    rl_jobs = [job for job in jobs if job not in sft_jobs]
    print(f"{len(done)} runs are in {path}; {len(jobs)} to go.", flush=True)
    if jobs and not Path("runs/tiny/gen_cot/cot.jsonl").exists():
        call("gen_cot.py", "--model", "tiny")
    if not PLAIN.exists() and any("plain base" in name for name, _ in jobs):
        call("data/toy/prepare.py", "--pretrain", "--no-template", "--folder", PLAIN)

    def work(job):
        name, seed = job
        row = run_row(name, seed)
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(json_line(row))
        print(f"{name}, seed {seed}: {row['answers']:.1f}, {row['perception']:.1f}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, sft_jobs))
        list(pool.map(work, rl_jobs))


def run_row(name, seed):
    """Trains and evaluates one row with one seed; returns what is kept of it."""
    sft_flags, rl_flags, _, _ = ROWS[name]
    adapter, plain = "none", "plain base" in name
    if sft_flags is not None:
        adapter = RUNS / f"sft{''.join(sft_flags)}{'-plain' if plain else ''}-{seed}"
        stage(adapter, "sft.py", *model_flags("sft", plain), "--seed", seed, *sft_flags, "--output", adapter)
    if rl_flags is not None:
        start = [] if "--adapter" in rl_flags else ["--adapter", adapter]
        adapter = folder_of(name, seed)
        stage(adapter, "pagrpo.py", *model_flags("pagrpo", plain), "--seed", seed, *start, *rl_flags,
              "--show-every", 5, "--output", adapter)
    folder = folder_of(f"evaluate {name}", seed)
    call("evaluate.py", *model_flags("evaluate", plain), "--adapters", adapter, "--mismatch",
         "--output", folder)
    row = dict(row=name, seed=seed) | scores_of(folder)
    if rl_flags is not None:
        metrics = read_jsonl(adapter / "metrics.jsonl")
        row["groups without gradient"] = 100 * float(np.mean([m["frac_no_gradient"] for m in metrics
                                                                  if "loss" in m]))
        row["curve"] = [[m["step"], m["fixed/perception"], m["fixed/reasoning"]] for m in metrics
                        if "fixed/perception" in m]
        row["updates"] = len(metrics)
        for process in ("perception", "reasoning"):
            row[f"tokens of {process}"] = float(np.mean([m[f"length/{process}"] for m in metrics[-10:]]))
    if name == "PA-GRPO":
        row |= perception_examination(adapter, folder, seed)
    return row


def model_flags(module, plain):
    """What makes a stage take the toy model; with the plain base, tiny's presets have to be spelt out."""
    flags = ["--model", PLAIN if plain else "tiny"]
    for name, value in importlib.import_module(module).TINY.items() if plain else ():
        if name not in ("checkpointing", "show_every"):  # which changes no result, and which is set anyway
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    return flags


def perception_examination(adapter, folder, seed):
    """Answers of the paper's Table 5, in per cent: a model with the question alone, with observations in its
    prompt instead of the clip, and with both."""
    own, row = next(folder.glob("completions-*.jsonl")), {}
    for name, model, flags in (
            ("text", adapter, ["--input", "text"]),
            ("text + own observation", adapter, ["--input", "text", "--observations", own]),
            ("base: text", "none", ["--input", "text"]),
            ("base: text + PA-GRPO's observation", "none", ["--input", "text", "--observations", own]),
            ("base: video + PA-GRPO's observation", "none", ["--observations", own])):
        part = folder_of(f"evaluate {name}", seed)
        call("evaluate.py", "--model", "tiny", "--adapters", model, *flags, "--mismatch", "--output", part)
        row[name] = scores_of(part)["answers"]
    return row


def folder_of(name, seed):
    return RUNS / re.sub("[^a-zA-Z0-9]+", "-", f"{name} {seed}")


def stage(folder, script, *flags):
    """A training stage, unless its adapter is there; it goes on from a checkpoint."""
    if not (folder / "adapter_model.safetensors").exists():
        call(script, *flags, "--resume")


def call(script, *flags):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / "log.txt", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def scores_of(folder):
    """The figures of an evaluation of one adapter, in per cent."""
    results = json.loads((folder / "results.json").read_text())
    summary = next(sets for name, sets in results["rows"].items() if name != "constant")["test.jsonl"]
    rows = read_jsonl(next(folder.glob("completions-*.jsonl")))
    sufficient = rule_judge(rows, [parse_trace(row["completion"] or "").observation for row in rows])
    scores = [accuracy_reward(row["problem_type"], row["completion"] or "", row["solution"]) for row in rows]
    given = [score for score, enough in zip(scores, sufficient) if enough]
    clear = summary["mismatch"]["match"] + summary["mismatch"]["mismatch"]
    return {"answers": summary["numbers"]["answer"][0], "perception": summary["perception"],
            "answers, observation sufficient": 100 * float(np.mean(given)) if given else None,
            "mismatch": 100 * summary["mismatch"]["mismatch"] / clear if clear else None,
            "template": summary["template"], "commit": results["settings"]["commit"][:7]}


# --- table, verdicts, figure --------------------------------------------------------------------------------

def add_curves(rows):
    """What the curves on the fixed prompts say of each run: both accuracies at update 25, and after how many
    updates perception is at 90 % of its ceiling, the highest mean over seeds of any row; all if never."""
    means = {}
    for row in rows:
        for step, perception, _ in row.get("curve", []):
            means.setdefault((row["row"], step), []).append(perception)
    ceiling = max((np.mean(values) for values in means.values()), default=0)
    for row in rows:
        if "curve" in row:
            at = {step: (perception, answer) for step, perception, answer in row["curve"]}
            for name, value in zip(("perception", "answers"), at.get(25, (np.nan, np.nan))):
                row[f"{name}, fixed prompts, update 25"] = 100 * value
            reached = [step for step in at if at[step][0] >= 0.9 * ceiling]
            row["updates to 90 % of the ceiling"] = min(reached, default=row["updates"])


def of_row(rows, name, column):
    """{seed: value} of a row's column, of the seeds that have one."""
    return {row["seed"]: row[column] for row in rows if row["row"] == name and row.get(column) is not None}


def mean_and_interval(values):
    """The mean, and half of its 95 % interval over seeds (Student's t), NaN for a single one."""
    n = len(values)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(n, np.nan)
    return np.mean(values), t * np.std(values, ddof=1) / n ** 0.5 if n > 1 else np.nan


def sign_flip(differences):
    """The exact two-sided p of paired differences: the share of all combinations of their signs with a mean
    as far from 0."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return float((np.abs(signs @ differences) >= abs(sum(differences)) - 1e-9).mean())


def claim(rows, column, better, worse, worse_column=None):
    """(mean difference, its interval, p, verdict, seeds) of "better is above worse" in a column."""
    above, below = of_row(rows, better, column), of_row(rows, worse, worse_column or column)
    if list(below) == [0]:  # the base, which has no seed
        below = dict.fromkeys(above, below[0])
    gains = [above[seed] - below[seed] for seed in above if seed in below]
    if len(gains) < 2:
        return None
    p, (mean, spread) = sign_flip(gains), mean_and_interval(gains)
    verdict = "undecided at this scale" if p > 0.05 else "holds" if mean > 0 else "does not hold"
    if len(set(above.values())) == len(set(below.values())) == 1:  # no training changes what is compared
        verdict = "can't be tested here: all seeds alike"
    return mean, spread, p, verdict, len(gains)


PA, GRPO, SUM = "PA-GRPO", "GRPO (without R_P)", "without separation"
UPDATES, STILL = "updates to 90 % of the ceiling", "groups without gradient"
CLAIMS = [  # (the claim, its arguments of `claim`)
    ("SFT + RL above SFT, answers", ("answers", PA, "SFT")),
    ("SFT + RL above RL only, answers", ("answers", PA, "RL only")),
    ("the same from the plain base, answers", ("answers", f"{PA}, plain base", "RL only, plain base")),
    ("SFT + RL above SFT from the plain base, answers", ("answers", f"{PA}, plain base", "SFT, plain base")),
    *[(f"PA-GRPO above {other}, {column}", (column, PA, other))
      for other in (GRPO, "GDPO", SUM) for column in ("answers", "perception")],
    *[(f"PA-GRPO is quicker than {other} (updates saved)", (UPDATES, other, PA))
      for other in (GRPO, "GDPO", SUM)],
    *[(f"PA-GRPO above {other}, both by segment, {column}", (column, PA, f"{other}, mean by segment"))
      for other in ("GRPO", "GDPO", SUM) for column in ("answers", "perception")],
    ("fewer groups without gradient than GRPO", (STILL, GRPO, PA)),
    ("less mismatch than GRPO (the paper compares with other projects there)", ("mismatch", GRPO, PA)),
    ("text + own observation above text (Table 5)", ("text + own observation", PA, PA, "text")),
    ("PA-GRPO's observations help the base, text (Table 5)",
     ("base: text + PA-GRPO's observation", PA, PA, "base: text")),
    ("PA-GRPO's observations help the base, video (Table 5)",
     ("base: video + PA-GRPO's observation", PA, "base", "answers")),
    ("the length bonus helps, answers", ("answers", PA, "without R_len")),
]


def report(rows):
    """The results as Markdown: table, then claims with verdicts."""
    add_curves(rows)
    lines = ["Mean over seeds ± 95 % interval; in % but for updates and tokens. Fixed prompts: held out.",
             "", f"| row | seeds | {' | '.join(COLUMNS)} | the paper at 7B |",
             "|---" * (len(COLUMNS) + 3) + "|"]
    for name in ROWS:
        cells = []
        for column, form in COLUMNS.items():
            mean, spread = mean_and_interval(list(of_row(rows, name, column).values()) or [np.nan])
            cells.append("-" if np.isnan(mean) else form.format(mean)
                         + ("" if np.isnan(spread) else " ± " + form.format(spread)))
        seeds = len(of_row(rows, name, "answers"))
        if seeds:
            lines.append(f"| {name} | {seeds} | {' | '.join(cells)} | {ROWS[name][3] or '-'} |")
    lines += ["", "| claim | difference | p, exact sign flip | seeds | verdict |", "|---|---|---|---|---|"]
    for text, arguments in CLAIMS:
        if found := claim(rows, *arguments):
            mean, spread, p, verdict, seeds = found
            lines.append(f"| {text} | {mean:+.1f} ± {spread:.1f} | {p:.3f} | {seeds} | {verdict} |")
    return "\n".join(lines) + "\n"


def draw(rows, path, names=(PA, GRPO, SUM)):
    """The headline: both accuracies on the fixed prompts, mean over seeds and each seed, by algorithm."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    titles = "perception: sufficient observations", "reasoning: answers"
    for axis, index, title in zip(axes, (1, 2), titles):
        for name, colour in zip(names, ("tab:blue", "tab:orange", "tab:green")):
            curves = [np.array(row["curve"], dtype=float) for row in rows if row["row"] == name]
            for curve in curves:
                axis.plot(curve[:, 0], 100 * curve[:, index], color=colour, alpha=0.2, linewidth=0.8)
            if curves:
                mean = np.mean([curve[:, index] for curve in curves], axis=0)
                axis.plot(curves[0][:, 0], 100 * mean, color=colour, linewidth=2.2, label=name)
        axis.set(title=title, xlabel="updates", ylim=(0, 100))
    axes[0].set_ylabel("% of the fixed prompts, greedy")
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- what an advantage says ---------------------------------------------------------------------------------

def measure_advantages(adapter, questions=264):
    """One rollout of an adapter, no training: what lands on perception's tokens of the same completions under
    each algorithm, where a group's observations differ, and how much of reasoning's variance the answer
    explains."""
    import pagrpo
    import sft
    import gen_cot
    sys.argv = ["pagrpo.py", "--model", "tiny", "--adapter", str(adapter), "--output", str(RUNS / "rollout")]
    args = pagrpo.get_args()
    model, tokenizer = sft.load_model(args.base, args.adapter, lora_rank=args.lora_rank)
    records = itertools.islice(pagrpo.endless(gen_cot.select_records(args), 0, 8), questions)
    groups, media, template = [], gen_cot.read_ahead(records, args), gen_cot.load_template(args)
    for _ in range(questions // 8):
        encoded, _ = sft.encode_batch(media, 8, template, tokenizer, sft.unwrap(model).config)
        some = pagrpo.sample_groups(model, encoded, tokenizer, args)
        pagrpo.score_groups(some, tokenizer, rule_judge, args)
        groups += [group.scores for group in some]
    print(advantage_table(groups))


def advantage_table(groups):
    """The table of `measure_advantages`, Markdown; groups: each prompt's completions' `process_rewards`."""
    import torch
    import pagrpo
    scores = [s for group in groups for s in group]
    right = [s["reasoning_accuracy"] for s in scores if s["perception_accuracy"]]
    wrong = [s["reasoning_accuracy"] for s in scores if not s["perception_accuracy"]]
    lines = [f"{len(groups)} groups of {len(groups[0])}: {100 * len(right) / len(scores):.0f} % of the "
             f"observations are sufficient; answers score {np.mean(right):.2f} after these, "
             f"{np.mean(wrong):.2f} after others.", "",
             "| advantage of perception's tokens | observation right | wrong | R² with right | over all groups "
             "| right ones punished | wrong ones rewarded | of reasoning's: R² with the answer |",
             "|---" * 8 + "|"]
    for name, without in (("PA-GRPO", None), ("GRPO", "perception"), ("without separation", "separation"),
                          ("GDPO", "assignment")):
        given, answered, everywhere = [], [], []  # but for `everywhere`, of groups whose accuracies differ
        for group in groups:
            p, r = (torch.tensor([s[process] for s in group]) for process in ("perception", "reasoning"))
            on_p, on_r = pagrpo.process_advantages(p, r, without)
            everywhere += zip(on_p.tolist(), [s["perception_accuracy"] for s in group])
            for process, advantages, pairs in (("perception", on_p, given), ("reasoning", on_r, answered)):
                accuracies = [s[f"{process}_accuracy"] for s in group]
                if len(set(accuracies)) > 1:
                    pairs += zip(advantages.tolist(), accuracies)
        on_right, on_wrong = (np.array([a for a, seen in given if seen == value]) for value in (1, 0))
        squares = [np.corrcoef(*np.array(pairs).T)[0, 1] ** 2 for pairs in (given, everywhere, answered)]
        lines.append(f"| {name} | {on_right.mean():+.2f} | {on_wrong.mean():+.2f} | "
                     f"{squares[0]:.2f} | {squares[1]:.2f} | {100 * (on_right < 0).mean():.0f} % | "
                     f"{100 * (on_wrong > 0).mean():.0f} % | {squares[2]:.2f} |")
    return "\n".join(lines)


def get_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advantages", metavar="ADAPTER", nargs="?", const="runs/tiny/sft",
                        help="measure the advantages on one rollout of this adapter (default: runs/tiny/sft)")
    parser.add_argument("--quick", action="store_true", help="the claims' rows with one seed")
    parser.add_argument("--table", action="store_true", help="table, verdicts and figure of what is there")
    return parser.parse_args()


def main(args):
    if args.advantages:
        return measure_advantages(args.advantages)
    if not args.table:
        claims = [name for name, row in ROWS.items()
                  if len(row[2]) != len(OTHER_SEEDS) and "plain base" not in name]
        run_matrix(claims if args.quick else ROWS, [0, CLAIM_SEEDS[0]] if args.quick else None)
    rows = read_jsonl(DOCS / "toy_runs.jsonl")
    text = report(rows)
    write_text(DOCS / "toy_results.md", text)
    draw(rows, DOCS / "toy_curves.png")
    print(text)


if __name__ == "__main__":
    main(get_args())
