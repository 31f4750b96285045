#!/usr/bin/env bash
# transformers 5.24.0: the text after a clip starts at a position in the middle of the clip; in 4.57.6 after it.
#
# Qwen2.5-VL counts positions on three axes. A clip of six temporal patches, one second each, is followed by two
# tokens of text. With 4.57.6 the text goes on after the clip's last patch. With 5.24.0 it goes on after the
# clip's width: time goes back, and the text has positions in the midst of the clip's. vLLM 0.33.0 and sglang
# 0.5.23 do, in their source, what 4.57.6 did. So `sft.rope_positions` makes the positions itself.
#
# Seen with transformers 4.57.6, 5.24.0 and torch 2.13.0 on Python 3.11, Linux:
#   4.57.6: time [0, 1, 2, 4, 6, 8, 10, 12, 13, 14] | 5.24.0: time [0, 1, 2, 4, 6, 8, 10, 12, 3, 4]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/positions.py" <<'PY'
import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = Qwen2_5_VLConfig(
    text_config=dict(sizes, num_key_value_heads=2, vocab_size=100,
                     rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}),
    vision_config=dict(depth=1, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=32,
                       tokens_per_second=2),
    vision_start_token_id=90, vision_end_token_id=91, image_token_id=92, video_token_id=93)
model = Qwen2_5_VLModel(config)

ids = torch.tensor([[1, 90] + [93] * 6 + [91, 2]])  # text, vision start, six patches, vision end, text
kinds = {} if transformers.__version__ < "5" else dict(mm_token_type_ids=2 * (ids == 93).int())
positions, _ = model.get_rope_index(ids, **kinds, video_grid_thw=torch.tensor([[6, 2, 2]]),
                                    second_per_grid_ts=torch.tensor([1.0]))
print(f"{transformers.__version__}: time {positions[0, 0].tolist()}")
PY
for version in 4.57.6 5.24.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q transformers==$version torch==2.13.0 numpy==2.4.6
done
said=$(for version in 4.57.6 5.24.0; do "$folder/$version/bin/python" "$folder/positions.py" 2>/dev/null; done)
said="${said/$'\n'/ | }"
echo "$said"
old="4.57.6: time [0, 1, 2, 4, 6, 8, 10, 12, 13, 14]" new="5.24.0: time [0, 1, 2, 4, 6, 8, 10, 12, 3, 4]"
test "$said" = "$old | $new"
