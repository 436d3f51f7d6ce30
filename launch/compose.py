"""From the command line to a frozen recipe: compose with Hydra, convert once, refuse with the nearest valid name."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from conf import schema
from launch.chain import Length, parsed
from launch.errors import ConfigError, closest
from launch.recipe import (
    PER_MODEL_FRONTEND,
    SHARED_ENGINE,
    Backend,
    Batch,
    Cluster,
    Container,
    Control,
    Engine,
    Environment,
    Executor,
    Fabric,
    Failover,
    Frontend,
    Handover,
    Kind,
    Launcher,
    Level,
    Limit,
    LoadFailure,
    LocalPrefillMode,
    Model,
    OnBadNode,
    OnLostNode,
    Preflight,
    Recipe,
    Role,
    RouterMode,
    Security,
    ServedModel,
    Stage,
    Standby,
    Tiny,
    Tokenize,
    Transport,
    Wait,
    Weights,
    When,
)
from launch.records import NAME
from workers.engine.checks import check_engines
from workers.engine.model import read_shape

E = TypeVar("E", bound=StrEnum)
C = TypeVar("C", schema.EngineConf, schema.FrontendConf)
GROUPS = ("recipe", "cluster")
TINY = {
    "tiny:": Tiny.TEXT,
    "tiny-vision:": Tiny.VISION,
    "tiny-audio:": Tiny.AUDIO,
    "tiny-video:": Tiny.VIDEO,
}
HUGGING_FACE = "hf:"
FREE_FORM = re.compile(r"\.(args|env|sbatch)\.|^models\.[^.]+\.(engine|frontend)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One call of `python -m launch`: the recipe, and how to go about it."""

    recipe: Recipe
    launcher: Launcher
    wait: Wait
    dry_run: bool
    runs_dir: Path
    overrides: tuple[str, ...]
    chain: Length | None = None


def read(overrides: Sequence[str]) -> Launch:
    """Compose `conf/config.yaml` with the user's overrides and convert the result.

    Raises:
        ConfigError: An override, a recipe or a value cannot be used; the message says which and what would do.
    """
    try:
        config = _compose([_spelled_out(text) for text in overrides])
        if config.models and OmegaConf.is_missing(config.model, "path"):
            config.model.path = ""  # OmegaConf refuses it otherwise, although each model says its own
        written = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    assert isinstance(written, schema.Config)
    return _convert(written, tuple(overrides))


def choices(group: str) -> tuple[str, ...]:
    """The names of the shipped files of a config group (`recipe`, `cluster`)."""
    folder = Path(conf.__file__).parent / group
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def _spelled_out(override: str) -> str:
    """Add the plus that Hydra asks for where a user cannot know it: the recipe, and keys below free-form mappings."""
    key = override.partition("=")[0]
    if key == "recipe":
        return f"+{override}"
    return f"++{override}" if FREE_FORM.search(key) and override[0].isalpha() else override


def _compose(overrides: Sequence[str]) -> DictConfig:
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_module(version_base="1.3", config_module="conf"):
        return compose(config_name="config", overrides=list(overrides))


def _convert(written: schema.Config, overrides: tuple[str, ...]) -> Launch:
    if not NAME.fullmatch(written.name):
        raise ConfigError(f"name={written.name!r} cannot name a folder: use letters, digits, '_', '-' and '.'")
    _refuse_missing(written)
    models = _models(written)
    recipe = Recipe(
        name=written.name,
        models=models,
        engine=_engine(written.engine) if written.models else models[0].engine,
        frontend=_frontend(written.frontend) if written.models else models[0].frontend,
        control=Control(
            # Hydra reads true and false as such, and OmegaConf writes them back with a capital.
            **_fields(written.control, standby=word(Standby, "control.standby", written.control.standby.lower()))
        ),
        failover=Failover(**_fields(written.failover)),
        security=Security(**_fields(written.security)),
        cluster=_cluster(written.cluster),
        slurm=Batch(
            **_fields(
                written.slurm,
                setup=tuple(written.slurm.setup),
                srun_args=tuple(written.slurm.srun_args),
                on_lost_node=word(OnLostNode, "slurm.on_lost_node", written.slurm.on_lost_node),
            )
        ),
        environment=_environment(written),
        preflight=Preflight(
            **_fields(
                written.preflight,
                level=word(Level, "preflight.level", written.preflight.level),
                kv=word(When, "preflight.kv", written.preflight.kv),
                on_bad_node=word(OnBadNode, "preflight.on_bad_node", written.preflight.on_bad_node),
                ignore=tuple(written.preflight.ignore),
            )
        ),
        handover=Handover(**_fields(written.handover)),
        weights=Weights(
            stage=word(Stage, "weights.stage", written.weights.stage),
            transport=word(Transport, "weights.transport", written.weights.transport),
        ),
    )
    for one in recipe.each:
        with _within(one.model.key):
            check_engines(one, read_shape(Path(one.model.path)))
    return Launch(
        recipe=recipe,
        launcher=word(Launcher, "launcher", written.launcher) if written.launcher else recipe.cluster.launcher,
        wait=_wait(written.wait),
        dry_run=written.dry_run,
        runs_dir=Path(written.runs_dir).expanduser().absolute(),
        overrides=overrides,
        chain=parsed(written.chain),
    )


def _models(written: schema.Config) -> tuple[ServedModel, ...]:
    """The models as each of them would be served alone.

    Raises:
        ConfigError: One cannot be, or is given twice: below `models`, and above.
    """
    if not written.models:
        roles = _roles(written.roles, "")
        return (_served(written.model, "", roles, _engine(written.engine), _frontend(written.frontend)),)
    if written.model.path or _roles(written.roles, ""):
        raise ConfigError(
            f"the recipe serves the models {', '.join(written.models)}: model and roles are those of a recipe of one model; "
            "write models.<key>.model and models.<key>.roles"
        )
    found = []
    for key, one in written.models.items():
        where = f"models.{key}"
        engine = _laid_over(written.engine, one.engine, f"{where}.engine", SHARED_ENGINE, None)
        frontend = _laid_over(written.frontend, one.frontend, f"{where}.frontend", (), PER_MODEL_FRONTEND)
        roles = _roles(one.roles, key)
        with _within(key):
            parts = _engine(engine), _frontend(frontend)
        found.append(_served(one.model, key, roles, *parts))
    return tuple(found)


def _served(
    written: schema.ModelConf, key: str, roles: tuple[Role, ...], engine: Engine, frontend: Frontend
) -> ServedModel:
    return ServedModel(model=_model(written, key), roles=roles, engine=engine, frontend=frontend)


def _model(written: schema.ModelConf, key: str) -> Model:
    """Where the weights are, and what clients call them."""
    prefix = next((prefix for prefix in TINY if written.path.startswith(prefix)), "")
    cached = written.path.startswith(HUGGING_FACE)
    path = snapshot(written.path) if cached else Path(written.path.removeprefix(prefix)).expanduser().absolute()
    name = written.path.removeprefix(HUGGING_FACE).partition("@")[0] if cached else path.name
    return Model(path=str(path), name=written.name or key or name, tiny=TINY.get(prefix), key=key)


def _roles(written: schema.RolesConf, key: str) -> tuple[Role, ...]:
    where = f"models.{key}.roles" if key else "roles"
    return tuple(
        Role(kind=kind, model=key, **_fields(role, executor=word(Executor, f"{where}.{kind}.executor", role.executor)))
        for kind in Kind
        if (role := getattr(written, kind.value)).replicas != 0
    )


def _engine(written: schema.EngineConf) -> Engine:
    return Engine(
        **_fields(
            written,
            backend=word(Backend, "engine.backend", written.backend),
            lora_dirs=tuple(written.lora_dirs),
            connector=_connector(written.connector),
            tokenize=word(Tokenize, "engine.tokenize", written.tokenize),
            kv_load_failure=word(LoadFailure, "engine.kv_load_failure", written.kv_load_failure),
        )
    )


def _frontend(written: schema.FrontendConf) -> Frontend:
    return Frontend(
        **_fields(
            written,
            router=word(RouterMode, "frontend.router", written.router) if written.router else None,
            local_prefill=word(LocalPrefillMode, "frontend.local_prefill", written.local_prefill),
        )
    )


def _laid_over(
    common: C, own: Mapping[str, Any], where: str, shared: Collection[str], allowed: Collection[str] | None
) -> C:
    """What all models share with what one has for itself: mappings are merged, all else is replaced.

    Args:
        common: The section of the whole deployment.
        own: Some of its keys, with the model's values.
        where: The model's section, for messages.
        shared: Keys that no model may have for itself.
        allowed: Those that it may; None for all others.

    Raises:
        ConfigError: A key is none, or not a model's, or its value has another type.
    """
    names = [item.name for item in fields(common)]
    for name in own:
        if name not in names:
            raise ConfigError(
                f"unknown key {f'{where}.{name}'!r}{closest(name, names) or ';'} there are {', '.join(names)}"
            )
        if name in shared or (allowed is not None and name not in allowed):
            raise ConfigError(
                f"{where}.{name}: all models share {name}: write {where.rpartition('.')[2]}.{name}, outside of models"
            )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(common), dict(own))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    laid = OmegaConf.to_object(merged)
    assert isinstance(laid, type(common))
    return laid


@contextlib.contextmanager
def _within(key: str) -> Iterator[None]:
    """Errors of a model of several say whose they are."""
    try:
        yield
    except ConfigError as error:
        if not key:
            raise
        raise ConfigError(f"models.{key}: {error}") from error


def snapshot(written: str) -> Path:
    """The folder of `hf:OWNER/NAME[@REVISION]` in the cache of Hugging Face: a commit's, so that it never changes.

    Raises:
        ConfigError: It is not there; nothing is fetched here, as weights take hours and belong on a transfer node.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = written.removeprefix(HUGGING_FACE).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        more = f" --revision {revision}" if revision else ""
        raise ConfigError(
            f"model.path={written} is not in the cache of Hugging Face ({type(error).__name__}): fetch it with "
            f"`hf download {repository}{more}`, with HF_HOME as it is here"
        ) from error


def _cluster(written: schema.ClusterConf) -> Cluster:
    tuples = ("nixl_backends", "hosts", "srun_args", "setup", "unset")
    container = word(Container, "cluster.container", written.container) if written.container else None
    return Cluster(
        **_fields(
            written,
            **{name: tuple(getattr(written, name)) for name in tuples},
            launcher=word(Launcher, "cluster.launcher", written.launcher),
            fabric=word(Fabric, "cluster.fabric", written.fabric),
            limits=tuple(Limit(**_fields(limit)) for limit in written.limits),
            container=container,
        )
    )


def _environment(written: schema.Config) -> Environment:
    """The environment, with the container runtime that its kind or the cluster names."""
    asked, here = written.environment, written.cluster.container
    kinds = ("here", "conda", "archive", "container", *Container)
    if asked.kind not in kinds:
        raise ConfigError(
            f"environment.kind is one of {', '.join(kinds)}, got {asked.kind!r}{closest(asked.kind, kinds)}"
        )
    if asked.kind == "container" and here is None:
        raise ConfigError(
            f"cluster {written.cluster.name!r} names no container runtime: write environment.kind="
            f"{' or '.join(Container)}, or use an environment without one"
        )
    runtime = here if asked.kind == "container" else asked.kind
    return Environment(
        **_fields(
            asked,
            binds=tuple(asked.binds),
            args=tuple(asked.args),
            container=Container(str(runtime)) if runtime in list(Container) else None,
        )
    )


def _connector(value: Any) -> tuple[str | Mapping[str, Any], ...]:
    """`engine.connector` as the list that it always is; `none` is the empty one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"engine.connector={value!r} is no JSON ({error})") from error
    if value is None or value == "none":
        return ()
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str | dict) for entry in entries) or (len(entries) > 1 and "none" in entries):
        raise ConfigError(f"engine.connector is a connector's name, a list of names, or a mapping, got {value!r}")
    return tuple(entries)


def word(kind: type[E], key: str, value: str) -> E:
    """The member of an enumeration that the user's word stands for.

    Raises:
        ConfigError: There is none; the message lists them.
    """
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{key} is one of {', '.join(kind)}, got {value!r}{closest(value, kind)}") from None


def _fields(written: Any, **converted: Any) -> dict[str, Any]:
    return {item.name: getattr(written, item.name) for item in fields(written)} | converted


def _wait(value: Any) -> Wait:
    words: dict[Any, Wait] = {True: Wait.STOPPED, False: Wait.NO, "true": Wait.STOPPED, "false": Wait.NO}
    return words.get(value) or word(Wait, "wait", str(value))


def _refuse_missing(written: Any, prefix: str = "") -> None:
    for item in fields(written):
        value = getattr(written, item.name)
        key = f"{prefix}{item.name}"
        if value == "???":
            raise ConfigError(f"{key} has no value: add {key}=<value>")
        if is_dataclass(value):
            _refuse_missing(value, f"{key}.")


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's complaint, led by the valid name nearest to what was written."""
    text = " ".join(str(cause).strip() for cause in (error, error.__cause__) if cause)
    if "LexerNoViableAlt" in text or "mismatched input" in text:
        return f"{text}\nquote a value with special characters, within the shell's own quotes: 'key=\"a&b\"'"
    if "missing mandatory value: name" in text:
        return f"nothing to launch: add +recipe=<name>, one of {', '.join(choices('recipe'))}"
    for group in GROUPS:
        for override in overrides:
            key, _, value = override.partition("=")
            if key.lstrip("+") == group and value and value not in choices(group):
                return (
                    f"no {group} named {value!r}{closest(value, choices(group))}; there are {', '.join(choices(group))}"
                )
    for override in overrides:
        key = re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]
        if key.split(".")[0] in GROUPS and "." not in key:
            continue
        unknown = unknown_key(key)
        if unknown:
            return unknown
    below = re.search(r"Key '([^']+)' is not in struct\s+full_key: models\.\1\b", text)
    if below:
        return (
            f"the recipe has no model {below.group(1)!r} below models: write it into a recipe file; its keys can be changed "
            "from here then"
        )
    named = re.search(r"Key '([^']+)' (?:is )?not in", text)
    full = re.search(r"full_key: (\S+)", text)
    if named and full:
        return unknown_key(full.group(1)) or text
    return text


def unknown_key(key: str) -> str | None:
    """What is wrong with a dotted key of the configuration, or None when the schema has it."""
    node: Any = schema.Config
    path: list[str] = []
    for part in key.split("."):
        if node is schema.ServedConf and path[-1] == "models":
            path.append(part)  # a key that the user chose
            continue
        if not is_dataclass(node):
            return None
        names = {item.name: item.type for item in fields(node)}
        if part not in names:
            where = ".".join(path) or "the configuration"
            near = closest(part, names)
            return f"unknown key {key!r}{near or ';'} {where} has {', '.join(names)}"
        path.append(part)
        node = _dataclass_of(str(names[part]))
    return None


def _dataclass_of(annotation: str) -> Any:
    return getattr(schema, annotation.removeprefix("dict[str, ").split(" |")[0].rstrip("]"), None)
