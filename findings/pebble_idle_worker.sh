#!/usr/bin/env bash
# pebble 5.2.3: if an idle worker is killed while no task runs, the whole pool is given up.
#
# A pool of two workers has done its task. One of the idle workers is killed, as a system that is out of memory
# does it. A busy worker would be replaced. Here the pool turns inactive, and the next task ends with
# "RuntimeError: Unexpected error within the Pool". So `gen_cot.read_ahead` asks for `active` before it
# schedules, and makes a new pool.
#
# Seen with pebble 5.2.3 on Python 3.11, Linux:   first task: 1 | pool active: False | next task: RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pebble==5.2.3
cat > "$folder/idle.py" <<'PY'
import multiprocessing
import os
import signal
import time

from pebble import ProcessPool

with ProcessPool(max_workers=2) as pool:
    said = [f"first task: {pool.schedule(abs, (-1,)).result()}"]
    time.sleep(1)  # both workers are idle now
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(1)  # the pool has looked at its workers
    said.append(f"pool active: {pool.active}")
    try:
        said.append(f"next task: {pool.schedule(abs, (-2,)).result(10)}")
    except RuntimeError as error:
        said.append(f"next task: {type(error).__name__}")
print(" | ".join(said))
PY
said=$("$folder/venv/bin/python" "$folder/idle.py" 2>/dev/null)
echo "$said"
test "$said" = "first task: 1 | pool active: False | next task: RuntimeError"
