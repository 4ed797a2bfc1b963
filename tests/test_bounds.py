"""What a command may take, and what becomes of one that takes more."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import psutil
import pytest
from graphs import write

from helpers import bounds

BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (bool flag, float[n] x) => (float[n] y) {
  y = If (flag) <
    then_branch = one () => (float[n] a) { b = Abs (x) a = Neg (b) },
    else_branch = two () => (float[n] c) { c = Neg (x) }
  >
}"""
LINE = (
    r"(.+): expected an answer within (\d+) s of the processor's time and (\d+) s on the clock,"
    r" found none after (\d+) s of the processor's time, (\d+) s on the clock; check the model; .+"
)


def inspect(path: Path, seconds: float, instead: str) -> subprocess.CompletedProcess:
    """The command on a file, with `instead` in the place of the check of it."""
    code = f"""
import subprocess, sys, time
from helpers import __main__ as shell
shell.bounds.SECONDS, shell.bounds.SECONDS_NODE = {seconds}, 0
def check(path, **_):
    {instead}
    return path
shell.files.check = check
sys.exit(shell.main(["inspect", {str(path)!r}]))
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def told(ended: subprocess.CompletedProcess, path: Path) -> list[int]:
    """The four numbers of the one line of a command that was ended for its time."""
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    named, *numbers = re.fullmatch(LINE, ended.stderr.strip()).groups()
    assert named == str(path)
    return [int(number) for number in numbers]


def test_what_waits_is_not_ended_by_the_processors_time(tmp_path):
    ended = inspect(write(tmp_path / "a.onnx"), 0.5, "time.sleep(2)")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1 attention site" in ended.stdout


def test_what_hangs_is_ended_by_the_clock(tmp_path):
    path = write(tmp_path / "a.onnx")
    start = time.monotonic()
    within, clock_within, processor, clock = told(inspect(path, 0.2, "time.sleep(50)"), path)
    assert time.monotonic() - start < 40
    assert (within, clock_within) == (0, 2)
    assert (processor, clock) in ((0, 2), (0, 3))


def test_what_works_too_long_is_ended(tmp_path):
    path = write(tmp_path / "a.onnx")
    within, clock_within, processor, clock = told(inspect(path, 1, "while True: pass"), path)
    assert (within, clock_within) == (1, 10)
    assert 1 <= processor < 5
    assert clock < 10


def test_a_child_that_works_too_long_is_ended_with_the_command(tmp_path):
    path, pid = write(tmp_path / "a.onnx"), tmp_path / "pid"
    child = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))\nwhile True: pass"
    started = inspect(path, 1, f"subprocess.run([sys.executable, '-c', {child!r}])")
    assert told(started, path)[:2] == [1, 10]
    deadline = time.monotonic() + 10
    while works(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def works(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # nobody has asked how it ended
    except psutil.NoSuchProcess:
        return False


def test_a_child_that_has_ended_counts():
    before = bounds.processor_seconds()
    busy = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert 0.9 < bounds.processor_seconds() - before < 10


def test_memory_that_the_system_does_not_limit(tmp_path):
    path = write(tmp_path / "a.onnx")
    instead = "import contextlib, numpy; held = numpy.ones(2**30, numpy.uint8); time.sleep(50)"
    limit = "bounds.MEMORY, bounds._memory_limited = 2**29, lambda size: contextlib.nullcontext()"
    code = f"import contextlib, sys, time\nfrom helpers import bounds\n{limit}\n"
    code += f"with bounds.bounded([bounds.Path({str(path)!r})]):\n    {instead}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"{path}: expected a command to take 0.5 GiB of memory at the most" in ended.stderr


def test_more_nodes_may_take_longer(tmp_path):
    """Each node counts, wherever it is; a file that is damaged or missing counts none."""
    proto = onnx.parser.parse_model(BRANCHES)
    path = tmp_path / "a.onnx"
    onnx.save(proto, path)
    one = bounds.SECONDS_EACH * path.stat().st_size + bounds.SECONDS
    assert bounds.limits([path]).processor == pytest.approx(one + 4 * bounds.SECONDS_NODE)
    assert bounds.limits([path]).clock == 10 * bounds.limits([path]).processor
    path.write_bytes(path.read_bytes()[:-5])
    assert bounds.limits([path]).processor < one
    assert bounds.limits([tmp_path / "none.onnx", tmp_path]).processor == bounds.SECONDS


def test_a_deep_and_small_model_has_the_time_that_the_optimizer_takes(tmp_path):
    """15,530 nodes of 144 layers, for which ONNX Runtime's optimizer took 100 s."""
    nodes = [onnx.helper.make_node("Relu", [f"x{i}"], [f"x{i + 1}"]) for i in range(15_530)]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"])
        for name in ("x0", "x15530")
    ]
    path = tmp_path / "a.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])), path)
    start = time.monotonic()
    assert bounds.limits([path]).processor > 700
    assert time.monotonic() - start < 2


def test_weights_beside_the_model_count(tmp_path):
    path = write(tmp_path / "a.onnx", wq=np.ones((8, 8), np.float32))
    before = bounds.limits([path])
    (tmp_path / "a.onnx.data").write_bytes(bytes(1000))
    (tmp_path / "b.data").write_bytes(bytes(1000))
    assert bounds.limits([path]).memory - before.memory == 1000 * bounds.MEMORY_EACH
    assert bounds.limits([path]).processor - before.processor == pytest.approx(
        1000 * bounds.SECONDS_EACH
    )
