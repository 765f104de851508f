"""``smoothcache doctor``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .command import command


def add(commands: Any) -> None:
    doctor = command(
        commands, "doctor", run, "check this machine: versions, compilers, GPU, and a short self-test", "doctor"
    )
    doctor.add_argument("--no-self-test", action="store_true", help="skip the self-test, which compiles a model")
    doctor.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    from .machine import examine

    missing = 0
    found = []
    for finding in examine(self_test=not options.no_self_test):
        missing += finding.missing
        found.append(vars(finding))
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps(found, indent=2))
    return int(missing > 0)
