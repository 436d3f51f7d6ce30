"""What a user writes is taken, or refused with the way out."""

from __future__ import annotations

from dataclasses import asdict

import msgspec
import pytest

from launch.compose import choices, read
from launch.errors import ConfigError
from launch.plan import plan
from launch.recipe import Kind, Launcher, Recipe, Tiny, Wait


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param([], r"nothing to launch: add \+recipe=<name>", id="nothing"),
        pytest.param(["+recipe=tiny_disag"], r"did you mean 'tiny_disagg'", id="unknown recipe"),
        pytest.param(
            ["+recipe=tiny_agg", "cluster=slurm_gpu9"],
            r"no cluster named 'slurm_gpu9', did you mean",
            id="unknown cluster",
        ),
        pytest.param(
            ["+recipe=tiny_agg", "engin.device=cpu"],
            r"unknown key 'engin.device', did you mean 'engine'",
            id="unknown section",
        ),
        pytest.param(["+recipe=tiny_agg", "engine.devise=cpu"], r"did you mean 'device'", id="unknown key"),
        pytest.param(
            ["+recipe=tiny_agg", "roles.decode.replica=2"], r"did you mean 'replicas'", id="unknown key, deeper"
        ),
        pytest.param(
            ["+recipe=tiny_agg", "roles.aggregated.replicas=two"],
            r"'two'.*could not be converted to Integer",
            id="word for a number",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "roles.decode.replicas=-1"],
            r"start at 1, got \(-1, 1, 1, 1, 1\)",
            id="negative count",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "roles.decode.replicas=0"],
            r"add roles.decode.replicas=1",
            id="prefill without decode",
        ),
        pytest.param(
            ["+recipe=tiny_agg", "roles.decode.replicas=1"],
            r"add roles.prefill.replicas=1",
            id="decode without prefill",
        ),
        pytest.param(["+recipe=tiny_disagg", "roles.aggregated.replicas=1"], r"mix with no other role", id="mixed"),
        pytest.param(
            ["+recipe=tiny_agg", "launcher=slurrm"],
            r"one of slurm, allocation, local, debug, got 'slurrm', did you mean 'slurm'",
            id="launcher",
        ),
        pytest.param(["+recipe=tiny_agg", "wait=maybe"], r"wait is one of stopped, ready, no", id="wait"),
        pytest.param(
            ["+recipe=tiny_agg", "engine.tokenize=workers"],
            r"one of auto, frontend, worker, got 'workers', did you mean 'worker'",
            id="who tokenizes",
        ),
        pytest.param(["+recipe=tiny_agg", "name=a/b"], r"cannot name a folder", id="name"),
        pytest.param(["+recipe=tiny_agg", "frontend.port=70000"], r"1 to 65535", id="port"),
        pytest.param(["+recipe=tiny_agg", "frontend.tls_cert=/c.pem"], r"tls_key go together.*set both", id="half TLS"),
        pytest.param(["+recipe=tiny_agg", "frontend.unix_socket=s"], r"absolute path", id="relative socket"),
        pytest.param(["+recipe=tiny_agg", "frontend.otlp_endpoint=h:4318"], r"http:// or https://", id="collector"),
        pytest.param(["+recipe=tiny_agg", "frontend.batch_concurrency=0"], r"at least 1, got", id="idle batches"),
        pytest.param(["+recipe=tiny_agg", "slurm.time_min=0"], r"at least 1 minute", id="time"),
        pytest.param(
            ["+recipe=tiny_agg", "engine.args.tensor_parallel_size=2"],
            r"is decided by the plan",
            id="the plan's argument",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "roles.decode.args.block_size=64"],
            r"must agree on block_size",
            id="unequal engines",
        ),
        pytest.param(["+recipe=tiny_agg", "engine.device=tpu"], r"cpu or cuda", id="device"),
        pytest.param(["+recipe=tiny_agg", "engine.canary_timeout_s=0"], r"canary_timeout_s above 0", id="canary"),
    ],
)
def test_bad_words_are_refused_with_the_way_out(overrides: list[str], message: str) -> None:
    """Each message names the value and what would do."""
    with pytest.raises(ConfigError, match=message):
        plan(read(overrides).recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.chat.engine.devise=1", r"unknown key 'models.chat.engine.devise', did you mean 'device'"),
        ("models.chat.engine.device=cuda", r"models.chat.engine.device: all models share device: write engine.device"),
        ("models.chat.frontend.port=8000", r"models.chat.frontend.port: all models share port"),
        ("models.chat.frontend.busy_requests=two", r"models.chat.frontend: Value 'two'.*Integer"),
        ("models.chat.rolez=3", r"unknown key 'models.chat.rolez', did you mean 'roles'"),
        ("models.other.roles.decode.replicas=1", r"no model 'other' below models: write it into a recipe file"),
        ("model.path=/m", r"serves the models chat, embed.*write models.<key>.model"),
        ("roles.decode.replicas=1", r"serves the models chat, embed.*models.<key>.roles"),
        ("models.chat.roles.decode.replicas=2", r"models.chat has decode.*add models.chat.roles.prefill.replicas=1"),
        ("models.chat.roles.aggregated.replicas=0", r"models.chat has no roles"),
        ("models.chat.roles.aggregated.replicas=-1", r"models.chat.roles.aggregated: replicas.* start at 1"),
        ("models.embed.model.name=chat", r"two models are called 'chat'"),
        ("models.embed.frontend.router=kv", r"models.embed.frontend.router=kv follows what engines cache"),
        ("models.chat.engine.backend=ecko", r"models.chat: engine.backend .*did you mean 'echo'"),
        ("models.chat.engine.args.max_sequences=1", r"models.chat: engine.args.max_sequences is no engine argument"),
        ("weights.stage=local", r"needs cluster.local_scratch"),
    ],
)
def test_what_is_wrong_with_one_of_several_models_names_it(override: str, message: str) -> None:
    """Keys of a model are checked as those of the only one are."""
    with pytest.raises(ConfigError, match=message):
        plan(read(["+recipe=tiny_two_models", override]).recipe)


def test_staging_is_refused_for_several_models() -> None:
    """It brings one to the nodes, and the engines of the others would wait for it."""
    with pytest.raises(ConfigError, match=r"brings one model to the nodes, and this recipe serves chat, embed"):
        read(["+recipe=tiny_two_models", "weights.stage=local", "cluster.local_scratch=/scratch"])


def test_a_model_lays_its_own_keys_over_those_of_all() -> None:
    """Mappings are merged, all else is replaced; the name that clients send is the key, or what the model says."""
    asked = read(
        [
            *(
                "+recipe=tiny_two_models",
                "engine.env.A=1",
                "models.chat.engine.env.B=2",
                "models.chat.engine.args.seed=7",
            ),
            *("models.chat.frontend.queue_requests=9", "models.embed.model.name=org/embed", "engine.kv_lease_s=20"),
        ]
    ).recipe
    chat, embed = asked.of("chat"), asked.of("embed")

    assert [served.model.name for served in asked.models] == ["chat", "org/embed"]
    assert chat.engine.env == {"A": "1", "B": "2"}
    assert embed.engine.env == asked.engine.env == {"A": "1"}
    assert chat.engine.args == {**asked.engine.args, "seed": 7}
    assert embed.engine.args == {**asked.engine.args, "runner": "pooling", "convert": "embed"}
    assert (chat.frontend.queue_requests, embed.frontend.queue_requests) == (9, 512)
    assert {one.engine.kv_lease_s for one in (asked, chat, embed)} == {20}
    assert [role.group for role in asked.roles] == ["chat-aggregated", "embed-embedding"]


@pytest.mark.parametrize("name", choices("recipe"))
def test_the_recipe_of_each_model_is_one_of_a_single_model(name: str) -> None:
    """A recipe of one model is that already; and what is written to the run directory is read as it was."""
    whole = read([f"+recipe={name}"]).recipe

    assert [one.model for one in whole.each] == [served.model for served in whole.models]
    assert all(one == one.of(one.model.key) for one in whole.each)
    assert len(whole.models) > 1 or whole.each == (whole,)
    assert msgspec.yaml.decode(msgspec.yaml.encode(asdict(whole)), type=Recipe) == whole


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        *((name, cluster) for name in choices("recipe") for cluster in ("local", "slurm_gpu8", "perlmutter")),
        *(("llama70b_disagg", cluster) for cluster in choices("cluster")),
    ],
)
def test_every_shipped_file_composes(name: str, cluster: str) -> None:
    """Recipes are named after their files; a cluster decides the launcher."""
    asked = read([f"+recipe={name}", f"cluster={cluster}"])

    assert asked.recipe.name == name
    assert asked.recipe.cluster.name == cluster
    assert asked.launcher is (Launcher.LOCAL if cluster == "local" else Launcher.SLURM)


def test_engine_options_need_no_plus() -> None:
    """Keys below free-form mappings are written like any other."""
    asked = read(
        ["recipe=tiny_disagg", "engine.args.seed=3", "roles.decode.args.max_num_seqs=4", "slurm.sbatch.nice=5"]
    )

    decode = next(role for role in asked.recipe.roles if role.kind is Kind.DECODE)
    assert asked.recipe.engine.args["seed"] == 3
    assert decode.args == {"max_num_seqs": 4}
    assert asked.recipe.slurm.sbatch == {"nice": 5}


@pytest.mark.parametrize(("word", "meaning"), [("true", Wait.STOPPED), ("false", Wait.NO), ("ready", Wait.READY)])
def test_wait_takes_yes_no_and_ready(word: str, meaning: Wait) -> None:
    """`wait=false` leaves at once."""
    assert read(["+recipe=tiny_agg", f"wait={word}"]).wait is meaning


@pytest.mark.parametrize(
    ("path", "kind"), [("tiny:m/t", Tiny.TEXT), ("tiny-vision:m/t", Tiny.VISION), ("/models/tiny:m", None)]
)
def test_the_path_says_which_model_is_made(path: str, kind: Tiny | None) -> None:
    """Or that none is: then it must be there."""
    model = read(["+recipe=tiny_agg", f"model.path='{path}'"]).recipe.model

    assert model.tiny is kind
    assert model.path.endswith(path.rpartition(":")[2] if kind else path)
