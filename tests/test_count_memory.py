"""The count of memory (bench_gpu.py, count_memory.py) against what PyTorch's profiler sees of the same
stages, really run, on the shape `small` in float32."""
import contextlib
import re
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bench_gpu
import pagrpo
import sft
from conftest import ROOT

FLAGS = ("--model random/weights --probe --device cpu --max-completion-tokens 24 --num-frames 4 "
         "--max-pixels 16 --num-generations 4 --prompts-per-update 2 --completions-per-pass 2").split()


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """{phase: (counted, profiled)}, GiB at the peak above what there is as the phase starts."""
    profiled = {}

    @contextlib.contextmanager
    def measured(phase, row):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            yield
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()  # below 0 where memory is given back
            peak = max(peak, now)
        profiled[phase] = peak / 2**30
        row |= {f"sec/{phase}": 0.0, f"gib/{phase}": peak / 2**30}

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr(sys, "argv", ["pagrpo.py", *FLAGS])
        patch.setattr(pagrpo.self_judge, "__defaults__", (24,))  # tokens of a judgement
        args = pagrpo.get_args()
        for name in ("Qwen2_5_VLForConditionalGeneration", "AutoTokenizer"):  # to be put back in the end
            patch.setattr(sft, name, getattr(sft, name))
        counted = bench_gpu.count(bench_gpu.use_random_weights("small"), args, torch.float32)
        patch.setattr(sft, "measured", measured)
        bench_gpu.time_sft(args)
        pagrpo.main(args)
    return {phase: (peak.total - peak.start, profiled[phase]) for phase, peak in counted.items()}


@pytest.mark.parametrize("phase", ["SFT", "rollout", "judge", "update"])
def test_a_count_is_within_a_tenth_of_the_profilers_memory_events(peaks, phase):
    counted, profiled = peaks[phase]
    print(f"{phase}: {1024 * counted:.1f} MiB counted, {1024 * profiled:.1f} by the profiler")
    assert counted == pytest.approx(profiled, rel=0.1)
    assert profiled > 0.01


def test_what_the_first_hour_on_a_gpu_needs_runs_on_a_small_shape():
    flags = ("--shapes small --tokens 8 --num-frames 2 --max-pixels 4 --num-generations 2 "
             "--prompts-per-update 1").split()
    done = subprocess.run([sys.executable, "tests/bench_gpu.py", *flags], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = re.findall(r"^(\w+) +[\d.]+ s +[\d.]+ GiB +([\d.]+) s +\d+% +([\d.]+) GiB$", done.stdout, re.M)
    assert [phase for phase, _, _ in table] == ["SFT", "rollout", "judge", "update"]
    assert all(float(gib) > 0.1 for _, _, gib in table) and "of the token ratio" in done.stdout
