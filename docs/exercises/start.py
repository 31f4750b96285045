"""Write it yourself: a folder with the five files, in which eight functions have lost their bodies.

    python docs/exercises/start.py my                      # makes the folder my; its README.md says what to write
    python docs/exercises/check.py my                      # runs the project's tests of each function on yours
"""
import argparse
import ast
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ["rewards.py", "gen_cot.py", "sft.py", "pagrpo.py", "evaluate.py"]
FUNCTIONS = {  # from easy to hard: its file, its paragraph in the README
    "length_reward": ("rewards.py", """The bonus for a segment of the right length. The docstring says all.
Usual mistake: an end of the range is left out, or an unknown accuracy (None or NaN) is paid for."""),
    "group_advantages": ("pagrpo.py", """Eq. 6 with P3 and P6. Usual mistakes: the biased std; equal rewards that
get tiny advantages. The mean of eight times 0.1 is not exactly 0.1 in floats: compare rewards, not std with 0."""),
    "process_advantages": ("pagrpo.py", """Eq. 6 for each process, and the rows of P7, by `group_advantages`.
Usual mistake: to confuse two rows. "separation" adds up the rewards, "assignment" the advantages."""),
    "format_rewards": ("rewards.py", """Choice R1. The docstring and `SKETCH` above it show a way. Usual mistake: one
regular expression for the whole completion. A fault in one process's part must cost the other nothing."""),
    "segment_masks": ("pagrpo.py", """Choice P1, on the ids: decode each by itself. Usual mistake: off by one at a
tag. The token that completes `</observation>` is perception's. The token in which the `<think>` of an unclosed
observation begins is reasoning's."""),
    "pa_grpo_loss": ("pagrpo.py", """Eq. 7 with a minus, with P2 and P4. `clip_frac` is the share of tokens at which
`min` takes the clipped term and that is the smaller. Usual mistakes: the KL the wrong way round; a mean over
padding, too; NaN for a completion that lacks a segment."""),
    "rope_positions": ("sft.py", """Choice S1. `grid_thw` counts patches, but `spatial_merge_size`² of them are one
token. `second_per_grid` is already per temporal patch. Usual mistakes: text that goes on at the last position of
time, not at the largest of all axes; a floor of floats (4 · 2 · 11.625 must be 93, not 92)."""),
    "shared_prefix_attention": ("pagrpo.py", """The mask of `token_logprobs`, without a mask. Where `lengths` is None
return `sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)`. The scale is
`module.scaling`. Usual mistake: `is_causal=True` for completions. Where there are more keys than queries, PyTorch
then lets the first query see the first key alone; `causal_lower_right` is for this."""),
}
README = """# Eight functions to write

Write what is `raise NotImplementedError` now. Equations and choices (P1, R1 …) are in the docstring at the top of
each file. `data` is a link to the project's. In the project's folder, all eight or one:

    python docs/exercises/check.py {folder}
    python docs/exercises/check.py {folder} length_reward

A function is checked with the project's own bodies of the other seven: the order is yours. When all are done,
the README's quick start runs in this folder, on your code.
"""


@functools.cache
def nodes(source):
    """Those of FUNCTIONS that a file's text holds, by name: nodes of `ast`."""
    return {node.name: node for node in ast.parse(source).body if getattr(node, "name", None) in FUNCTIONS}


def start(folder):
    folder.mkdir(parents=True)
    for file in FILES:
        source = (ROOT / file).read_text()
        lines = source.splitlines(keepends=True)
        for node in reversed(nodes(source).values()):  # the last first: the lines before it stay in place
            lines[node.body[0].end_lineno:node.end_lineno] = ["    raise NotImplementedError\n"]
        (folder / file).write_text("".join(lines))
    (folder / "data").symlink_to(ROOT / "data")
    paragraphs = [f"\n## `{name}`, {file}\n\n{text}\n" for name, (file, text) in FUNCTIONS.items()]
    (folder / "README.md").write_text(README.format(folder=folder) + "".join(paragraphs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to make")
    folder = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"{folder} exists already: give another name.")
    start(folder)
    print(f"Read {folder}/README.md, then: python docs/exercises/check.py {folder}")
