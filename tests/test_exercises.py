"""docs/exercises/: the project's own bodies are done, and typical wrong ones are not."""
import ast
import json
import subprocess
import sys

from conftest import ROOT

EXERCISES = ROOT / "docs/exercises"
sys.path.insert(0, str(EXERCISES))
import start  # noqa: E402

WRONG = {
    "length_reward": [("low <= num_tokens <= high", "low < num_tokens < high"),
                      ("(accuracy or 0) > 0 and format > 0", "accuracy and format")],  # NaN is true
    "group_advantages": [("values.std()", "values.std(unbiased=False)"),
                         ("len(values) > 1 and values.max() > values.min()", "len(values) > 1"),
                         ("known = ~torch.isnan(rewards)", "known = torch.ones_like(rewards) > 0")],
    "process_advantages": [("return perception, reasoning", "return reasoning, perception"),
                           ('if without == "assignment"', 'if without == "separation"')],
    "format_rewards": [('float(after == "T.tA.a")', 'float(sketch == "O.oT.tA.a")'),
                       ('before == "O."', '"O." in before')],
    "segment_masks": [('len("</observation>")).sum()) + 1', 'len("</observation>")).sum())'),
                      ("(ends <= text", "(ends < text"), ("eos_token_id) + 1 if", "eos_token_id) if")],
    "pa_grpo_loss": [("loss = -sum", "loss = sum"), ("ref_logprobs - logprobs", "logprobs - ref_logprobs"),
                     ("torch.min(", "torch.max("), ("mask.sum(1).clamp(min=1)", "mask.sum(1)"),
                     ("mask.sum(1).clamp(min=1)", "mask.shape[1]"), ("(kl.detach() * both)", "kl.detach()"),
                     ("- beta * kl", "- beta * kl.detach()"), (".clamp(-10, 10)", ""),
                     ("(clipped < surrogate)", "(clipped != surrogate)"),
                     ("(kl.detach() * both).sum() / tokens", "((kl * both).sum(1) / both.sum(1)).mean()")],
    "rope_positions": [("vision.tokens_per_second * seconds", "seconds"), ("times + 1e-6", "times"),
                       ("h // vision.spatial_merge_size", "h"),
                       ("int(blocks[-1].max()) + 1", "int(blocks[-1][0, -1]) + 1")],
    "shared_prefix_attention": [("if i > 0:", "if False:"), (", scale=module.scaling", ""),
                                ("k, v, causal,", "k, v, is_causal=True,"),
                                (".transpose(1, 2), None", ", None")],
}
RUN = """import check, json, pathlib, sys
print(json.dumps([check.check(pathlib.Path(folder), name) for folder, name in json.loads(sys.argv[1])]))"""


def write_function(folder, name, old="", new=""):
    """Give a function in a folder of start.py's the project's body, with `old` replaced by `new`."""
    file = start.FUNCTIONS[name][0]
    target, source = (folder / file).read_text(), (ROOT / file).read_text()
    own, given = start.nodes(target)[name], start.nodes(source)[name]
    body = "".join(source.splitlines(True)[given.lineno - 1:given.end_lineno])
    assert old in body, f"{name} has no {old!r} any more"
    lines = target.splitlines(True)
    lines[own.lineno - 1:own.end_lineno] = body.replace(old, new) if old else body
    (folder / file).write_text("".join(lines))


def test_start_takes_eight_bodies_and_nothing_else(tmp_path):
    start.start(tmp_path / "my")
    for name, (file, _) in start.FUNCTIONS.items():
        node = start.nodes((tmp_path / "my" / file).read_text())[name]
        assert len(node.body) == 2 and ast.unparse(node.body[1]) == "raise NotImplementedError"
        write_function(tmp_path / "my", name)
    for file in start.FILES:
        assert (tmp_path / "my" / file).read_text() == (ROOT / file).read_text()
    assert (tmp_path / "my/data/toy/base").is_dir()


def test_the_command_lines(tmp_path):
    def run(script, *args):
        command = [sys.executable, EXERCISES / script, *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("check.py", "my").stderr == "No pagrpo.py in my: make the folder with start.py.\n"
    assert "Read my/README.md" in run("start.py", "my").stdout
    (tmp_path / "my/README.md").write_text("mine")
    assert run("start.py", "my").stderr == "my exists already: give another name.\n"
    assert (tmp_path / "my/README.md").read_text() == "mine"
    checked = run("check.py", "my", "length_reward")
    assert (checked.stdout, checked.returncode) == ("length_reward           not written yet\n", 1)


def test_right_bodies_are_done_and_wrong_ones_fail(tmp_path):
    """Each half of the functions without the other, then all mistakes. Checked in one run, as an import of
    torch takes seconds."""
    cases, expected = [], []
    for half in (0, 1):
        folder = tmp_path / f"half{half}"
        start.start(folder)
        for i, name in enumerate(start.FUNCTIONS):
            if i % 2 == half:
                write_function(folder, name)
            cases.append((str(folder), name))
            expected.append(None if i % 2 == half else "not written yet")
    for i in range(max(map(len, WRONG.values()))):
        folder = tmp_path / f"wrong{i}"
        start.start(folder)
        for name in start.FUNCTIONS:
            if i < len(WRONG[name]):
                write_function(folder, name, *WRONG[name][i])
                cases.append((str(folder), name))
                expected.append("fails")
    command = [sys.executable, "-c", RUN, json.dumps(cases)]
    run = subprocess.run(command, cwd=EXERCISES, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout)
    for case, text, wanted in zip(cases, found, expected, strict=True):
        assert (text and text.split(" in tests/")[0]) == wanted, case
    biased = found[cases.index((str(tmp_path / "wrong0"), "group_advantages"))]
    assert biased.splitlines()[1].strip() == "rewards = [1.0, 2.0, nan, 3.0]"
    assert biased.splitlines()[3].strip() == "got      [-1.224595, 0.0, 0.0, 1.224595]"
