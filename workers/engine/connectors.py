"""KV connectors: what moves an engine's KV cache elsewhere, as vLLM's `kv_transfer_config`.

`engine.connector` is one of the words below, a list of them (vLLM's MultiConnector, tried in that order), or a mapping
that is passed on as it is. Between prefill and decode engines exactly one child carries prompts. Our request plane
speaks the pull protocol of NIXL: the prefill's answer says where its blocks are, the decode engine fetches them.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.errors import ConfigError, closest
from launch.recipe import Kind, Recipe
from workers.engine.vllm_names import CONNECTORS, VERSION

MULTI = "MultiConnector"
OFFLOADING = "OffloadingConnector"
ROLES = ("kv_producer", "kv_consumer", "kv_both")
ROLE_OF = {Kind.PREFILL: "kv_producer", Kind.DECODE: "kv_consumer"}
# What a decode engine can pull with the parameters that a prefill worker returns.
PULLED = frozenset(("NixlConnector", "NixlPullConnector"))
# What hands a prompt from one engine to another by a protocol that our request plane does not speak.
FOREIGN = frozenset(("NixlPushConnector", "MooncakeConnector", "MoRIIOConnector"))


@dataclass(frozen=True, slots=True)
class Connector:
    """A connector that a recipe names by a word; `package` is what Python imports for it."""

    name: str
    package: str
    install: str
    module: str | None = None


KNOWN: dict[str, Connector] = {
    "nixl": Connector("NixlConnector", "nixl", "pip install nixl==1.5.1"),
    "lmcache": Connector("LMCacheConnectorV1", "lmcache", "pip install lmcache"),
    "kvbm": Connector("DynamoConnector", "kvbm", "pip install kvbm", "kvbm.vllm_integration.connector"),
    "mooncake": Connector("MooncakeConnector", "mooncake", "pip install mooncake-transfer-engine"),
}
PACKAGES = {
    **{item.name: item for item in KNOWN.values()},
    **{name: KNOWN["nixl"] for name in ("NixlPullConnector", "NixlPushConnector")},
    "LMCacheMPConnector": KNOWN["lmcache"],
    "MooncakeStoreConnector": KNOWN["mooncake"],
}


def kv_transfer_config(recipe: Recipe, kind: Kind) -> dict[str, Any] | None:
    """vLLM's `kv_transfer_config` for the engines of a role; None where nothing is to be moved.

    A carrier alone (`nixl`, the default) has nothing to do in an aggregated engine and is left out there.
    """
    children = [child for entry in recipe.engine.connector if (child := _child(recipe, kind, entry))]
    if kind in (Kind.EMBEDDING, Kind.ENCODE) or not children:
        return None
    policy = {"kv_load_failure_policy": str(recipe.engine.kv_load_failure)}
    if len(children) == 1:
        return policy | children[0]
    return {
        "kv_connector": MULTI,
        "kv_role": ROLE_OF.get(kind, "kv_both"),
        **policy,
        "kv_connector_extra_config": {"connectors": children},
    }


def ec_transfer_config(recipe: Recipe, kind: Kind, folder: str) -> dict[str, Any] | None:
    """vLLM's `ec_transfer_config` for the engines of a role: what encode engines made, through files in the folder.

    Decode engines take no part: an image is in the KV cache that they pull, and they encode it themselves if need be.
    """
    ec_role = {Kind.ENCODE: "ec_producer", Kind.PREFILL: "ec_consumer", Kind.AGGREGATED: "ec_consumer"}.get(kind)
    if not recipe.encodes_apart or ec_role is None:
        return None
    return {
        "ec_connector": "FileEncoderCache",
        "ec_connector_module_path": "workers.engine.encoder_cache",
        "ec_role": ec_role,
        "ec_connector_extra_config": {
            "shared_storage_path": folder,
            "max_bytes": int(recipe.engine.encoder_cache_gb * 1e9),
        },
    }


def check_connectors(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything is queued.

    Raises:
        ConfigError: A connector is unknown or malformed, or prefill and decode have no carrier, or more than one.
    """
    for entry in recipe.engine.connector:
        if isinstance(entry, str):
            if entry not in KNOWN:
                raise ConfigError(
                    f"engine.connector={entry!r} is unknown{closest(entry, KNOWN)}; there are {', '.join(KNOWN)}, none, "
                    "and a mapping with kv_connector and kv_role"
                )
        else:
            _check_verbatim(entry)
    if recipe.disaggregated:
        _check_carrier(recipe)
    elif "mooncake" in recipe.engine.connector:
        raise ConfigError(
            "engine.connector=mooncake hands prompts from prefill to decode engines and this recipe has none: for "
            "Mooncake's store write engine.connector={kv_connector: MooncakeStoreConnector, kv_role: kv_both}"
        )
    for role in recipe.roles:
        args = {**recipe.engine.args, **role.args}
        if args.get("kv_offloading_size") is not None and kv_transfer_config(recipe, role.kind):
            raise ConfigError(
                f"roles.{role.kind}: kv_offloading_size puts vLLM {VERSION}'s own offloading connector in the place of "
                "engine.connector: leave it out, or list {kv_connector: OffloadingConnector, kv_role: kv_both, "
                "kv_connector_extra_config: {cpu_bytes_to_use: <bytes>}} beside nixl in engine.connector"
            )


def lease_s(config: Mapping[str, Any] | None, default: float) -> float:
    """Seconds that a prefill engine keeps blocks for a decode engine, as its `kv_transfer_config` says."""
    for child in children_of(config):
        if child.get("kv_connector") in PULLED:
            return float(child.get("kv_connector_extra_config", {}).get("kv_lease_duration", default))
    return default


def require_packages(config: Mapping[str, Any] | None) -> None:
    """Refuse connectors whose Python package this environment lacks.

    Raises:
        ConfigError: Says what to install.
    """
    for child in children_of(config):
        known = PACKAGES.get(str(child.get("kv_connector")))
        module = str(child.get("kv_connector_module_path") or (known.package if known else ""))
        package = module.partition(".")[0]
        if package and importlib.util.find_spec(package) is None:
            how = f": {known.install}" if known and known.package == package else ""
            raise ConfigError(
                f"{child['kv_connector']} needs the Python package {package!r}, which this environment lacks{how}"
            )


def with_engine_id(config: Mapping[str, Any], life: str) -> dict[str, Any]:
    """The same with an engine id that follows from `life`, for all nodes of one engine.

    Left alone, each node makes one up (vLLM 0.32), and NIXL refuses the blocks of every node but the first: "engine ID
    mismatch". It must be new with every start: that is how a decode engine knows a prefill engine that was restarted.
    """
    return {"engine_id": hashlib.sha256(life.encode()).hexdigest()[:32], **config}


def children_of(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The connectors of a `kv_transfer_config`, those of a MultiConnector each by itself."""
    if not config:
        return
    if config.get("kv_connector") == MULTI:
        for child in config.get("kv_connector_extra_config", {}).get("connectors", ()):
            yield from children_of(child)
    else:
        yield config


def _child(recipe: Recipe, kind: Kind, entry: str | Mapping[str, Any]) -> dict[str, Any] | None:
    if not isinstance(entry, str):
        return _telling(entry) if recipe.publishes_kv_events else dict(entry)
    known = KNOWN[entry]
    config: dict[str, Any] = {"kv_connector": known.name, "kv_role": "kv_both"}
    if known.module:
        config["kv_connector_module_path"] = known.module
    if entry == "nixl":
        if kind not in ROLE_OF:
            return None
        config |= {
            "kv_role": ROLE_OF[kind],
            "kv_buffer_device": recipe.engine.device,
            "kv_connector_extra_config": {
                "backends": list(recipe.cluster.nixl_backends),
                "kv_lease_duration": recipe.engine.kv_lease_s,
            },
        }
    return config


def _telling(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same where an offloading connector says in KV events what it has; by itself it names its chunks only."""
    extra: Mapping[str, Any] = entry.get("kv_connector_extra_config") or {}
    if entry.get("kv_connector") == MULTI:
        extra = {**extra, "connectors": [_telling(child) for child in extra.get("connectors") or ()]}
    elif entry.get("kv_connector") == OFFLOADING:
        extra = {"self_describing_kv_events": True, **extra}
    return {**entry, "kv_connector_extra_config": extra} if extra else dict(entry)


def _check_verbatim(entry: Mapping[str, Any]) -> None:
    name, role = entry.get("kv_connector"), entry.get("kv_role")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"engine.connector as a mapping needs kv_connector, vLLM's name of the connector; got {entry}"
        )
    if name not in CONNECTORS and not entry.get("kv_connector_module_path"):
        raise ConfigError(
            f"kv_connector={name!r} is no connector of vLLM {VERSION}{closest(name, CONNECTORS)}: for one of another "
            "package add kv_connector_module_path"
        )
    if role not in ROLES:
        raise ConfigError(f"kv_role of {name} is one of {', '.join(ROLES)}, got {role!r}")
    if name == MULTI:
        inner: Sequence[Any] = (entry.get("kv_connector_extra_config") or {}).get("connectors") or ()
        if not inner:
            raise ConfigError(f"{MULTI} needs kv_connector_extra_config.connectors, a list of connectors; got {entry}")
        for child in inner:
            _check_verbatim(child)


def _check_carrier(recipe: Recipe) -> None:
    children = list(children_of(kv_transfer_config(recipe, Kind.PREFILL)))
    names = [str(child["kv_connector"]) for child in children]
    foreign = [name for name in names if name in FOREIGN]
    if foreign:
        raise ConfigError(
            f"{foreign[0]} cannot carry prompts from prefill to decode engines here: Baton's request plane speaks the "
            "pull protocol of NIXL only (the prefill's answer says where the blocks are); use engine.connector=nixl"
        )
    carriers = [name for name in names if name in PULLED]
    if len(carriers) != 1:
        found = f"{len(carriers)} that do" if carriers else "none that does"
        raise ConfigError(
            "prefill and decode engines need one connector that passes a prompt's KV cache between them, and "
            f"engine.connector has {found} ({', '.join(names) or 'none'}): use engine.connector=nixl, "
            "or [nixl, lmcache] to offload as well"
        )
