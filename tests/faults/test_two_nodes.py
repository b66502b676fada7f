"""Two network namespaces as two nodes, the second one headless.

All traffic stays inside two namespaces that the test makes and removes itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.faults import engine

pytestmark = pytest.mark.alone

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
SECONDS = 8
"""Deadline of the agreement."""
SECONDS_TO_END = 60
"""From the first refusal in a log to the end of every process of a node, two cores."""


@dataclass(frozen=True)
class Net:
    """Names of the two namespaces; addresses and interfaces inside them."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.213.0.1", "10.213.0.2")
    interfaces: tuple[str, str] = ("oproj0", "oproj1")

    def prefix(self, node: int) -> list[str]:
        """Command prefix: run inside a namespace, under a host name of its own."""
        named = ["sh", "-c", f'hostname node{node + 1}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.names[node], "unshare", "--uts", *named]


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    net = Net((f"oproj{os.getpid()}a", f"oproj{os.getpid()}b"))
    problem = _why_not()
    if problem:
        pytest.skip(f"two network namespaces cannot be made on this machine: {problem}")
    first, second = net.names
    commands = [f"ip netns add {name}" for name in net.names]
    commands.append(
        f"ip link add {net.interfaces[0]} netns {first} type veth "
        f"peer name {net.interfaces[1]} netns {second}"
    )
    for name, address, interface in zip(net.names, net.addresses, net.interfaces, strict=True):
        commands.append(f"ip -n {name} addr add {address}/24 dev {interface}")
        commands += [f"ip -n {name} link set {device} up" for device in ("lo", interface)]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=10)
            if done.returncode:
                pytest.skip(
                    "two network namespaces cannot be made on this machine: "
                    f"{command}: {done.stderr.strip()}"
                )
        yield net
    finally:
        for name in net.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)


def _why_not() -> str:
    if not sys.platform.startswith("linux"):
        return "not Linux"
    missing = [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if os.geteuid() == 0 else "not root"


@contextlib.contextmanager
def two_nodes(
    net: Net, local: int, envs: tuple[dict[str, str], dict[str, str]], fresh: bool = False
) -> Iterator[tuple[engine.Node, engine.Node]]:
    """A server and a headless second node, each with `local` of the data-parallel ranks.

    fresh: every process of the first node is a new interpreter.
    """
    with contextlib.ExitStack() as stack:
        nodes = []
        for index in (0, 1):
            options: dict[str, object] = {
                "data_parallel_size": 2 * local,
                "data_parallel_size_local": local,
                "data_parallel_address": net.addresses[0],
                "data_parallel_rpc_port": 13345,
                "host": net.addresses[0],
                "served_model_name": "demo",
            }
            if index:
                options |= {"headless": True, "data_parallel_start_rank": local}
            else:
                options["api_server_count"] = 1  # else one for each rank
            env = {
                "VLLM_HOST_IP": net.addresses[index],
                "GLOO_SOCKET_IFNAME": net.interfaces[index],
                "OPROJ_PATCH_HANDSHAKE_SECONDS": str(SECONDS),
                **envs[index],
            }
            started = engine.node(options, env, net.prefix(index), fresh and not index)
            nodes.append(stack.enter_context(started))
        yield nodes[0], nodes[1]


def _inside(net: Net, code: str) -> str:
    """Output of Python code run on the first node."""
    done = subprocess.run(
        [*net.prefix(0), sys.executable, "-c", code], capture_output=True, text=True, timeout=90
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def test_four_ranks_on_two_nodes_answer(net: Net) -> None:
    on = {TOGGLE: "4"}
    with two_nodes(net, 2, (on, on), fresh=True) as (first, second):
        url = f"http://{net.addresses[0]}:{first.port}"
        healthy = f"import urllib.request as u; print(u.urlopen('{url}/health', timeout=5).status)"
        deadline = time.monotonic() + 300
        while _inside(net, healthy) != "200":
            for node in (first, second):
                assert node.process.poll() is None, node.log()[-4000:]
            assert time.monotonic() < deadline, first.log()[-3000:] + second.log()[-3000:]
            time.sleep(1)
        complete = (
            "import sys; sys.path.insert(0, '.'); from tests.faults import engine; print(len([1 "
            f"for _ in range(8) if engine.complete({first.port}, 'demo', "
            f"host='{net.addresses[0]}')]))"
        )
        assert _inside(net, complete) == "8"
        for node in (first, second):
            assert "o_proj sharded 4-way over ranks [0, 1, 2, 3]" in node.log()


@pytest.mark.parametrize("unset", [1, 0], ids=["on node two", "on node one"])
def test_variable_missing(net: Net, unset: int) -> None:
    envs = ({TOGGLE: "2"}, {TOGGLE: "2"})
    envs[unset].clear()
    with two_nodes(net, 1, envs) as nodes:
        aware = nodes[1 - unset]
        told = rf"OPROJ011: rank {unset}: {TOGGLE} is not set there, or"
        deadline = time.monotonic() + 240
        while not re.search(told, aware.log()):
            assert time.monotonic() < deadline, aware.log()[-4000:]
            time.sleep(0.2)
        refused = time.monotonic()
        for node in nodes:
            node.gone_after(SECONDS_TO_END)
            print(f"gone {time.monotonic() - refused:.1f} s after the refusal")
        assert re.search(r"enforce fail|Connection|Broken pipe", nodes[unset].log())
