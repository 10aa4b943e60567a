"""A scheduler of one node for tests: sbatch, srun, squeue, scontrol and scancel that really run the scripts here.

    sbatch SCRIPT                      an array (or one job); a detached process of ours runs its tasks
    srun --output F --error F COMMAND  the step of a job: its pid lies in STATE/JOB.pid
    scontrol requeue JOB               the job runs again once its script has ended
    scancel --signal=USR2 JOB          Slurm's warning before it takes a job's place
    scancel --full --signal=KILL JOB   a node that is lost: the step is killed and, with --requeue, put back
    squeue --noheader --jobs JOB --format %T

What a real one does and this does not: nodes, limits, priorities, accounting.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
STATE = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path) -> dict[str, str]:
    """Put the commands into `folder`/bin; returns the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "state").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "state")}


def _options(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


def sbatch(script: str) -> None:
    number = 100 + len(list(STATE.glob("*.sh")))
    (STATE / f"{number}.sh").write_bytes(Path(script).read_bytes())
    tasks = _tasks(number)
    for task in tasks:
        _set(_name(number, task), "PENDING")
    process = subprocess.Popen(
        [sys.executable, __file__, "daemon", str(number)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(STATE / "daemon.log").open("ab"),
    )
    (STATE / f"{number}.daemon").write_text(str(process.pid))
    print(f"Submitted batch job {number}")


def _tasks(number: int) -> list[int | None]:
    array = _options((STATE / f"{number}.sh").read_text()).get("array")
    if array is None:
        return [None]
    first, last = array.split("%")[0].split("-")
    return list(range(int(first), int(last) + 1))


def _name(number: int, task: int | None) -> str:
    return str(number) if task is None else f"{number}_{task}"


def _set(job: str, state: str) -> None:
    (STATE / f"{job}.state").write_text(state)


def daemon(number: str) -> None:
    options = _options((STATE / f"{number}.sh").read_text())
    at_once = int(options.get("array", "0-0%1").split("%")[1])
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda task: _run(int(number), task, "requeue" in options), _tasks(int(number))))


def _run(number: int, task: int | None, may_requeue: bool) -> None:
    job = _name(number, task)
    own = {"SLURM_JOB_ID": str(number * 10 + (task or 0)), "SLURM_JOB_NODELIST": "localhost"}
    own |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    own |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    if task is not None:
        own |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
    while True:
        _set(job, "RUNNING")
        done = subprocess.run(["bash", str(STATE / f"{number}.sh")], env={**os.environ, **own}, check=False)
        again = STATE / f"{job}.requeue"
        if not (again.exists() and may_requeue):
            break
        again.unlink()
        _set(job, "PENDING")
    _set(job, "COMPLETED" if done.returncode == 0 else "FAILED")


def srun(*arguments: str) -> None:
    """Options first, then the command; becomes it."""
    left, files = list(arguments), {"--output": 1, "--error": 2}
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else str(int(os.environ["SLURM_JOB_ID"]) // 10)
    while left[0].startswith("--"):
        option = left.pop(0)
        if option in files:
            name = left.pop(0).replace("%A_%a", job).replace("%j", job).replace("%t", "0")
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), files[option])
    (STATE / f"{job}.pid").write_text(str(os.getpid()))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(task or 0) % len(cores)]})  # a job is bound to its cores
    os.execvp(left[0], left)  # noqa: S606 (what a scheduler is for)


def squeue(*arguments: str) -> None:
    path = STATE / f"{arguments[arguments.index('--jobs') + 1]}.state"
    state = path.read_text() if path.exists() else ""
    if not state:
        raise SystemExit("slurm_load_jobs error: Invalid job id specified")
    if state in ("PENDING", "RUNNING"):
        print(state)


def scontrol(verb: str, job: str) -> None:
    assert verb == "requeue"
    (STATE / f"{job}.requeue").touch()


def scancel(*arguments: str) -> None:
    *options, job = arguments
    lost = "--full" in options
    if lost:
        (STATE / f"{job}.requeue").touch()
    pid = int((STATE / f"{job}.pid").read_text())
    os.kill(pid, signal.SIGKILL if lost else signal.SIGUSR2)


def wait_until_idle(seconds: float) -> None:
    """Until no job waits or runs."""
    deadline = time.monotonic() + seconds
    while any(path.read_text() in ("PENDING", "RUNNING", "") for path in STATE.glob("*.state")):
        if time.monotonic() > deadline:
            raise TimeoutError({path.name: path.read_text() for path in STATE.glob("*.state")})
        time.sleep(0.1)


def end() -> None:
    """Kill what still runs, as after a test that failed; a training ends with its step."""
    for path in STATE.glob("*.daemon"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    {each.__name__: each for each in (sbatch, srun, squeue, scontrol, scancel, daemon)}[sys.argv[1]](*sys.argv[2:])
