"""A Slurm cluster of virtual nodes on this machine, in a folder: controller, node daemons and munge of its own.

It needs neither systemd nor cgroups nor a database, and ends with the test. Debian and Ubuntu have it:
apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from experiments.base.sweep_definition import Sweep, seeds
from experiments.config.sweep_points import Point, resolve_points
from experiments.half_depth import quickstart
from launchers.sweeps import slurm
from launchers.sweeps.sweep_folder import SweepFolder
from tests.forks import CORES
from tests.patience import patience
from tests.tiny import Tiny

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
MISSING = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {', '.join(MISSING)} not found")
STEPS = 120
REQUEST = slurm.Request(None, 60, 1, 0, 2, 2, {})  # two cores: a job has a node of its own
# Debian's Slurm refuses jobs whose credential is older than this, so it holds a job that is put back for as long.
HELD = "BeginTime"


def wait(ready: Callable[[], bool], seconds: float = 60, pause: float = 0.02) -> None:
    """Wait until `ready`; fails after as long as the machine may need."""
    deadline = time.monotonic() + patience(seconds)
    while not ready():
        assert time.monotonic() < deadline, "never ready"
        time.sleep(pause)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Cluster:
    """Nodes n1, n2, …, each of two cores; a partition `main` whose jobs give way to those of `high`."""

    folder: Path
    nodes: int = 2
    settings: dict[str, str] = field(default_factory=dict)
    main: str = ""
    held: dict[str, float] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SYSTEM_PATH}

    def call(self, *command: str, check: bool = True) -> str:
        """What a command prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        return done.stdout

    def start(self) -> None:
        """Write the settings, start the daemons, and wait until all nodes are idle."""
        at = self.folder
        (at / "state").mkdir(parents=True)
        at.chmod(0o755)
        (at / "munge.key").write_bytes(os.urandom(1024))
        (at / "munge.key").chmod(0o600)
        controller, *ports = _free_ports(self.nodes + 1)
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        settings = {
            "ClusterName": "tests", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": controller,
            "SlurmUser": user, "SlurmdUser": user, "AuthInfo": f"socket={at}/munge.socket",
            "SlurmctldPidFile": at / "slurmctld.pid", "SlurmctldLogFile": at / "slurmctld.log",
            "SlurmdPidFile": at / "slurmd.%n.pid", "SlurmdLogFile": at / "slurmd.%n.log",
            "SlurmdSpoolDir": at / "spool.%n", "StateSaveLocation": at / "state",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "MpiDefault": "none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
            "ReturnToService": "2", "KillWait": "5", "SlurmdParameters": "config_overrides",
            **self.settings,
        }  # fmt: skip
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 State=UNKNOWN"
            for i, port in enumerate(ports, 1)
        ]
        lines += [
            f"PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE LLN=YES {self.main}",
            "PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF",
        ]
        (at / "slurm.conf").write_text("\n".join(lines) + "\n")
        self.call("munged", f"--key-file={at}/munge.key", f"--socket={at}/munge.socket",
                  f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log", f"--seed-file={at}/munge.seed",
                  "--force")  # fmt: skip
        self.call("slurmctld", "-c")
        for i in range(self.nodes):
            (at / f"spool.n{i + 1}").mkdir()
            self.start_node(f"n{i + 1}")
        wait(lambda: self.call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False) == f"{self.nodes}\n")

    def start_node(self, node: str) -> None:
        """Start a node's daemon on a core of its own: commands compute with as many threads as they have cores."""
        core = CORES[int(node.removeprefix("n")) % len(CORES)]
        self.call("taskset", "--cpu-list", str(core), "slurmd", "-N", node)

    def lose_node(self, node: str, *, still_at_work: bool = False) -> None:
        """Have the controller take a node for lost: without power, or `still_at_work` where nobody reaches it."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        for pid in [] if still_at_work else self._job_keepers(node):
            _kill_tree(pid)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def _job_keepers(self, node: str) -> list[int]:
        """Daemons of steps, which outlive the node's: those whose socket lies in its spool folder."""
        steps = [path.name.partition("_")[2].split(".")[0] for path in (self.folder / f"spool.{node}").glob("*_*.*")]
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().decode(errors="replace")
                ours = (path.parent / "cwd").readlink().is_relative_to(self.folder)
                if ours and line.startswith("slurmstepd: [") and line.split("[")[1].split(".")[0] in steps:
                    found.append(int(path.parent.name))
        return found

    def preempt(self, node: str) -> None:
        """Have a job of the partition `high` take the whole node for a moment."""
        self.call(
            "sbatch", "--partition=high", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=true"
        )

    def jobs(self, *states: str) -> dict[str, tuple[str, str, str]]:
        """State, reason and nodes of what waits or runs, by job."""
        shown = self.call("squeue", "-h", "-r", "-o", "%i|%T|%r|%N")
        found = {job: (state, reason, nodes) for job, state, reason, nodes in (x.split("|") for x in shown.split())}
        return {job: each for job, each in found.items() if not states or each[0] in states}

    def node_of(self, job: str) -> str:
        """The node on which a job runs."""
        return self.jobs("RUNNING")[job][2]

    def hasten(self) -> None:
        """Let jobs that were put back start now, not two minutes later, but not before their old steps have ended."""
        for job, (_, reason, _) in self.jobs("PENDING").items():
            since = self.held.setdefault(job, time.monotonic()) if reason == HELD else self.held.pop(job, None)
            if reason == HELD and since is not None and time.monotonic() - since > 3:
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
                del self.held[job]

    def wait_until_idle(self, seconds: float) -> None:
        """Until no job waits or runs; those that are put back need not wait their two minutes."""

        def idle() -> bool:
            self.hasten()
            return not self.jobs()

        wait(idle, seconds, pause=0.5)

    def end(self) -> None:
        """Cancel what runs, and end the daemons."""
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        with contextlib.suppress(AssertionError):
            wait(lambda: not self.jobs(), seconds=5)
        for i in range(self.nodes):  # of a node that was lost, steps are left over
            for pid in self._job_keepers(f"n{i + 1}"):
                _kill_tree(pid)
        for path in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def _kill_tree(pid: int) -> None:
    """SIGKILL a process, then its children: what a node that loses its power does."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children.stdout.split():
        _kill_tree(int(child))


@contextlib.contextmanager
def cluster(folder: Path, **options: object) -> Generator[Cluster]:
    """A cluster while the block runs."""
    made = Cluster(folder, **options)  # pyright: ignore[reportArgumentType]
    try:
        made.start()
        yield made
    finally:
        made.end()


def sweep_of(tiny: Tiny, out: Path, n: int, steps: int = STEPS) -> tuple[SweepFolder, list[Point]]:
    """A folder of a sweep of `n` points, of which none has begun."""
    items = [*tiny.train_items(steps)[1:], "checkpoint.every=10", "evaluation.every=100"]
    points = resolve_points(Sweep(quickstart) * seeds(n), items, "study")
    folder = SweepFolder(out)
    folder.claim("study", points)
    return folder, points
