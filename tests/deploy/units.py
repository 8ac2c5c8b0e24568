"""systemd units, read as strictly as systemd reads them, for machines that have no systemd-analyze.

Sections, keys and the form of their values: what our units use, and an error for anything else, so that a
misspelt key, which systemd only warns about in its log, is found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SECONDS = r"\d+(s|min|h)?"
_BOOLEAN = r"yes|no|true|false|on|off|1|0"
_NAME = r"[a-z_][a-z0-9_-]*"
_UNIT_NAMES = r"[\w@.-]+\.(service|target|mount|socket)( [\w@.-]+\.(service|target|mount|socket))*"
_PATHS = r"-?/\S+( -?/\S+)*"
_COMMAND = r"/\S+( .+)?"

KEYS: dict[str, dict[str, str]] = {
    "Unit": {
        "Description": r"\S.*",
        "Documentation": r"(https?|man|file):\S+",
        **dict.fromkeys(("After", "Before", "Wants", "Requires", "PartOf", "BindsTo"), _UNIT_NAMES),
        "StartLimitIntervalSec": _SECONDS,
        "StartLimitBurst": r"\d+",
    },
    "Service": {
        "Type": r"simple|exec|forking|oneshot|notify",
        "User": _NAME,
        "Group": _NAME,
        "Environment": r'"?\w+=.*',
        "EnvironmentFile": r"-?/\S+",
        "WorkingDirectory": r"~|-?/\S+",
        **dict.fromkeys(("ExecStart", "ExecStartPre", "ExecStop", "ExecReload"), _COMMAND),
        **dict.fromkeys(("TimeoutStopSec", "TimeoutStartSec", "RestartSec"), _SECONDS),
        "Restart": r"no|always|on-success|on-failure|on-abnormal|on-abort|on-watchdog",
        "RestartPreventExitStatus": r"\d+( \d+)*",
        "KillMode": r"control-group|mixed|process|none",
        "KillSignal": r"SIG[A-Z]+",
        "LimitNOFILE": r"\d+|infinity",
        "ProtectSystem": rf"strict|full|{_BOOLEAN}",
        "ProtectHome": rf"read-only|tmpfs|{_BOOLEAN}",
        "UMask": r"0[0-7]{3}",
        **dict.fromkeys(("ReadWritePaths", "ReadOnlyPaths"), _PATHS),
        **dict.fromkeys(("StateDirectory", "ConfigurationDirectory", "RuntimeDirectory"), r"[\w./-]+"),
        "StateDirectoryMode": r"0[0-7]{3}",
        **dict.fromkeys(
            ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "RestrictSUIDSGID", "LockPersonality",
             "ProtectKernelTunables", "ProtectKernelModules", "ProtectControlGroups"),
            _BOOLEAN,
        ),
    },
    "Install": {"WantedBy": _UNIT_NAMES, "Alias": _UNIT_NAMES},
}  # fmt: skip


def problems(text: str) -> list[str]:
    """What systemd would not take, or would pass over; [] for a good unit."""
    found = []
    section, seen = "", set()
    for number, line in _lines(text):
        header = re.fullmatch(r"\[(\w+)\]", line)
        if header:
            section = header[1]
            if section not in KEYS:
                found.append(f"line {number}: there is no section [{section}]")
            continue
        key, equals, value = line.partition("=")
        form = KEYS.get(section, {}).get(key)
        if not equals:
            found.append(f"line {number}: {line!r} is no assignment")
        elif form is None:
            found.append(f"line {number}: [{section}] has no key {key!r}")
        elif not re.fullmatch(form, value):
            found.append(f"line {number}: {key} cannot be {value!r}")
        seen.add((section, key))
    needed = (("Unit", "Description"), ("Service", "ExecStart"), ("Install", "WantedBy"))
    return found + [f"[{section}] lacks {key}" for section, key in needed if (section, key) not in seen]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, those that end in a backslash joined with the next."""
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not pending and (not line.strip() or line.lstrip().startswith(("#", ";"))):
            continue
        first = first if pending else number
        pending += line.rstrip()
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        yield first, pending.strip()
        pending = ""
    if pending:
        yield first, pending.strip()
