"""Four hosts in containers, and an inventory of them: `Bed`.

As a program, to look around by hand: ``python tests/ansible/bed.py up DIR``, then ``… play DIR site``, ``… down DIR``;
``… renew DIR`` takes the roles of this tree over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).parents[2]
HERE: Final = Path(__file__).parent
IMAGE: Final = "fleetfed-test/ansible-host"
BASE: Final = "debian:bookworm-slim"
SITE: Final = "north"
HUB, GATEWAY, DEVICES = "hub", "g-north", ("d-1", "d-2")
HOSTS: Final = (HUB, GATEWAY, *DEVICES)
SECRET: Final = "vaulted-pass:word"
_CA: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_PACKAGES: Final = ("broker", "cloud_coordinator", "device", "gateway", "shared")
_FLAGS: Final = (
    # SYS_PTRACE, which a real machine's systemd has: it could not see itself behind ProtectProc with PrivateUsers.
    *(
        "--cap-add",
        "SYS_ADMIN",
        "--cap-add",
        "SYS_PTRACE",
        "--security-opt",
        "seccomp=unconfined",
        "--security-opt",
        "apparmor=unconfined",
    ),
    *("--tmpfs", "/run", "--tmpfs", "/run/lock", "--tmpfs", "/tmp"),
    *("-v", "/sys/fs/cgroup:/sys/fs/cgroup", "-e", "container=docker"),
    # On the machine's own file system: fuse-overlayfs, which some engines have, knows no set-group-id folders.
    *("-v", "/var/lib", "-v", "/opt"),
)
_CHANGED: Final = re.compile(r"^(\S+)\s+:\s+ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


def why_not() -> str:
    """Why no bed can be made here; empty where one can."""
    if os.geteuid() != 0:
        return "needs root for Docker and systemd in containers"
    for program in ("docker", "ssh-keygen"):
        if shutil.which(program) is None:
            return f"needs {program}"
    if _run("docker", "image", "inspect", BASE, check=False).returncode:
        return f"needs the image {BASE}"
    return ""


def environment() -> Path:
    """A virtual environment with Ansible, made once; its ``bin``."""
    folder = Path(os.environ.get("FLEETFED_ANSIBLE_VENV", "/tmp/ansible-venv"))
    if not (folder / "bin" / "ansible-lint").exists():
        venv.create(folder, with_pip=True)
        _run(folder / "bin" / "pip", "install", "--quiet", "-r", HERE / "requirements.txt")
    return folder / "bin"


def collection(bin_: Path, folder: Path) -> Path:
    """The collection as a user has it, built and installed; its ``collections`` folder."""
    built, installed = folder / "built", folder / "collections"
    _run(bin_ / "ansible-galaxy", "collection", "build", ROOT / "ansible", "--output-path", built, "--force")
    (archive,) = built.glob("fleetfed-fleet-*.tar.gz")
    _run(bin_ / "ansible-galaxy", "collection", "install", archive, "-p", installed, "--force", "--offline")
    return installed


@dataclass
class Play:
    """What came of one run.

    Attributes:
        returncode: of ansible-playbook.
        output: all that it said.
        seconds: how long it took.
        changed: per host.
        failed: per host, with what could not be reached.
    """

    returncode: int
    output: str
    seconds: float
    changed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)


class Bed:
    """Containers, keys, inventory and authority below one folder.

    Args:
        folder: of everything that is written on this machine.
        name: prefix of containers and name of the network.
    """

    def __init__(self, folder: Path, name: str = "fleetfed-bed") -> None:
        self.folder = folder
        self.name = name
        self.bin = environment()
        self.authority = folder / "authority"

    def up(self) -> None:
        """Start bare hosts, and write what Ansible has to know of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._image()
        _run("docker", "network", "create", self.name, check=False)
        key = self.folder / "ssh"
        if not key.exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        for host in HOSTS:
            container = f"{self.name}-{host}"
            _run("docker", "rm", "-f", "-v", container, check=False)
            _run("docker", "run", "-d", "--name", container, "--hostname", host, "--network", self.name,
                 "--network-alias", host, *_FLAGS, IMAGE)  # fmt: skip
        for host in HOSTS:
            self._wait(host)
            self.shell(host, "umask 077; mkdir -p /root/.ssh; cat > /root/.ssh/authorized_keys",
                       stdin=key.with_suffix(".pub").read_text())  # fmt: skip
        (self.folder / "home").mkdir(exist_ok=True)
        self.source("0.1.0")
        self._data()
        self.renew()

    def renew(self) -> None:
        """Install the collection, and write the inventory."""
        collection(self.bin, self.folder)
        self._inventory()

    def down(self) -> None:
        """Remove containers and network."""
        for host in HOSTS:
            _run("docker", "rm", "-f", "-v", f"{self.name}-{host}", check=False)
        _run("docker", "network", "rm", self.name, check=False)

    def source(self, version: str, *, broken: str = "") -> Path:
        """A copy of the packages with another version; ``broken`` is put into the device's command line."""
        folder = self.folder / "source" / version
        shutil.rmtree(folder, ignore_errors=True)
        for name in _PACKAGES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "hatch_build.py", "README.md"):
            shutil.copy(ROOT / name, folder / name)
        path = folder / "shared" / "version.py"
        path.write_text(re.sub(r'VERSION = ".*"', f'VERSION = "{version}"', path.read_text()))
        if broken:
            cli = folder / "device" / "cli.py"
            cli.write_text(f"{cli.read_text().split('if __name__')[0]}\n{broken}\n")
        return folder

    def play(self, name: str, *arguments: str, timeout: float = 1500, **variables: Any) -> Play:
        """Run a playbook of the collection."""
        command = [
            self.bin / "ansible-playbook", f"fleetfed.fleet.{name}", "-i", self.folder / "inventory",
            "--vault-password-file", self.folder / "vault-password", *arguments,
        ]  # fmt: skip
        if variables:
            command += ["-e", json.dumps(variables)]
        started = time.monotonic()
        log = self.folder / f"{name}.log"
        with log.open("w") as said:
            done = subprocess.run([str(each) for each in command], env=self._environ(), cwd=self.folder,
                                  stdout=said, stderr=subprocess.STDOUT, timeout=timeout)  # fmt: skip
        seconds, output = time.monotonic() - started, log.read_text()
        rows = _CHANGED.findall(output)
        print(f"{name} {' '.join(arguments)}: exit {done.returncode} after {seconds:.0f} s")
        return Play(
            done.returncode,
            output,
            seconds,
            {host: int(changed) for host, _, changed, _, _ in rows},
            {host: int(unreachable) + int(failed) for host, _, _, unreachable, failed in rows},
        )

    def lint(self) -> subprocess.CompletedProcess[str]:
        """Run ansible-lint on the collection where it is installed: it finds its own roles nowhere else."""
        return subprocess.run(
            [str(self.bin / "ansible-lint"), "--nocolor", "--offline", "--profile", "production"],
            env=self._environ(),
            cwd=self.folder / "collections" / "ansible_collections" / "fleetfed" / "fleet",
            text=True,
            capture_output=True,
            check=False,
        )

    def shell(self, host: str, command: str, *, stdin: str = "", check: bool = True) -> str:
        """Run a shell command as root on a host; what it said."""
        done = _run("docker", "exec", "-i", f"{self.name}-{host}", "sh", "-c", command, stdin=stdin, check=check)
        return done.stdout.strip()

    def fleetfed(self, *arguments: str, check: bool = True) -> Any:
        """Run the operator's command line on this machine; its JSON."""
        program = self.authority / "software" / "current" / "bin" / "fleetfed"
        config = self.authority / "operator.toml"
        done = _run(program, *arguments, "--config", config, "--json", check=check)
        return json.loads(done.stdout or "null")

    def address(self, host: str) -> str:
        """A host's address on the bed's network."""
        form = f'{{{{(index .NetworkSettings.Networks "{self.name}").IPAddress}}}}'
        return _run("docker", "inspect", "-f", form, f"{self.name}-{host}").stdout.strip()

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": str(self.folder / "home"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_FORKS": "4",
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }

    def _image(self) -> None:
        context = self.folder / "image"
        context.mkdir(exist_ok=True)
        shutil.copy(HERE / "Dockerfile.host", context / "Dockerfile")
        shutil.copy(_CA, context / _CA.name)
        (context / "pip.conf").write_text(f"[global]\ncert = {_CA}\ntimeout = 120\n")
        _run("docker", "build", "-q", "-t", IMAGE, context)

    def _wait(self, host: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while self.shell(host, "systemctl is-system-running; systemctl is-active ssh", check=False) not in (
            "running\nactive",
            "degraded\nactive",
        ):
            if time.monotonic() > end:
                raise TimeoutError(f"{host} does not come up")
            time.sleep(0.5)

    def _data(self) -> None:
        """Eight by eight pictures of digits, a fifth for the coordinator, the rest dealt to the devices."""
        from fleetfed.cloud_coordinator.demo import sources

        split = sources.load("digits", sources.Deal(devices=len(DEVICES), split="uniform"))
        split.validation.save(self.folder / "validation.npz")
        for name, part in zip(DEVICES, split.devices, strict=True):
            part.save(self.folder / f"{name}.npz")
        assert np.load(self.folder / "d-1.npz")["x"].shape[0] > 100

    def _inventory(self) -> None:
        folder = self.folder / "inventory"
        (folder / "group_vars" / "all").mkdir(parents=True, exist_ok=True)

        def host(name: str, **variables: Any) -> dict[str, Any]:
            return {name: {"ansible_host": self.address(name), **variables}}

        def group(*hosts: dict[str, Any]) -> dict[str, Any]:
            return {"hosts": {name: each for table in hosts for name, each in table.items()}}

        hub = host(HUB)
        tree = {
            "authority": group(
                {
                    "localhost": {
                        "ansible_connection": "local",
                        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
                    }
                }
            ),
            "enrollers": group(hub),
            "brokers": group(hub),
            "coordinators": group(hub),
            "gateways": group(host(GATEWAY, gateway_site=SITE)),
            "monitoring": group(hub),
            "devices": group(
                *(
                    host(
                        name,
                        device_site=SITE,
                        device_owner=f"owner-{name}",
                        device_data=str(self.folder / f"{name}.npz"),
                    )
                    for name in DEVICES
                )
            ),
        }
        (folder / "hosts.json").write_text(json.dumps({"all": {"children": tree}}, indent=1))
        variables = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.folder / "ssh"),
            "fleetfed_fleet": "bed",
            "fleetfed_broker_host": HUB,
            "fleetfed_enrolment_url": f"https://{HUB}:8443",
            "broker_hosts": [HUB, self.address(HUB)],
            "pki_directory": str(self.authority),
            "pki_broker_host": self.address(HUB),
            "common_source": str(self.folder / "source" / "0.1.0"),
            # A container has its machine's clock and cannot set it.
            "common_require_ntp": False,
            "coordinator_validation": str(self.folder / "validation.npz"),
            "coordinator_database_password": "{{ vault_database_password }}",
            "coordinator_settings": {
                "validation": {"scale": 0.0625},
                "rounds": {
                    "start_when": 2, "quorum_fraction": 1.0, "quorum_minimum": 1, "deadline": 60.0, "expires": 120.0,
                    "training": {"learning_rate": 0.05},
                },
            },
            "coordinator_metrics": "0.0.0.0:9464",
            "gateway_metrics": "0.0.0.0:9465",
            "enroller_metrics": "0.0.0.0:9467",
            "enroller_publish": "daily",
            "monitoring_alerts": str(ROOT / "deploy" / "monitoring" / "alerts.yml"),
            "device_settings": {"data": {"scale": 0.0625}},
        }  # fmt: skip
        (folder / "group_vars" / "all" / "fleet.json").write_text(json.dumps(variables, indent=1))
        (self.folder / "vault-password").write_text("open sesame\n")
        vault = folder / "group_vars" / "all" / "vault.yml"
        vault.write_text(f"vault_database_password: {json.dumps(SECRET)}\n")
        _run(self.bin / "ansible-vault", "encrypt", "--vault-password-file", self.folder / "vault-password", vault)


def _run(*command: Any, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(each) for each in command], input=stdin, text=True, capture_output=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:6]))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def main() -> int:
    """Up, down, or a playbook."""
    bed = Bed(Path(sys.argv[2]).absolute())
    if sys.argv[1] == "play":
        play = bed.play(sys.argv[3], *sys.argv[4:])
        print(play.output)
        return play.returncode
    {"up": bed.up, "renew": bed.renew, "down": bed.down}[sys.argv[1]]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
