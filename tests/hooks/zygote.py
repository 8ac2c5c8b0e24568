"""Processes of a running service by `fork` instead of by import: seconds less for each.

A tiny job spends nine tenths of its time on importing torch, DeepSpeed and transformers anew in
each driver, rank and scorer. The zygote imports them once; `sitecustomize.py` turns what would become
a Ray worker or a `modeseek` command into a stand-in that asks the zygote for a fork with the same
arguments, environment, directory and open files, passes signals on and ends as the fork ends. All else
is as it is without: the fork runs the same script, under Ray, over the same sockets.

    python zygote.py SOCKET [--engines]       prints "ready"; --engines: vLLM, too

Ray is not among them: it reads its configuration once, when it is imported. vLLM asks for Ray and does
without, so it is imported as if there were none.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOADED = [
    "aiohttp",
    "alembic.command",
    "actors.export",
    "actors.policy",
    "actors.reference",
    "deepspeed",
    "fastapi",
    "httpx",
    "matplotlib.pyplot",
    "modeseek_ray.data.loading",
    "modeseek_ray.reports.html",
    "modeseek_ray.service",
    "pandas",
    "peft",
    "pyarrow.dataset",
    "rich.console",
    "sqlalchemy",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "uvicorn",
]
ENGINES = ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"]


_READ_LATE = {"RAY_JOB_STOP_WAIT_TIME_S"}  # settings of Ray that are looked up when they are needed
_execvp = os.execvp


# --- in the stand-in


def stand_in(path: str) -> int:
    """Be the process that a fork takes the place of. Returns the exit status to end with."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(path)
        request = {"argv": sys.orig_argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}
        body = json.dumps(request).encode()
        socket.send_fds(channel, [struct.pack("!I", len(body))], [0, 1, 2])
        channel.sendall(body)
        pid = struct.unpack("!I", _receive(channel, 4))[0]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda sent, _frame: _pass_on(pid, sent))
        status = int(struct.unpack("!i", _receive(channel, 4))[0])
    if status < 0:  # killed: so are we
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    return status


def _pass_on(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _receive(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = channel.recv(size - len(data))
        if not chunk:
            os._exit(1)  # the zygote is gone, and the fork with it
        data += chunk
    return data


# --- the zygote


class Zygote:
    """Forks on request, reaps, and ends a fork whose stand-in has gone."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._path = path
        self._forks: dict[int, socket.socket] = {}
        self._stand_ins: dict[int, int] = {}  # fork -> who stands for it
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:
                    self._gone(key.data)
            self._reap()

    def _accept(self) -> None:
        channel, _ = self._listener.accept()
        head, fds, _, _ = socket.recv_fds(channel, 4, 3)
        request = json.loads(_receive(channel, struct.unpack("!I", head)[0]))
        pid = os.fork()
        if pid == 0:
            self._become(request, fds, channel)
        for fd in fds:
            os.close(fd)
        self._forks[pid] = channel
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._stand_ins[pid] = struct.unpack("3i", credentials)[0]
        self._said_of(pid).write_text(str(pid))
        self._selector.register(channel, selectors.EVENT_READ, pid)
        channel.sendall(struct.pack("!I", pid))

    def _said_of(self, pid: int) -> Path:
        """Where `tests/forks.py` looks for the fork behind a stand-in."""
        return Path(f"{self._path}.{self._stand_ins[pid]}")

    def _gone(self, pid: int) -> None:
        channel = self._forks.get(pid)
        if channel is None:
            return
        self._selector.unregister(channel)
        self._forks[pid] = channel
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _reap(self) -> None:
        while self._forks:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            channel = self._forks.pop(pid, None)
            if channel is None:
                continue
            self._said_of(pid).unlink(missing_ok=True)
            with suppress(KeyError, OSError):  # its stand-in may have gone first
                channel.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
                self._selector.unregister(channel)
            channel.close()

    def _end(self) -> None:
        for pid in self._forks:
            _pass_on(pid, signal.SIGKILL)
        os._exit(0)

    def _become(self, request: dict[str, Any], fds: list[int], channel: socket.socket) -> None:
        """In the fork: never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._selector.close()
            for own in (self._listener, self._woken, self._wake, channel, *self._forks.values()):
                own.close()
            os.setsid()
            for target, fd in enumerate(fds):
                os.dup2(fd, target)
                os.close(fd)
            os.environ.clear()
            os.environ.update(request["env"])
            os.chdir(request["cwd"])
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
            if threads := request["env"].get("OMP_NUM_THREADS"):  # read when torch was imported
                sys.modules["torch"].set_num_threads(int(threads))
            status = _run(request["argv"])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            _finish(status)


def _run(argv: list[str]) -> int:
    """What `python ARGV…` would do, with everything imported."""
    while argv[0].startswith("-") and argv[0] != "-m":  # -u and the like
        argv = argv[1:]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        if os.path.basename(argv[0]) == "setup_worker.py":
            os.execvp = functools.partial(_go_on_here, dict(os.environ))  # type: ignore[assignment]
        runpy.run_path(argv[0], run_name="__main__")
    return 0


def _go_on_here(before: dict[str, str], file: str, args: list[str]) -> None:
    """Ray's set-up of a worker ends with `exec python default_worker.py …`: run that in this process.

    It would be a second Python, stand-in and fork, and would import Ray once more. Only where the worker's own
    environment changes none of Ray's settings, which it has read by now.
    """
    os.execvp = _execvp
    words = shlex.split(args[-1])
    changed = {name for name, value in os.environ.items() if before.get(name) != value}
    is_worker = len(words) > 2 and words[0] == "exec" and os.path.basename(words[2]) == "default_worker.py"
    if not is_worker or {name for name in changed if name.startswith("RAY_")} - _READ_LATE:
        _execvp(file, args)
    raise SystemExit(_run(words[2:]))


def _finish(status: int) -> None:
    """As the interpreter ends, without taking apart what the zygote had built."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _preload(names: list[str]) -> None:
    """What packages print while they are imported does not belong on our output."""
    output = os.dup(1)
    os.dup2(2, 1)
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"  # as `actors.vllm_engine` has it; read at import
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not preloaded: {name}: {error}", file=sys.stderr)
    del sys.modules["ray"]
    os.dup2(output, 1)
    os.close(output)


def main() -> None:
    import gc

    _preload(PRELOADED + (ENGINES if "--engines" in sys.argv[2:] else []))
    if "ray._raylet" in sys.modules:
        raise RuntimeError("something of the zygote's has imported Ray")
    zygote = Zygote(sys.argv[1])
    gc.freeze()
    print("ready", flush=True)
    zygote.serve()


if __name__ == "__main__":
    main()
