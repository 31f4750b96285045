"""Records, the prompt and the three-step pipeline, on hand-worked cases."""
import gzip
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import gen_cot
import prepare
from gen_cot import build_prompt, load_records
from rewards import (PROBLEM_TYPES, UserError, accuracy_reward, correct_answer, gold_answer, make_judge,
                     question_text, write_jsonl)

ROOT = Path(__file__).resolve().parents[1]
RECORD = dict(problem_id=7, problem="What falls?", data_type="video", problem_type="multiple choice",
              options=["A. a cup", "B. a book"], solution="<answer>B</answer>", path="STAR/a.mp4",
              data_source="STAR")


def changed(**fields):
    """The record with fields changed, or without those that are None."""
    return {k: v for k, v in (RECORD | fields).items() if v is not None}


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
    write_jsonl(tmp_path / "lines.jsonl", rows)
    dump(tmp_path / "blank.jsonl", "\r\n\r\n".join(json.dumps(row) for row in rows) + "\n\n")
    for part, piece in ((3, rows[6:]), (1, rows[:2]), (2, rows[2:6])):  # written out of order
        with gzip.open(tmp_path / f"d_rl.part{part}of3.json.gz", "wt", encoding="utf-8") as file:
            json.dump(piece, file)
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for paths in ("list.json", "lines.jsonl", "blank.jsonl", "d_rl.part*.json.gz", "lines.jsonl.gz"):
        assert load_records(tmp_path / paths) == rows, paths


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
    (["A. c", "B) x: y"], ["A. c", "B) x: y"]), (["a. y", "B. x"], ["A. y", "B. x"]),
    (["J. Smith", "B. Doe"], ["A. J. Smith", "B. B. Doe"]),  # initials
    (["(2) red", "(3) blue"], ["A. red", "B. blue"]), (["B. y", "A. x"], ["A. B. y", "B. A. x"]),
    (["(1)", "(2)"], ["A. (1)", "B. (2)"]), (["a.m.", "p.m."], ["A. a.m.", "B. p.m."]),  # texts, not labels
    (["1. May", "2. May", "5. May"], ["A. 1. May", "B. 2. May", "C. 5. May"]),
    (["red", "", "blue", None, float("nan"), "nan"], ["A. red", "B. blue"]),  # a table's empty cells
    (["A. red", "B. None", "C. ", "D: nan"], ["A. red", "B. None"]),
    ("['A. red', 'B. blue', None]", ["A. red", "B. blue"]),
])
def test_options_come_in_many_forms(tmp_path, options, expected):
    row = {k: str(v) for k, v in RECORD.items()} | {"options": options, "problem_type": "OCR"}
    # all strings, as in the RL file
    [record] = load_records(dump(tmp_path / "rl.json", [row]))
    assert record["options"] == expected and record["problem_id"] == "7"


def test_options_are_parsed_and_never_evaluated(tmp_path):
    with pytest.raises(ValueError):
        gen_cot.parse_options(f"[open({str(tmp_path / 'made')!r}, 'w')]")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("options, solution, expected", [
    (["a) red", "b) blue"], "b", "B"),  # letters that become capitals in the prompt, too
    (None, "b", "B"), (None, "(B)", "B"), (None, "B. a book", "B"), (None, "a book", "a book")])
def test_a_gold_answer_is_the_letter_that_the_prompt_asks_for(options, solution, expected):
    record = gen_cot.parse_record(changed(options=options, solution=solution))
    assert record["solution"] == f"<answer>{expected}</answer>"
    assert record["options"] == ([] if options is None else ["A) red", "B) blue"])


@pytest.mark.parametrize("options, gold, text", [
    (["B. cat", "C. dog", "D. cow"], "B", "cat"), (["B. cat", "C. dog", "D. cow"], "D. cow", "cow"),
    (["C) left", "D) right"], "<answer>D</answer>", "right"), (["(1) cat", "(2) dog"], 2, "dog"),
    (["0. cat", "1. dog"], 0, "cat"), (["Ｂ．cat", "Ｃ．dog"], "C", "dog"), (["A. cat", "C. dog"], "C", "dog"),
    (["A. C", "B. G", "C. A"], "A", "C"), (["C", "G", "A"], "A", "A"), (["O+", "A+", "B+"], "A+", "A+"),
    (["", "cat", "dog"], "C", "dog"), (["A. cat", "", "C. dog"], "C", "dog"), (["cat", None, "dog"], "C", "dog"),
    (["1.5", "2.5"], "2.5", "2.5"), (["A.3", "B.4"], "B.4", "4"), (["1: 0", "2: 1"], "B", "1"),
    ([1.0, 2.0], 2.0, "2"), (["−5", "5"], "-5", "−5"), (["A. R. Reagan", "B. John F. Kennedy"],
                                                        "B. John F. Kennedy", "John F. Kennedy"), (["3", "1", "2"], 1, "1"),
    (["C. green", "A. red", "B. blue"], "A", "red"), (["(1)", "(2)"], "(2)", "(2)"), (["cat", "cat", "dog"], "B. cat", "cat"),
    (["A. C", "B. G", "C. A"], "C. A", "A"), (["cafe\u0301", "tea"], "caf\u00e9", "caf\u00e9")])
def test_a_gold_answer_stays_what_it_is_in_its_own_file(options, gold, text):
    """However the options are labelled there, the letter in the prompt stands for the same text."""
    record = gen_cot.parse_record(changed(options=options, solution=gold))
    assert correct_answer(record)[1] == text
    shown = question_text(record).replace("B.4", "B. 4").replace(") ", ". ").splitlines()
    assert f"{gold_answer(record['solution'])}. {text}" in shown


@pytest.mark.parametrize("gold", [
    "(A), (C)", "(A)(C)", "(A) and (C)", "[A][C]", "A、C", "A.C", "A. C", "A: C", "A,C", "AC",  # two options
    "B. cat", "nan", ".5"])  # the label of one and the text of another; nothing; not 5
def test_a_gold_that_is_not_one_option_is_a_bad_record(gold):
    with pytest.raises(ValueError, match="gold"):
        gen_cot.parse_record(changed(options=["cat", "dog", "5"], solution=gold))


@pytest.mark.parametrize("options", [json.dumps(json.dumps(["yes", "no"])), "'red'", "{'red', 'blue'}", "0", "red, blue"])
def test_options_that_are_no_list_are_a_bad_record(options):
    with pytest.raises((ValueError, SyntaxError)):
        gen_cot.parse_record(changed(options=options, solution="A"))


def test_golds_that_name_no_option_are_bad_records_where_one_learns_from_them(tmp_path, capsys):
    rows = [changed(options=["3 s", "9 s", "12 s"], solution=i % 3) for i in range(12)]
    file = dump(tmp_path / "indices.json", rows)
    assert "12 are bad" in error_of(load_records, file)
    assert "its gold is none of the options: 0" in capsys.readouterr().out
    assert load_records(file, lost_golds=True)[0]["solution"] == "<answer>none of the options: 0</answer>"


@pytest.mark.parametrize("options, gold", [
    (["red", "", "blue"], "B"), (["A. red", "B. nan", "C. blue"], "B"), (["A. red", "C. blue"], "B. green")])
def test_a_lost_gold_is_no_other_option_s_new_letter(options, gold):
    record = gen_cot.parse_record(changed(options=options, solution=gold), lost_golds=True)
    for answer in (gold, "A", "B", "C"):
        for scoring in ("paper", "lenient"):
            assert accuracy_reward("multiple choice", f"<answer>{answer}</answer>", record["solution"], scoring,
                                   record["options"]) == 0


@pytest.mark.parametrize("options", [
    ["1. red", "2. ", "3. blue"], ["1. red", "2. nan", "3. blue"], ["Ａ．red", "Ｂ．nan", "Ｃ．blue"],
    ["[A] red", "[B] NaN", "[C] blue"], ["red", None, "blue"], ["B.4", "C:5", "D.6"], [1.0, 2.0, 3.0]])
def test_a_record_that_is_read_again_is_the_same(options):
    """As the trainers read what gen_cot.py wrote."""
    once = gen_cot.parse_record(changed(options=options, solution="C" if options[0] == "red" else options[2]))
    assert gen_cot.parse_record(once) == once and once["solution"] in ("<answer>B</answer>", "<answer>C</answer>")


def test_fields_that_no_stage_follows_are_told(tmp_path, capsys):
    rows = [changed(start_time=6.0, end_time=8.0), RECORD, changed(video_start=0.5)]
    load_records(dump(tmp_path / "parts.json", rows))
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith("2 records name a part of their clip (end_time, start_time, video_start)")
    load_records(dump(tmp_path / "whole.json", [RECORD]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("field, rate, seconds", [("fps", 1.0, 12), ("sample_fps", "2", 6), (None, None, 4)])
def test_a_folder_of_frames_has_its_record_s_rate(tmp_path, capsys, field, rate, seconds):
    (tmp_path / "clip").mkdir()
    for i in range(12):
        Image.new("L", (56, 56), 20 * i).save(tmp_path / "clip" / f"{i}.png")
    [record] = load_records(dump(tmp_path / "a.json", [changed(path="clip", **{field or "x": rate})]), tmp_path)
    frames, fps = gen_cot.read_media(record, 8)
    assert len(frames) / fps == pytest.approx(seconds)
    assert ("1 folders of frames have no fps" in capsys.readouterr().out) == (field is None)


def test_traces_are_found_by_any_form_of_an_id_and_whatever_failed_before(tmp_path):
    rows = [dict(problem_id=7, output=None), dict(problem_id=7.0, output="seven"),
            dict(problem_id="8", output="eight"), dict(problem_id=9, error="HTTP 500"),
            dict(problem_id="v1.0", output="one"), dict(problem_id="v1", output="v")]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    records = [gen_cot.parse_record(changed(problem_id=i, path=f"{i}.mp4")) for i in ("7", 8, 9, "v1.0", "v1")]
    assert gen_cot.load_traces(tmp_path / "traces.jsonl", records) == ["seven", "eight", None, "one", "v"]


def test_frames_named_by_their_time_are_in_its_order(tmp_path):
    (tmp_path / "clip.5").mkdir()
    for i, name in enumerate(("0.0", "0.25", "0.5", "0.75", "1.0", "9.5", "10.0", "10.25")):
        Image.new("L", (56, 56), 30 * i).save(tmp_path / "clip.5" / f"{name}.png")
    frames, _ = gen_cot.read_folder(tmp_path / "clip.5", 8, 4 * 784, rate=1)
    assert frames.mean(axis=(1, 2, 3)).tolist() == [30 * i for i in range(8)]
    assert gen_cot.media_path(tmp_path, "clip.5.mp4") == f"{tmp_path}/clip.5"
    assert gen_cot.media_path(tmp_path, "clip.5.6") == f"{tmp_path}/clip.5.6"  # no suffix


def test_paths_of_other_tools_are_read(tmp_path, capsys):
    (tmp_path / "STAR").mkdir()
    names = ["STAR/a.png", unicodedata.normalize("NFD", "STAR/caf\u00e9.png")]
    for name in names:
        Image.new("RGB", (56, 56)).save(tmp_path / name)
    paths = [".\\STAR\\a.png", f"file://{tmp_path}/STAR/a.png", f"{tmp_path}/STAR/a.png", " STAR/a.png ",
             "STAR/caf\u00e9.png", names[1]]
    file = dump(tmp_path / "a.json", [changed(problem_id=i, path=path) for i, path in enumerate(paths)])
    assert selected(file, tmp_path) == list(range(6)) and "; 0 have no medium\n" in capsys.readouterr().out
    dump(file, [changed(path=path) for path in (names[0], "STAR/b.png")])
    assert len(selected(file, tmp_path)) == 1
    assert f"1 have no medium, the first one {tmp_path}/STAR/b.png" in capsys.readouterr().out


@pytest.mark.parametrize("problem, expected", [
    ("<video>\nWhat falls?", "What falls?"), ("<image> <image>What falls?", "What falls?"),
    ("What falls?<video>", "What falls?"), ("\ufeff<image>What falls?", "What falls?"),
    ("<|vision_start|><|image_pad|><|vision_end|><image>\nWhat falls?", "What falls?"), ("Is it a <video> or an <image> tag?", None),
    ("<|vision_start|><|video_pad|><|vision_end|>What falls?", "What falls?")])
def test_where_the_medium_is_goes_and_what_is_asked_stays(problem, expected):
    assert gen_cot.parse_record(changed(problem=problem))["problem"] == (expected or problem)


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


def test_a_file_of_questions_that_are_not_scored_is_an_error(tmp_path):
    rows = [RECORD, changed(problem_type="open-ended")]
    assert load_records(dump(tmp_path / "a.json", rows), None, ("open-ended",)) == [RECORD]
    assert "a.json" in error_of(load_records, dump(tmp_path / "a.json", rows[1:]), None, ("open-ended",))


def test_a_file_whose_name_is_a_pattern_is_found(tmp_path):
    assert load_records(dump(tmp_path / "records[1].json", [RECORD])) == [RECORD]


@pytest.mark.parametrize("fields, solution", [
    (dict(solution="<answer>B</answer>"), "<answer>B</answer>"),
    (dict(solution="B"), "<answer>B</answer>"),
    (dict(solution=None, answer="B"), "<answer>B</answer>"),
    (dict(solution="", answer="<answer>B</answer>"), "<answer>B</answer>"),
    (dict(solution="a Book"), "<answer>B</answer>"), (dict(solution="B. a book"), "<answer>B</answer>"),
    (dict(problem_type="numerical", solution=4.5), "<answer>4.5</answer>"),
    (dict(problem_type="numerical", solution=None, answer=0), "<answer>0</answer>"),
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


@pytest.mark.parametrize("row", [
    changed(problem=None), changed(problem=" <image>\n"), changed(path=None),
    changed(problem_type=None), changed(problem_type="essay"), changed(data_type="audio"),
    changed(solution=None), changed(solution=["B"], problem_type="OCR"),  # or every answer would be wrong
    changed(solution="<answer> </answer>", problem_type="OCR"),
    changed(options="A. 1, B. 2"), changed(options={"A": "1"}), changed(options="['a\0b']"),
    changed(options="['A. a red car' 'B. a blue car']"),  # as numpy prints them
    changed(options=[str(i) for i in range(15)]), "What falls?", ["What falls?"],
    changed(path="./STAR/../../secret.mp4"), changed(path=" "), changed(path="/"), changed(path="../secret.mp4"), changed(path="/../secret.mp4")])
def test_a_bad_record_is_left_out_and_named(tmp_path, capsys, row):
    """Before any model is loaded, and never by a traceback in mid-run."""
    file = dump(tmp_path / "a.json", [RECORD] * 20 + [row])
    assert len(load_records(file, tmp_path)) == 20
    assert f"{file}, record 20: " in capsys.readouterr().out


def test_few_bad_records_are_counted_and_many_are_an_error(tmp_path, capsys):
    """A malformed line of JSON Lines is one of them."""
    lines = [json.dumps(RECORD)] * 80
    lines[3:6] = ['{"problem": ', "{'problem': 1}", json.dumps(changed(problem_type="essay"))]
    file = dump(tmp_path / "few.jsonl", "\ufeff" + "\n\n".join(lines))  # a byte order mark, as Windows has it
    assert len(load_records(file)) == 77
    said = capsys.readouterr().out
    assert said.startswith("3 records ") and f"{file}, record 3: " in said
    file = dump(tmp_path / "many.json", [RECORD] * 17 + [changed(problem_type="essay")])  # 5.6 %
    assert f"{file}: 17 records are good, 1 are bad" in error_of(load_records, file)
    assert f"{file}, record 17: KeyError 'essay'" in capsys.readouterr().out


def test_a_bad_file_is_named(tmp_path):
    packed = gzip.compress(json.dumps([RECORD] * 500).encode())
    spoilt = bytearray(packed)
    spoilt[20:40] = bytes(20)
    files = {"text.json": b"not json", "half.json": json.dumps([RECORD]).encode()[:-9],
             "line.jsonl": b'{"a": 1}\n{"a"\n', "latin.json": b'["\xe9"]', "none.json": b"[]",
             "cut.json.gz": packed[:-9], "spoilt.json.gz": spoilt, "plain.json.gz": b"[]"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert name in error_of(load_records, tmp_path / name)
    assert "--data" in error_of(load_records, tmp_path / "nothing*.json")


def test_an_empty_file_among_others_is_an_error(tmp_path):
    """As a download that broke off leaves one."""
    dump(tmp_path / "part1.json", [RECORD])
    dump(tmp_path / "part2.json", "")
    assert "part2.json" in error_of(load_records, tmp_path / "part*.json")


def test_types_and_placeholders_are_read_as_what_they_are(tmp_path):
    row = changed(problem="<image>\nWhat falls\x1b[2J? \ud83d", problem_type=" Multiple Choice",
                  data_type="Video", solution="<answer>\x07B</answer>")
    [record] = load_records(dump(tmp_path / "a.json", [row]))
    assert record == changed(problem="What falls[2J?")


def selected(file, root, **flags):
    """Which problem_ids `select_records` gives for a stage's flags."""
    args = SimpleNamespace(**dict(data=str(file), media_root=str(root), limit=None, seed=0) | flags)
    return [r["problem_id"] for r in gen_cot.select_records(args)]


def test_records_without_their_medium_are_left_out_aloud_before_the_limit_draws(tmp_path, capsys):
    (tmp_path / "STAR").mkdir()
    (tmp_path / "STAR/a.mp4").write_bytes(b"")
    rows = [changed(problem_id=i) for i in range(60)]
    rows[3]["path"], rows[4]["path"] = "./STAR/gone.mp4", "./gone/a.mp4"
    rows[5]["path"] = "./STAR"  # a folder of frames is a clip
    file, there = dump(tmp_path / "a.json", rows), [0, 1, 2, *range(5, 60)]
    assert selected(file, tmp_path) == there
    assert re.search(r"58 of 60 records of .*; 2 have no medium", capsys.readouterr().out)
    drawn = selected(file, tmp_path, limit=20)
    assert len(drawn) == 20 and drawn == sorted(drawn) and set(drawn) < set(there) and drawn != there[:20]
    assert drawn == selected(file, tmp_path, limit=20) != selected(file, tmp_path, limit=20, seed=1)
    assert "--media-root" in error_of(selected, file, tmp_path / "no")


# --- the prompt ---

def test_the_options_come_once_in_the_prompt():
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
    for name, text in {"no_form.txt": "{question}", "no_question.txt": "{answer_form}"}.items():
        assert name in error_of(template, dump(tmp_path / name, text))


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
    write_jsonl(tmp_path / "questions.jsonl", records)
    write_jsonl(tmp_path / "traces.jsonl", traces)
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
    assert sorted(os.listdir(tmp_path / "out")) == [".cot.jsonl.lock", "cot.jsonl", "yield.json"]
    row, = [line.split() for line in done.stdout.splitlines() if line.split()[0] == "all"]
    counts = [list(planted.values()).count(reason) for reason in gen_cot.REASONS]
    assert row == ["all", "60", *map(str, counts), str(len(kept))]
    records = load_records(tmp_path / "questions.jsonl")
    outputs = gen_cot.load_traces(tmp_path / "traces.jsonl", records)
    reasons, _ = gen_cot.verify(records, outputs, make_judge("rule"))
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
    (["--traces", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
    (["--data", "nowhere.jsonl"], "No data file nowhere.jsonl: pass --data"),
    (["--threshold", "1.1"], "None of the 60 traces was kept"),
    (["--judge", "oracle"], "oracle"),
])
def test_a_mistake_gets_one_sentence_and_leaves_no_traces(scripted, tmp_path, flags, says):
    done = run(tmp_path, *flags)
    assert done.returncode == 1 and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_traces_are_found_by_their_question_else_by_an_id_that_no_other_has(tmp_path):
    """The ids of two files can be alike; an id with two traces tells nothing."""
    def found(*rows):
        write_jsonl(tmp_path / "traces.jsonl", rows)
        return gen_cot.load_traces(tmp_path / "traces.jsonl", records)

    records = [changed(problem_id=i, problem=f"What falls {i}?") for i in (1, 2, 3)]
    records.append(changed(problem_id=1, problem="What falls in the other file?"))
    of_files = [dict(question=gen_cot.question_key(records[i]), problem_id=1, output=f"of {i}")
                for i in (0, 3)]
    assert found(*of_files, dict(problem_id="2", output="x")) == ["of 0", "x", None, "of 3"]
    two = [dict(problem_id=2, output=text) for text in ("x", "x", "y", "y", "x")]
    assert found(*two[:2]) == [None, "x", None, None] and found(*two) == [None] * 4
    own = dict(problem_id=3, question="Which?", output="z")  # a field of somebody else's
    assert found(own) == [None, None, "z", None]
    records[0]["problem_id"] = None  # no id is no id that two share
    assert found(dict(problem_id=None, output="x"), dict(output="x"), own) == [None, None, "z", None]


def test_a_line_of_the_traces_that_a_kill_tore_costs_one_trace(tmp_path):
    """`gen_cot.py --teacher` leaves such a line where it was killed; what comes after it is whole."""
    lines = [json.dumps(dict(problem_id=i, output=f"of {i}")) for i in (7, 8, 9)]
    file = dump(tmp_path / "traces.jsonl", "\n".join([lines[0], lines[1][:20], lines[2]]))
    assert gen_cot.load_traces(file, [changed(problem_id=i) for i in (7, 8, 9)]) == ["of 7", None, "of 9"]
