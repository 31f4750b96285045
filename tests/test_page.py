"""The page: what pagrpo.py keeps of its rollouts, what evaluate.py makes of them, how a browser shows it."""
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import evaluate
import gen_cot
import pagrpo
import sft
from conftest import ROOT
from rewards import UserError, make_judge, read_jsonl, rule_judge, write_jsonl

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RECORD = dict(problem="Which colour is first?", problem_type="multiple choice", data_type="video",
              path="./media/x.mp4", options=["A. red", "B. blue"], solution="<answer>A</answer>")
TRACE = "<observation>{}</observation> <think>It is first, so {}.</think><answer>{}</answer>"
EVIL = ["</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "<b>bold</b>",
        "\u202etxet denrut\u202c", "\u2028\u2029\ufeff\u0000\x1b[2J\x7f", "&lt;b&gt; &amp;",
        "\\u003cb>", "\"'`${1}", "https://example.org/x.js", "\ud83d half", "DATA", "👍🏽 中文"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / gen_cot.MODELS["tiny"])


def make_args(**changes):
    defaults = dict(without=None, scoring="paper", loss_average="segment", perception_length=(4, 64),
                    reasoning_length=(4, 64))
    return SimpleNamespace(**(defaults | changes))


def make_row(tokenizer, texts, judge, args=None, record=RECORD):
    """A scored group of these texts, as rollouts.jsonl holds it; a text that ends with … was cut."""
    args = args or make_args()
    rows = [tokenizer(text.removesuffix("…"))["input_ids"] + [tokenizer.eos_token_id] * (text[-1] != "…")
            for text in texts]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows])
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    masks = [segment & mask for segment in pagrpo.segment_masks(ids, tokenizer)]
    group = pagrpo.Group(record, None, ids, mask, torch.zeros(ids.shape), *masks)
    pagrpo.score_groups([group], tokenizer, judge, args)
    return dict(step=0, group=0, **pagrpo.rollout_row(group, tokenizer, args))


def make_page(folder, **changes):
    """The page of what is there, by `evaluate.py --html`; returns its text and its data."""
    defaults = dict(scoring="paper", media_root=str(folder), workers=1, num_frames=32, max_pixels=256,
                    limit=None)
    evaluate.write_page(folder, None, SimpleNamespace(**(defaults | changes)))
    page = (folder / "traces.html").read_text(encoding="utf-8")
    return page, json.loads(Parsed(page).scripts[0], parse_constant=lambda name: pytest.fail(name))


def write(folder, rollouts=(), samples=()):
    """The folder's files as the scripts write them, and the page; returns its text and its data."""
    with sft.open_log(folder / "rollouts.jsonl", 0) as log:
        for row in rollouts:
            sft.log_row(log, row)
        log.write('{"step": 9, "gro' * bool(rollouts))  # what a kill tore
    write_jsonl(folder / "completions-x.jsonl", samples)
    return make_page(folder)


def write_runs(folder, model="SFT + PA-GRPO"):
    """Three models' completions of five questions, whose files are not in the models' order; their table;
    logs of SFT, of RL, and of an RL run without prompts on held-out media. The last model is right but for
    question 3, the others are wrong; SFT has no completion of question 0, and answers 4 twice."""
    answers = {"none": ("base", "BBBBB"), "sft": ("SFT", "-BBBB"), "pagrpo": (model, "AAABA")}
    for stem, (name, letters) in answers.items():
        rows = [dict(RECORD, problem=f"Question {i}?", problem_id=i, path=f"m{i}", file="e.json", model=name,
                     completion=TRACE.format("red", letter, letter), evidence=["red"])
                for i, letter in enumerate(letters) if letter != "-"]
        again = [dict(rows[-1], completion=None), rows[-1]] * (stem == "sft")  # unread, and asked again
        write_jsonl(folder / f"evaluate/completions-{stem}.jsonl", rows[:-1] + (again or rows[-1:]))
    figures = dict(questions=5, numbers=dict(answer=[20.0, None]), perception=None, template=100.0)
    table = {name: {"e.json": figures} for name in ("constant", "base", "SFT", model)}
    table[model] = {"e.json": figures | dict(numbers=dict(answer=[80.04, 3.5]), perception=82.84)}
    (folder / "evaluate/results.json").write_text(json.dumps(dict(rows=table, settings={})))
    rewards = ("rewards/perception_accuracy", "rewards/reasoning_accuracy")
    logs = dict(sft=[dict(step=0, loss=1.5), dict(step=1, loss=None), dict(step=2, loss=0.5)],
                rl=[{"step": i, "loss": 0.1} | dict.fromkeys(rewards, 0.5) for i in range(3)],
                bare=[{"step": i, "loss": 0.1} | dict.fromkeys(rewards, i / 2) for i in range(3)])
    logs["rl"][0] |= {"fixed/perception": 0.25, "fixed/reasoning": 0.5}
    logs["rl"][2] |= {"fixed/perception": 0.75, "fixed/reasoning": 1}
    for name, rows in logs.items():
        write_jsonl(folder / name / "metrics.jsonl", rows)
        (folder / name / "run.json").write_text(json.dumps(dict(algorithm=name.upper(), flags={})))
    return table, logs


class Parsed(HTMLParser):
    """The elements and script texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.attributes, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data
        else:
            self.text += data


# --- what training keeps ---

GROUP = [TRACE.format("first red", "A", "A"), TRACE.format("first blue", "A", "A"),
         TRACE.format("first red", "B", "B"), TRACE.format("lost", "B", "B"), "first red",
         "<observation>red…"]


def judge(records, observations):
    """True for red, unknown for lost; with words."""
    judge.replies = [observation and f"I see {observation}." for observation in observations]
    return [None if "lost" in (text or "") else "red" in (text or "") for text in observations]


@pytest.mark.parametrize("without, name", [
    (None, "PA-GRPO"), ("perception", "GRPO"), ("length", "without length"),
    ("reasoning", "without reasoning")])
def test_the_page_holds_the_rewards_and_each_algorithms_advantages(tokenizer, tmp_path, without, name):
    """Against Eq. 5 and 6 worked with numpy; an unknown verdict leaves means and spreads."""
    _, data = write(tmp_path, [make_row(tokenizer, GROUP, judge, make_args(without=without))])
    (row,) = data["rollouts"]
    bonus = 0.0 if without == "length" else 0.2
    # a sentence of an observation alone has no tag at all, the last one was cut within it
    perception = np.array([2 + bonus, 1, 2 + bonus, np.nan, 0, 0])
    reasoning = np.array([2 + bonus, 2 + bonus, 1, 1, 0, 0])
    expected = dict(perception=perception, reasoning=reasoning, reward=perception + reasoning)
    for key, rewards in expected.items():
        found = np.array([it["scores"][key] for it in row["completions"]], float)
        assert np.allclose(found, rewards, equal_nan=True), key

    def compared(rewards):
        known = ~np.isnan(rewards)
        advantages = (rewards - rewards[known].mean()) / (rewards[known].std(ddof=1) + 1e-4)
        return np.where(known, advantages, 0)

    p, r, both = map(compared, (perception, reasoning, perception + reasoning))
    expected = {"PA-GRPO": (p, r), "GRPO": (r, r), "GDPO": (p + r, p + r), "without separation": (both, both)}
    for algorithm, advantages in expected.items():
        assert np.allclose(row["advantages"][algorithm], advantages, atol=1e-5), algorithm
    assert row["algorithm"] == name and set(row["advantages"]) == {*expected, name}
    assert np.allclose(row["moments"]["reward"], [np.nanmean(perception + reasoning),
                                                  np.nanstd(perception + reasoning, ddof=1)], atol=1e-5)
    assert [it["scores"]["perception"] is None for it in row["completions"]] == [i == 3 for i in range(6)]
    assert [it["scores"]["truncated"] for it in row["completions"]] == [i == 5 for i in range(6)]
    assert [it["reply"] for it in row["completions"]][3:] == ["I see lost.", None, None]
    assert row["record"]["media"].endswith("media/x.mp4") and row["record"]["gold"] == "A"


def test_token_texts_join_to_the_completion(tokenizer):
    """A character that several tokens make up is one piece; each segment is what its mask says."""
    text = TRACE.format("红 and 👍🏽 é", "A", "A")
    row = make_row(tokenizer, [text, "\ud83d".encode("utf-8", "replace").decode() + "中…"], judge)
    for it, whole in zip(row["completions"], [text + tokenizer.eos_token, "?中"]):
        assert "".join(piece for piece, _ in it["tokens"]) == whole
        assert not any("\ufffd" in piece for piece, _ in it["tokens"])
    pieces = row["completions"][0]["tokens"]
    assert "".join(piece for piece, segment in pieces if segment == "P") == text.partition(" <think>")[0]
    assert pieces[-1] == [tokenizer.eos_token, "R"] and len(pieces) > 20


def test_a_group_with_equal_rewards_or_one_known_verdict_has_no_perception_advantage(tokenizer, tmp_path):
    rows = [make_row(tokenizer, [GROUP[0]] * 3, judge), make_row(tokenizer, [GROUP[0], GROUP[3]], judge)]
    _, data = write(tmp_path, rows)
    for row, moments in zip(data["rollouts"], ([2.2, 0], False)):
        assert not np.any(row["advantages"]["PA-GRPO"][0]) and row["moments"]["perception"] == moments


def test_a_judges_words_are_kept_where_it_has_any(tokenizer):
    self_judge = make_judge("self", generate=lambda prompts: ["Fine. <judgement>Yes</judgement>"])
    assert self_judge([RECORD] * 2, ["first red", ""]) == [True, False]
    assert self_judge.replies == ["Fine. <judgement>Yes</judgement>", None]
    row = make_row(tokenizer, GROUP[:2], rule_judge)
    assert [it["reply"] for it in row["completions"]] == [None, None]


def test_a_resumed_run_shows_each_group_once(toy_records, tmp_path, monkeypatch):
    """Stopped in its fourth update, behind its last checkpoint; what it showed after that is shown anew."""
    root = Path(toy_records[0]["media"]).parents[1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sft, "plot_curves", lambda *args: None)

    def run(output, more=""):
        command = ("pagrpo.py --adapter none --updates 4 --prompts-per-update 3 --num-generations 2 "
                   f"--lr 1e-2 --max-completion-tokens 12 --model tiny --data {root}/records.json "
                   f"--num-frames 4 --media-root {root} --workers 1 --show-every 1 --save-every 2 "
                   f"--output {output} {more}")
        monkeypatch.setattr(sys, "argv", command.split())
        pagrpo.main(pagrpo.get_args())

    run(tmp_path / "whole")
    updates, update = [], pagrpo.update

    def killed(*args):
        updates.append(1)
        if len(updates) == 4:
            patch.setattr(sft, "save_checkpoint", lambda *args: None)  # what is killed saves nothing
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pagrpo, "update", killed)
        run(tmp_path / "killed")
    assert len(read_jsonl(tmp_path / "killed/rollouts.jsonl")) == 6
    run(tmp_path / "killed", "--resume")
    whole, again = (read_jsonl(tmp_path / name / "rollouts.jsonl") for name in ("whole", "killed"))
    assert whole == again and [(row["step"], row["group"]) for row in whole] == [
        (step, group) for step in range(4) for group in (0, 1)]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_group_on_screen_has_colours_on_a_terminal_alone(tokenizer, monkeypatch, terminal):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", screen)
    pagrpo.show(make_row(tokenizer, [*GROUP, TRACE.format("x" * 300, "\x1b[2J\u202eA", "A")], judge))
    text = screen.getvalue()
    assert ("\033[36m" in text and "\033[33m" in text) == terminal == ("\033" in text)
    plain = re.sub(r"\033\[\d+m", "", text)
    assert max(map(len, plain.splitlines())) <= 80 and "\x1b" not in plain and "\u202e" not in plain
    assert "reward, advantage: perception, reasoning" in plain and " 1  2.20, +" in plain


# --- what the page is ---

def evil_samples():
    """500 completions, and every text of their records, that would be markup or steer the screen."""
    samples = []
    for i in range(500):
        evil = EVIL[i % len(EVIL)]
        completion = TRACE.format(evil, "B", "A") if i % 2 else f"<think>{evil}"
        path = f"m{i % 7}{evil if i % 3 == 0 and '/' not in evil else ''}"
        samples.append(dict(RECORD, problem=evil, options=[f"A. {evil}", "B. b"], completion=completion,
                            file="e.json", path=path, problem_id=i))
    return samples


def test_texts_are_inert_in_the_page(tokenizer, tmp_path):
    """The only scripts are the page's own two, its data come back as they were, and nothing names a host."""
    template = (ROOT / "data/trace_page.html").read_text(encoding="utf-8")
    texts = [text for text in EVIL if "\ud83d" not in text]

    def talkative(records, observations):
        talkative.replies = texts
        return [True for _ in records]

    row = make_row(tokenizer, [TRACE.format(text, "A", text) for text in texts], talkative,
                   record=dict(RECORD, problem=texts[0], path="lost"))
    samples = evil_samples()
    page, data = write(tmp_path, [row], samples)
    assert Parsed(page).tags == Parsed(template).tags and Parsed(page).tags.count("script") == 2
    assert len(data["samples"]) == 500 and page.isascii() == template.isascii()
    for sample, shown in zip(samples, data["samples"]):
        assert "".join(piece for piece, _ in shown["pieces"]) == sample["completion"]
        assert (shown["problem"], shown["options"]) == (sample["problem"], sample["options"])
    assert [it["reply"] for it in data["rollouts"][0]["completions"]] == texts
    assert data["rollouts"][0]["record"]["problem"] == texts[0]
    assert all("can't be" in words for words in data["media"].values())  # there are none
    ours = page.replace(Parsed(page).scripts[0], "")
    assert not re.search(r"\w+://|(src|href)=[\"'](?!data:,)|url\(|@import|innerHTML|fetch\(", ours)
    assert "default-src 'none'" in ours and len(template.splitlines()) <= 340


def test_samples_have_what_the_filters_look_at(tmp_path):
    completions = {"right": TRACE.format("first red", "A", "A"),
                   "mismatch": TRACE.format("first red", "B", "A"),
                   "blind": TRACE.format("nothing", "A", "A"), "wrong": TRACE.format("first red", "B", "B"),
                   "tagless": "A", "unread": None}
    samples = [dict(RECORD, evidence=["first red"], completion=text, file="e.json", problem_id=name,
                    truncated=name == "wrong") for name, text in completions.items()]
    _, data = write(tmp_path, samples=samples)
    shown = dict(zip(completions, data["samples"]))
    assert [name for name in shown if shown[name]["right"]] == ["right", "mismatch", "blind", "tagless"]
    assert [name for name in shown if shown[name]["perception"]] == ["right", "mismatch", "wrong"]
    flags = dict(mismatch="mismatch", no_tag="tagless", truncated="wrong", unread="unread")
    for field, name in flags.items():
        assert [other for other in shown if shown[other][field]] == [name]
    hues = [hue for _, hue in shown["right"]["pieces"]]
    assert [hue for hue in hues if hue] == ["perception", "reasoning", "answer"]


def test_the_page_has_the_evaluations_tables_and_the_runs_curves(tmp_path):
    """As results.json and metrics.jsonl have them."""
    table, logs = write_runs(tmp_path)
    _, data = make_page(tmp_path)
    assert data["tables"] == {"evaluate": table}
    curves = {f"{name.upper()} ({name})": rows for name, rows in logs.items()}
    assert {name: rows for name, rows in data["curves"].items() if rows} == curves
    assert {sample["model"] for sample in data["samples"]} == {"base", "SFT", "SFT + PA-GRPO"}
    assert len({tuple(sample["question"]) for sample in data["samples"]}) == 5


def test_a_limit_keeps_the_first_questions_that_all_models_answered(tmp_path, capsys):
    write_runs(tmp_path)
    _, data = make_page(tmp_path, limit=2)
    told = [(sample["model"], sample["problem"]) for sample in data["samples"]]
    assert sorted(told) == [(model, f"Question {i}?") for model in ("SFT", "SFT + PA-GRPO", "base")
                            for i in (1, 2)]
    assert "6 evaluated completions; 2 of 2 media can't be read" in capsys.readouterr().out
    _, data = make_page(tmp_path)
    assert len(data["samples"]) == 14 and not any(sample["unread"] for sample in data["samples"])


def test_media_are_found_by_the_runs_own_settings(tokenizer, toy_records, tmp_path, monkeypatch, capsys):
    """From another folder: of a run by its run.json, of an evaluation by its results.json; one is lost."""
    picture = next(record["media"] for record in toy_records if record["data_type"] == "image")
    runs, elsewhere = tmp_path / "work/runs/tiny", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, root in (("a.png", "clips"), ("b.png", "tests")):
        (tmp_path / "work" / root / "media").mkdir(parents=True)
        shutil.copy(picture, tmp_path / "work" / root / "media" / name)
    record = dict(RECORD, data_type="image")
    row = make_row(tokenizer, GROUP[:2], judge, record=record | dict(path="media/a.png"))
    write_jsonl(runs / "pagrpo/rollouts.jsonl", [dict(step=0, group=0) | row])
    (runs / "pagrpo/run.json").write_text('{"algorithm": "RL", "flags": {"media_root": "clips"}}')
    samples = [dict(record, problem_id=name, path=f"media/{name}.png", completion="A", file="e.json")
               for name in ("b", "lost")]
    write_jsonl(runs / "evaluate/completions-x.jsonl", samples)
    (runs / "evaluate/results.json").write_text('{"rows": {}, "settings": {"media_root": "tests"}}')
    monkeypatch.chdir(elsewhere)
    _, data = make_page(runs, media_root="data/Video-R1-data")
    shown = [data["media"][it["media"]] for it in (data["rollouts"][0]["record"], *data["samples"])]
    assert [isinstance(pictures, list) for pictures in shown] == [True, True, False]
    assert "1 groups of training and 2 evaluated completions; 1 of 3 media can't" in capsys.readouterr().out


@pytest.mark.parametrize("first", range(5))
def test_a_medium_is_the_first_that_exists(tmp_path, monkeypatch, first):
    """Below --media-root; the run's own root as seen from above the run, from here, from the project; the
    toy's."""
    places = ["given", "far/own", "here/own", "project/own", "project/data/toy"]
    for place in places[first:]:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.mp4").touch()
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "project/evaluate.py"))
    args = SimpleNamespace(media_root=str(tmp_path / "given"))
    run, record = tmp_path / "far/runs/tiny/sft", dict(path="x.mp4")
    found = evaluate.page_medium(run, dict(media_root="own"), args, record)
    assert Path(found).resolve() == tmp_path / places[first] / "x.mp4"


def test_thumbnails_are_small_and_have_the_times_of_their_frames(toy_records, monkeypatch):
    clip = next(record for record in toy_records if record["data_type"] == "video")
    frames, fps = gen_cot.read_media(clip, 8, 256)
    pictures = evaluate.thumbnails(clip, 32, 256)
    assert len(pictures) == len(frames) <= 8 and pictures[0][1] == "0.0 s"
    assert pictures[-1][1] == f"{len(frames) / fps:.1f} s"
    noise = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3)).astype(np.uint8)  # compresses worst
    monkeypatch.setattr(gen_cot, "read_media", lambda record, num_frames, max_pixels: (noise, 2.0))
    assert 500 * len(json.dumps(evaluate.thumbnails(clip, 32, 256))) < 38e6


def test_a_folder_without_traces_is_named(tmp_path):
    with pytest.raises(UserError, match="no rollouts.jsonl and no completions"):
        evaluate.write_page(tmp_path, None, SimpleNamespace(scoring="paper"))


# --- how a browser shows it ---

PROBE = """<script>
const seen = {};
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const all = (selector, node = document) => [...node.querySelectorAll(selector)];
const texts = (selector, node) => all(selector, node).map(it => it.textContent);
const click = words => all("button").find(node => node.textContent === words).click();
const choose = (name, value) => {
  const node = all("select").find(it => texts("option", it).includes(value));
  node.value = value; node.onchange();
};
const look = () => ({hash: location.hash, articles: all("article").length, blames: all(".blame").length,
  tables: all("main table").length, evil: window.evil || 0, cells: texts("details td"),
  models: all("article").map(it => texts("section b", it)), marked: texts("article .part:not(.other) b"),
  questions: texts("article p b"), lines: all("polyline").map(it => [it.getAttribute("class"),
    it.getAttribute("points")]), told: texts("main > .row > b"), curves: texts(".curve small")});
const steps = STEPS;
function next() {
  if (!steps.length) { document.title = JSON.stringify(seen); return; }
  const [name, act] = steps.shift();
  act();
  setTimeout(() => { seen[name] = look(); next(); }, 50);
}
next();
</script>"""


def browse(folder, page, steps, address=""):
    """Opens the page and does the steps, {name: JavaScript}; returns what is seen after each, and the whole
    page at the end. There must be no console message, which a refused request would leave, too."""
    code = ", ".join(f"[{json.dumps(name)}, () => {act}]" for name, act in steps.items())
    (folder / "probe.html").write_text(page + PROBE.replace("STEPS", f"[{code}]"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000", "--dump-dom",
               f"file://{folder}/probe.html{address}"]
    done = subprocess.run(command, capture_output=True, timeout=280, encoding="utf-8", errors="replace")
    assert ":CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert list(seen) == list(steps) and not any(it["evil"] for it in seen.values())
    return seen, done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_page_in_a_browser(tokenizer, tmp_path):
    """Switch, keys, filters and formula; every text, a model's name and a run's among them, stays text."""
    evil = [text.replace("alert(1)", "window.evil=1") for text in EVIL if "\ud83d" not in text]
    rows = [make_row(tokenizer, GROUP[:4], judge)]
    rows += [make_row(tokenizer, [TRACE.format(text, "A", text) for text in evil], judge) | dict(step=1)]
    write_runs(tmp_path, model=evil[2])
    (tmp_path / "rl/run.json").write_text(json.dumps(dict(algorithm=evil[0])))
    page, _ = write(tmp_path, rows, evil_samples())
    seen, shown = browse(tmp_path, page, {
        "first": "0", "GRPO": "click('GRPO')", "both": "press('b')", "formula": "press('f')",
        "next": "press('j')", "before": "press('k')", "evaluation": "click('Evaluation')",
        "of x": "choose('model', 'completions-x')", "no tag": "click('no answer tag')", "card": "press('j')",
    }, "#update=0&group=0")
    assert seen["first"]["articles"] == seen["GRPO"]["articles"] == 4
    assert seen["both"]["articles"] == seen["formula"]["articles"] == 8
    # perception earned 2.2, 1, 2.2, unknown, and reasoning 2.2, 2.2, 1, 1: one is praised, two are punished
    assert seen["first"]["blames"] == 0 and seen["GRPO"]["blames"] == seen["both"]["blames"] == 3
    assert seen["first"]["tables"] == 0 and seen["formula"]["tables"] == 2
    assert "update=1" in seen["next"]["hash"] and "update=0" in seen["before"]["hash"]
    assert seen["evaluation"]["marked"] == [evil[2]] * 5 and seen["of x"]["articles"] == 100
    assert seen["no tag"]["articles"] == 100 and "at=0" in seen["card"]["hash"]
    parsed = Parsed(shown)
    made = ("head body main nav button select option div article section i sub details summary table caption "
            "tr td th polyline")
    assert set(parsed.tags) <= {*Parsed(page).tags, *made.split()}
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert parsed.tags.count("script") == 3 and "\\u{202e}" in parsed.text and "<img src=x" in parsed.text


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_key_goes_to_the_next_group_that_grpo_would_wrong(tokenizer, tmp_path):
    """Over those without one, and from the last to the first; where there is no other it does nothing."""
    fair = [GROUP[0], TRACE.format("lost", "B", "B")[:20]]  # seen and answered, neither
    groups = {0: GROUP[:4], 1: fair, 2: fair, 3: GROUP[:4], 4: fair}
    rows = [make_row(tokenizer, texts, judge) | dict(step=step) for step, texts in groups.items()]
    page, _ = write(tmp_path, rows)
    seen, _ = browse(tmp_path, page, {
        "on": "press('g')", "round": "press('g')", "at the end": "location.hash = 'update=4&group=0'",
        "from there": "press('g')"}, "#update=1&group=0")
    assert [it["hash"] for it in seen.values()] == [f"#update={step}&group=0" for step in (3, 0, 4, 0)]
    page, _ = write(tmp_path, rows[:2])
    seen, _ = browse(tmp_path, page, {"first": "press('g')"}, "#update=0&group=0")
    assert seen["first"]["hash"] == "#update=0&group=0" and seen["first"]["articles"] == 4


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_evaluation_opens_on_the_last_model_and_shows_all_side_by_side(tmp_path):
    write_runs(tmp_path)
    page, _ = make_page(tmp_path)
    seen, _ = browse(tmp_path, page, {"first": "0", "wrong": "all('.square button')[1].click()",
                                      "of SFT": "choose('model', 'SFT')"})
    names, first = ["base", "SFT", "SFT + PA-GRPO"], seen["first"]
    assert first["questions"] == [f"Question {i}?" for i in range(5)] and first["marked"] == [names[2]] * 5
    assert first["models"] == [[names[0], names[2]]] + [names] * 4
    assert seen["wrong"]["questions"] == ["Question 3?"]
    assert first["told"] == ["5 of 5 questions, by SFT + PA-GRPO's answers"]
    assert seen["of SFT"]["questions"] == [f"Question {i}?" for i in range(1, 5)]
    assert seen["of SFT"]["marked"] == ["SFT"] * 4
    # two files of one model have their own names behind it
    shutil.copy(tmp_path / "evaluate/completions-sft.jsonl", tmp_path / "completions-b.jsonl")
    page, _ = make_page(tmp_path)
    seen, _ = browse(tmp_path, page, {"first": "0"})
    assert sorted(seen["first"]["models"][1]) == sorted(
        [names[0], "SFT (completions-b.jsonl)", "SFT (evaluate/completions-sft.jsonl)", names[2]])


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_table_and_the_curves_are_on_top_of_the_page(tmp_path):
    write_runs(tmp_path)
    page, _ = make_page(tmp_path)
    first = browse(tmp_path, page, {"first": "0"})[0]["first"]
    rows = [first["cells"][i:i + 4] for i in range(0, len(first["cells"]), 4)]
    assert rows == [[name, "20.0", "-", "100.0"] for name in ("constant", "base", "SFT")] + [
        ["SFT + PA-GRPO", "80.0 ± 3.5", "82.8", "100.0"]]
    # 240 wide and 60 high, from 0 to 1 or, of the loss, to 1.5; sampled accuracy where none is `fixed`
    assert set(first["curves"]) >= {
        "RL (rl), 3 steps", "fixed/perception 0.25 → 0.75", "fixed/reasoning 0.5 → 1", "loss 1.5 → 0.5",
        "rewards/perception_accuracy 0 → 1"}
    assert first["lines"] == [
        ["perception", "0,60,120,30,240,0"], ["reasoning", "0,60,120,30,240,0"],  # bare
        ["perception", "0,45,240,15"], ["reasoning", "0,30,240,0"],  # rl
        ["none", "0,0,240,40"]]  # sft
