"""`python -m launch.keys NAME ...`: give keys out and take them back, while the deployment runs or before it starts again.

python -m launch.keys NAME list                     whose keys there are
python -m launch.keys NAME add ID [--admin]         a new key; shown once, kept as a hash
python -m launch.keys NAME revoke ID                from now on refused (within seconds)
python -m launch.keys NAME rotate [--admin]         replace the deployment's own key, in the file api_key or admin_key
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

import msgspec

from launch.errors import ConfigError, LaunchError, closest
from launch.records import NAME, RunDirectory, find, write
from workers.runtime.keys import ADMIN, DEFAULT, Key, Scope, more_keys, sha256


def main() -> int:
    """Do it; 0 when it was done, 1 when it was not, with the reason."""
    arguments = _parser().parse_args()
    try:
        run = find(arguments.runs_dir.absolute(), arguments.name)
        for line in _done(run, arguments):
            print(line)
    except (LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: keys.json of {arguments.name} cannot be read ({error}): repair or remove it", file=sys.stderr)
        return 1
    return 0


def add(run: RunDirectory, name: str, scope: Scope) -> str:
    """Make a key and keep its hash; returns the key.

    Raises:
        ConfigError: The name is taken, or is none.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key: use letters, digits, '_', '-' and '.'")
    keys = more_keys(run)
    if name in (DEFAULT, ADMIN, *(key.id for key in keys)):
        raise ConfigError(f"there is a key named {name!r} already: revoke it first, or take another name")
    secret = _new(scope)
    _keep(run, [*keys, Key(id=name, scope=scope, sha256=sha256(secret))])
    return secret


def revoke(run: RunDirectory, name: str) -> None:
    """Take a key back.

    Raises:
        ConfigError: There is none of that name, or it is the deployment's own.
    """
    keys = more_keys(run)
    if name in (DEFAULT, ADMIN):
        raise ConfigError(f"{name!r} is the deployment's own key: replace it with `rotate`")
    left = [key for key in keys if key.id != name]
    if len(left) == len(keys):
        names = [key.id for key in keys]
        raise ConfigError(
            f"there is no key named {name!r}{closest(name, names)}; there are {', '.join(names) or 'none'}"
        )
    _keep(run, left)


def rotate(run: RunDirectory, scope: Scope) -> Path:
    """Replace one of the deployment's own two keys; returns the file that holds it."""
    path = run.api_key_file if scope is Scope.USER else run.admin_key_file
    write(path, f"{_new(scope)}\n".encode(), mode=0o600)
    return path


def _done(run: RunDirectory, arguments: argparse.Namespace) -> list[str]:
    if arguments.action == "list":
        own = [f"{DEFAULT} {Scope.USER} {run.api_key_file}", f"{ADMIN} {Scope.ADMIN} {run.admin_key_file}"]
        return [*own, *(f"{key.id} {key.scope}" for key in more_keys(run))]
    if arguments.action == "revoke":
        revoke(run, arguments.id)
        return [f"{arguments.id} is revoked"]
    scope = Scope.ADMIN if arguments.admin else Scope.USER
    if arguments.action == "add":
        return [add(run, arguments.id, scope)]
    return [f"the new key is in {rotate(run, scope)}"]


def _new(scope: Scope) -> str:
    return f"{'baton' if scope is Scope.USER else 'baton-admin'}-{secrets.token_urlsafe(32)}"


def _keep(run: RunDirectory, keys: list[Key]) -> None:
    write(run.keys_file, msgspec.json.format(msgspec.json.encode(keys), indent=2), mode=0o600)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.keys", description="Give keys out and take them back.")
    parser.add_argument("name", help="the deployment")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="whose keys there are", parents=[common])
    added = actions.add_parser("add", help="a new key, shown once", parents=[common])
    added.add_argument("id")
    added.add_argument("--admin", action="store_true", help="for operations on workers, not for the model")
    actions.add_parser("revoke", help="take a key back", parents=[common]).add_argument("id")
    rotated = actions.add_parser("rotate", help="replace the deployment's own key", parents=[common])
    rotated.add_argument("--admin", action="store_true", help="the one of operations on workers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
