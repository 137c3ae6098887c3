"""A Slurm of two nodes with fake GPUs on this one machine, with accounting, for `prove.py`.

Debian's own packages (`PACKAGES`), daemons on loopback alone, everything they write below one
folder. Needs root. A fake GPU is a device node that nobody opens: Slurm counts it, and hands it
out, as it does a real one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmdbd", "mariadb-server", "munge")
GPUS_PER_NODE = 2
WITHIN_S = 60.0  # for a daemon to answer

SLURM_CONF = """ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/run/munge.sock
AccountingStorageTRES=gres/gpu
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 \
RealMemory=8000 Gres=gpu:{gpus}
PartitionName=spot Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=reserved Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP
"""
SLURMDBD_CONF = """DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
AuthType=auth/munge
AuthInfo={folder}/run/munge.sock
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=x
StorageLoc=slurm_acct_db
"""
SQL = (
    "create user slurm@127.0.0.1 identified by 'x';"
    " grant all on slurm_acct_db.* to slurm@127.0.0.1;"
)


class CannotRun(Exception):
    """This machine lacks something: the reason is the message."""


def install() -> None:
    """Install what is missing of Debian's packages.

    Raises:
        CannotRun: If this is no root, no Debian, or a package cannot be had.
    """
    if os.geteuid() != 0:
        raise CannotRun("Slurm's daemons want root")
    missing = [name for name in ("slurmctld", "slurmdbd", "mariadbd", "munged") if not _has(name)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise CannotRun(f"{', '.join(missing)} are not here, and no apt-get to install them")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise CannotRun(f"apt-get {words[0]}: {done.stderr.strip()[-200:]}")


def _has(program: str) -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return shutil.which(program, path=path) is not None


@dataclass(slots=True)
class Cluster:
    """The daemons, from `start` to `stop`.

    Attributes:
        folder: Of all that they write; others than root must be able to enter it.
    """

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need beside this process's own."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start munge, MariaDB, slurmdbd, slurmctld and two slurmd, each once the one before it
        answers.
        """
        for name in ("run", "state", "spool/n1", "spool/n2", "log", "dev"):
            (self.folder / name).mkdir(parents=True)
        sql_port, dbd_port, port = free_ports(4)
        self._write(sql_port, dbd_port, port)
        self._start_munge()
        self._start_database(sql_port)
        self._daemon("slurmdbd", "-D")
        self._until("slurmdbd", lambda: self.says("sacctmgr", "-n", "show", "cluster") is not None)
        self.run("sacctmgr", "-i", "add", "cluster", "proof", check=False)
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until("slurmctld", lambda: (self.says("sinfo", "-hNo%T") or "").count("idle") >= 4)

    def stop(self) -> None:
        """Cancel what runs, and end the daemons in the order that none waits for another."""
        self.run("scancel", "--user=root", check=False)
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *words: str, check: bool = True, **more: str) -> str:
        """Return what a command of Slurm's prints."""
        done = subprocess.run(
            words, env={**self.environment, **more}, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def says(self, *words: str) -> str | None:
        """Return what a command prints, None where it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return None if done.returncode else done.stdout

    def _write(self, sql_port: int, dbd_port: int, port: int) -> None:
        names = {
            "folder": self.folder,
            "host": socket.gethostname().partition(".")[0],
            "sql_port": sql_port,
            "dbd_port": dbd_port,
            "port": port,
            "first": port + 1,
            "last": port + 2,
            "gpus": GPUS_PER_NODE,
        }
        devices = [self.folder / f"dev/gpu{number}" for number in range(GPUS_PER_NODE)]
        for device in devices:  # Slurm refuses a plain file
            os.mknod(device, 0o20666, os.makedev(1, 3))
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**names))
        dbd = self.folder / "slurmdbd.conf"
        dbd.write_text(SLURMDBD_CONF.format(**names))
        dbd.chmod(0o600)
        file = f"{self.folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={file}\n")

    def _start_munge(self) -> None:
        key = self.folder / "run/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [f"--{what}={self.folder}/run/munge.{ends}" for what, ends in MUNGE]
        self._daemon("munged", "--foreground", "--force", *own)
        self._until("munged", (self.folder / "run/munge.sock").exists)

    def _start_database(self, port: int) -> None:
        data, own = self.folder / "sql", ["setpriv", "--reuid=mysql", "--regid=mysql"]
        data.mkdir()
        shutil.chown(data, "mysql", "mysql")
        words = ("--user=mysql", f"--datadir={data}", "--skip-test-db")
        self.run("mariadb-install-db", *words, "--auth-root-authentication-method=socket")
        at = [f"--datadir={data}", f"--socket={data}/sock", f"--pid-file={data}/pid"]
        to = ["--bind-address=127.0.0.1", f"--port={port}", "--innodb-buffer-pool-size=64M"]
        self._daemon(*own, "--clear-groups", "mariadbd", "--no-defaults", *at, *to)
        client = ["mariadb", "--no-defaults", f"--socket={data}/sock", "-uroot"]
        self._until("mariadbd", lambda: self.says(*client, "-eselect 1") is not None)
        self.run(*client, f"-e{SQL}")

    def _daemon(self, *words: str) -> None:
        log = (self.folder / f"log/{len(self.daemons)}-{words[0]}.out").open("wb")
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        own = {**self.environment, "PATH": path}
        # a session of its own: Ctrl-C at the terminal is for the script, which stops them in order
        self.daemons.append(
            subprocess.Popen(
                words, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        )

    def _until(self, name: str, answers: Callable[[], bool]) -> None:
        until = time.monotonic() + WITHIN_S
        while not answers():
            if time.monotonic() > until:
                raise CannotRun(f"{name} does not answer within {WITHIN_S:.0f} s: see its log")
            time.sleep(0.2)


MUNGE: Sequence[tuple[str, str]] = (
    ("key-file", "key"),
    ("socket", "sock"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
)


def free_ports(count: int) -> tuple[int, int, int]:
    """Return two free ports, and the first of three more in a row."""
    for first in range(16800, 60000, 10):
        if all(_is_free(first + each) for each in range(count + 1)):
            return first, first + 1, first + 2
    raise CannotRun("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
