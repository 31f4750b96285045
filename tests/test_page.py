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


def write(folder, rollouts=(), samples=()):
    """The folder's files as the scripts write them, and the page; returns its text and its data."""
    with sft.open_log(folder / "rollouts.jsonl", 0) as log:
        for row in rollouts:
            sft.log_row(log, row)
        log.write('{"step": 9, "gro' * bool(rollouts))  # what a kill tore
    write_jsonl(folder / "completions-x.jsonl", samples)
    args = SimpleNamespace(scoring="paper", media_root=str(folder), workers=1, num_frames=32, max_pixels=256)
    evaluate.write_page(folder, None, args)
    page = (folder / "traces.html").read_text(encoding="utf-8")
    return page, json.loads(Parsed(page).scripts[0], parse_constant=lambda name: pytest.fail(name))


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
    assert "media" not in row["record"] and row["record"]["gold"] == "A"


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
    assert "default-src 'none'" in ours and len(template.splitlines()) <= 300


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
const seen = [];
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const look = name => seen.push([name, location.hash, document.querySelectorAll("article").length,
  document.querySelectorAll(".blame").length, document.querySelectorAll("table").length, window.evil || 0]);
const steps = [["first", () => {}], ["GRPO", () => click("GRPO")], ["both", () => press("b")],
  ["formula", () => press("f")], ["next", () => press("j")], ["before", () => press("k")],
  ["evaluation", () => click("Evaluation")], ["no tag", () => click("no answer tag")],
  ["card", () => press("j")]];
const buttons = () => [...document.querySelectorAll("button")];
const click = words => buttons().find(node => node.textContent === words).click();
function next() {
  if (!steps.length) { document.title = JSON.stringify(seen); return; }
  const [name, act] = steps.shift();
  act();
  setTimeout(() => { look(name); next(); }, 50);
}
next();
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_page_in_a_browser(tokenizer, tmp_path):
    """Switch, keys, filters and formula; no console message, which a refused request would leave, too."""
    evil = [text.replace("alert(1)", "window.evil=1") for text in EVIL if "\ud83d" not in text]
    rows = [make_row(tokenizer, GROUP[:4], judge)]
    rows += [make_row(tokenizer, [TRACE.format(text, "A", text) for text in evil], judge) | dict(step=1)]
    page, _ = write(tmp_path, rows, evil_samples())
    (tmp_path / "probe.html").write_text(page + PROBE, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom",
               f"file://{tmp_path}/probe.html#update=0&group=0"]
    done = subprocess.run(command, capture_output=True, timeout=280, encoding="utf-8", errors="replace")
    assert ":CONSOLE" not in done.stderr, done.stderr
    told = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    seen = {name: rest for name, *rest in told}
    articles, blames, tables = ({name: rest[i] for name, rest in seen.items()} for i in (1, 2, 3))
    assert not any(rest[4] for rest in seen.values())
    assert articles["first"] == articles["GRPO"] == 4 and articles["both"] == articles["formula"] == 8
    # perception earned 2.2, 1, 2.2, unknown, and reasoning 2.2, 2.2, 1, 1: one is praised, two are punished
    assert blames["first"] == 0 and blames["GRPO"] == blames["both"] == 3 and tables["formula"] == 2
    assert "update=1" in seen["next"][0] and "update=0" in seen["before"][0]
    assert articles["evaluation"] == 100 and articles["no tag"] == 100 and "at=0" in seen["card"][0]
    parsed = Parsed(done.stdout)
    made = "head main nav button select option div article section i sub details summary table tr td th"
    assert set(parsed.tags) <= {*Parsed(page).tags, *made.split()}
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert parsed.tags.count("script") == 3 and "\\u{202e}" in parsed.text and "<img src=x" in parsed.text
