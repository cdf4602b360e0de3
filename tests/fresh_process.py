"""
Processes as `python ...` starts them, but with torch and other libraries in memory: they are forked from one process
that imported these, and so begin in a third of the time. transformers, huggingface_hub and what is ours they import
themselves, in the environment and folder that they are given.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path

LIBRARIES = [
    *("torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("scipy.optimize", "sklearn.metrics", "pandas", "pyarrow.parquet", "PIL.Image"),
]
NOT_IN_MEMORY = {"transformers", "huggingface_hub", "datasets", "phi3_embed", "phi3_tools"}

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(LIBRARIES)


def run_fresh(*arguments, cwd="/", env=None, timeout=300) -> subprocess.CompletedProcess:
    """`python *arguments`, which are of `-c code`, `-m module` or a script -> what it printed, and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        given = [str(argument) for argument in arguments]
        process = processes.Process(target=_main, args=(given, str(cwd), dict(os.environ | (env or {})), *files))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(given, timeout)
        printed = [Path(file).read_text() if os.path.exists(file) else "" for file in files]
    return subprocess.CompletedProcess(given, process.exitcode, *printed)


def run_alone(*arguments, cwd="/", env=None, timeout=300) -> subprocess.CompletedProcess:
    """[`run_fresh`] with nothing in memory, where that is what is measured."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | (env or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def _main(arguments, cwd, environment, *files):
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    assert not NOT_IN_MEMORY & sys.modules.keys()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # The interpreter's own folders: those of pytest are not the process's.
    own = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    first, *rest = arguments
    is_script = first not in ("-c", "-m")
    given = [str(Path(first).parent) if is_script else "", *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    sys.path[:] = [*given, *own]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


class Machine:
    """A process that lives on: `machine(code, *arguments)` is as conftest's `run_python`, but keeps its names."""

    LOOP = """
import contextlib, io, json, sys, traceback
names = {"__name__": "machine"}
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(code, names)
        except Exception as exception:
            error = "".join(traceback.format_exception_only(exception))
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""

    def __init__(self, home, **environment):
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LOOP],
            env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, code, *arguments):
        print(json.dumps([code, *map(str, arguments)]), file=self.process.stdin, flush=True)
        printed, error = json.loads(self.process.stdout.readline())
        if error:
            raise RuntimeError(error)
        return printed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
