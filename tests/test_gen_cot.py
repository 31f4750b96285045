"""Records, the prompt and the three-step pipeline, on hand-worked cases."""
import argparse
import functools
import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gen_cot
import prepare
from gen_cot import build_prompt, load_records
from rewards import PROBLEM_TYPES, UserError, make_judge

ROOT = Path(__file__).resolve().parents[1]
RECORD = dict(problem_id=7, problem="What falls?", data_type="video", problem_type="multiple choice",
              options=["A. a cup", "B. a book"], solution="<answer>B</answer>", path="./STAR/a.mp4",
              data_source="STAR")


def changed(**fields):
    """The record with fields changed, or without those that are None."""
    return {k: v for k, v in (RECORD | fields).items() if v is not None}


NESTED = functools.reduce(lambda inner, _: [inner], range(9999), "x")


def dump(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def error_of(function, *args, **kwargs):
    """The text of the UserError that the call raises; it must be one sentence on one line."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- records ---

def test_all_file_forms_load_alike(tmp_path):
    rows = [changed(problem_id=i, problem=f"Why {i}? ü\u2028\n end") for i in range(7)]  # odd line ends
    dump(tmp_path / "list.json", rows)
    gen_cot.write_jsonl(tmp_path / "lines.jsonl", rows)
    dump(tmp_path / "blank.jsonl", "\r\n\r\n".join(json.dumps(row) for row in rows) + "\n\n")
    for part, piece in ((3, rows[6:]), (1, rows[:2]), (2, rows[2:6])):  # written out of order
        with gzip.open(tmp_path / f"d_rl.part{part}of3.json.gz", "wt", encoding="utf-8") as file:
            json.dump(piece, file)
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for paths in ("list.json", "lines.jsonl", "blank.jsonl", "d_rl.part*.json.gz", "lines.jsonl.gz"):
        assert load_records(tmp_path / paths) == rows, paths
    both = load_records([str(tmp_path / "lines.jsonl"), tmp_path / "d_rl.part1*"])
    assert [r["problem_id"] for r in both] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("options, expected", [
    (["A. 1", "B. 2"], ["A. 1", "B. 2"]),
    ([], []),
    (None, []),
    ("", []),
    ("[]", []),
    ("null", []),
    ("None", []),
    ('["A. it\'s", "B. \\"no\\""]', ["A. it's", 'B. "no"']),  # as JSON prints it
    ("['A. a, b', \"B. it's\"]", ["A. a, b", "B. it's"]),  # as Python prints it
    ("('A) 1', 'B) 2')", ["A) 1", "B) 2"]),
    ([1, 2.5, True], ["A. 1", "B. 2.5", "C. True"]),
    ("['red', 'blue']", ["A. red", "B. blue"]),
    (["A. c", "B) x: y"], ["A. c", "B) x: y"]), (["B. y", "a. x"], ["B. y", "A. x"]),
    (["J. Smith", "B. Doe"], ["A. J. Smith", "B. B. Doe"]),  # initials
])
def test_options_come_in_many_forms(tmp_path, options, expected):
    row = {k: str(v) for k, v in RECORD.items()} | {"options": options}  # all strings, as in the RL file
    [record] = load_records(dump(tmp_path / "rl.json", [row]))
    assert record["options"] == expected and record["problem_id"] == "7"


def test_options_are_parsed_and_never_evaluated(tmp_path):
    text = f"[open({str(tmp_path / 'made')!r}, 'w')]"
    assert "record 0: the options are no list" in error_of(gen_cot.parse_options, text, "record 0")


@pytest.mark.parametrize("options, solution, expected", [
    (["a) red", "b) blue"], "b", "B"),  # whose letters become capitals in the prompt, too
    (None, "b", "B"), (None, "(B)", "B"), (None, "B. a book", "B"), (None, "a book", "a book")])
def test_a_gold_answer_is_the_letter_that_the_prompt_asks_for(options, solution, expected):
    record = gen_cot.parse_record(changed(options=options, solution=solution), "here")
    assert record["solution"] == f"<answer>{expected}</answer>"
    assert record["options"] == ([] if options is None else ["A) red", "B) blue"])


def test_what_pandas_writes_for_nothing_is_nothing(tmp_path):
    row = json.dumps(changed(options=None, solution="left", answer="STOP", problem_type="OCR"))
    file = tmp_path / "pandas.json"
    file.write_text(f"[{row.replace('null', 'NaN').replace(json.dumps('left'), 'NaN')}]")
    record, = load_records(file)
    assert (record["options"], record["solution"]) == ([], "<answer>STOP</answer>")


def test_a_whole_number_is_one_however_json_has_it(tmp_path):
    """pandas writes the integers of a column with a gap as 3.0."""
    rows = [changed(problem_type="numerical", options=None, solution=gold) for gold in (3.0, 3, 3.5, "3.0")]
    golds = [record["solution"] for record in load_records(dump(tmp_path / "a.json", rows))]
    assert golds == [f"<answer>{gold}</answer>" for gold in ("3", "3", "3.5", "3.0")]


def test_a_file_of_questions_that_are_not_scored_says_so(tmp_path):
    rows = [changed(problem_type=kind) for kind in ("open-ended", "Open-Ended")]
    said = error_of(gen_cot.load_records, dump(tmp_path / "a.json", rows), None, ("open-ended",))
    assert said.endswith("a.json holds none but these: there is nothing to do.")


def test_a_file_whose_name_is_a_pattern_is_found(tmp_path):
    assert len(load_records(dump(tmp_path / "records[1].json", [RECORD]))) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("fields, solution", [
    (dict(solution="<answer>B</answer>"), "<answer>B</answer>"),
    (dict(solution="B"), "<answer>B</answer>"),
    (dict(solution=None, answer="B"), "<answer>B</answer>"),
    (dict(solution="", answer="<answer>B</answer>"), "<answer>B</answer>"),
    (dict(solution="a Book"), "<answer>B</answer>"), (dict(solution="B. a book"), "<answer>B</answer>"),
    (dict(problem_type="numerical", solution=4.5), "<answer>4.5</answer>"),
    (dict(problem_type="numerical", solution=None, answer=0), "<answer>0</answer>"),
    (dict(problem_type="OCR", solution=False, answer="x"), "<answer>false</answer>"),
])
def test_solution_with_and_without_tags(tmp_path, fields, solution):
    [record] = load_records(dump(tmp_path / "a.json", [changed(**fields)]))
    assert record["solution"] == solution


@pytest.mark.parametrize("path", ["./Evaluation/arkit/1.mp4", "Evaluation/arkit/1.mp4", "./arkit/1.mp4",
                                  "arkit//1.mp4"])
@pytest.mark.parametrize("folder", ["Evaluation/arkit", "arkit"])
def test_evaluation_paths_with_and_without_their_first_folder(tmp_path, path, folder):
    (tmp_path / "root" / folder).mkdir(parents=True)
    medium = tmp_path / "root" / folder / "1.mp4"
    medium.write_bytes(b"")
    [record] = load_records(dump(tmp_path / "a.json", [changed(path=path)]), tmp_path / "root")
    assert Path(record["media"]) == medium


@pytest.mark.parametrize("row, says", [
    (changed(problem=None), "field problem"), (changed(problem=" <image>\n"), "field problem"),
    (changed(path=""), "field path"),
    (changed(problem_type=None), "field problem_type"),
    (changed(solution=None), "field solution"),  # or every answer would be wrong, without a word
    (changed(solution=["B"]), "field solution"),
    (changed(problem_type="essay"), "'essay', known are multiple choice, numerical, OCR, free-form, "),
    (changed(data_type="audio"), "not image or video"),
    (changed(options="A. 1, B. 2"), "options"),
    (changed(options={"A": "1"}), "options"), (changed(options=[["A", "1"], ["B", "2"]]), "options"),
    (changed(options="['A. a red car' 'B. a blue car']"), "options"),  # as numpy prints them
    (changed(options="[" * 99999), "options"), (changed(options="['a\0b']"), "options"),
    (changed(options=[str(i) for i in range(15)]), "15 options"),
    (changed(output=["a trace"]), "the field output is not a text"), (changed(observation=5), "observation"),
    *[(changed(evidence=evidence), "evidence") for evidence in (5, True, {"a": "b"}, ["a", 1], [["a"]])],
    (changed(problem="half \ud83d"), "surrogate"), (changed(extra={"deep": NESTED}), "nested"),
    ("What falls?", "an object"),
    (changed(path="/etc/passwd"), "leaves the media root"),
    (changed(path="./STAR/../../secret.mp4"), "leaves the media root"),
    (changed(path="../secret.mp4"), "leaves the media root"),
])
def test_a_bad_record_is_named_with_file_index_and_mend(tmp_path, row, says):
    """Before any model is loaded, and never by a traceback in mid-run."""
    text = error_of(gen_cot.parse_record, row, "data.json, record 1", tmp_path)
    assert text.startswith("data.json, record 1: ") and says in text


def test_a_bad_file_is_named(tmp_path):
    packed = gzip.compress(json.dumps([RECORD] * 500).encode())
    spoilt = bytearray(packed)
    spoilt[20:40] = bytes(20)
    files = {"text.json": b"not json", "half.json": json.dumps([RECORD]).encode()[:-9],
             "line.jsonl": b'{"a": 1}\n{"a"\n', "latin.json": b'["\xe9"]',
             "cut.json.gz": packed[:-9], "spoilt.json.gz": spoilt, "plain.json.gz": b"[]"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert name in error_of(load_records, tmp_path / name)
    assert "--data" in error_of(load_records, tmp_path / "nothing*.json")
    for text in ("# notes\n\x1b[2Jmore", "[{'problem': 'a Python list'}]"):
        said = error_of(load_records, dump(tmp_path / "some.json", text))
        assert f"it begins {text[:9]!r}"[:-1] in said and "again" not in said and "\x1b" not in said
    dump(tmp_path / "good.json", [RECORD])
    for text in ("", " \n", "[]"):  # also where another file has records
        dump(tmp_path / "none.json", text)
        assert "none.json holds no records" in error_of(load_records, [tmp_path / "good.json",
                                                                       tmp_path / "none.json"])


def test_few_bad_records_are_named_and_left_out_and_many_are_an_error(tmp_path, capsys):
    bad = changed(problem_type="essay")
    file = dump(tmp_path / "few.json", [RECORD] * 20 + [bad])
    assert len(load_records(file)) == 20
    assert f"left out: {file}, record 20: unknown problem_type 'essay'" in capsys.readouterr().out
    file = dump(tmp_path / "many.json", [RECORD] * 17 + [bad])  # 5.6 %
    assert f"1 of the 18 records in {file} can't be used" in error_of(load_records, file)
    assert f"left out: {file}, record 17: unknown" in capsys.readouterr().out


def test_left_out_records_are_counted_by_reason_with_one_example(tmp_path, capsys):
    """A malformed line of JSON Lines is one of them; what differs within a reason is no other reason."""
    lines = [json.dumps(RECORD)] * 200
    lines[3:7] = ['{"problem": ', "{'problem': 1}", '["a"]', "[" * 99999]
    for i, row in enumerate([changed(path=None), changed(problem=None), changed(problem_type="it's"),
                             changed(problem_type="essay"), changed(options="x 'y'"), changed(options="z")]):
        lines[10 + i] = json.dumps(row)
    file = dump(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(lines))  # a BOM, as Windows has it
    assert len(load_records(file)) == 190
    left = capsys.readouterr().out.splitlines()
    assert left[0].startswith(f"left out: {file}, record 3: line 7 is no JSON (Expecting")
    said = [re.search(r"record (\d+): (.{12}).*?( \d such records\.)?$", line).groups() for line in left]
    assert said == [("3", "line 7 is no", None), ("4", "line 9 is no", None), ("5", "expected an ", None),
                    ("6", "line 13 is n", None), ("10", "the field pa", None), ("11", "the field pr", None),
                    ("12", "unknown prob", " 2 such records."), ("14", "the options ", " 2 such records.")]


def test_types_and_placeholders_are_read_as_what_they_are(tmp_path):
    row = changed(problem="<image>\nWhat <video>falls\x1b[2J?", problem_type=" Multiple Choice", data_type="Video",
                  solution="<answer>\x07B</answer>")
    [record] = load_records(dump(tmp_path / "a.json", [row]))
    assert record == changed(problem="What falls[2J?")


LOST = [("numerical", gold) for gold in ("1/2", "$5", "\u22125", "4 km", "<answer>4", "<ANSWER>4</ANSWER>")]
LOST += [("OCR", "<answer>STOP"), ("OCR", "<answer> </answer>"), ("free-form", "你好世界"),
         ("multiple choice", "E"), ("multiple choice", "neither")]


def test_golds_that_nothing_can_match_are_counted_among_the_records_that_are_used(tmp_path, capsys):
    rows = [dict(changed(problem_type=kind, solution=gold), problem_id=f"{gold}\x1b[2J") for kind, gold in LOST]
    rows += [changed(problem_type=kind, solution=gold) for kind, gold in [
        ("numerical", "-5"), ("OCR", "STOP"), ("free-form", "a cup"), ("multiple choice", "a cup")]]
    rows += [changed(options=None), changed(problem_id=8)]  # the options may stand in the question
    (tmp_path / "STAR").mkdir()
    (tmp_path / "STAR/a.mp4").write_bytes(b"")
    file = dump(tmp_path / "a.json", rows)
    assert len(selected(file, tmp_path, scoring="paper")) == len(rows)
    said = capsys.readouterr().out
    assert re.findall(r"^(\d) gold answers of type (.*?) can't be .*problem_id (.*), (.*)\.$", said, re.M) == [
        ("6", "numerical", repr("1/2\x1b[2J"), "'1/2'"), ("2", "OCR", repr("<answer>STOP\x1b[2J"), "'<answer>STOP'"),
        ("1", "free-form", repr("你好世界\x1b[2J"), "'你好世界'"), ("2", "multiple choice", repr("E\x1b[2J"), "'E'")]
    assert "\x1b" not in said
    selected(file, tmp_path, scoring="lenient")  # which takes 4 km for 4 km, as anything for itself
    assert "2 gold answers of type numerical" in capsys.readouterr().out
    selected(file, tmp_path, scoring="paper", limit=1, seed=1)  # of those that are used
    assert "gold answers of type multiple" not in capsys.readouterr().out


def selected(file, root, **flags):
    """Which problem_ids `select_records` gives for a stage's flags."""
    args = argparse.Namespace(**dict(data=str(file), media_root=str(root), limit=None, seed=0) | flags)
    return [r["problem_id"] for r in gen_cot.select_records(args)]


def test_records_without_their_medium_are_left_out_aloud_before_the_limit_draws(tmp_path, capsys):
    (tmp_path / "STAR").mkdir()
    (tmp_path / "STAR/a.mp4").write_bytes(b"")
    rows = [changed(problem_id=i) for i in range(60)]
    rows[3]["path"], rows[4]["path"] = "./STAR/gone.mp4", "./gone/a.mp4"
    rows[5]["path"] = "./STAR"  # a folder of frames is a clip
    file, there = dump(tmp_path / "a.json", rows), [0, 1, 2, *range(5, 60)]
    assert selected(file, tmp_path) == there
    assert "2 of 60 records left out" in capsys.readouterr().out
    drawn = selected(file, tmp_path, limit=20)
    assert len(drawn) == 20 and drawn == sorted(drawn) and set(drawn) < set(there) and drawn != there[:20]
    assert drawn == selected(file, tmp_path, limit=20) != selected(file, tmp_path, limit=20, seed=1)
    assert "--media-root" in error_of(selected, file, tmp_path / "no")


# --- the prompt ---

def test_the_options_stand_once_in_the_prompt():
    appended = build_prompt(RECORD)
    assert "Question: What falls?\nOptions:\nA. a cup\nB. a book\n" in appended
    inside = changed(problem="What falls?\nA. a cup\nB. a book")  # as VideoRFT's file has it
    one_of_two = changed(problem="What falls, A. a cup or else?")
    for text in map(build_prompt, (RECORD, inside)):
        assert text.count("A. a cup") == text.count("B. a book") == 1
    assert build_prompt(one_of_two).count("B. a book") == 1  # half of the options is no list of options
    assert "Options" not in build_prompt(changed(options=[]))


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_prompt_shows_no_answer(problem_type):
    """A letter or a number as an example would be learnt as the answer; the gold answer would be copied."""
    record = changed(problem_type=problem_type, options=[])
    text = build_prompt(record)
    assert not re.search(r"\b[A-HJ]\b|\d", re.sub(r"^\d\. ", "", text, flags=re.MULTILINE)), text
    trace = dict(solution="<answer>A</answer>", answer="A", output="<think>A</think>")
    assert text == build_prompt(record | trace)
    assert all(f"<{tag}>" in text and f"</{tag}>" in text for tag in ("observation", "think", "answer"))


def test_the_prompt_is_the_same_whatever_the_stage(tmp_path):
    """SFT, RL and evaluation read different files of the same question; the policy must see one prompt."""
    forms = [RECORD, {k: str(v) for k, v in RECORD.items()},
             changed(process="<think>t</think>", output="<observation>o</observation>", evidence=["x"]),
             changed(path="./Evaluation/STAR/a.mp4", original_question_type="x")]
    records = load_records(dump(tmp_path / "a.json", forms), tmp_path)
    assert len({build_prompt(record) for record in records}) == 1


def test_a_question_cannot_fill_in_the_template():
    text = build_prompt(changed(problem="What does {question} or {answer_form} mean? {x}", options=[]))
    assert "What does {question} or {answer_form} mean? {x}" in text
    assert text.count("What does") == text.count("letter of the chosen option") == 1


def test_prompt_files(tmp_path):
    def template(file):
        return gen_cot.load_template(SimpleNamespace(prompt_file=file))

    assert template(None) == gen_cot.PROMPT
    own = dump(tmp_path / "own.txt", "Q: {question} {not_ours} A: {answer_form}")
    text = build_prompt(RECORD, template(own))
    assert text.startswith("Q: What falls?\nOptions:\nA. a cup\nB. a book {not_ours} A: Give the letter")
    bad = {"no_form.txt": b"{question}", "no_question.txt": b"{answer_form}", "latin.txt": b"\xe9{question}"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        assert name in error_of(template, tmp_path / name)
    assert "nowhere.txt" in error_of(template, tmp_path / "nowhere.txt")


# --- the pipeline ---

FLAWS = [None, "wrong answer", "broken template", "insufficient observation"]


@pytest.fixture
def scripted(tmp_path):
    """(records, traces, planted reasons by problem_id): questions of every kind, traces spoilt in turn."""
    rng, records, traces, planted = random.Random(1), [], [], {}
    for i in range(60):
        question = prepare.make_question(prepare.make_scene(rng), rng)
        flaw = FLAWS[i % 4]
        traces.append(dict(problem_id=str(i) if i % 3 else i, output=prepare.teach(question, flaw, rng)))
        records.append(dict(question, problem_id=i, path=f"./media/{i}.mp4", data_type="video"))
        planted[i] = flaw
    del traces[7::20]  # those questions have no trace at all
    planted |= {i: "no trace" for i in (7, 27, 47)}
    gen_cot.write_jsonl(tmp_path / "questions.jsonl", records)
    gen_cot.write_jsonl(tmp_path / "traces.jsonl", traces)
    return records, traces, planted


def run(folder, *flags):
    """`python gen_cot.py --model tiny` on the scripted questions, from the repository's root."""
    command = [sys.executable, "gen_cot.py", "--model", "tiny", "--data", folder / "questions.jsonl",
               "--traces", folder / "traces.jsonl", "--output", folder / "out" / "cot.jsonl", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_exactly_the_planted_flaws_are_rejected_each_for_its_reason(scripted, tmp_path):
    records, _, planted = scripted
    assert {r["problem_type"] for r in records} == set(PROBLEM_TYPES)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    kept = load_records(tmp_path / "out" / "cot.jsonl")
    assert [r["problem_id"] for r in kept] == [i for i, flaw in planted.items() if flaw is None]
    assert sorted(os.listdir(tmp_path / "out")) == ["cot.jsonl", "yield.json"]
    row, = [line.split() for line in done.stdout.splitlines() if line.split()[0] == "all"]
    counts = [list(planted.values()).count(reason) for reason in gen_cot.REASONS]
    assert row == ["all", "60", *map(str, counts), str(len(kept))]
    traces = gen_cot.load_traces(tmp_path / "traces.jsonl")
    outputs = [traces.get(str(i)) for i in range(60)]
    reasons, _ = gen_cot.verify(load_records(tmp_path / "questions.jsonl"), outputs, make_judge("rule"))
    assert reasons == list(planted.values())


def test_a_kept_record_has_the_fields_of_the_official_release(toy_records):
    for record in toy_records:
        kept = gen_cot.kept_record(record, record["output"], 0.9, "paper")
        for field in ("problem", "data_type", "problem_type", "options", "solution", "path", "data_source"):
            assert kept[field] == record[field]
        assert kept["output"] == record["output"] and kept["reward"] == 0.9 and "media" not in kept
        assert f"<answer>{kept['answer']}</answer>" == record["solution"]
        assert kept["observation"].startswith("<observation>Based")
        joined = f"{kept['observation']}{kept['process']}<answer>"
        assert "".join(record["output"].split()).startswith("".join(joined.split()))


def test_the_judge_sees_only_what_is_left_and_unknown_is_not_kept():
    """A judge costs money; a verdict that it fails to give is no yes."""
    def trace(answer):
        return f"<observation>o {answer}</observation><think>t</think><answer>{answer}</answer>"

    records = [changed(problem_id=i, problem_type="regression", options=[], solution="10") for i in range(5)]
    traces = [trace(6), trace(5.9), trace(14), trace("10 m"), trace(10)]
    asked = []

    def judge(records, observations):
        asked.append(([r["problem_id"] for r in records], observations))
        return [True, None, False]

    reasons, scores = gen_cot.verify(records, traces, judge)
    assert asked == [([0, 2, 4], ["o 6", "o 14", "o 10"])]
    assert reasons == [None, "wrong answer", "judge unknown", "wrong answer", "insufficient observation"]
    assert scores == pytest.approx([0.6, 0.59, 0.6, 0, 1])  # the threshold itself is kept


@pytest.mark.parametrize("flags, says", [
    (["--traces", "nowhere.jsonl"], "No traces file nowhere.jsonl: pass --traces"),
    (["--model", "qwen-72b"], "Unknown model 'qwen-72b': pass one of tiny, qwen2.5-vl-7b, qwen2.5-vl-3b"),
    (["--data", "nowhere.jsonl"], "No data file nowhere.jsonl: pass --data"),
    (["--threshold", "1.1"], "None of the 60 traces was kept"),
    (["--judge", "oracle"], "oracle"),
])
def test_a_mistake_gets_one_sentence_and_leaves_no_file(scripted, tmp_path, flags, says):
    done = run(tmp_path, *flags)
    assert done.returncode == 1 and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("row", ["text", dict(problem_id=1), dict(output="x"),
                                 dict(problem_id=1, output=None)])
def test_a_bad_traces_file_is_named(tmp_path, row):
    file = dump(tmp_path / "traces.jsonl", [{"problem_id": 0, "output": "x"}, row])
    assert f"{file}, record 1" in error_of(gen_cot.load_traces, file)


def test_two_different_traces_for_one_problem_id_are_an_error(tmp_path):
    rows = [dict(problem_id=1, output="x"), dict(problem_id="1", output="x"), dict(problem_id=2, output="y")]
    file = tmp_path / "traces.jsonl"
    assert gen_cot.load_traces(dump(file, rows)) == {"1": "x", "2": "y"}
    assert f"{file}, record 3: problem_id 1 has" in error_of(
        gen_cot.load_traces, dump(file, [*rows, dict(problem_id=1, output="z")]))
    of_files = [dict(row, question=row["output"] * 24) for row in (rows[0], dict(problem_id=1, output="f"))]
    of_files[0]["question"] = "a" * 24
    assert gen_cot.load_traces(dump(file, of_files)) == {"a" * 24: "x", "f" * 24: "f"}  # two files' first ones
    others = [dict(rows[0], question="Which?"), dict(rows[2], question=["Which?"])]  # a field of one's own
    assert gen_cot.load_traces(dump(file, others)) == {"1": "x", "2": "y"}
