"""Write it yourself: a folder with the five files, in which eight functions have lost their bodies.

    python docs/exercises/start.py my       # makes the folder my; its README.md says what to write
    python docs/exercises/check.py my       # runs the project's own tests of each function on yours
"""
import ast
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ["rewards.py", "gen_cot.py", "sft.py", "pagrpo.py", "evaluate.py"]
FUNCTIONS = {  # from easy to hard: the file, and the paragraph of the README
    "length_reward": ("rewards.py", """\
The bonus for a segment of the right length. The docstring says all. Usual mistake: an end of the range is
left out, or an unknown accuracy (None or NaN) is paid for."""),
    "group_advantages": ("pagrpo.py", """\
Eq. 6 with P3 and P6. Usual mistakes: the biased std; tiny advantages where all rewards are equal. In floats
the mean of eight times 0.1 is not 0.1, so compare the rewards with each other, not their std with 0."""),
    "process_advantages": ("pagrpo.py", """\
Eq. 6 for each process by `group_advantages`, and the rows of P7. In the rows marked * both processes get the
same advantage. With N for `group_advantages` it is N(R_R) without "perception", N(R_P) without "reasoning".
Usual mistake: two rows are confused. "separation" adds up the rewards, "assignment" the advantages."""),
    "format_rewards": ("rewards.py", """\
Choice R1. The docstring, and `SKETCH` above the function, show a way. Usual mistake: one regular expression
for the whole completion. A fault in one process's part must cost the other nothing."""),
    "segment_masks": ("pagrpo.py", """\
Choice P1, on the ids: decode each by itself. The tokenizer that you get has `decode` and `eos_token_id`, no
more. Tags are looked for in the whole text: without `<observation>` all is reasoning's; else the first
`</observation>` ends perception, wherever it is; else the first `<think>` does. Usual mistake: off by one.
The token that completes `</observation>` is perception's, whatever else it holds. Where the observation is never
closed, the token in which `<think>` begins is reasoning's."""),
    "pa_grpo_loss": ("pagrpo.py", """\
Eq. 7 with a minus; P2 and P4. `clip_frac` is the share of tokens whose clipped term is the smaller one. Usual
mistakes: the KL the wrong way round; no clamp to ±10; a sum over completions for their mean; means over
padding, too; NaN for a completion that lacks a segment. Return the metrics, too."""),
    "rope_positions": ("sft.py", """\
Choice S1. `grid_thw` counts patches; `spatial_merge_size` of them in each direction of space are one token.
Usual mistakes: the text goes on after the last time instead of after the largest position of all axes;
4 · 2 · 11.625 must be 93, where floats can make it 92.999…"""),
    "shared_prefix_attention": ("pagrpo.py", """\
The docstring of `token_logprobs` says why it is exact. `module.scaling` is the scale. Without `lengths`,
return `sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)`. Usual mistake:
`is_causal=True` for completions. With more keys than queries, PyTorch then shows the first query the first
key alone. See `causal_lower_right`."""),
}
README = """\
# Eight functions to write

Replace each `raise NotImplementedError`. The equations and choices (P1, R1 …) are in the docstring at the top
of each file. From the project's folder, all of them or one:

    python docs/exercises/check.py {folder}
    python docs/exercises/check.py {folder} length_reward

While one is checked, the other seven have the project's bodies: write them in any order. When all are done,
the README's quick start runs in this folder, on your code. `data` is a link to the project's.
"""


@functools.cache
def nodes(source):
    """Of a file's text: the syntax trees of those FUNCTIONS that it holds, by name."""
    return {node.name: node for node in ast.parse(source).body if getattr(node, "name", None) in FUNCTIONS}


def start(folder):
    folder.mkdir(parents=True)
    for file in FILES:
        source = (ROOT / file).read_text()
        lines = source.splitlines(keepends=True)
        for node in reversed(nodes(source).values()):  # the last first, so that line numbers stay true
            lines[node.body[0].end_lineno:node.end_lineno] = ["    raise NotImplementedError\n"]
        (folder / file).write_text("".join(lines))
    (folder / "data").symlink_to(ROOT / "data")
    paragraphs = [f"\n## {name} ({file})\n\n{text}\n" for name, (file, text) in FUNCTIONS.items()]
    (folder / "README.md").write_text(README.format(folder=folder) + "".join(paragraphs))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} exists already: give another name.")
    start(Path(sys.argv[1]))
    print(f"Read {sys.argv[1]}/README.md. Then: python docs/exercises/check.py {sys.argv[1]}")
