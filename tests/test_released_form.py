"""The released Qwen2.5-VL models as they lie on the hub, at the toy base's size: flat config, old names of
weights, shards, tokens, chat template and generation config. Every stage runs on them."""
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import gen_cot
import pagrpo
import sft
from conftest import ROOT

BASE = ROOT / gen_cot.MODELS["tiny"]
SPARE_ROWS = {"3B": 151936 - 151665, "7B": 152064 - 151665}  # of the head, behind the last token
TIED = {"3B": True, "7B": False}
DTYPE = {"3B": torch.float32, "7B": torch.bfloat16}  # of the stages' pass, both with nf4
SPECIAL = [f"<|{name}|>" for name in """endoftext im_start im_end object_ref_start object_ref_end box_start
           box_end quad_start quad_end vision_start vision_end vision_pad image_pad video_pad""".split()]
PLAIN = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in """fim_prefix fim_middle fim_suffix
         fim_pad repo_name file_sep""".split())]  # added, but not special; from 151643 to 151664
CHAT_TEMPLATE = """{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
{% set image_count.value = image_count.value + 1 %}\
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' or 'video' in content %}\
{% set video_count.value = video_count.value + 1 %}\
{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_json(path, data):
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def added_token(i, content):
    return dict(content=content, lstrip=False, normalized=False, rstrip=False, single_word=False,
                special=content in SPECIAL) | ({} if i is None else dict(id=i))


def write_tokenizer(folder):
    """The base's 676 tokens of text, then the 22 added ones in the released order. Returns {token: id}."""
    data = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, first = data["model"]["vocab"], len(data["model"]["vocab"])
    ids = {content: first + i for i, content in enumerate(SPECIAL + PLAIN)}
    added = [added_token(i, content) for content, i in ids.items()]
    write_json(folder / "tokenizer.json", data | dict(added_tokens=added))
    write_json(folder / "vocab.json", vocabulary)
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", dict(
        add_bos_token=False, add_prefix_space=False, bos_token=None, eos_token="<|im_end|>", errors="replace",
        added_tokens_decoder={str(i): added_token(None, content) for content, i in ids.items()},
        additional_special_tokens=SPECIAL[1:], chat_template=CHAT_TEMPLATE, model_max_length=131072,
        clean_up_tokenization_spaces=False, pad_token="<|endoftext|>", split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer", unk_token=None))
    return vocabulary | ids


def write_configs(folder, ids, rows, tied):
    new = json.loads((BASE / "config.json").read_text())
    text, vision = new["text_config"], new["vision_config"]
    same = ("attention_dropout", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
            "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
            "rms_norm_eps", "use_cache", "use_sliding_window")
    flat = {name: text[name] for name in same} | dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", torch_dtype="bfloat16",
        max_window_layers=28, sliding_window=32768, tie_word_embeddings=tied, transformers_version="4.41.2",
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], vocab_size=rows,
        rope_theta=text["rope_parameters"]["rope_theta"],
        rope_scaling=dict(type="mrope", mrope_section=text["rope_parameters"]["mrope_section"]))
    for name in ("vision_start", "vision_end", "image", "video"):
        flat[f"{name}_token_id"] = ids[f"<|{name}|>" if "vision" in name else f"<|{name}_pad|>"]
    kept = ("depth", "hidden_act", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size",
            "patch_size", "spatial_merge_size", "window_size", "fullatt_block_indexes", "tokens_per_second",
            "temporal_patch_size")
    flat["vision_token_id"] = ids["<|vision_pad|>"]
    flat["vision_config"] = {name: vision[name] for name in kept} | dict(in_chans=3, spatial_patch_size=14)
    write_json(folder / "config.json", flat)
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    write_json(folder / "generation_config.json", dict(
        bos_token_id=ends[1], pad_token_id=ends[1], eos_token_id=ends, do_sample=True, temperature=0.000001,
        repetition_penalty=1.05, transformers_version="4.49.0"))


def write_weights(folder, ids, rows, tied):
    """The base's weights. What must never be sampled is as likely as `<`, with which a trace begins."""
    weights, old = load_file(BASE / "model.safetensors"), sft.AutoTokenizer.from_pretrained(BASE).get_vocab()
    table = weights["model.embed_tokens.weight"]
    wide = table[old["<"]].repeat(rows, 1)
    for token, i in ids.items():
        if token in old:
            wide[i] = table[old[token]]
    weights["model.embed_tokens.weight"] = wide
    if not tied:
        weights["lm_head.weight"] = wide.clone()
    names, places = sorted(weights), {}
    for n, part in ((1, names[:40]), (2, names[40:])):
        shard = f"model-{n:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    size = dict(total_size=sum(weight.numel() * 2 for weight in weights.values()))
    write_json(folder / "model.safetensors.index.json", dict(metadata=size, weight_map=places))


@pytest.fixture(scope="module", params=["3B", "7B"])
def released(request, tmp_path_factory):
    """(size, folder of the model)"""
    folder = tmp_path_factory.mktemp("hub") / f"Qwen2.5-VL-{request.param}-Instruct"
    folder.mkdir()
    ids = write_tokenizer(folder)
    rows = len(ids) + SPARE_ROWS[request.param]
    write_configs(folder, ids, rows, TIED[request.param])
    write_weights(folder, ids, rows, TIED[request.param])
    return request.param, folder


def test_it_loads_whole_with_the_right_layers_in_four_bits(released, capsys):
    size, folder = released
    model, tokenizer = sft.load_base(str(folder))  # raises where a weight is missing
    said = capsys.readouterr().out
    assert f"{folder}: 28 of 41 linear layers in 4 bits" in said
    four_bit = [name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(four_bit) == 28 and all("language_model.layers" in name for name in four_bit)
    table, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert (table.data_ptr() == head.data_ptr()) == TIED[size] and torch.equal(table, head)
    assert len(head) == 676 + 22 + SPARE_ROWS[size] and len(tokenizer) == 676 + 22
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert [tokenizer.convert_ids_to_tokens(676 + i) for i in range(22)] == SPECIAL + PLAIN
    allowed = set(range(len(head))) - set(pagrpo.banned_ids(tokenizer, len(head)))
    assert allowed == {*range(676), tokenizer.eos_token_id}


def test_its_chat_format_is_ours_and_texts_cannot_write_its_tokens(released):
    tokenizer = sft.AutoTokenizer.from_pretrained(released[1])
    chat = [dict(role="user", content=[dict(type="video"), dict(type="text", text="Why?")])]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == sft.CHAT.format(medium="<|video_pad|>", prompt="Why?")
    evil = "".join(SPECIAL + PLAIN)
    prompt = sft.encode_text(evil, tokenizer).input_ids.tolist()
    plain = sft.encode_text("", tokenizer).input_ids.tolist()
    assert [i for i in prompt if i >= 676] == [i for i in plain if i >= 676]
    target = sft.target_ids(dict(output=f"<think>{evil}</think>"), tokenizer).tolist()
    assert [i for i in target if i >= 676] == [tokenizer.eos_token_id]


def test_its_states_are_those_of_the_same_weights_in_the_new_form(released, toy_records):
    """Else a number of the old config, such as the base of the positions' angles, was passed over."""
    record = next(r for r in toy_records if r["data_type"] == "video")
    states, prompts = [], []
    for base in (str(BASE), str(released[1])):
        model, tokenizer = sft.load_base(base, four_bit=False)
        media = gen_cot.read_media(record, 8, 4)
        prompts.append(sft.encode_prompt(record["problem"], *media, tokenizer, model.config))
        with torch.no_grad():
            sft.embed_prompts(model, prompts[-1:])
            states.append(model.model.language_model(
                inputs_embeds=prompts[-1].embeds[None], position_ids=prompts[-1].positions[:, None],
                attention_mask=torch.ones(1, len(prompts[-1].input_ids))).last_hidden_state)
    assert torch.equal(prompts[0].positions, prompts[1].positions)
    assert torch.allclose(*states, atol=1e-4) and states[0].std() > 0.1


def run_stage(monkeypatch, command, folder, records):
    """`python COMMAND` with the released models' own defaults but for sizes, in here."""
    root = Path(records[0]["media"]).parents[1]
    flags = ["--model", folder, "--data", root / "records.json", "--media-root", root, "--max-pixels", 4,
             "--num-frames", 4, "--workers", 1]
    monkeypatch.setattr(sys, "argv", [*command.split(), *map(str, flags)])
    stage = importlib.import_module(command.split(".py")[0])
    stage.main(stage.get_args())


def test_every_stage_runs_on_it_and_samples_no_banned_token(
        released, toy_records, tmp_path, monkeypatch, capsys):
    """With its generation config, a group would be one completion over and over, and <|endoftext|> an end."""
    size, folder = released
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "pick_device", lambda: (torch.device("cpu"), DTYPE[size]))
    monkeypatch.setattr(sft, "plot_curves", lambda *args: None)
    sampled, rollout = [], pagrpo.rollout

    def watched(*args):
        sampled.append(rollout(*args))
        return sampled[-1]

    monkeypatch.setattr(pagrpo, "rollout", watched)
    monkeypatch.setattr(evaluate, "rollout", watched, raising=False)
    run_stage(monkeypatch, "sft.py --limit 8 --batch-size 4 --micro-batch 2 --lora-rank 8 --lr 2e-3", folder,
              toy_records)
    run_stage(monkeypatch, "pagrpo.py --updates 2 --prompts-per-update 2 --num-generations 4 --lora-rank 8 "
              "--lr 1e-3 --max-completion-tokens 24", folder, toy_records)
    groups = [ids for ids, _, _ in sampled if len(ids) == 8 and ids.shape[1] <= 24]
    assert len(groups) >= 2 and all(len(ids[:4].unique(dim=0)) > 1 for ids in groups)
    run_stage(monkeypatch, "evaluate.py --limit 4 --batch-size 2 --max-completion-tokens 24", folder,
              toy_records)
    seen = torch.cat([ids[mask] for ids, mask, _ in sampled]).unique().tolist()
    assert len(seen) > 20 and not [i for i in seen if i >= 676 and i != 676 + SPECIAL.index("<|im_end|>")]
    for stage in ("sft", "pagrpo"):
        rows = gen_cot.read_json(Path("runs", folder.name, stage, "metrics.jsonl"))
        assert len(rows) == 2 and all(row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in rows)
    assert all(row["logprob_gap"] < (1e-3 if size == "3B" else 0.1) for row in rows)
    assert "SFT + PA-GRPO" in capsys.readouterr().out
