"""Does it work, and how do we know: accuracy of answers and of observations,
before and after each stage (Sec. 4).

    python evaluate.py --model tiny            # base, SFT, SFT + PA-GRPO on the toy world's test split
    python evaluate.py --model tiny --adapters none runs/tiny/pagrpo

An answer that is empty or can't be parsed is wrong. A record whose medium turns out to be unreadable counts
as wrong too, and the score without such records is printed beside; one whose medium is missing is left out,
which every stage says when it starts.

Our choices:
E1. Decoding is greedy, which is what the paper's temperature 0.01 with top-p 0.001 comes to.
E2. The row "constant" answers every question of a type with the one gold answer of that type that scores best
    on this very test set: the most that guessing without looking could earn.
E3. Intervals are 95 % by the normal approximation over questions.
"""
import gc
import json
import math
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import gen_cot
import sft
from pagrpo import rollout
from rewards import PROBLEM_TYPES, accuracy_reward, format_rewards, parse_trace

TINY = dict(data="data/toy/test.jsonl", media_root="data/toy", max_pixels=4, max_completion_tokens=112,
            batch_size=50)


def get_args():
    parser, model, _ = gen_cot.make_parser(__doc__, "data/Video-R1-eval/eval_*.json", "questions",
                                           num_frames=32, max_pixels=256)
    model.add_argument("--no-4bit", action="store_true", help="keep the base in 16 bits (big cards)")
    model.add_argument("--adapters", nargs="+",
                       help="adapter folders to compare, none for the base (default: none, runs/<model>/sft, "
                            "runs/<model>/pagrpo)")
    add = parser.add_argument_group("algorithm").add_argument
    gen_cot.add_judge_args(add, default="rule")
    add("--max-completion-tokens", type=gen_cot.positive, default=1024, help="completions are cut here")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=gen_cot.number(0, int), default=0, help="seed of the draw of --limit")
    add("--batch-size", type=gen_cot.positive, default=4, help="questions decoded together")
    add("--output", type=Path,
        help="folder for results.json and completions (default: runs/<model>/evaluate)")
    args = gen_cot.parse_args(parser, TINY)
    args.output = args.output or args.run_dir / "evaluate"
    if args.adapters is None:
        stages = [args.run_dir / "sft", args.run_dir / "pagrpo"]
        args.adapters = ["none"] + [str(s) for s in stages if (s / "adapter_config.json").exists()]
    return args


def main(args):
    records = gen_cot.select_records(args)
    judge = gen_cot.judge_from(args, records)
    for adapter in args.adapters:
        if adapter != "none":
            sft.check_adapter(adapter)
    if any(args.output.glob("completions-*.jsonl")):
        gen_cot.move_aside(args.output)
    gen_cot.check_writable(args.output)
    rows = {"constant": summarise(constant_answers(records, args.scoring))}
    for adapter, name in row_names(args.adapters).items():
        model, tokenizer = sft.load_model(args.base, None if adapter == "none" else adapter, not args.no_4bit,
                                      trainable=False)
        texts = complete(model, tokenizer, records, args)
        del model  # before the next one is loaded
        gc.collect()
        file = Path(adapter).name if name != adapter else adapter.strip("/").replace("/", "-")
        file = args.output / f"completions-{file}.jsonl"
        rows_kept = [dict(problem_id=record.get("problem_id"), path=record["path"], completion=text)
                     for record, text in zip(records, texts)]
        gen_cot.write_jsonl(file, rows_kept)  # in case that the judge refuses
        results = score_completions(records, texts, judge, args.scoring)
        gen_cot.write_jsonl(file, results)
        rows[name] = summarise(results)
    print_table(rows, records)
    gen_cot.print_stats("judge", judge)
    settings = {key: str(value) for key, value in vars(args).items()}
    rows = json.loads(json.dumps(rows), parse_constant=lambda nan: None)  # a type without questions: null
    gen_cot.write_text(args.output / "results.json",
                       json.dumps(dict(rows=rows, questions=len(records), settings=settings), indent=1))
    print(f"\nresults.json and every completion in {args.output}")


def complete(model, tokenizer, records, args):
    """Greedy completions (E1): list of str, None for a record whose medium can't be read."""
    template, config, skipped = gen_cot.load_template(args), sft.unwrap(model).config, set()
    texts, media = {}, gen_cot.read_ahead([dict(record, index=i) for i, record in enumerate(records)], args)
    for _ in tqdm(range(0, len(records), args.batch_size), desc="completions", unit="batch"):
        encoded = sft.encode_batch(islice(media, args.batch_size), template, tokenizer, config, skipped)
        if not encoded:
            continue
        kept, prompts = zip(*encoded)
        with torch.no_grad():
            sft.embed_prompts(model, prompts)
        ids, mask, _ = rollout(model, prompts, tokenizer, 1, args.max_completion_tokens)
        for record, row, keep in zip(kept, ids, mask):
            texts[record["index"]] = tokenizer.decode(row[keep], skip_special_tokens=True,
                                                      clean_up_tokenization_spaces=False)
    return [texts.get(i) for i in range(len(records))]


def score_completions(records, texts, judge, scoring):
    """One result per record: dict of problem_id, path, problem_type, solution, completion, answer score and
    how it was scored, perception verdict, template."""
    verdicts = judge(records, [parse_trace(text or "").observation for text in texts])
    return [dict(problem_id=record.get("problem_id"), path=record["path"],
                 problem_type=record["problem_type"], solution=record["solution"], completion=text,
                 answer=answer_score(record, text or "", scoring), scoring=scoring,
                 perception=None if verdict is None else float(verdict),
                 template=min(format_rewards(text or "")))
            for record, text, verdict in zip(records, texts, verdicts)]


def answer_score(record, text, scoring):
    return accuracy_reward(record["problem_type"], text, record["solution"], scoring, record.get("options"))


def constant_answers(records, scoring):
    """The results of the best constant answer per problem type (E2)."""
    results = []
    for kind in PROBLEM_TYPES:
        asked = [record for record in records if record["problem_type"] == kind]
        scores = {guess: [answer_score(record, guess, scoring) for record in asked]
                  for guess in {record["solution"] for record in asked}}
        best = max(sorted(scores), key=lambda guess: sum(scores[guess]), default=None)
        results += [dict(problem_type=kind, completion=best, answer=s, perception=0.0, template=0.0)
                    for s in scores.get(best, [])]
    return results


def mean(values):
    """(mean, half-width of its 95 % interval) of a list of float, E3; (nan, nan) of an empty one."""
    if not values:
        return math.nan, math.nan
    average = sum(values) / len(values)
    spread = sum((v - average) ** 2 for v in values) / max(1, len(values) - 1)
    return average, 1.96 * math.sqrt(spread / len(values))


def summarise(results):
    """The table's row as a dict of percentages: answers overall and per type, perception, template,
    media unread, observations without a verdict."""
    readable = [r for r in results if r["completion"] is not None]
    row = {"answer": mean([r["answer"] for r in results]),
           "perception": mean([r["perception"] for r in results if r["perception"] is not None]),
           "template": mean([r["template"] for r in results]),
           "answer, readable media only": mean([r["answer"] for r in readable])}
    for kind in PROBLEM_TYPES:
        row[kind] = mean([r["answer"] for r in results if r["problem_type"] == kind])
    return ({key: tuple(round(100 * v, 2) for v in pair) for key, pair in row.items()}
            | {"unread": len(results) - len(readable),
               "judge unknown": sum(r["perception"] is None for r in results)})


def print_table(rows, records):
    """rows: dict from the model's name to its `summarise`."""
    kinds = [kind for kind in PROBLEM_TYPES if any(record["problem_type"] == kind for record in records)]
    print(f"\n{len(records)} questions; accuracy in %, ± 95 % interval; "
          "perception: observations that the judge finds sufficient")
    width = max(16, *(len(name) + 1 for name in rows))
    print(f"{'':<{width}}{'answer':>13}{'perception':>13}{'template':>10}"
          + "".join(f"{kind:>17}" for kind in kinds))
    for name, row in rows.items():
        (a, da), (p, dp) = row["answer"], row["perception"]
        print(f"{name:<{width}}{a:>7.1f} ± {da:<3.1f}{p:>7.1f} ± {dp:<3.1f}{row['template'][0]:>10.1f}"
              + "".join(f"{row[kind][0]:>17.1f}" for kind in kinds))
        if row["unread"]:
            print(f"  {row['unread']} media could not be read and count as wrong; without them "
                  f"the answers are {row['answer, readable media only'][0]:.1f}")
        if row["judge unknown"]:
            print(f"  {row['judge unknown']} observations got no verdict and count in no perception")


def row_names(adapters):
    """{adapter: its name in the table}; those whose folders share a name go by their paths."""
    known = {"none": "base", "sft": "SFT", "pagrpo": "SFT + PA-GRPO"}
    names = [known.get(Path(adapter).name, Path(adapter).name) for adapter in adapters]
    return {adapter: name if names.count(name) == 1 else str(adapter)
            for adapter, name in zip(adapters, names)}


if __name__ == "__main__":
    gen_cot.run_script(main, get_args)
