"""What processes take connections on."""

from __future__ import annotations

import ipaddress
import json

import psutil
from places import ROOT


def listening(root: int) -> set[tuple[str, str]]:
    """Names of the processes from a root on, and the addresses that they take connections on."""
    found = set()
    try:
        family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.Error:
        return set()
    for process in family:
        try:
            name = process.cmdline()[0] if process.name().startswith("ray") else process.name()
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((name.split("/")[-1], connection.laddr.ip.removeprefix("::ffff:")))
        except (psutil.Error, IndexError):
            continue
    return found


def open_to_the_network(seen: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of ``listening`` that other machines reach."""
    return {(name, address) for name, address in seen if not ipaddress.ip_address(address).is_loopback}


def unknown_doors(seen: set[tuple[str, str]], after: str) -> set[tuple[str, str]]:
    """Those of ``listening`` that ``docs/doors.json`` does not name for what was started, or that more people reach than it says."""
    known = json.loads((ROOT / "docs" / "doors.json").read_text())[after]
    found = set()
    for name, address in seen:
        where, _ = known.get("ray::*" if name.startswith("ray::") else name, ("nowhere", ""))
        if where == "nowhere" or (where == "loopback" and not ipaddress.ip_address(address).is_loopback):
            found.add((name, address))
    return found
