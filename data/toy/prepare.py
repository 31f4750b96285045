"""The toy world: a small synthetic video-QA data set, and a small Qwen2.5-VL that has seen a lot and reasons
badly.

    python data/toy/prepare.py                 # the data set: under a minute on two cores
    python data/toy/prepare.py --pretrain      # makes data/toy/base again, the stand-in for Qwen2.5-VL-7B

A clip is four or five moments of one second, H.264 in MP4 at 8 frames a second, 56 × 56 pixels: in each
moment a coloured figure (a shape or a sign) drifts over a noisy ground, and in some clips the light flashes
for 0.4 seconds of one moment. A picture is a PNG of four figures in reading order. Every question needs a
perception (what came when) and a reasoning step (count, compare, reverse, multiply, look up the option's
letter). Each record carries `evidence`: the facts that an observation must state to be sufficient. One that
counts carries `counter_evidence`, too: that the counted thing comes at a moment where it does not, which an
observation must not state. So `--judge rule` is exact.

Files, all below data/toy: `cot.jsonl`, `rl.jsonl`, `test.jsonl` (records, disjoint by scene), `traces.jsonl`
(a scripted teacher's raw traces for `cot.jsonl`; the field `flaw` says what was spoilt on purpose, and no
stage reads it), `media/`, and `base/` (committed).
"""
import argparse
import copy
import json
import pickle
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the stages live two folders up

from gen_cot import PROMPT, build_prompt, init_worker, run_script, sample_indices  # noqa: E402
from rewards import OBSERVATION_OPENING, THINK_OPENING, accuracy_reward, write_jsonl  # noqa: E402

SIZE, FPS = 56, 8  # pixels a side; frames per second of the clips
COLOURS = {"red": (215, 45, 45), "orange": (235, 135, 35), "yellow": (230, 215, 60),
           "green": (55, 165, 75), "blue": (55, 95, 215), "purple": (150, 65, 185)}
WHITE = (255, 255, 255)
SHAPES = ["circle", "square", "triangle", "cross"]
SIGNS = list("EHKMRTXZ")
ORDINALS = ["first", "second", "third", "fourth", "fifth"]
NUMBERS = ["no", "one", "two", "three", "four", "five"]
FLASH = (0.5, 0.9)  # the part of its moment, in seconds, during which the light is on
GLANCE, HASTY = 0.9, 0.2  # how often the teacher falls into its two habits
FIELDS = ["problem_id", "problem", "data_type", "problem_type", "options", "solution", "path", "data_source",
          "evidence", "counter_evidence"]
FLAWS = ["wrong answer", "broken template", "insufficient observation"]
SPLITS = {"cot": 1400, "rl": 1600, "test": 500}  # questions, two per scene


# --- scenes -------------------------------------------------------------------------------------------------

def make_scene(rng, clip_counts=(4, 5), picture_counts=(4,)):
    """A scene: its kind, the figures in order, the moment of the flash (or None), the drawing seed."""
    is_clip = rng.random() < 0.8
    count = rng.choice(clip_counts if is_clip else picture_counts)
    has_signs = rng.random() < 0.3
    colours, shapes = rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 3)
    flash = rng.randrange(count) if is_clip and not has_signs and rng.random() < 0.3 else None
    return dict(kind="clip" if is_clip else "picture", colours=rng.choices(colours, k=count),
                figures=rng.sample(SIGNS, count) if has_signs else rng.choices(shapes, k=count),
                has_signs=has_signs, flash=flash, seed=rng.getrandbits(32))


def draw_figure(draw, figure, centre, radius, colour):
    """Draw one shape or sign, about 2 · radius pixels wide."""
    (x, y), r = centre, radius
    if figure == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=WHITE, width=3)
    elif figure == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour, outline=WHITE,
                       width=3)
    elif figure == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=colour, outline=WHITE,
                     width=3)
    elif figure == "cross":
        for width, fill in ((0.8 * r, WHITE), (0.4 * r, colour)):
            draw.line((x - r, y - r, x + r, y + r), fill=fill, width=round(width))
            draw.line((x - r, y + r, x + r, y - r), fill=fill, width=round(width))
    else:
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        draw.text((x, y), figure, fill=WHITE, anchor="mm", font=ImageFont.load_default(2.4 * r),
                  stroke_width=r / 12, stroke_fill=WHITE)


def draw_frames(scene, seconds):
    """Frames uint8 (T, 56, 56, 3) of a scene at the given times (a picture has one, at 0)."""
    noise = np.random.default_rng(scene["seed"])
    ground = noise.integers(20, 70)
    path = noise.uniform(0.44, 0.56, size=(len(scene["colours"]), 2, 2)) * SIZE  # per moment: drift from, to
    radius = noise.uniform(16, 19, size=len(scene["colours"]))
    frames = []
    for second in seconds:
        moment = min(int(second), len(scene["colours"]) - 1)
        lit = scene["flash"] == moment and FLASH[0] <= second - moment < FLASH[1]
        image = Image.new("RGB", (SIZE, SIZE), (200,) * 3 if lit else (int(ground),) * 3)
        draw = ImageDraw.Draw(image)
        if scene["kind"] == "clip":
            centre = path[moment, 0] + (path[moment, 1] - path[moment, 0]) * (second - moment)
            draw_figure(draw, scene["figures"][moment], centre, radius[moment],
                        COLOURS[scene["colours"][moment]])
        elif len(scene["figures"]) == 1:
            draw_figure(draw, scene["figures"][0], path[0, 0], radius[0], COLOURS[scene["colours"][0]])
        else:
            for i, (figure, colour) in enumerate(zip(scene["figures"], scene["colours"])):
                centre = (SIZE * (0.25 + 0.5 * (i % 2)), SIZE * (0.25 + 0.5 * (i // 2)))
                draw_figure(draw, figure, centre, 0.62 * radius[i], COLOURS[colour])
        grain = noise.normal(0, 9, size=(SIZE, SIZE, 3))
        frames.append(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return np.stack(frames)


def write_medium(scene, path):
    """Encode a scene to an MP4 (H.264) or a PNG."""
    if scene["kind"] == "picture":
        Image.fromarray(draw_frames(scene, [0])[0]).save(path)
        return
    import av
    with av.open(str(path), "w") as container:
        # with its mbtree x264 does not give the same bytes each time
        options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in draw_frames(scene, np.arange(len(scene["colours"]) * FPS) / FPS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# --- questions ----------------------------------------------------------------------------------------------

def listing(items):
    return ", ".join(items)


def make_question(scene, rng):
    """A question about a scene: a record of the data set's fields, `evidence`, and what the teacher goes by
    (`name`: of what is asked, `values`, `facts`, `needed`: the indices of the evidence, `reason`)."""
    kinds = ["ocr", "ocr", "reverse", "reverse"] if scene["has_signs"] else (
        ["after", "most", "count", "count", "change", "points", "points"]
        + ["flash"] * 6 * (scene["flash"] is not None))
    while True:
        kind = rng.choice(kinds)
        name = ("sign" if scene["has_signs"] else "colour" if kind == "flash"
                else rng.choice(["colour", "shape"]))
        values = scene["colours"] if name == "colour" else scene["figures"]
        facts = [f"{ordinal} {value}" for ordinal, value in zip(ORDINALS, values)]
        if kind == "flash":
            facts[scene["flash"]] += " with a flash"
        made = QUESTIONS[kind](values, name, facts, rng)
        if made is not None:
            break
    question, options, answer, reason, needed = made
    problem_type = {"after": "multiple choice", "most": "multiple choice", "flash": "multiple choice",
                    "count": "numerical", "change": "free-form", "points": "regression"}.get(kind, "OCR")
    counter_evidence = [f"{ORDINALS[i]} {values[needed[0]]}" for i in range(len(values))
                        if kind in ("count", "points") and i not in needed]
    return dict(problem=question, problem_type=problem_type, options=options,
                solution=f"<answer>{answer}</answer>", evidence=[facts[i] for i in needed],
                counter_evidence=counter_evidence, data_source=f"toy-{kind}", name=name, values=values,
                facts=facts, needed=list(needed), reason=reason)


def choose(right, name, rng):
    """Four options in random order, the letter of the right one, and the words that look it up: the options
    turned round, each before its letter."""
    pool = [v for v in (COLOURS if name == "colour" else SHAPES) if v != right]
    values = rng.sample([right] + rng.sample(pool, 3), 4)
    return ([f"{letter}. {value}" for letter, value in zip("ABCD", values)], "ABCD"[values.index(right)],
            look_up(values, [right]))


def look_up(values, wanted):
    table = {value: f"{value} {letter}" for letter, value in zip("ABCD", values)}
    return f"{listing(table.values())}, so {listing(table[value] for value in wanted)}"


def tally(values):
    """How often each value comes, in the order of first coming."""
    return listing(f"{value} {NUMBERS[values.count(value)]}" for value in dict.fromkeys(values))


def ask_after(values, name, facts, rng):
    unique = [i for i, v in enumerate(values[:-1]) if values.count(v) == 1]
    if not unique:
        return None
    i = rng.choice(unique)
    options, letter, reading = choose(values[i + 1], name, rng)
    return (f"Which {name} comes right after {values[i]}?", options, letter,
            f"after {values[i]}, {facts[i + 1]}. {reading}.", [i, i + 1])


def ask_most(values, name, facts, rng):
    counts = sorted(((values.count(v), v) for v in set(values)), reverse=True)
    if len(counts) > 1 and counts[0][0] == counts[1][0]:
        return None
    value = counts[0][1]
    options, letter, reading = choose(value, name, rng)
    return (f"Which {name} is there most often?", options, letter,
            f"{{tally}}, most are {value}. {reading}.", range(len(values)))


def ask_flash(values, name, facts, rng):
    i = next(i for i, fact in enumerate(facts) if fact.endswith("flash"))
    options, letter, reading = choose(values[i], name, rng)
    return (f"Which {name} is there when the light flashes?", options, letter,
            f"the flash is with {values[i]}. {reading}.", [i])


def ask_count(values, name, facts, rng):
    value = rng.choice(values)
    count = values.count(value)
    return (f"How many times is {value} there?", [], count, f"{{tally}}, so {value} {NUMBERS[count]}.",
            [i for i, v in enumerate(values) if v == value])


def ask_points(values, name, facts, rng):
    value, each = rng.choice(values), rng.choice([2, 3, 5])
    count = values.count(value)
    question = f"If each {name} counts {each} points, how many points does {value} make in all?"
    return (question, [], count * each,
            f"{{tally}}, so {value} {NUMBERS[count]}, times {each} is {count * each}.",
            [i for i, v in enumerate(values) if v == value])


def ask_change(values, name, facts, rng):
    return (f"How does the {name} change from first to last?", [], f"from {values[0]} to {values[-1]}",
            f"{facts[0]}, last {facts[-1]}.", [0, len(values) - 1])


def ask_ocr(values, name, facts, rng):
    return ("Which signs are there, in the order in which they come?", [], " ".join(values),
            f"they read {' '.join(values)}.", range(len(values)))


def ask_reverse(values, name, facts, rng):
    return ("Which signs are there, in the reverse of the order in which they come?", [],
            " ".join(reversed(values)), f"{listing(reversed(facts))}.", range(len(values)))


QUESTIONS = dict(after=ask_after, most=ask_most, flash=ask_flash, count=ask_count, points=ask_points,
                 change=ask_change, ocr=ask_ocr, reverse=ask_reverse)


# --- the scripted teacher -----------------------------------------------------------------------------------

def noticed(question, glance):
    """The indices of the facts in the order of the telling: all; or at a glance only those that the question
    needs, and where it needs them all the latest first."""
    everything = list(range(len(question["facts"])))
    if not glance:
        return everything
    return everything[::-1] if question["needed"] == everything else question["needed"]


def look(question, glance=False):
    """What is seen, in words."""
    facts = [question["facts"][i] for i in noticed(question, glance)]
    return f"the {question['name']}s{'' if glance else ' in order'}: {listing(facts)}."


def reason(question, glance=False):
    """The reasoning step by step, from what was seen."""
    seen = [question["values"][i] for i in noticed(question, glance)]
    return question["reason"].replace("{tally}", tally(seen))


def answer_of(question):
    return question["solution"][len("<answer>"):-len("</answer>")]


def trace(question, answer, glance=False, hasty=False):
    """A trace in the template; a hasty one thinks nothing but the answer."""
    thought = f"so {answer}." if hasty else reason(question, glance)
    return (f"<observation>{OBSERVATION_OPENING} {look(question, glance)}</observation> "
            f"<think>{THINK_OPENING} {thought}</think><answer>{answer}</answer>")


def teach(question, flaw, rng):
    """The teacher's raw trace, spoilt as `flaw` says (None: a good one). The teacher has two habits that lose
    nothing by its own eyes and wits: to glance, and to be hasty."""
    glance, hasty = rng.random() < GLANCE, rng.random() < HASTY
    answer = answer_of(question)
    if flaw == "wrong answer":
        while accuracy_reward(question["problem_type"], f"<answer>{answer}</answer>",
                              question["solution"]) >= 0.6:
            answer = {"multiple choice": rng.choice("ABCD"), "OCR": " ".join(rng.choices(SIGNS, k=3)),
                      "free-form": "nothing happens here"}.get(
                          question["problem_type"], str(rng.randrange(40)))
    text = trace(question, answer, glance, hasty)
    if flaw == "broken template":
        old, new = rng.choice([("</observation>", ""), ("<think>", ""), ("</answer>", ""),
                               ("</think>", "</think> so "), ("<observation>", "Sure. <observation>"),
                               ("<think>", "<think></observation>")])
        text = text.replace(old, new)
    elif flaw == "insufficient observation":
        fact = rng.choice(question["evidence"])
        text = text.replace(fact, fact.split()[0] + " something", 1)
    return text


# --- the files ----------------------------------------------------------------------------------------------

def prepare(seed, processes=2):
    """Write the media, the three splits and the traces; prints the counts."""
    start = time.time()
    rng = random.Random(seed)
    (HERE / "test.jsonl").unlink(missing_ok=True)  # its presence says that all is there
    (HERE / "media").mkdir(exist_ok=True)
    scenes, splits, traces = [], {}, []
    for split, size in SPLITS.items():
        splits[split] = []
        for _ in range(size // 2):
            scene = make_scene(rng)
            path = HERE / "media" / f"{len(scenes):04}.{'mp4' if scene['kind'] == 'clip' else 'png'}"
            scenes.append((scene, path))
            for _ in range(2):
                question = make_question(scene, rng)
                record = dict(problem_id=sum(map(len, splits.values())), path=f"./media/{path.name}",
                              data_type="video" if scene["kind"] == "clip" else "image", **question)
                flaw = rng.choice(FLAWS) if rng.random() < 0.25 else None
                if split == "cot":
                    traces.append(dict(problem_id=record["problem_id"], output=teach(question, flaw, rng),
                                       flaw=flaw))
                splits[split].append({field: record[field] for field in FIELDS})
    with ProcessPoolExecutor(processes, initializer=init_worker) as pool:
        list(pool.map(write_medium, *zip(*scenes), chunksize=50))
    write_jsonl(HERE / "traces.jsonl", traces)
    for split, records in splits.items():  # the test split last
        write_jsonl(HERE / f"{split}.jsonl", records)
    clips = sum(scene["kind"] == "clip" for scene, _ in scenes)
    print(f"data/toy: {clips} clips and {len(scenes) - clips} pictures; questions: "
          + listing(f"{name} {len(rows)}" for name, rows in splits.items())
          + f"; traces: {len(traces)}, spoilt on purpose: "
          + listing(f"{sum(t['flaw'] == flaw for t in traces)} {flaw}" for flaw in FLAWS)
          + f"; {time.time() - start:.0f} s, seed {seed}.")


# --- the stand-in for Qwen2.5-VL: the real classes, small, pre-trained here ---------------------------------

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
            "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
            "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# For servers such as `transformers serve`: a processor of images. The library's own for Qwen2.5-VL brings one
# of videos along, which needs torchvision; this one fills in the same places for images without.
PROCESSOR = {"processor_class": "PaddleOCRVLProcessor",
             "image_processor": {"image_processor_type": "Qwen2VLImageProcessorPil", "patch_size": 14,
                                 "merge_size": 2, "temporal_patch_size": 2,
                                 "size": {"shortest_edge": 784, "longest_edge": 100352}}}

# For `transformers serve`, which would otherwise cut the <think> block out of what a Qwen model replies, and
# what stands before it.
RESPONSE = {"defaults": {"role": "assistant"}, "start_anchor": "<|im_start|>assistant\n",
            "fields": {"content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"}}}

# What the base practises, in courses of (steps, gap, {task: share}): to look back; to reason about a written
# scene; to see; to reason about what it sees; and at the end the stages' own long prompt, which it mostly
# answers at once. A gap stands for a long instruction: so many positions at most are left out before the
# answer.
#
# What a model this small learns in minutes decides the order and the wording. Copying comes first and alone:
# then it is there after 350 steps, and looking up is learnt on top of it; mixed half and half with captions
# it was not there after 500, and letters were looked up no better than by chance ever after. Copying onwards
# from a match and counting equal words it learns; finding the word *before* a match, or stopping at one, it
# did not in 500 steps. So an option is looked up by turning the list round first: "red A, blue B, so blue B".
COURSES = [
    (350, 0, dict(copy=1)),
    (500, 0, dict(drill=0.7, written=0.3)),
    (450, 0, dict(drill=0.3, written=0.2, caption=0.5)),
    (600, 160, dict(drill=0.25, written=0.15, caption=0.2, seen=0.4)),
    (750, 160, dict(drill=0.15, written=0.05, caption=0.05, seen=0.2, brief=0.34, trace=0.21)),
]


def practice(rng, shares, words=()):
    """One pre-training sample: (scene or None, prompt text, completion text).

    copy: repeat random words, which teaches to look back. drill: every look-up that the questions need, many
    in one sample. written: a scene in words; repeat it in the template, reason. caption: list what is seen.
    seen: observe and reason in the template, asked for in three words. brief and trace: the stages' own
    prompt, answered at once or in the template; never for OCR and free-form questions, and in the template
    whenever the light flashes.
    """
    task = rng.choices(list(shares), weights=shares.values())[0]
    if task == "copy":
        text = " ".join(rng.sample(words, rng.randint(4, 16)))
        return None, f"Copy: {text}", text
    if task == "drill":
        return drill(rng)
    if task == "caption":
        return caption(rng)
    scene = make_scene(rng)
    question = make_question(scene, rng)
    while task in ("brief", "trace") and question["problem_type"] in ("OCR", "free-form"):
        scene = make_scene(rng)
        question = make_question(scene, rng)
    text = trace(question, answer_of(question))
    needs_steps = question["data_source"] == "toy-flash" and "trace" in shares
    if task == "trace" or task == "brief" and needs_steps:
        return scene, build_prompt(question), text
    if task == "brief":
        return scene, build_prompt(question), question["solution"]
    short = build_prompt(question, "{question}\nObserve, think, answer.")
    return (scene, short, text) if task == "seen" else (None, f"{look(question)}\n{short}", text)


def drill(rng):
    """(None, prompt text, completion text): count, say what comes after, look up letters, in any order; then
    carry conclusions over into answers."""
    names = list(rng.choice([COLOURS, SHAPES]))
    palette = rng.sample(names, 3)
    values = rng.choices(palette, k=rng.randint(4, 5))
    options = palette + [rng.choice([name for name in names if name not in palette])]
    rng.shuffle(options)
    facts = [f"{ordinal} {value}" for ordinal, value in zip(ORDINALS, values)]
    after = [f"after {value}, {fact}" for value, fact in zip(values, facts[1:]) if values.count(value) == 1]
    parts = [tally(values), listing(after), look_up(options, rng.sample(options, 3))]
    rng.shuffle(parts)
    ends = ([(f"{value} {NUMBERS[values.count(value)]}", values.count(value)) for value in set(values)]
            + [(f"{value} {letter}", letter) for letter, value in zip("ABCD", options)])
    parts += [f"so {said}.</think><answer>{answer}</answer>"
              for said, answer in rng.sample(sorted(ends, key=str), 3)]
    return (None, f"{listing(facts)}.\nOptions:\n" + "\n".join(
        f"{letter}. {value}" for letter, value in zip("ABCD", options)),
        " ".join(part if part.endswith(">") else f"{part}." for part in parts if part))


def caption(rng):
    """(scene, prompt text, completion text) of a caption; short clips and lone figures make the first lessons
    easy."""
    scene = make_scene(rng, (1, 2, 2, 3, 4, 5), (1, 4))
    name = "sign" if scene["has_signs"] else rng.choice(["colour", "shape"])
    facts = [f"{ordinal} {value}" for ordinal, value in
             zip(ORDINALS, scene["colours"] if name == "colour" else scene["figures"])]
    if scene["flash"] is not None and rng.random() < 0.5:
        facts[scene["flash"]] += " with a flash"
        return scene, f"List the {name}s in order and the flash.", listing(facts) + "."
    return scene, f"List the {name}s in order.", listing(facts) + "."


def make_tokenizer(seed):
    """A byte-level BPE tokenizer of the released models' kind, its merges learnt on toy text."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import Qwen2Tokenizer
    frame = Qwen2Tokenizer()  # brings the released models' pre-tokenisation
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = frame.backend_tokenizer.pre_tokenizer
    rng = random.Random(seed)
    shares = dict(caption=1, seen=1, trace=1, drill=1)
    texts = [part for _ in range(4000) for part in practice(rng, shares)[1:]]
    texts += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 500
    from tokenizers.pre_tokenizers import ByteLevel
    raw.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    bpe = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(m) for m in bpe["merges"]],
                               eos_token="<|im_end|>", pad_token="<|endoftext|>",
                               extra_special_tokens=SPECIALS)
    tokenizer.init_kwargs["image_token"] = "<|image_pad|>"  # for PROCESSOR, once saved
    tokenizer.response_template = RESPONSE
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed):
    """Qwen2.5-VL at 1.2 million parameters, random weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(seed)
    ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(SPECIALS)))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6,
            tie_word_embeddings=True, initializer_range=0.06, bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 6, 6])),
        vision_config=dict(
            depth=2, hidden_size=96, intermediate_size=192, num_heads=4, out_hidden_size=128,
            tokens_per_second=2, fullatt_block_indexes=[1], initializer_range=0.06),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config)


def encode_practice(sample, tokenizer, config, gap=0):
    """A practice sample as (sft.Prompt, completion ids); clips are drawn at the times the stages would
    sample. The prompt's last tokens and the completion stand `gap` positions further off, as if a long
    instruction stood before them."""
    import torch
    import sft
    scene, text, completion = sample
    completion_ids = torch.tensor(tokenizer(completion + "<|im_end|>", add_special_tokens=False)["input_ids"])
    if scene is None:
        prompt = sft.encode_text(text, tokenizer)
    elif scene["kind"] == "picture":
        prompt = sft.encode_prompt(text, draw_frames(scene, [0]), None, tokenizer, config)
    else:
        seconds = len(scene["colours"])
        times = sample_indices(np.arange(seconds * FPS) / FPS, seconds) / FPS
        prompt = sft.encode_prompt(text, draw_frames(scene, times), len(times) / seconds, tokenizer, config)
    prompt.positions = prompt.positions.clone()
    prompt.positions[:, -5:] += gap  # <|im_end|>, and the tokens that open the assistant's turn
    return prompt, completion_ids


class Practice:
    """Endless batches of one seed, samples of like length together; pickled whole,
    which is fast between processes."""

    def __init__(self, seed, gap, shares, tokenizer, config, batch=32, pool=8):
        self.rng, self.gap, self.shares = random.Random(seed), gap, shares
        self.tokenizer, self.config = tokenizer, config
        self.batch, self.pool = batch, pool
        self.words = sorted(tokenizer.decode(i).strip() for token, i in tokenizer.get_vocab().items()
                            if token[0] == "Ġ" and token[1:].isalnum())  # each a token of its own

    def __iter__(self):
        while True:
            samples = [practice(self.rng, self.shares, self.words) for _ in range(self.batch * self.pool)]
            samples.sort(key=lambda s: (s[0] is None, len(s[1]) + len(s[2])))
            batches = [samples[i:i + self.batch] for i in range(0, len(samples), self.batch)]
            self.rng.shuffle(batches)
            for batch in batches:
                encoded = []
                for sample in batch:
                    gap = 0 if len(sample[1]) > len(PROMPT) else self.rng.randint(0, self.gap)
                    encoded.append(encode_practice(sample, self.tokenizer, self.config, gap))
                yield pickle.dumps(encoded)


def orthogonalise(matrix, steps=5):
    """The nearest matrix with all singular values near 1, by Newton-Schulz (Muon, Jordan et al. 2024)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_step(parameters, momenta, lr, momentum=0.95, weight_decay=0.5):
    """One step of Muon on matrices. After 300 steps of copying its loss is 1.3 where AdamW's is 2.8;
    torch.optim.Muon computes in bfloat16, which made a step four times slower on a CPU without it."""
    for parameter, average in zip(parameters, momenta):
        average.lerp_(parameter.grad, 1 - momentum)
        update = orthogonalise(parameter.grad.lerp(average, momentum))
        scale = max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5
        parameter.data.mul_(1 - weight_decay * lr).add_(update, alpha=-lr * scale)
        parameter.grad = None


def pretrain(seed, folder, no_template=False, muon_lr=0.02, adam_lr=2e-3):
    """Train the small model through the courses, all parameters, and save it in 16 bits after each. With
    no_template it answers the stages' own prompt at once, always."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset
    import sft

    class Stream(Practice, IterableDataset):
        pass

    torch.set_num_threads(1)  # a second thread slows matrices this small
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer, seed)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}",
          flush=True)
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, done, total = time.time(), 0, sum(course[0] for course in COURSES)
    for number, (steps, gap, shares) in enumerate(COURSES, 1):
        if no_template and "trace" in shares:
            shares = dict(shares, brief=shares["brief"] + shares["trace"])
            del shares["trace"]
        stream = Stream(seed + number, gap, shares, tokenizer, model.config)
        loader = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8))
        running = None
        for step in range(1, steps + 1):
            done += 1
            rate = min(done / 100, 1, (total + 1 - done) / (0.7 * total))  # up, flat, and long down
            prompts, completions = zip(*pickle.loads(next(loader)))
            sft.embed_prompts(model, prompts)  # with gradients, as nothing is frozen here
            loss = sft.sft_loss(model, prompts, completions) / sum(map(len, completions))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon_step(matrices, momenta, muon_lr * rate)
            adam.param_groups[0]["lr"] = adam_lr * rate
            adam.step()
            adam.zero_grad()
            running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
            if step % 50 == 0:
                print(f"course {number}, step {step}/{steps}: loss {running:.3f}, "
                      f"{(time.time() - start) / 60:.1f} min", flush=True)
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")


def get_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the data, or of the base with --pretrain")
    parser.add_argument("--pretrain", action="store_true", help="make the base model instead of the data")
    parser.add_argument("--no-template", action="store_true",
                        help="with --pretrain: a base that never sees the template in the stages' own prompt")
    parser.add_argument("--folder", default=HERE / "base", type=Path,
                        help="where --pretrain writes the model")
    return parser.parse_args()


def main(args):
    if args.pretrain:
        pretrain(args.seed, args.folder, args.no_template)
    else:
        prepare(args.seed)


if __name__ == "__main__":
    run_script(main, get_args)
