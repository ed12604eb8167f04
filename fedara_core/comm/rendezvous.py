"""How the processes of torch.distributed find each other, within a limited time.

One store at MASTER_ADDR:MASTER_PORT, held by torchrun or by process 0, lists who has come.
"""

import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fedara_core.errors import InputError

SECONDS_KEY = "FEDARA_RENDEZVOUS_SECONDS"
_DEFAULT_SECONDS = 120.0
_QUIET_SECONDS = 5.0  # a wait that is longer is told
_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0  # for the others to read why all are refused
_MOST_NAMED = 8  # of those that have not come


@dataclass(frozen=True, kw_only=True)
class Place:
    """Who this process is, where all meet, and how long it waits there."""

    world_rank: int
    world_size: int
    host_rank: int
    host_size: int
    address: str
    port: int
    agent_store: bool  # torchrun itself holds the store
    attempt: str  # torchrun's count of restarts
    seconds: float

    @property
    def holds_store(self) -> bool:
        return self.world_rank == 0 and not self.agent_store

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def read_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The launcher's variables. Raises InputError for one that is missing or wrong."""
    keys = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [key for key in keys if not environ.get(key)]
    if missing:
        raise InputError(
            f"--comm torch: {', '.join(missing)} not set; allowed: start with "
            "torchrun --no-python --nproc-per-node N fedara run CONFIG"
        )
    world_size = _integer(environ, "WORLD_SIZE", 1, None)
    host_size = _integer(environ, "LOCAL_WORLD_SIZE", 1, world_size, default=1)
    return Place(
        world_rank=_integer(environ, "RANK", 0, world_size - 1),
        world_size=world_size,
        host_rank=_integer(environ, "LOCAL_RANK", 0, host_size - 1, default=0),
        host_size=host_size,
        address=environ["MASTER_ADDR"],
        port=_integer(environ, "MASTER_PORT", 1, 65535),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        seconds=_limit_seconds(environ),
    )


def _integer(
    environ: Mapping[str, str], key: str, least: int, most: int | None, default: int | None = None
) -> int:
    """A variable's value, in [least, most]."""
    text = environ.get(key, "")
    if not text and default is not None:
        return default
    with suppress(ValueError):
        value = int(text)
        if value >= least and (most is None or value <= most):
            return value
    allowed = f"{least} or more" if most is None else f"{least} to {most}"
    raise InputError(f"{key} = {text!r}: not what a launcher sets; allowed: {allowed}")


def _limit_seconds(environ: Mapping[str, str]) -> float:
    text = environ.get(SECONDS_KEY, "") or str(_DEFAULT_SECONDS)
    with suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < math.inf:
            return seconds
    raise InputError(f"{SECONDS_KEY} = {text!r}: no time to wait; allowed: seconds above 0")


class Rendezvous:
    """One process's wait for the others."""

    def __init__(self, place: Place) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self._place = place
        self._start = time.monotonic()
        self._told = False

    @property
    def left(self) -> timedelta:
        """Time that is left; a little even after the limit, for what is nearly there."""
        return timedelta(seconds=max(1.0, self._start + self._place.seconds - time.monotonic()))

    def store(self, refusal: str) -> Any:
        """The store, once every process has come. refusal: why this one can not take part, or "".

        Raises InputError on every process if one of them refuses, or if they do not all come.
        """
        try:
            store = self._dist.PrefixStore(f"fedara/{self._place.attempt}", self._open())
            store.set(f"here/{self._place.world_rank}", refusal)
            self._wait_for_all(store)
            self._check_refusals(store)
        except RuntimeError as error:
            raise InputError(
                f"--comm torch: the store at {self._place} does not answer "
                f"({_first_line(error)}); allowed: a MASTER_ADDR and MASTER_PORT that are free "
                "for process 0, and that every host reaches"
            ) from None
        return store

    def _open(self) -> Any:
        """Hold the store, or connect to it."""
        place = self._place
        if not place.holds_store:
            self._wait_for_store()
        return self._dist.TCPStore(
            host_name=place.address,
            port=place.port,
            world_size=place.world_size,
            is_master=place.holds_store,
            timeout=self.left,
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _wait_for_store(self) -> None:
        place = self._place
        what = f"process 0 to open the store at {place}"
        while True:
            try:
                socket.create_connection((place.address, place.port), timeout=5).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
            allowed = "a MASTER_ADDR that this host resolves and reaches"
            self._go_on_waiting(f"{what} ({reason})", allowed, tells=place.host_rank == 0)

    def _wait_for_all(self, store: Any) -> None:
        place = self._place
        everyone = [f"here/{world_rank}" for world_rank in range(place.world_size)]
        while not store.check(everyone):
            come = [store.check([key]) for key in everyone]
            missing = [str(world_rank) for world_rank, here in enumerate(come) if not here]
            if not missing:
                return
            names = ", ".join(missing[:_MOST_NAMED]) + (" ..." if missing[_MOST_NAMED:] else "")
            self._go_on_waiting(
                f"process {names} at {place}; {sum(come)} of {place.world_size} processes have "
                "come",
                "start all of them",
                tells=come.index(True) == place.world_rank,  # the first of those that are here
            )

    def _go_on_waiting(self, what: str, allowed: str, *, tells: bool) -> None:
        """Sleep a moment and, once, say for what. Raises InputError when the time is over."""
        place, waited = self._place, time.monotonic() - self._start
        if waited > place.seconds:
            raise InputError(
                f"--comm torch: process {place.world_rank} waited {place.seconds:g} s for {what}; "
                f"allowed: {allowed}, or a longer {SECONDS_KEY}"
            )
        if tells and waited > _QUIET_SECONDS and not self._told:
            self._told = True
            sys.stderr.write(
                f"fedara: process {place.world_rank} on host {socket.gethostname()} waits for "
                f"{what}; it gives up after {SECONDS_KEY} = {place.seconds:g}\n"
            )
            sys.stderr.flush()
        time.sleep(_POLL_SECONDS)

    def _check_refusals(self, store: Any) -> None:
        """Raise the first process's refusal on all of them."""
        place = self._place
        refusals = [store.get(f"here/{i}").decode() for i in range(place.world_size)]
        refusal = next(filter(None, refusals), "")
        if not refusal:
            return
        store.set(f"read/{place.world_rank}", "")
        end = time.monotonic() + _FAREWELL_SECONDS
        read = [f"read/{world_rank}" for world_rank in range(place.world_size)]
        while place.holds_store and not store.check(read) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        raise InputError(refusal)


def check_interfaces(environ: Mapping[str, str] = os.environ) -> str:
    """Why gloo can not use the interfaces that GLOO_SOCKET_IFNAME names on this host, or ""."""
    names = environ.get("GLOO_SOCKET_IFNAME", "")
    wrong = [name for name in names.split(",") if names and not _has_address(name)]
    if not wrong:
        return ""
    usable = [name for _, name in socket.if_nameindex() if _has_address(name)]
    return (
        f"GLOO_SOCKET_IFNAME = {names!r}: host {socket.gethostname()} has no interface "
        f"{wrong[0]!r} with an address; allowed: {', '.join(usable)}"
    )


def _has_address(interface: str) -> bool:
    from torch.distributed import ProcessGroupGloo

    try:
        ProcessGroupGloo.create_device(interface=interface)
    except (RuntimeError, ValueError):  # none of this name; no name
        return False
    return True


def no_connection(library: str, error: Exception, place: Place) -> InputError:
    """The processes came, and can not exchange messages."""
    return InputError(
        f"--comm torch: the {place.world_size} processes came to {place}, and {library} does not "
        f"connect process {place.world_rank} on host {socket.gethostname()} with the others "
        f"({_first_line(error)}); allowed: {library.upper()}_SOCKET_IFNAME = an interface that "
        "all hosts share, a host name with an address in /etc/hosts"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
