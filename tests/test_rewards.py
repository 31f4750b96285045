"""Template, scores and rewards, against hand-worked cases and against implementations that are not ours."""
import functools
import math
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rewards import (PROBLEM_TYPES, Trace, accuracy_reward, format_rewards, length_reward, option_key,
                     parse_trace)

GOOD = "<observation>a red car</observation> <think>so red</think><answer>B</answer>"


def score(problem_type, answer, gold, scoring="paper", options=None):
    completion, solution = (f"<answer>{text}</answer>" for text in (answer, gold))
    return accuracy_reward(problem_type, completion, solution, scoring, options)


# --- the template ---

@pytest.mark.parametrize("text, expected", [
    (GOOD, Trace("a red car", "so red", "B")),
    ("<answer>B</answer>", Trace(None, None, "B")),
    ("", Trace(None, None, None)),
    ("B", Trace(None, None, None)),
    ("<answer>B", Trace(None, None, None)),
    ("<ANSWER>B</ANSWER>", Trace(None, None, None)),
    ("<answer></answer>", Trace(None, None, "")),
    # the answer is the one after the think block, not one that the thoughts or the observation try out
    ("<think>is <answer>A</answer>?</think><answer>B</answer>", Trace(None, "is <answer>A</answer>?", "B")),
    ("<answer>A</answer><think>t</think><answer>B</answer><answer>C</answer>", Trace(None, "t", "B")),
    ("<answer>A</answer><think>t</think>", Trace(None, "t", None)),
    ("<think>never closed <answer>B</answer>", Trace(None, None, "B")),
    # the think block is the one after the observation
    ("<think>early</think><observation>o</observation><think>late</think>", Trace("o", "late", None)),
    ("<think>early</think><observation>o</observation><answer>B</answer>", Trace("o", None, "B")),
    ("<observation>one</observation><observation>two</observation>", Trace("one", None, None)),
    ("</think><think>\n t \n</think>", Trace(None, "t", None)),
    ("<think><think>x</think></think>", Trace(None, "<think>x", None)),
])
def test_parse_trace(text, expected):
    assert parse_trace(text) == expected


@pytest.mark.parametrize("text, expected", [
    (GOOD, (1, 1)),
    (f"\n {GOOD} \n", (1, 1)),
    (GOOD.replace(" <think>", "\n\n<think>").replace("<answer>", "\t<answer>"), (1, 1)),
    ("", (0, 0)),
    ("B", (0, 0)),
    # perception's own faults
    (GOOD.replace("<observation>a red car</observation>", ""), (0, 1)),
    (GOOD.replace("a red car", " \n "), (0, 1)),
    (GOOD.replace("a red car", "\u200b \u2060"), (0, 1)),  # nothing of it shows
    (GOOD.replace("a red car", "\u3164\u2800 \ufe0f"), (0, 1)),  # nor of fillers, empty Braille cells
    (GOOD.replace("observation>", "Observation>"), (0, 0)),  # then it is text before the thoughts
    (GOOD.replace("</observation>", ""), (0, 1)),
    (f"Sure! {GOOD}", (0, 1)),
    (GOOD.replace("a red car", "a <think> tag"), (0, 1)),
    (GOOD.replace("a red car", "</think><answer>"), (0, 1)),
    # reasoning's own faults
    (f"<observation>one more</observation>{GOOD}", (1, 0)),
    (GOOD.replace("<think>", "</observation><think>"), (1, 0)),
    (GOOD.replace("<think>so red</think>", ""), (1, 0)),
    (GOOD.replace("so red", ""), (1, 0)),
    (GOOD.replace("so red", "\u00ad\ufeff"), (1, 0)),
    (GOOD.replace(">B<", "> <"), (1, 0)),
    (GOOD.replace("</answer>", ""), (1, 0)),
    (GOOD.replace("</think>", ""), (1, 0)),
    (GOOD.replace("<think>", "<Think>"), (1, 0)),
    (f"{GOOD} Done.", (1, 0)),
    (f"{GOOD}<answer>C</answer>", (1, 0)),
    (GOOD.replace("<think>", "and so <think>"), (1, 0)),
    (GOOD.replace("<answer>", "thus <answer>"), (1, 0)),
    ("<observation>o</observation><answer>B</answer><think>t</think>", (1, 0)),
    ("<observation>o</answer> <think>t</think><answer>B", (0, 0)),  # closed before it is opened
    (GOOD.replace("so red", "the <answer> tag"), (1, 0)),
    (GOOD.replace("so red", "a </think> tag"), (1, 0)),
    # a tag of perception's, quoted in the thoughts, is the thoughts' fault
    (GOOD.replace("so red", "the <observation> tag"), (1, 0)),
    (GOOD.replace("</think>", "</observation></think>"), (1, 0)),
    ("<think>t</think><answer>B</answer><observation>o</observation>", (0, 0)),
])
def test_format_rewards(text, expected):
    assert format_rewards(text) == expected


def one_edit_away():
    """Every completion that differs from GOOD by one deleted, doubled or misplaced piece."""
    pieces = re.split("(</?[a-z]+>)", GOOD)[1:-1]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == GOOD
    for i, piece in enumerate(pieces):
        if piece != " ":
            yield pieces[:i] + pieces[i + 1:]
        for j in range(len(pieces)):
            if piece.startswith("<"):
                yield pieces[:j] + [piece] + pieces[j:]
    for i in range(len(pieces) - 1):
        if " " not in pieces[i:i + 2]:
            yield pieces[:i] + [pieces[i + 1], pieces[i]] + pieces[i + 2:]


def test_every_single_fault_costs_a_format_reward():
    for pieces in one_edit_away():
        assert format_rewards("".join(pieces)) != (1, 1), pieces


@pytest.mark.parametrize("tokens, accuracy, format, expected", [
    (128, 1.0, 1.0, 0.2), (320, 1.0, 1.0, 0.2), (200, 0.01, 1.0, 0.2),
    (127, 1.0, 1.0, 0.0), (321, 1.0, 1.0, 0.0), (200, 0.0, 1.0, 0.0), (200, 1.0, 0.0, 0.0),
    (200, None, 1.0, 0.0), (200, math.nan, 1.0, 0.0), (200, True, 1.0, 0.2),
])
def test_length_reward(tokens, accuracy, format, expected):
    assert length_reward(tokens, accuracy, format, 128, 320) == expected
    assert length_reward(tokens, accuracy, format, 128, 320, bonus=1) == expected * 5


# --- accuracy: hand-worked cases ---

@pytest.mark.parametrize("completion, expected", [
    ("<answer>B</answer>", 1), ("<answer> B </answer>", 1), ("<answer>b</answer>", 0),
    ("<answer>B.</answer>", 0),
    ("<answer>(B)</answer>", 0), ("<answer>B. foo</answer>", 0), ("<answer>**B**</answer>", 0),
    ("<answer></answer>", 0),
    ("B", 0), ("<answer>B", 0), ("<ANSWER>B</ANSWER>", 0), (GOOD, 1),
    ("<think>t</think> B", 0), ("<answer>B</answer><think>t</think>", 0),
    ("<answer>A</answer><think>t</think><answer>B</answer>", 1),
])
def test_multiple_choice(completion, expected):
    assert accuracy_reward("multiple choice", completion, "<answer>B</answer>") == expected
    assert accuracy_reward("multiple choice", completion, "B") == expected


@pytest.mark.parametrize("answer, gold, expected", [
    ("1,000", "1000", 0), ("1,000", "1,000", 1), ("1,000.0", "1000.0", 1), ("1000.0", "1,000", 1),
    ("5", "5.0", 0),
    ("5.0", "5.00", 1), ("5.", "5.0", 1), ("3.141", "3.14", 1), ("0.125", "0.12", 1), ("2.675", "2.68", 0),
    ("-3", "-3", 1), ("50%", "50", 0), ("$5", "5", 0), ("5 cm", "5", 0), ("1e3", "1000", 1),
    ("1/2", "0.5", 0),
    ("nan", "5", 0), ("nan", "nan", 0), ("inf", "inf", 0), ("-inf", "-inf", 0), ("1e999", "1e999", 0),
    ("", "", 0),
    ("9" * 5000, "9" * 5000, 0), ("٣", "3", 1),
])
def test_numerical(answer, gold, expected):
    assert score("numerical", answer, gold) == expected


@pytest.mark.parametrize("answer, gold, expected", [
    ("10", "10", 1), ("5", "10", 0.5), ("20", "10", 0), ("-10", "10", 0), ("10 m", "10", 0), ("nan", "10", 0),
    ("0", "0", 1), ("0.0", "-0", 1), ("1e-9", "0", 0), ("-8", "-10", 0.8), ("inf", "10", 0), ("10", "inf", 0),
    ("1e308", "-1e308", 0), ("1,200", "1000", 0.8), ("5e-324", "1e308", 0), ("1e308", "5e-324", 0),
    ("", "10", 0),
])
def test_regression(answer, gold, expected):
    assert score("regression", answer, gold) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("answer, gold, expected", [
    ("hello world", "Hello world", 0.5), ("Hello world", "Hello world", 1), ("hello", "hello world", 0.5),
    ("hello big world", "hello world", 0.5), ("a b c d e", "hello world", 0),
    ("hello \n world", "hello world", 1),
    ("", "", 0), ("", "hello", 0), ("hello", "", 0),
])
def test_ocr(answer, gold, expected):
    assert score("OCR", answer, gold) == expected


@pytest.mark.parametrize("answer, gold, expected", [
    ("cat", "cat", 2 / 3), ("running", "run", 2 / 3), ("a cat", "a cat", 1), ("dog", "cat", 0), ("", "", 0),
    ("A CAT!", "a cat", 1),
    # two of three words in order: ROUGE-1 and -L 4/5, ROUGE-2 of "red car" in "a red car" 2/3
    ("red car", "a red car", (0.8 + 2 / 3 + 0.8) / 3),
])
def test_free_form(answer, gold, expected):
    assert score("free-form", answer, gold) == pytest.approx(expected, abs=1e-12)


OPTIONS = ["A. a red car", "B) a blue van", "C. 12", "D. A. Smith"]


@pytest.mark.parametrize("answer, gold, expected", [
    ("b", "B", 1), ("B.", "B", 1), ("(B)", "B", 1), ("(b)", "B", 1), ("B. a blue van", "B", 1),
    ("B: because", "B", 1),
    ("(B) a blue van", "B", 1), ("**B**", "B", 1), ("**B. a blue van**", "B", 1), ("A blue  van!", "B", 1),
    ("a blue van", "B. a blue van", 1), ("12", "C", 1), ("A. Smith", "D", 1), ("A. Smith", "A", 0),
    ("A", "B", 0), ("a red car", "B", 0), ("A. a blue van", "B", 0), ("A or B", "B", 0), ("a car", "A", 0),
    ("BB", "B", 0),
    ("B, C", "B", 0), ("?!", "!?", 0), ("yes", "Yes.", 0),  # golds that are none of the options
    ("The answer is B.", "B", 1), ("Option B", "B", 1),
    ("Answer: (B)", "B", 1), ("The final answer is: **(B)**", "B", 1), (r"\boxed{B}", "B", 1),
    (r"So \boxed{\text{B}}.", "B", 1), ("B or not B: B", "B", 0),
    ("not B", "B", 0), ("The answer is not B.", "B", 0), ("It's not option B.", "B", 0),
    ("I wouldn't say option B", "B", 0), ("The answer is A red one", "A", 0),
    ("Option A, option B", "B", 0), ("The answer is B", "A", 0),
    ('The answer is "B".', "B", 1), (r"\boxed{\textbf{B}}", "B", 1),
    ("wrong answer: B", "B", 0), ("Neither option B", "B", 0),
    ("The answer is A rather than option B", "B", 0),
    ("The answer is B because option A, the red car, left.", "A", 0), ("Unlike option A, B is right", "A", 0),
    ("It is B.", "B", 1), ("It's (B)", "B", 1), ("It is A red one", "A", 0), ("It is not B.", "B", 0),
    ("A - B", "B", 0), ("B-side", "B", 0),
    ("A. a red car\nB) a blue van\nC. 12", "A", 0), ("(A) a red car or (B) a blue van", "A", 0),
])
def test_lenient_multiple_choice(answer, gold, expected):
    assert score("multiple choice", answer, gold, "lenient", OPTIONS) == expected


@pytest.mark.parametrize("answer", [
    "[B]", "{B}", "<B>", "（B）", "【B】", "「B」", "`B`", "$B$", r"\(B\)", "__B__", r"\boxed{\text{(B)}}", r"\boxed{B. a blue van}",
    "选项：B", "答案为（B）", "故选：B。", "正确选项是B", "ANSWER=B", "my final answer is b", "The best choice must be (B).",
    "Answer: B. a blue van", "The answer is B: a blue van", "I'd go with B", "I pick B", "So B is the answer", "Thus, B.",
    "B since A is red", "B, since A is red", "B would be correct", "B is the best answer", "B, not A", "B\n\nA is too red.",
    "A is wrong. The answer is B.", "The answer is B rather than A", "The answer is B\nbecause A is red",
    r"\boxed{\alpha + 1}, so the answer: B", "It shows A BLUE VAN, driving.", "Answer: a blue van", "the van: a blue van!"])
def test_lenient_reads_what_a_sentence_settles_on(answer):
    assert score("multiple choice", answer, "B", "lenient", OPTIONS) == 1
    assert score("multiple choice", answer, "B", "paper", OPTIONS) == 0


@pytest.mark.parametrize("answer", [
    "either B or C", "B?", "Is it B?", "B is not correct", "B and C", "B/C", "b, c", "不是B", "答案不是B", "B is wrong",
    "Rule out B", "All except B", "The answer could be A or B", "The answer is A, not B", "A rather than B",
    "B is less likely than A", "not a blue van", "a red car or a blue van", "a blue van and 12", "Incorrect: B",
    "(B) and (C)", "(B), (C)", "A because B is blue", "The answer is BC", "B is the wrong answer", "B is less correct", "I cannot choose B",
    "I doubt the answer is B", "It cannot be a blue van", "a blue van is absent", "I reject option B", "A: no\nB: yes",
    "The answer is B? No, it is C.", "A\nB\nC", "A: incorrect", "A. a red car B) a blue van"])
def test_lenient_reads_nothing_that_is_denied_or_one_of_two(answer):
    assert score("multiple choice", answer, "B", "lenient", OPTIONS) == 0


@pytest.mark.parametrize("options, answer, letter", [
    (["3 m", "5 m"], "The distance is 5 m.", "B"), (["3 m", "5 m"], "The distance is 2.5 m.", ""), (["5", "7"], "-5", ""),
    (["$10", "$20"], "It costs $10,000", ""), (["yes", "no"], "No. The car stops.", "B"), (["yes", "no"], "No, never.", "B"),
    (["yes", "no"], "I have no idea", ""), (["Left", "Right"], "It moves to the left.", "A"),
    (["dog", "cat"], "There is no dog", ""), (["dog", "cat"], "There is a dog", "A"), (["O+", "A+"], "O-", ""), (["C++", "C#"], "C#", "B"), (["5", "7"], ".5", ""), (["> 5 m", "9 m"], "< 5 m", ""),
    (["He did not do it", "He did it"], "A. He did not do it.", "A"), (["He did not do it", "He did it"], "He did not do it!", "A")])
def test_an_options_text_counts_where_it_is_whole_and_meant(options, answer, letter):
    labelled = [f"{name}. {text}" for name, text in zip("AB", options)]
    assert [name for name in "AB" if score("multiple choice", answer, name, "lenient", labelled)] == [*letter]


def test_of_two_option_texts_in_an_answer_the_one_that_holds_the_other_counts():
    options = ["A. a car", "B. a red car", "C. a dog", "D. a dog"]
    assert score("multiple choice", "It shows a red car.", "B", "lenient", options) == 1
    assert score("multiple choice", "It shows a car.", "A", "lenient", options) == 1
    assert score("multiple choice", "It shows a red car and a dog.", "B", "lenient", options) == 0
    assert score("multiple choice", "It shows a dog.", "C", "lenient", options) == 0
    assert score("multiple choice", "c it is", "C", "lenient", ["A. c", "B. a", "C. b"]) == 0


@pytest.mark.parametrize("options, answer, letter", [
    # an answer that is one of the labels is that option, whatever the texts are
    (["A. C", "B. G", "C. D", "D. A"], "A", "A"), (["A. C", "B. G", "C. D", "D. A"], "D.", "D"),
    (["1) C", "2) G"], "2", "B"), (["Ａ．left", "Ｂ．right"], "Ｂ", "B"), (["C: left", "D: right"], "d", "B"),
    # without labels the texts as written go first, then the letter of the place
    (["C", "G", "D", "A"], "A", "D"), (["O+", "A+", "B+"], "A+", "B"), (["O+", "A+", "B+"], "A", "A"),
    (["C", "C++", "C#", "D"], "C++", "B"), (["C", "C++", "C#", "D"], "C", "A"), (["f*", "f"], "f*", "A"),
    (["J. Smith", "B. Jones"], "B. Jones", "B"), (["1.5 m", "2.5 m"], "2", "2"), (["10:30", "11:15"], "b", "B"),
    (["left", "right"], "C", "c"), (["cafe\u0301", "cake"], "caf\u00e9", "A"), (["5 m²", "6 m²"], "6 m2", "B"),
    # labels are a property of the set
    (["A. cat", "C. dog"], "C", "B"), (["B. cat", "A. dog"], "B", "B"), (["A. cat", "dog"], "B", "B"),
    ([], "b", "B"), ([], "red", "red"),
    (["A. 9:00", "B. 10:30"], "B.10:30", "B"), (["1", r"\frac{1}{2}"], r"\boxed{\frac{1}{2}}", "boxed frac 1 2"),
    (["A. Ronald Reagan", "B. John F. Kennedy"], "B. John F. Kennedy", "B"),
])
def test_an_option_is_picked_by_its_label_or_by_its_text(options, answer, letter):
    assert option_key(answer, options) == letter


def test_a_gold_that_is_none_of_the_options_is_matched_by_nothing():
    for scoring in ("paper", "lenient"):
        assert score("multiple choice", "0", "0", scoring, ["A. 3 s", "B. 9 s"]) == 0
        assert score("multiple choice", "B", "B", scoring, ["A. 3 s", "B. 9 s"]) == 1
        assert score("multiple choice", "red", "red", scoring) == 1  # the options may be in the question


@pytest.mark.parametrize("scoring", ["paper", "lenient"])
def test_one_text_has_one_form_of_unicode(scoring):
    """An é of one character or of two; for lenient full-width signs, too."""
    assert score("OCR", "cafe\u0301", "caf\u00e9", scoring) == 1
    assert score("multiple choice", "（Ｂ）", "B", scoring, OPTIONS) == (scoring == "lenient")


@pytest.mark.parametrize("scoring", ["paper", "lenient"])
def test_a_character_that_shows_nothing_is_no_difference(scoring):
    """Records lose theirs as they are read (a joiner in Persian, a soft hyphen), answers as scored."""
    assert score("OCR", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
                 "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645", scoring) == 1
    assert score("OCR", "NO\rENTRY\x85HERE", "NO ENTRY HERE", scoring) == 1  # line ends show
    assert score("OCR", "\U0001fae8", "\U0001fae8", scoring) == 1  # as does what Python doesn't know yet
    assert score("multiple choice", "B\u200b", "B", scoring, OPTIONS) == 1 != score(
        "multiple choice", "\u200b", "B", scoring, OPTIONS)


@pytest.mark.parametrize("options, gold, right, wrong", [
    (["A. 3", "B. 5"], "B", "5", "3"), (["A. 3", "B. 5"], "5", "B", "A"),
    (["A. 12", "B. -12"], "A", "12", "-12"), (["A. 12", "B. -12"], "B", "-12", "12"),
    (["A. <", "B. >", "C. ="], "C", "=", "<"), (["A. <", "B. >", "C. ="], "C", "=", "!!!"),
    (["A. x", "B. y"], "A", "x", "y"), (["A. 3", "B. -3"], "B", "-3.", "3."),
    (["A. 3", "B. 5"], "A", "3.", "-3"),
    (["A. 1 2", "B. 1/2"], "B", "1/2!", "1 2"),
    # options that are letters themselves: a letter that labels an option comes first, else an option's text
    (["A. c", "B. a", "C. b"], "C", "c", "a"), (["A. c", "B. a"], "A", "c", "b"),
    (["A. e", "B. g", "C. h"], "B", "g", "h"),
    # only the whole text names an option, not its beginning
    (["A. yes", "B. no"], "A", "Yes.", "No, it doesn't."),
    (["A. Sentence A: it falls", "B. Sentence B: it rises"], "B", "Sentence B: it rises", "Sentence A"),
    (["A. Option 1: it falls", "B. Option 2: it rises"], "B", "Option 2: it rises", "Option 1: it falls"),
])
def test_an_option_is_named_by_its_text_however_short(options, gold, right, wrong):
    assert score("multiple choice", right, gold, "lenient", options) == 1
    assert score("multiple choice", wrong, gold, "lenient", options) == 0


@pytest.mark.parametrize("answer, gold, expected", [
    ("1,000", "1000", 1), ("1000", "1,234", 0), ("1,234,567.5", "1234567.5", 1), ("50%", "50", 1),
    ("50", "50 %", 1),
    ("5 cm", "5", 1), ("5", "5 cm", 1), ("5 cm", "5 cm.", 1), ("5 cm", "5 m", 0), ("5 or 6", "5", 0),
    ("$5", "5", 1),
    ("5", "5.0", 0), ("1000.0", "1,000", 1), ("3,14", "314", 0), ("cm", "cm", 1), ("1e3 m", "1000", 1),
    ("20°C", "20", 1), ("3 million", "3", 0), ("3", "3 million", 0), ("2π", "2", 0), ("5k", "5", 0),
    ("5 K", "5", 0), ("3 million", "3 million", 1), ("3 million", "3 billion", 0), ("50 percent", "50", 1),
    ("1 200 m", "1200", 1), ("\u22123", "-3", 1), ("5 minutes", "5", 1), ("$5", "$5", 1), ("nan", "nan", 1),
    ("", "", 0), ("cm", "m", 0), ("3M", "3", 0), ("3.", "3", 1), ("**3**", "3", 1), (r"\boxed{3}", "3", 1),
    ("1 hour", "1", 1), ("minus 5", "-5", 1), ("minus 5", "5", 0), ("Negative 5 m", "-5", 1), ("负5", "-5", 1),
    ("3¾", "3", 0), ("3 ½", "3", 0), ("5 lakh", "5", 0), ("3 quarters", "3", 0), ("5 squared", "5", 0), ("5 bn", "5", 0),
])
def test_lenient_numerical(answer, gold, expected):
    assert score("numerical", answer, gold, "lenient") == expected


@pytest.mark.parametrize("answer, gold", [
    ("There are 7 lamps on the wall.", "7"), ("roughly 7 lamps", "7"), ("7灯", "7"), ("一共有7把椅子", "7"), ("–7", "-7"), ("答案是 7 米", "7"), ("≈7.5m", "7.5"),
    ("7.5 square feet", "7.5"), ("7.5 m²", "7.5"), ("7.5 m2", "7.5"), ("30 degrees Celsius", "30"), ("30 °C", "30"),
    ("Area = 3 m × 4 m = 12 m²", "12"), ("1 + 2 = 3", "3"), ("[7]", "7"), (r"\(7\)", "7"), ("7, not 8", "7"),
    ("The total is 7, since 3 and 4 are lit", "7"), ("The answer is -7.", "-7"), (".5", ".5"), ("7€", "7"),
    ("The final answer would be 7 lamps, as 3 of them are lit twice", "7"), ("7 (seven)", "7")])
def test_lenient_reads_the_number_of_a_sentence(answer, gold):
    assert score("numerical", answer, gold, "lenient") == 1


@pytest.mark.parametrize("answer", [
    "7 or 8", "7 to 8", "7-8", "7, 8", "between 7 and 8", "not 7", "It isn't 7", "more than 7", "7?", "maybe 7", "7/8",
    "7:30", "7 thousand", "7 Million lamps", "7k", "7万", "7 half", "7 dozens",
    "<7", "≥7", "√7", "7²", "7^2", "7或8", "–7", "never 7", "at least 7", "the answer is not 7", "A7", "lamps 7 and 8"])
def test_lenient_reads_no_number_that_is_denied_or_one_of_two(answer):
    assert score("numerical", answer, "7", "lenient") == 0


def test_lenient_regression_reads_units():
    assert score("regression", "9 m", "10", "lenient") == pytest.approx(0.9)
    assert score("regression", "9 m", "10 cm", "lenient") == 0
    assert score("regression", "1,100 kg", "1,000", "lenient") == pytest.approx(0.9)


def test_unknown_names_are_no_score():
    with pytest.raises(AssertionError, match="unknown problem type 'ocr'"):
        accuracy_reward("ocr", GOOD, "B")
    with pytest.raises(AssertionError, match="unknown scoring 'strict'"):
        accuracy_reward("OCR", GOOD, "B", scoring="strict")


# --- accuracy: independent implementations ---

def some_words(rng, longest):
    words = ["a", "b", "the", "cat", "cats", "running", "Ran", "é", "x-y", "."]
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, longest)))


@functools.cache
def edits(a, b):
    """The least number of words to insert, delete or replace, by the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_ocr_equals_the_definition_of_the_edit_distance():
    rng = random.Random(0)
    for _ in range(300):
        answer, gold = some_words(rng, 8), some_words(rng, 8)
        words = gold.split()
        expected = max(0, 1 - edits(tuple(answer.split()), tuple(words)) / len(words))
        assert score("OCR", answer, gold) == pytest.approx(expected, abs=1e-12)


def test_free_form_equals_rouge_score():
    rng = random.Random(1)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for _ in range(2000):
        answer, gold = some_words(rng, 12), some_words(rng, 12)
        expected = sum(part.fmeasure for part in scorer.score(gold, answer).values()) / 3
        assert score("free-form", answer, gold) == pytest.approx(expected, abs=1e-12)


def reference_numbers(answer, gold):
    """Read anew from the rules, on decimal strings: (numerical, regression)."""
    from decimal import ROUND_HALF_EVEN, Decimal
    a, b = (Decimal(float(text.replace(",", ""))) for text in (answer, gold))
    pointed = [any(mark in text for mark in ".,") for text in (answer, gold)]
    cents = [number.quantize(Decimal("0.01"), ROUND_HALF_EVEN) for number in (a, b)]
    relative = (1 if a == b else 0) if b == 0 else max(0, 1 - abs(a - b) / abs(b))
    return float(pointed[0] == pointed[1] and cents[0] == cents[1]), float(relative)


def test_numbers_equal_a_decimal_implementation():
    rng = random.Random(2)
    texts = ["{:.0f}", "{:.1f}", "{:.2f}", "{:.3f}", "{:,.0f}", "{:,.2f}", "{:e}", " {:.0f}"]
    hits = 0
    for _ in range(2000):
        number = rng.choice([rng.randint(-20, 20), rng.uniform(-3000, 3000), rng.randint(0, 2000) / 8])
        other = number + rng.choice([0, 0, 0, 0.001, 1, -number / 2])
        answer, gold = rng.choice(texts).format(number), rng.choice(texts).format(other)
        numerical, regression = reference_numbers(answer, gold)
        assert score("numerical", answer, gold) == numerical, (answer, gold)
        assert score("regression", answer, gold) == pytest.approx(regression, abs=1e-9), (answer, gold)
        hits += numerical
    assert 200 < hits < 1800  # the pairs decide nothing if they all agree or all differ


# --- accuracy: any text whatever ---

odd_texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789.,-+eE%_ infa٣五½²\x00\x1f\u2028\ud800", max_size=12),
    st.sampled_from(["nan", "inf", "-inf", "-1e999", "9" * 5000, "0." + "9" * 5000, "1_0", "--1", "+"]),
    st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "a", " "])).map("".join),
    st.floats().map(repr), st.integers().map(str))


@settings(max_examples=400, deadline=None, database=None)
@given(st.sampled_from(PROBLEM_TYPES), odd_texts, odd_texts, st.lists(st.text(max_size=8), max_size=3))
@example("numerical", "٣" * 5000, "٣" * 5000, [])
@example("regression", "1", "1e-320", [])
@example("multiple choice", "", "", [])
def test_scores_stay_in_range(problem_type, answer, gold, options):
    paper = score(problem_type, answer, gold, "paper", options)
    lenient = score(problem_type, answer, gold, "lenient", options)
    assert 0 <= paper <= lenient <= 1
    assert 0 <= accuracy_reward(problem_type, answer, gold) <= 1  # without a tag of ours around either
    if not parse_trace(f"<answer>{answer}</answer>").answer:
        assert lenient == 0


@settings(max_examples=300, deadline=None, database=None)
@given(odd_texts)
def test_format_and_parsing_take_any_text(text):
    perception, reasoning = format_rewards(text)
    trace = parse_trace(text)
    assert {perception, reasoning} <= {0.0, 1.0}
    assert not perception or trace.observation
    assert not reasoning or (trace.think and trace.answer)
