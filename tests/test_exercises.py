"""docs/exercises/: the project's own bodies are done, and typical wrong ones are not."""
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
                     ("(clipped < surrogate)", "(clipped != surrogate)")],
    "rope_positions": [("vision.tokens_per_second * seconds", "seconds"), ("times + 1e-6", "times"),
                       ("h // vision.spatial_merge_size", "h"),
                       ("int(blocks[-1].max()) + 1", "int(blocks[-1][0, -1]) + 1")],
    "shared_prefix_attention": [("if i > 0:", "if False:"), (", scale=module.scaling", ""),
                                ("k, v, causal,", "k, v, is_causal=True,"),
                                (".transpose(1, 2), None", ", None")],
}
RUN = """import check, json, pathlib, sys
print(json.dumps([check.check(pathlib.Path(folder), name) for folder, name in json.loads(sys.argv[1])]))"""


def write_function(path, name, old="", new=""):
    """Give the function in the file at `path` the project's body, with `old` replaced by `new`."""
    target, source = path.read_text(), (ROOT / path.name).read_text()
    own, given = start.nodes(target)[name], start.nodes(source)[name]
    body = "".join(source.splitlines(True)[given.lineno - 1:given.end_lineno])
    assert old in body, f"{name} has no {old!r} any more"
    lines = target.splitlines(True)
    lines[own.lineno - 1:own.end_lineno] = body.replace(old, new) if old else body
    path.write_text("".join(lines))


def test_start_takes_eight_bodies_and_nothing_else(tmp_path):
    start.start(tmp_path / "my")
    for name, (file, _) in start.FUNCTIONS.items():
        write_function(tmp_path / "my" / file, name)
    for file in start.FILES:
        assert (tmp_path / "my" / file).read_text() == (ROOT / file).read_text()
    assert (tmp_path / "my/data/toy/base").is_dir()


def test_the_command_lines(tmp_path):
    def run(script, *args):
        return subprocess.run([sys.executable, EXERCISES / script, *args], cwd=tmp_path, capture_output=True, text=True)

    assert "Read my/README.md" in run("start.py", "my").stdout
    assert run("start.py", "my").stderr == "my exists already: give another name.\n"
    done = run("check.py", "my", "length_reward")
    assert (done.stdout.split(maxsplit=1), done.returncode) == (["length_reward", "not written yet\n"], 1)


def test_right_bodies_are_done_and_wrong_ones_fail(tmp_path):
    """Half of the functions are written, then the other half; then the mistakes, one of each function at a
    time. One run in all, as an import of torch takes seconds."""
    names, cases, expected = list(start.FUNCTIONS), [], []
    for half in (0, 1):
        start.start(folder := tmp_path / f"half{half}")
        for i, name in enumerate(names):
            cases.append((str(folder), name))
            expected.append("not written yet" if i % 2 == half else None)
            if i % 2 != half:
                write_function(folder / start.FUNCTIONS[name][0], name)
    for i in range(max(map(len, WRONG.values()))):
        start.start(folder := tmp_path / f"wrong{i}")
        for name in names:
            if i < len(WRONG[name]):
                write_function(folder / start.FUNCTIONS[name][0], name, *WRONG[name][i])
                cases.append((str(folder), name))
                expected.append("fails")
    run = subprocess.run([sys.executable, "-c", RUN, json.dumps(cases)], cwd=EXERCISES, capture_output=True, text=True)
    for (folder, name), found, wanted in zip(cases, json.loads(run.stdout), expected, strict=True):
        assert (found and found.split(" in tests")[0]) == wanted, (folder, name)
