#!/usr/bin/env bash
# transformers 5.24.0: `transformers serve` loses what a Qwen model writes before <think>, unless it streams.
#
# For a Qwen tokenizer without a `response_template`, as the released Qwen2.5-VL's, the server has a template of
# its own. Text before <think> is its field `content`. Text after </think> is that field once more, and replaces
# the first. So the reply lacks the first text, though its tokens are counted. The streamed reply has both. Here
# the server's own functions read one reply of such a model, whole and character by character. Our traces begin
# with <observation>: so the toy's tokenizer has a `response_template`, and docs/serving.md tells of it.
#
# Seen with transformers 5.24.0 on Python 3.11, Linux:
#   whole: 'There are 2.' | streamed: 'First I count. There are 2.' | thought: 'One, two.', 'One, two.'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/parse.py" <<'PY'
from types import SimpleNamespace

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.utils import (ReasoningText, build_response_parser, parse_assistant_message,
                                            response_events_to_chunks)

prompt = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
reply = "First I count. <think>One, two.</think>There are 2.<|im_end|>"

# a tokenizer whose tokens are characters
characters = {character: i for i, character in enumerate(sorted(set(prompt + reply)))}
backend = Tokenizer(models.WordLevel(characters, unk_token="?"))
backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
backend.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
prompt_ids, reply_ids = (tokenizer(text)["input_ids"] for text in (prompt, reply))
assert tokenizer.decode(prompt_ids) == prompt and tokenizer.decode(reply_ids) == reply
model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl"))  # all that is read of it

whole, thought, _ = parse_assistant_message(tokenizer, model, reply_ids, prompt_ids)
parser = build_response_parser(tokenizer, model, prompt_ids)
events = [event for character in reply for event in parser.feed(character)]
chunks = response_events_to_chunks(events + parser.finalize()[1])
streamed, streamed_thought = ("".join(chunk for chunk in chunks if isinstance(chunk, ReasoningText) is is_thought)
                              for is_thought in (False, True))
print(f"whole: {whole!r} | streamed: {streamed!r} | thought: {thought!r}, {streamed_thought!r}")
PY
said=$("$folder/venv/bin/python" "$folder/parse.py" 2>/dev/null)
echo "$said"
test "$said" = "whole: 'There are 2.' | streamed: 'First I count. There are 2.' | thought: 'One, two.', 'One, two.'"
