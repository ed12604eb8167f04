"""How the processes of --comm torch find each other: whom they wait for, and for how long."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from bench.ask import own_command
from fedara_core.comm.rendezvous import SECONDS_KEY, check_interfaces, read_place
from fedara_core.errors import InputError
from support.launch import TINY, environment

pytestmark = pytest.mark.xdist_group("jobs")

PLACE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
OPEN = (
    "import sys, time\n"
    "from fedara_core.comm import rendezvous\n"
    "rendezvous._QUIET_SECONDS = 0.5\n"
    "from fedara_core.comm.launch import open_communicator\n"
    "from fedara_core.errors import InputError\n"
    "try:\n    communicator = open_communicator('torch')\n"
    "except InputError as error:\n    sys.exit(f'fedara: {error}')\n"
)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number: int = free.getsockname()[1]
    return number


def start(
    world_rank: int, world_size: int, port: int, code: str, **more: str
) -> subprocess.Popen[str]:
    """One process of a job that no launcher ties together."""
    place = {"RANK": world_rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    texts = {key: str(value) for key, value in place.items()}
    return subprocess.Popen(
        [sys.executable, "-c", OPEN + code],
        env=environment() | {"MASTER_ADDR": "localhost", SECONDS_KEY: "90"} | texts | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refusal(process: subprocess.Popen[str]) -> list[str]:
    """Its lines of the suite on stderr; it must have ended, and without a traceback."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("fedara: ")]


# ---- partners that never come ----


def test_process_0_says_who_has_not_come_and_where(port: int) -> None:
    seconds = 3
    first, third = (start(i, 4, port, "", **{SECONDS_KEY: str(seconds)}) for i in (0, 2))
    told, last = refusal(first)
    for line in (told, last):
        assert f"process 1, 3 at localhost:{port}; 2 of 4 processes have come" in line
    assert f"{SECONDS_KEY} = {seconds}" in told
    assert f"process 0 waited {seconds} s" in last
    (other,) = refusal(third)  # only one of them tells that it waits
    assert "--comm torch: " in other


@pytest.mark.slow
@pytest.mark.parametrize("address", ["localhost", "no-such-host.invalid"])
def test_without_process_0_the_others_say_that_they_wait_for_it(port: int, address: str) -> None:
    process = start(1, 2, port, "", MASTER_ADDR=address, **{SECONDS_KEY: "2"})
    told, last = refusal(process)
    assert f"process 0 to open the store at {address}:{port}" in told
    assert f"process 1 waited 2 s for process 0 to open the store at {address}:{port}" in last
    assert "MASTER_ADDR that this host resolves" in last


def test_the_command_line_refuses_in_one_line(port: int) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", str(TINY), "--comm", "torch"],
        env=environment() | place | {SECONDS_KEY: "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "waited 1 s for process 1 at" in line


def test_a_port_of_another_program_is_refused(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        (line,) = refusal(start(0, 2, port, "", **{SECONDS_KEY: "5"}))
    assert f"the store at localhost:{port} does not answer" in line


def test_two_minutes_are_the_default_and_a_variable_sets_more() -> None:
    assert read_place(PLACE).seconds == 120
    assert read_place({**PLACE, SECONDS_KEY: "7200"}).seconds == 7200


# ---- what must stay allowed ----


@pytest.mark.slow
def test_a_process_that_comes_late_is_waited_for(port: int) -> None:
    code = "communicator.barrier(); print(communicator.world_size); communicator.close()"
    first = start(0, 2, port, code)
    time.sleep(4)  # importing torch takes a part of it
    second = start(1, 2, port, code)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out.strip() for out, _ in outputs] == ["2", "2"], outputs


@pytest.mark.slow
def test_after_the_rendezvous_a_slow_process_is_waited_for(port: int) -> None:
    """Longer than the rendezvous may take."""
    code = (
        "time.sleep(9 * communicator.world_rank)\n"
        "print(communicator.gather_bytes(b'x')); communicator.close()"
    )
    jobs = [start(i, 2, port, code, **{SECONDS_KEY: "8"}) for i in range(2)]
    outputs = [process.communicate(timeout=60) for process in jobs]
    assert [out.strip() for out, _ in outputs] == ["[b'x', b'x']"] * 2, outputs


# ---- interfaces ----


def test_a_wrong_interface_of_one_host_is_refused_on_every_process(port: int) -> None:
    jobs = [start(i, 3, port, "", GLOO_SOCKET_IFNAME=("lo", "lo", "eth77")[i]) for i in range(3)]
    line, *others = (refusal(job)[-1] for job in jobs)  # one may have told that it waits
    assert others == [line, line]
    assert "GLOO_SOCKET_IFNAME = 'eth77'" in line
    assert socket.gethostname() in line
    assert "allowed: lo" in line


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ("", None),
        ("lo", None),
        ("lo,lo", None),
        ("ib0", "'ib0'"),
        ("lo,ib0", "'ib0'"),
        ("lo,", "''"),
    ],
)
def test_interfaces(names: str, wrong: str | None) -> None:
    said = check_interfaces({"GLOO_SOCKET_IFNAME": names})
    assert bool(said) == (wrong is not None)
    assert wrong is None or f"no interface {wrong} with an address" in said


# ---- variables ----


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("RANK", "4", "0 to 3"),
        ("RANK", "-1", "0 to 3"),
        ("WORLD_SIZE", "two", "1 or more"),
        ("WORLD_SIZE", "0", "1 or more"),
        ("MASTER_PORT", "99999", "1 to 65535"),
        ("LOCAL_RANK", "7", "0 to 0"),
        ("LOCAL_WORLD_SIZE", "x", "1 to 4"),
        (SECONDS_KEY, "soon", "seconds above 0"),
        (SECONDS_KEY, "0", "seconds above 0"),
        (SECONDS_KEY, "inf", "seconds above 0"),
    ],
)
def test_a_wrong_variable_is_refused(key: str, value: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        read_place({**PLACE, key: value})
    assert f"{key} = {value!r}" in str(caught.value)
    assert str(caught.value).endswith(f"allowed: {allowed}")


@pytest.mark.parametrize("key", PLACE)
def test_a_missing_variable_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"{key} not set; allowed: start with torchrun"):
        read_place({**PLACE, key: ""})


def test_the_launcher_s_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in PLACE.items():
        monkeypatch.setenv(key, value)
    assert str(read_place(os.environ)) == str(read_place()) == "n1:29500"


@pytest.mark.slow
def test_a_foreign_program_at_the_port_is_no_trace(port: int) -> None:
    """Neither of Python nor of C++, which torch logs."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer() -> None:
            with suppress(OSError):  # closed
                while True:
                    server.accept()[0].close()

        threading.Thread(target=answer, daemon=True).start()
        place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), SECONDS_KEY: "5"}
        job = subprocess.run(
            [*own_command(), "run", str(TINY), "--comm", "torch"],
            env=environment() | place,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert job.returncode == 2
    (line,) = job.stderr.splitlines()
    assert line.startswith(f"fedara: --comm torch: the store at 127.0.0.1:{port} does not")
