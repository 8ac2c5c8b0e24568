"""`modeseek doctor`: is this machine fit, and what to do where it is not.

Every check answers within seconds and changes nothing. Neither torch nor Ray is loaded.
"""

from __future__ import annotations

import email.utils
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from actors.cli.format import size
from modeseek_ray.playground import locate

REQUIREMENTS = Path(__file__).parents[2] / "deploy" / "requirements" / "cpu.txt"
NEEDED_DISK_BYTES = 5_000_000_000
NEEDED_MEMORY_BYTES = 4_000_000_000
LARGEST_CLOCK_ERROR_S = 5.0
TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Check:
    """One finding. `mend` says what to do; it is empty where nothing has to be done."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def collect(home: Path, url: str, storage: Path | None = None) -> list[Check]:
    """Look at everything a job needs. `home` is MODESEEK_HOME, `storage` MODESEEK_STORAGE where it is another
    directory, `url` where the service is or would be."""
    service, clock = check_service(url)
    storage = storage or home
    return [
        check_python(),
        check_packages(REQUIREMENTS),
        check_home(home),
        *([] if storage == home else [check_home(storage, "storage")]),
        check_disk(storage),
        check_memory(),
        check_gpu(),
        service,
        clock,
        check_ray(home),
        check_playground(storage),
    ]


def show(found: list[Check]) -> RenderableType:
    """A line a check, mends below what failed, and the sum."""
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        mark = Text("✓", style="green") if check.ok else Text("✗", style="bold red")
        table.add_row(mark, check.name, escape(check.detail))
        if check.mend:
            table.add_row("", "", Text(check.mend, style="dim" if check.ok else "yellow"))
    bad = sum(not check.ok for check in found)
    total = (
        Text("Everything is in place.", style="green") if bad == 0 else Text(f"{bad} to mend.", style="red")
    )
    return Group(table, total)


def check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == (3, 11)
    return Check("Python", ok, version, "" if ok else "The pinned packages are for Python 3.11: install it.")


def check_packages(requirements: Path) -> Check:
    """Installed versions against the pinned list; a local part (`+cpu`) does not matter."""
    if not requirements.exists():
        return Check("packages", True, "no pinned list beside this installation")
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    wanted = dict(line.split("==") for line in lines if "==" in line)
    wrong = [
        f"{name} {found or 'missing'}, pinned {version}"
        for name, version in wanted.items()
        if (found := _installed(name)) is None or found.split("+")[0] != version.split("+")[0]
    ]
    if not wrong:
        return Check("packages", True, f"{len(wanted)} as pinned in {requirements.name}")
    shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    mend = f"pip install --no-deps -r {requirements}"
    return Check("packages", False, shown, mend)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_home(home: Path, name: str = "home") -> Check:
    """Written to for real: permissions alone do not tell of read-only mounts and full quotas."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home) as file:
            file.write(b"modeseek")
            file.flush()
    except OSError as error:
        mend = f"Point MODESEEK_{name.upper()} at a directory you may write to."
        return Check(name, False, f"{home}: {error.strerror}", mend)
    return Check(name, True, f"{home} is writable")


def check_disk(home: Path) -> Check:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    ok = free >= NEEDED_DISK_BYTES
    mend = f"Checkpoints need room: free {size(NEEDED_DISK_BYTES)}, or set MODESEEK_HOME to a larger disk."
    return Check("disk", ok, f"{size(free)} free under {existing}", "" if ok else mend)


def check_memory() -> Check:
    free = psutil.virtual_memory().available
    ok = free >= NEEDED_MEMORY_BYTES
    mend = f"The demo needs about {size(NEEDED_MEMORY_BYTES)}: end other programs."
    return Check("memory", ok, f"{size(free)} available, {psutil.cpu_count()} cores", "" if ok else mend)


def check_gpu() -> Check:
    """GPUs are optional; a driver that is there but does not answer is worth knowing."""
    if shutil.which("nvidia-smi") is None:
        return Check("GPU", True, "none; jobs run on the CPU")
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return Check(
            "GPU", False, f"nvidia-smi: {error}", "Check the driver; until then jobs run on the CPU."
        )
    return Check("GPU", True, "; ".join(found.splitlines()))


def check_service(url: str) -> tuple[Check, Check]:
    """Whether a service answers at `url` or its port is free, and whether its clock agrees with ours."""
    clock = Check("clock", time.time() > 1.7e9, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    if not clock.ok:
        clock = Check("clock", False, clock.detail, "Leases and events carry times: set the clock.")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/healthz", timeout=TIMEOUT_S) as answer:
            return Check("service", True, f"answers at {url}"), _compare_clock(answer.headers["Date"], clock)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        return _port(url, error), clock


def _port(url: str, error: Exception) -> Check:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S):
            mend = "Another program has the port: serve with --port, and set MODESEEK_URL."
            return Check("service", False, f"something else answers at {url} ({error})", mend)
    except OSError:
        detail = f"not running; {host}:{port} is free"
        return Check("service", True, detail, "Start it with: modeseek serve")


def _compare_clock(date: str | None, clock: Check) -> Check:
    if date is None:
        return clock
    off_s = abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time())
    ok = off_s <= LARGEST_CLOCK_ERROR_S
    mend = "Leases and events carry times: synchronise the clocks (NTP)."
    return Check("clock", ok, f"{clock.detail}, {off_s:.0f} s from the service's", "" if ok else mend)


def check_ray(home: Path) -> Check:
    """The head that the service started, if it did: its process and its Ray Jobs API."""
    record = home / "ray" / "head.json"
    if not record.exists():
        return Check("Ray", True, "not running; the service starts it")
    try:
        head = json.loads(record.read_text(encoding="utf-8"))
        parts = urlsplit(head["dashboard"])
        with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S):
            return Check("Ray", True, f"head at {head['address']}, process {head['pid']}")
    except (OSError, ValueError, KeyError) as error:
        if _is_gone(record):
            return Check("Ray", True, "not running any more; the service starts a new head")
        mend = f"Restart the service; the head's log is {record.with_name('head.log')}."
        return Check("Ray", False, f"the recorded head does not answer: {error}", mend)


def _is_gone(record: Path) -> bool:
    try:
        return not psutil.pid_exists(int(json.loads(record.read_text(encoding="utf-8"))["pid"]))
    except (ValueError, KeyError):
        return False


def check_playground(home: Path) -> Check:
    """The demo's model; without it the demo builds it first."""
    built = [name for name in ("moe", "dense") if locate(name, home) is not None]
    if not built:
        return Check(
            "playground", True, "not built yet", "Built on first use, in minutes: modeseek playground moe"
        )
    return Check("playground", True, f"{', '.join(built)} built")
