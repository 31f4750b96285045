"""Write it yourself: the project's own tests of each function, on yours.

    python docs/exercises/check.py my                      # all eight, a quarter of a minute
    python docs/exercises/check.py my group_advantages     # one

A line for each: done, not written yet, or the first case that fails. The exit status is 0 if all are
done. While a function's tests run, the other seven have the project's bodies. All else, such as helpers, is
as in your files.
"""
import argparse
import ast
import importlib
import re
import signal
import sys
from pathlib import Path

import pytest

from start import FUNCTIONS, ROOT, nodes

sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  what it sets must be set before torch is imported

TESTS = {  # of each function: a file in tests/, and the tests in it, cases worked by hand first
    "length_reward": ("test_rewards.py", "test_length_reward"),
    "group_advantages": ("test_pagrpo.py", "test_advantages_by_hand"),
    "process_advantages": ("test_pagrpo.py", "test_ablations_are_the_rows_of_the_table",
                           "test_an_unknown_perception_counts_as_nothing",
                           "test_gdpo_keeps_the_reasoning_advantage_where_the_verdict_is_unknown"),
    "format_rewards": ("test_rewards.py", "test_format_rewards",
                       "test_every_single_fault_costs_a_format_reward",
                       "test_format_and_parsing_take_any_text"),
    "segment_masks": ("test_pagrpo.py", "test_masks_by_hand", "test_a_token_across_a_tag_by_hand",
                      "test_masks_partition_the_completion_wherever_the_tokenizer_splits_it"),
    "pa_grpo_loss": ("test_pagrpo.py", "test_loss_by_hand", "test_kl_by_hand",
                     "test_loss_and_gradient_equal_a_slow_loop"),
    "rope_positions": ("test_sft.py", "test_positions_by_hand",
                       "test_positions_are_exact_at_every_tenth_of_a_second",
                       "test_positions_equal_a_slow_loop_on_random_layouts"),
    "shared_prefix_attention": ("test_pagrpo.py", "test_packed_attention_equals_a_dense_mask",
                                "test_packed_logprobs_and_gradients_equal_hugging_face"),
}
# nothing on screen, no folder .pytest_cache, no collecting of garbage, which takes most of the time
QUIET = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


class FirstFailure:
    """A pytest plugin that keeps the first failure in `text`: line of the test, case, and what came out."""

    def __init__(self, folder):
        self.folder, self.text = folder, None

    def pytest_assertrepr_compare(self, op, left, right):
        return [f"got      {left!r}", f"expected {right!r}"] if op == "==" else None

    def pytest_exception_interact(self, node, call):
        error = call.excinfo.value
        if isinstance(error, NotImplementedError):
            self.text = "not written yet"
            return
        places = {Path(entry.path).parent: entry for entry in call.excinfo.traceback}  # the last line in each
        lines = ["fails"]
        if test := places.get(ROOT / "tests"):
            lines[0] += f" in tests/{test.path.name}, line {test.lineno + 1}: {str(test.statement).strip()}"
        if hasattr(node, "callspec"):
            lines += [f"{name} = {value!r}" for name, value in node.callspec.params.items()]
        if not isinstance(error, AssertionError):
            own = places.get(self.folder)
            place = f" in {own.path.name}, line {own.lineno + 1}" if own else ""
            lines.append(type(error).__name__ + place)
        message = re.sub(r"\d+\.\d{7,}", lambda digits: f"{float(digits[0]):.6f}", str(error))
        lines += re.sub(" ± [0-9.e+-]+", "", message).replace("assert ", "", 1).splitlines()[:4]
        self.text = "\n    ".join(line.strip()[:300] for line in lines)


def put_in_place(folder, name):
    """Give the function `name` the folder's body, and the other seven the project's. Tests and modules have
    imported these very objects, so the objects stay and only their code changes."""
    for other, (file, _) in FUNCTIONS.items():
        module = sys.modules.get(Path(file).stem)
        if module:
            path = (folder if other == name else ROOT) / file
            namespace = dict(vars(module))
            exec(compile(ast.Module([nodes(path.read_text())[other]], []), path, "exec"), namespace)
            for part in ("__code__", "__defaults__"):
                setattr(getattr(module, other), part, getattr(namespace[other], part))


def check(folder, name):
    """None if the tests of this function pass on the folder's, else the first failure."""
    sys.path.insert(0, str(folder))  # before the project's, which conftest puts first
    importlib.import_module(Path(FUNCTIONS[name][0]).stem)
    put_in_place(folder, name)
    first, (file, *tests) = FirstFailure(folder), TESTS[name]
    signal.alarm(30)
    status = pytest.main(["-x", *QUIET, *[f"{ROOT}/tests/{file}::{test}" for test in tests]], plugins=[first])
    signal.alarm(0)
    assert status == (1 if first.text else 0), f"pytest ended with {status!r}"
    return first.text


def too_long(*_):
    raise TimeoutError("over half a minute: a loop without an end?")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("function", nargs="?", choices=FUNCTIONS, metavar="function")
    args = parser.parse_args()
    if not (args.folder / "pagrpo.py").exists():
        sys.exit(f"No pagrpo.py in {args.folder}: make the folder with start.py.")
    signal.signal(signal.SIGALRM, too_long)
    open_ones = 0
    for name in [args.function] if args.function else FUNCTIONS:
        print(f"{name:<24}", end="", flush=True)
        failure = check(args.folder.resolve(), name)
        open_ones += failure is not None
        print(failure or "done", flush=True)
    sys.exit(min(open_ones, 1))
