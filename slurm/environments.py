"""Where the compute nodes' Python comes from: as lines of the batch script, arguments of srun and a command; pure.

A container is entered once for each agent, and everything that the agent starts is inside it: engines find each other's
memory and devices as without one.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError
from launch.recipe import Container, Recipe

UNPACK = Path(__file__).with_name("unpack.py")
SHM_SIZE = "64g"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """How to run Python on a compute node.

    `command` is shell text to which arguments are appended, `setup` is run by the batch shell before it, `srun_args` belong
    to every srun that runs it.
    """

    command: str
    setup: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()

    def in_batch_shell(self) -> str:
        """The command as the batch shell itself runs it: where srun enters the container, through an srun of one task."""
        if not self.srun_args:
            return self.command
        return f"srun --nodes=1 --ntasks=1 {shlex.join(self.srun_args)} {self.command}"


def interpreter(recipe: Recipe, run_dir: Path) -> Interpreter:
    """The interpreter of a recipe's environment.

    Raises:
        ConfigError: The environment cannot be had on this cluster.
    """
    asked = recipe.environment
    path = asked.path or ""
    if asked.container is not None:
        return _container(recipe, asked.container, run_dir)
    if asked.kind == "conda":
        prefix = shlex.quote(path)
        setup = (f"export CONDA_PREFIX={prefix}", f"export PATH={prefix}/bin:$PATH")
        return Interpreter(command=shlex.quote(f"{path}/bin/python"), setup=setup)
    if asked.kind == "archive":
        return _archive(recipe, path)
    return Interpreter(command=shlex.quote(sys.executable))


def folders(recipe: Recipe, run_dir: Path) -> tuple[str, ...]:
    """What must be there inside a container, as path or path:path-inside."""
    tls = [path for path in (recipe.frontend.tls_cert, recipe.frontend.tls_key) if path]
    models = [path for one in recipe.models for path in (one.model.path, *one.engine.lora_dirs)]
    needed = [str(run_dir), *models, *tls, *recipe.environment.binds]
    return tuple(dict.fromkeys(needed))


def _archive(recipe: Recipe, path: str) -> Interpreter:
    """Every node unpacks for itself, once, on its own disk: thousands of small files never meet the shared one."""
    scratch = recipe.cluster.local_scratch
    if scratch is None:
        raise ConfigError(
            f"environment.kind=archive unpacks to a disk of each node's own and cluster {recipe.cluster.name!r} names none: "
            "write cluster.local_scratch=<folder>, or use another environment"
        )
    inside = recipe.environment.python if "/" in recipe.environment.python else f"bin/{recipe.environment.python}"
    words = ["python3", str(UNPACK), path]
    # The folder may hold the site's variables, which the batch shell replaces.
    return Interpreter(command=f'{shlex.join(words)} "{_in_quotes(scratch)}" {shlex.quote(inside)}')


def _container(recipe: Recipe, runtime: Container, run_dir: Path) -> Interpreter:
    asked, cluster = recipe.environment, recipe.cluster
    image = asked.path or ""
    amd = cluster.gpu_vendor == "amd"
    gpus = recipe.engine.device == "cuda"
    binds = folders(recipe, run_dir)
    if runtime is Container.APPTAINER:
        words = [cluster.container_command or "apptainer", "exec"]
        words += ["--rocm" if amd else "--nv"] if gpus else []
        words += [word for bind in binds for word in ("--bind", bind)]
        return Interpreter(command=shlex.join([*words, *asked.args, image, asked.python]))
    if runtime is Container.PODMAN_HPC:
        words = [
            cluster.container_command or "podman-hpc",
            "run",
            "--rm",
            "--interactive",
            *(["--gpu"] if gpus else []),
        ]
        words += ["--net=host", "--env-host", f"--shm-size={SHM_SIZE}"]
        words += [f"--volume={bind if ':' in bind else f'{bind}:{bind}'}" for bind in binds]
        return Interpreter(command=shlex.join([*words, *asked.args, image, asked.python]))
    if runtime is Container.PYXIS:
        mounts = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
        args = (f"--container-image={image}", f"--container-mounts={mounts}", *asked.args)
        return Interpreter(command=shlex.quote(asked.python), srun_args=args)
    if asked.binds:
        raise ConfigError(
            f"environment.binds: CSCS's container engine takes its mounts from the environment definition alone: write them "
            f"into {image}, the run directory's and the model's too"
        )
    return Interpreter(command=shlex.quote(asked.python), srun_args=(f"--environment={image}", *asked.args))


def _in_quotes(text: str) -> str:
    """Text for double quotes of a shell, in which $NAME is replaced and nothing else is special."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")


def exported(name: str, value: str, default_only: bool = False) -> str:
    """A line that exports a variable; `default_only` leaves what the user's own shell has."""
    text = _in_quotes(value)
    return f'export {name}="${{{name}:-{text}}}"' if default_only else f'export {name}="{text}"'
