"""Settings: read from TOML and `--set`, refused with the name and the rule, and the same on both sides of the wire."""

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitfl.config import exposure, identity, operation
from splitfl.config.explain import OTHER_NAMES, known_settings
from splitfl.config.own import ClientSection, DataSection, ServerSection
from splitfl.config.reading import Config, to_toml
from splitfl.config.run import differences
from splitfl.config.section import Section, SettingClass, classes_of
from splitfl.config.sections import StrategySection
from splitfl.config.trees import ClientConfig, RunConfig, ServerConfig
from splitfl.errors import ConfigError

MODEL = {"model": {"model_name_or_path": "/srv/models/llama"}}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def loaded(*overrides: str) -> ServerConfig:
    return ServerConfig.load(None, ["model.model_name_or_path=llama", *overrides])


class TestLoading:
    def test_a_file_with_overrides_on_top(self, tmp_path: Path) -> None:
        path = written(
            tmp_path / "run.toml", 'seed = 3\n[model]\nmodel_name_or_path = "x"\n[federation]\nnum_rounds = 5\n'
        )
        config = ServerConfig.load(path, ["federation.num_rounds=7", "federation.local_steps=2", "seed=4"])
        assert (config.seed, config.federation.num_rounds, config.federation.local_steps) == (4, 7, 2)
        assert config.total_steps == 14
        assert config.lora.r == 8

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b"seed = ", r"run\.toml: not TOML: "),
            (b"[model\n", r"run\.toml: not TOML: "),
            (b"seed = 1\nseed = 2\n", r"run\.toml: not TOML: "),
            (b'name = "\xff"\n', r"run\.toml: not TOML: "),
        ],
    )
    def test_a_file_that_is_not_toml(self, tmp_path: Path, text: bytes, reason: str) -> None:
        (tmp_path / "run.toml").write_bytes(text)
        with pytest.raises(ConfigError, match=reason):
            ServerConfig.load(tmp_path / "run.toml")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"missing\.toml: no such file; --config names a TOML file"):
            ServerConfig.load(tmp_path / "missing.toml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
            ServerConfig.load(tmp_path)

    def test_the_error_names_the_file(self, tmp_path: Path) -> None:
        path = written(tmp_path / "run.toml", "seed = -1\n")
        with pytest.raises(ConfigError, match=r"run\.toml: seed = -1: input should be greater than or equal to 0"):
            RunConfig.load(path)


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "section", "key", "value"),
        [
            ("optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 1e-3),
            ("federation.num_rounds = 7", "federation", "num_rounds", 7),
            ("federation.server_mode=sequential", "federation", "server_mode", "sequential"),
            ('federation.server_mode="frozen"', "federation", "server_mode", "frozen"),
            ("train.embeddings=true", "train", "embeddings", True),
            ('lora.target_modules=["q_proj", "v_proj"]', "lora", "target_modules", ("q_proj", "v_proj")),
            ("lora.target_modules=[]", "lora", "target_modules", ()),
            ("model.model_name_or_path=/a path/with=signs", "model", "model_name_or_path", "/a path/with=signs"),
            ("server.runs_dir=elsewhere", "server", "runs_dir", Path("elsewhere")),
            ("server.run_id=2024-05-01", "server", "run_id", "2024-05-01"),
        ],
    )
    def test_values_are_toml_or_plain_text(self, override: str, section: str, key: str, value: object) -> None:
        got = getattr(getattr(loaded(override), section), key)
        assert got == value
        assert type(got) is type(value) or isinstance(got, Path)

    def test_the_last_one_wins(self) -> None:
        assert loaded("seed=1", "seed=2").seed == 2

    @pytest.mark.parametrize("override", ["seed", "=3", "federation.=3", ""])
    def test_what_is_no_override(self, override: str) -> None:
        with pytest.raises(ConfigError, match=r"write --set section\.key=value"):
            loaded(override)

    def test_a_value_is_no_section(self) -> None:
        with pytest.raises(ConfigError, match="seed is a value, not a section"):
            loaded("seed=1", "seed.more=2")

    def test_the_error_names_its_source(self) -> None:
        with pytest.raises(ConfigError, match=r"^--set: federation\.num_rounds = 'many': must be a whole number"):
            loaded("federation.num_rounds=many")


class TestUnknownSettings:
    @pytest.mark.parametrize(
        ("override", "nearest"),
        [
            ("federation.num_round=3", "federation.num_rounds"),
            ("optimizer.learning_rat=1", "optimizer.learning_rate"),
            ("learning_rate=1", "optimizer.learning_rate"),
            ("model.server_mode=shared", "federation.server_mode"),
            ("training.bottom=lora", "train?"),
        ],
    )
    def test_the_nearest_is_named(self, override: str, nearest: str) -> None:
        with pytest.raises(ConfigError, match=r"unknown setting .*; did you mean " + re.escape(nearest)):
            loaded(override)

    def test_or_those_that_are_known(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown setting lora\.z+; known here: r, alpha, dropout, target"):
            loaded("lora.zzzzzzzzzzzzzzzzzzzz=1")


class TestNamesOfOtherPrograms:
    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("lr=1e-3", "optimizer.learning_rate"),
            ("optimizer.lr=1e-3", "optimizer.learning_rate"),
            ("optimizer.LR=1e-3", "optimizer.learning_rate"),
            ("batch_size=8", "federation.per_device_train_batch_size"),
            ("federation.epochs=3", "federation.local_steps"),
            ("lora.rank=4", "lora.r"),
            ("lora.lora_alpha=4", "lora.alpha"),
            ("text.max_length=64", "text.max_seq_length"),
            ("model.name_or_path=llama", "model.model_name_or_path"),
            ("federation.rounds=3", "federation.num_rounds"),
            ("num_clients=3", "federation.min_available_clients"),
            ("server.port=5555", "server.address"),
        ],
    )
    def test_the_setting_that_is_meant_is_named(self, override: str, meant: str) -> None:
        name = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"unknown setting {re.escape(name)}; did you mean {re.escape(meant)}\?"):
            loaded(override)

    def test_a_client_is_told_its_own(self) -> None:
        with pytest.raises(ConfigError, match=r"did you mean client\.server_address\?"):
            ClientConfig.load(None, ["client.client_id=a", "client.host=gpu-box"])

    def test_each_is_one_of_ours(self) -> None:
        ours = {*known_settings(ServerConfig), *known_settings(ClientConfig)}
        assert {name for names in OTHER_NAMES.values() for name in names} <= ours


class TestKindsOfValues:
    @pytest.mark.parametrize(
        ("line", "rule"),
        [
            ("federation.num_rounds = true", "federation.num_rounds = true: must be a whole number"),
            ("federation.num_rounds = 2.0", "federation.num_rounds = 2.0: must be a whole number"),
            ('federation.num_rounds = "2"', "federation.num_rounds = '2': must be a whole number"),
            ("lora.alpha = true", "lora.alpha = true: must be a number"),
            ('optimizer.learning_rate = "1e-3"', "optimizer.learning_rate = '1e-3': must be a number"),
            ("train.embeddings = 1", "train.embeddings = 1: must be true or false"),
            ('train.embeddings = "yes"', "train.embeddings = 'yes': must be true or false"),
            ("server.device = 0", "server.device = 0: must be text"),
            ('lora.target_modules = "q_proj"', "lora.target_modules = 'q_proj': must be a list"),
            ('federation.strategy = "fedavg"', "federation.strategy = 'fedavg': must be 'FedAvg', "),
            ('server.run_id = "a/b"', "server.run_id = 'a/b': must be 1 to 64 letters, digits"),
        ],
    )
    def test_nothing_is_guessed(self, line: str, rule: str, tmp_path: Path) -> None:
        path = written(tmp_path / "run.toml", f'model.model_name_or_path = "llama"\n{line}\n')
        with pytest.raises(ConfigError, match=re.escape(f"run.toml: {rule}")):
            ServerConfig.load(path)

    def test_what_was_nearly_written_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"or 'NormClippedMean'; did you mean 'FedAvg'\?$"):
            loaded("federation.strategy=fedavg")

    def test_a_proxy_is_a_host_and_a_port(self) -> None:
        with pytest.raises(ConfigError, match=r"client\.socks_proxy = 'foo': must be HOST:PORT"):
            ClientConfig.load(None, ["client.client_id=a", "client.socks_proxy=foo"])
        for proxy in ("localhost:1080", "10.0.0.1:9050", "[::1]:1080"):
            assert ClientConfig.load(None, ["client.client_id=a", f"client.socks_proxy={proxy}"]).client.socks_proxy

    def test_the_error_says_that_there_are_overrides(self, tmp_path: Path) -> None:
        path = written(tmp_path / "run.toml", 'model.model_name_or_path = "x"\n')
        with pytest.raises(ConfigError, match=r"run\.toml with --set: seed = -1"):
            ServerConfig.load(path, ["seed=-1"])

    def test_a_whole_number_is_a_number(self) -> None:
        assert loaded("lora.alpha=4").lora.alpha == 4.0

    def test_text_on_the_command_line_may_look_like_a_number(self) -> None:
        assert loaded("server.run_id=20261130").server.run_id == "20261130"
        assert loaded("server.runs_dir=7").server.runs_dir == Path("7")
        assert ClientConfig.load(None, ["client.client_id=true"]).client.client_id == "true"


class TestSections:
    def test_a_list_of_a_section(self, tmp_path: Path) -> None:
        path = written(tmp_path / "run.toml", 'model.model_name_or_path = "llama"\n[[train]]\nbottom = "none"\n')
        with pytest.raises(ConfigError, match=r"train is one section, .* write \[train\], in single brackets") as found:
            ServerConfig.load(path)
        assert "TrainSection" not in str(found.value)

    def test_a_value_in_a_sections_place(self) -> None:
        with pytest.raises(
            ConfigError, match=r"^--set: model = 'llama': model is a section; did you mean model\.model_n"
        ):
            ServerConfig.load(None, ["model=llama"])

    def test_a_servers_file_for_a_client(self, tmp_path: Path) -> None:
        path = written(
            tmp_path / "server.toml", 'seed = 1\n[model]\nmodel_name_or_path = "x"\n[train]\n[server]\nrun_id = "a"\n'
        )
        with pytest.raises(ConfigError) as found:
            ClientConfig.load(path)
        assert str(found.value) == (
            f"{path} is a server's file (it has [model], [train] and [server]): `splitfl server` takes it, and"
            " `splitfl client` one with [client] and [data]"
        )

    def test_a_clients_file_for_a_server(self, tmp_path: Path) -> None:
        path = written(tmp_path / "client.toml", '[client]\nclient_id = "a"\n[data]\npath = "a.txt"\n')
        with pytest.raises(ConfigError) as found:
            ServerConfig.load(path)
        assert str(found.value) == (
            f"{path} is a client's file (it has [client] and [data]): `splitfl client` takes it, and"
            " `splitfl server` one with [model], [federation] and [server]"
        )

    def test_a_section_of_the_other_role(self) -> None:
        with pytest.raises(ConfigError, match=r"is a server's file, and \[data\] belongs in a client's: move it there"):
            loaded("data.path=x")


BUFFERED = [
    "federation.strategy=FedBuff",
    "federation.server_mode=frozen",
    "optimizer.lr_scheduler_type=constant",
]


class TestRanges:
    @pytest.mark.parametrize(
        "override",
        [
            "seed=-1",
            "seed=2147483648",
            "model.bottom_layers=-1",
            "model.dtype=float16",
            "lora.r=0",
            "lora.dropout=1.0",
            "optimizer.learning_rate=0",
            "optimizer.learning_rate=nan",
            "optimizer.adam_beta1=1.0",
            "optimizer.lr_scheduler_type=polynomial",
            "federation.fraction_train=0",
            "federation.fraction_train=1.1",
            "federation.server_mode=per_clinic",
            "federation.round_timeout=0",
            "federation.strategy=FedNova",
            "strategy.proximal_mu=-0.1",
            "strategy.server_learning_rate=0",
            "strategy.server_learning_rate=nan",
            "strategy.server_momentum=1.0",
            "strategy.eta=0",
            "strategy.eta=inf",
            "strategy.beta_1=-0.1",
            "strategy.beta_2=1.0",
            "strategy.tau=0",
            "strategy.beta=0.5",
            "strategy.num_malicious_clients=-1",
            "strategy.num_clients_to_keep=-1",
            "strategy.clipping_norm=0",
            "strategy.buffer_size=0",
            "strategy.max_staleness=-1",
            "federation.partial_work=most",
            "merge.parts=middle",
            "text.max_seq_length=1",
            "link.max_in_flight=0",
            "link.max_in_flight=65",
            "link.frame_bytes=4095",
            "train.bottom=half",
            "server.run_id=../x",
            "server.num_threads=-1",
        ],
    )
    def test_the_setting_and_its_value_are_named(self, override: str) -> None:
        name, _, value = override.partition("=")
        with pytest.raises(ConfigError) as caught:
            loaded(override)
        assert f"{name} = " in str(caught.value)
        assert value.removesuffix(".0") in str(caught.value)

    def test_several_findings_are_all_told(self) -> None:
        with pytest.raises(ConfigError, match=r"seed = -1: .*; lora\.r = 0: "):
            loaded("seed=-1", "lora.r=0")

    @pytest.mark.parametrize(
        ("overrides", "rule"),
        [
            (
                ["federation.min_train_clients=2"],
                r"min_train_clients \(2\) must not exceed min_available_clients \(1\)",
            ),
            (["link.heartbeat_interval=6"], r"heartbeat_timeout \(8.0 s\) must be at least twice heartbeat_interval"),
            (["link.slowest_link_bytes_per_second=25000"], r"takes 10.5 s on the slowest link, which must stay below"),
            (
                ["strategy.eta=0.5"],
                r"strategy\.eta = 0\.5 is an option of FedAdagrad, FedAdam, FedYogi: leave it out, or choose another"
                r" federation\.strategy than FedAvg",
            ),
            (["federation.strategy=Krum", "strategy.num_clients_to_keep=2"], r"is an option of MultiKrum: leave"),
            (
                ["federation.strategy=SCAFFOLD", "federation.weight_by=uniform"],
                r"optimizer\.optim = adamw_torch does not go with federation\.strategy = SCAFFOLD, .* set"
                r' optimizer\.optim to "sgd"',
            ),
            (
                ["federation.strategy=SCAFFOLD", "optimizer.optim=sgd", "optimizer.weight_decay=0.1"],
                r"optimizer\.weight_decay = 0\.1 does not go with federation\.strategy = SCAFFOLD, .*: set it to 0",
            ),
            (
                ["federation.strategy=SCAFFOLD", "optimizer.optim=sgd"],
                r"federation\.weight_by = num_examples does not go with federation\.strategy = SCAFFOLD: .* so set"
                r' weight_by to "uniform"',
            ),
            (
                [
                    "federation.strategy=SCAFFOLD",
                    "optimizer.optim=sgd",
                    "federation.weight_by=uniform",
                    "federation.server_mode=per_client",
                ],
                r"federation\.server_mode = per_client does not go with federation\.strategy = SCAFFOLD, .*: choose",
            ),
            (
                ["federation.strategy=SCAFFOLD", "strategy.proximal_mu=0.1"],
                r"strategy\.proximal_mu = 0\.1 is an option of FedProx: leave",
            ),
            (["strategy.buffer_size=4"], r"is an option of FedBuff: leave it out"),
            (
                ["federation.strategy=FedBuff"],
                r'FedBuff": federation\.server_mode = "shared" has clients wait for each other, and FedBuff has none'
                r' wait: set it to "sequential" or "frozen"; optimizer\.lr_scheduler_type = "linear" needs a last step',
            ),
            (
                [*BUFFERED, "storage.durability=snapshot", "federation.fraction_train=0.5"],
                r'"snapshot" takes all clients back to one merge, .* "redo"; federation\.fraction_train = 0\.5 is of'
                r" rounds that all clients share: leave it out",
            ),
            (
                [*BUFFERED, "federation.partial_work=accept"],
                r"partial_work = accept is of rounds that all clients share",
            ),
        ],
    )
    def test_settings_that_do_not_fit_each_other(self, overrides: list[str], rule: str) -> None:
        with pytest.raises(ConfigError, match=rule):
            loaded(*overrides)

    def test_a_server_needs_a_model_and_a_client_a_name(self) -> None:
        with pytest.raises(ConfigError, match="name a model directory or a hub id"):
            ServerConfig.from_tree({}, source="test")
        with pytest.raises(ConfigError, match="give this client a name"):
            ClientConfig.from_tree({}, source="test")

    @pytest.mark.parametrize("name", ["clinic a", "-a", ".a", "a/b", "é", "x" * 65])
    def test_names_that_are_no_file_names(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"client\.client_id = "):
            ClientConfig.from_tree({"client": {"client_id": name}}, source="test")


class TestRoundTrip:
    @pytest.mark.parametrize(
        "config",
        [
            ServerConfig.from_tree(MODEL, source="test"),
            ServerConfig.from_tree(
                {
                    **MODEL,
                    "seed": 5,
                    "lora": {"target_modules": ["q_proj"], "alpha": 0.5},
                    "server": {"run_id": "a.b-c", "cache_dir": "/a cache/ü", "export_model": False},
                },
                source="test",
            ),
            ClientConfig.from_tree(
                {
                    "client": {"client_id": "clinic-a"},
                    "data": {"path": 'a "quoted" name.txt', "also_evaluate": {"other": "b.txt"}},
                },
                source="test",
            ),
        ],
        ids=["server", "server, changed", "client"],
    )
    def test_what_is_written_reads_back(self, config: Config, tmp_path: Path) -> None:
        assert type(config).load(written(tmp_path / "run.toml", to_toml(config))) == config

    def test_json_reads_back(self) -> None:
        run = ServerConfig.from_tree(MODEL, source="test").run_config()
        again = RunConfig.from_tree(json.loads(run.to_json()), source="test")
        assert again == run
        assert again.fingerprint() == run.fingerprint()


def leaves(tree: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    for name, field in tree.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from leaves(annotation, (*prefix, name))
        else:
            yield (*prefix, name), annotation, field.default


def another(annotation: Any, value: Any) -> Any:
    """Return a different value that the setting allows."""
    if typing.get_origin(annotation) is typing.Literal:
        return next((choice for choice in typing.get_args(annotation) if choice != value), None)
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 or 0.25
        case str() | Path() | None:
            return "a1" * 32  # which is a hash as well
        case tuple():
            return typing.get_args(typing.get_args(annotation)[0])[:1] or ("other", "another")
    raise AssertionError(f"no other value of {annotation}")


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: merged(first[key], second[key]) for key in first.keys() & second.keys() if isinstance(first[key], dict)
    }
    return {**first, **second, **both}


RUN_SETTINGS = list(leaves(RunConfig))
SERVER_SETTINGS = [leaf for leaf in leaves(ServerConfig) if leaf[0][0] == "server"]
BASE = merged(MODEL, {"federation": {"min_available_clients": 3}})


def base_for(path: tuple[str, ...]) -> dict[str, Any]:
    """Return settings in which a setting may be changed: an option needs what uses it."""
    match path:
        case ("federation", "early_stopping_threshold"):
            return merged(BASE, {"federation": {"evaluate": "rounds", "early_stopping_patience": 1}})
        case ("federation", "early_stopping_patience" | "load_best_model_at_end"):
            return merged(BASE, {"federation": {"evaluate": "rounds"}})
        case ("evaluation", "label_words"):
            return merged(BASE, {"evaluation": {"measures": ["accuracy"]}})
        case ("strategy", option):
            return merged(BASE, needs_of(sorted(StrategySection.USED_BY[option])[0]))
    return BASE


def needs_of(strategy: str) -> dict[str, Any]:
    federation = {"federation": {"strategy": strategy}}
    if strategy != "FedBuff":
        return federation
    return merged(federation, {"federation": {"server_mode": "frozen"}, "optimizer": {"lr_scheduler_type": "constant"}})


def built(path: tuple[str, ...], annotation: Any, default: Any) -> ServerConfig:
    return ServerConfig.from_tree(merged(base_for(path), nested(path, another(annotation, default))), source="test")


def classes_of_setting(path: tuple[str, ...]) -> tuple[SettingClass, ...]:
    section: type[Section] = RunConfig
    for name in path[:-1]:
        section = typing.cast(type[Section], section.model_fields[name].annotation)
    return classes_of(section, path[-1])


class TestClasses:
    @pytest.mark.parametrize(("path", "_annotation", "_default"), RUN_SETTINGS, ids=lambda part: str(part)[:40])
    def test_every_setting_of_a_run_is_operation_or_not(
        self, path: tuple[str, ...], _annotation: Any, _default: Any
    ) -> None:
        marks = classes_of_setting(path)
        assert marks in (
            (SettingClass.OPERATION,),
            (SettingClass.IDENTITY,),
            (SettingClass.EXPOSURE,),
            (SettingClass.IDENTITY, SettingClass.EXPOSURE),
        ), f"{'.'.join(path)}: let it stand in identity.py (as Exposure[...] too), exposure.py or operation.py"

    @pytest.mark.parametrize("module", [identity, exposure, operation], ids=lambda module: module.__name__)
    def test_all_that_stands_in_a_file_is_of_its_class(self, module: ModuleType) -> None:
        wanted = SettingClass[module.__name__.rpartition(".")[2].upper()]
        there = [
            each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__
        ]
        assert there
        for section in there:
            assert issubclass(section, Section)
            assert all(wanted in classes_of(section, name) for name in section.model_fields)

    @pytest.mark.parametrize("tree", [ServerSection, ClientSection, DataSection], ids=lambda tree: tree.__name__)
    def test_what_is_one_sides_own_has_none(self, tree: type[Section]) -> None:
        assert not any(classes_of(tree, name) for name in tree.model_fields)

    def test_differences_are_named_with_both_values(self) -> None:
        before = {"a": {"b": 1, "c": [1]}, "d": 2}
        now = {"a": {"b": 2, "c": [1]}, "e": {"f": None, "g": 3}}
        assert list(differences(before, now)) == [("a.b", 1, 2), ("d", 2, None), ("e.g", None, 3)]
        assert not list(differences(now, now))


class TestFingerprint:
    @pytest.mark.parametrize(("path", "annotation", "default"), RUN_SETTINGS, ids=lambda part: str(part)[:40])
    def test_identity_and_exposure_change_it_and_operation_does_not(
        self, path: tuple[str, ...], annotation: Any, default: Any
    ) -> None:
        base = ServerConfig.from_tree(base_for(path), source="test").run_config()
        changed = built(path, annotation, default).run_config()
        found = [name for name, _, _ in differences(base.operation(), changed.operation())]
        is_operation = SettingClass.OPERATION in classes_of_setting(path)
        assert (found == [".".join(path)]) == is_operation
        assert (changed.fingerprint() == base.fingerprint()) == is_operation

    @pytest.mark.parametrize(("path", "annotation", "default"), RUN_SETTINGS, ids=lambda part: str(part)[:40])
    def test_each_setting_is_in_the_trees_of_its_classes(
        self, path: tuple[str, ...], annotation: Any, default: Any
    ) -> None:
        base = ServerConfig.from_tree(base_for(path), source="test").run_config()
        changed = built(path, annotation, default).run_config()
        trees = {
            SettingClass.IDENTITY: (base.identity(), changed.identity()),
            SettingClass.EXPOSURE: (base.exposure(), changed.exposure()),
            SettingClass.OPERATION: (base.operation(), changed.operation()),
        }
        found = {mark for mark, (before, now) in trees.items() if any(differences(before, now))}
        also = {SettingClass.IDENTITY} if base.federation.compares_rounds and path[0] == "evaluation" else set()
        assert found - also == set(classes_of_setting(path))

    @pytest.mark.parametrize(("path", "annotation", "default"), SERVER_SETTINGS, ids=lambda part: str(part)[:40])
    def test_the_servers_own_do_not(self, path: tuple[str, ...], annotation: Any, default: Any) -> None:
        base = ServerConfig.from_tree(BASE, source="test")
        changed = built(path, annotation, default)
        assert changed != base
        assert changed.fingerprint() == base.fingerprint()
        assert changed.run_config() == base.run_config()

    def test_with_rounds_or_without_is_another_run(self) -> None:
        without = {"federation": {"num_rounds": 0, "server_mode": "frozen"}}
        runs = [
            ServerConfig.from_tree(merged(MODEL, tree), source="test").run_config()
            for tree in (without, {"federation": {"server_mode": "frozen"}})
        ]
        assert list(differences(runs[0].identity(), runs[1].identity())) == [("federation.num_rounds", 0, "1 or more")]
        assert runs[0].fingerprint() != runs[1].fingerprint()

    def test_where_rounds_are_compared_what_is_measured_is_identity(self) -> None:
        compared = {"federation": {"evaluate": "rounds", "load_best_model_at_end": True}}
        before, now = (
            ServerConfig.from_tree(merged(MODEL, merged(compared, tree)), source="test").run_config()
            for tree in ({}, {"evaluation": {"num_examples": 4}, "federation": {"per_device_eval_batch_size": 3}})
        )
        names = [name for name, _, _ in differences(before.identity(), now.identity())]
        assert names == ["evaluation.num_examples", "federation.per_device_eval_batch_size"]

    def test_where_the_model_lies_is_nobodys_affair_and_what_it_holds_is(self) -> None:
        here, there, other = (
            ServerConfig.from_tree({"model": model}, source="test").run_config()
            for model in (
                {"model_name_or_path": "/srv/models/llama", "checkpoint_sha256": "a1" * 32},
                {"model_name_or_path": "elsewhere/copy/", "checkpoint_sha256": "a1" * 32},
                {"model_name_or_path": "/srv/models/llama", "checkpoint_sha256": "b2" * 32},
            )
        )
        assert here.fingerprint() == there.fingerprint() != other.fingerprint()
        assert (here.model.model_name_or_path, there.model.model_name_or_path) == ("llama", "copy")

    def test_clients_get_no_path_of_the_server(self) -> None:
        paths = {"runs_dir": "/srv/runs", "cache_dir": "/srv/cache", "address": "ipc:///srv/socket"}
        config = ServerConfig.from_tree({**MODEL, "server": paths}, source="test")
        sent = config.run_config().to_json()
        assert "srv" not in sent
        assert "/" not in sent
        assert set(json.loads(sent)) == set(RunConfig.model_fields)


class TestWhatTrains:
    @pytest.mark.parametrize(
        ("overrides", "backbone", "bottom"),
        [
            ([], True, True),
            (["federation.server_mode=frozen"], False, True),
            (["train.backbone=none"], False, True),
            (["train.bottom=none"], True, False),
            (["model.bottom_layers=0"], True, False),
            (["model.bottom_layers=0", "train.embeddings=true"], True, True),
        ],
    )
    def test_follows_from_the_settings(self, overrides: list[str], backbone: bool, bottom: bool) -> None:
        config = loaded(*overrides)
        assert (config.backbone_trains, config.bottom_trains) == (backbone, bottom)


def test_settings_do_not_change_once_read() -> None:
    config = loaded()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


class TestEvaluation:
    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"federation": {"early_stopping_patience": 2}}, 'set federation.evaluate to "rounds"'),
            ({"federation": {"load_best_model_at_end": True}}, "load_best_model_at_end compares rounds"),
            (
                {
                    "federation": {
                        "early_stopping_patience": 1,
                        "evaluate": "rounds",
                        "num_rounds": 0,
                        "server_mode": "frozen",
                    }
                },
                "num_rounds to 1 or more",
            ),
            ({"federation": {"early_stopping_threshold": 0.1}}, "means nothing without early_stopping_patience"),
            (
                {
                    "federation": {
                        "early_stopping_patience": 1,
                        "evaluate": "rounds",
                        "metric_for_best_model": "rouge_l",
                    }
                },
                "add it to evaluation.measures",
            ),
            ({"federation": {"metric_for_best_model": "bleu"}}, "metric_for_best_model"),
            (
                {
                    "federation": {"load_best_model_at_end": True, "evaluate": "rounds"},
                    "merge": {"parts": ["top"]},
                },
                "a part that is not merged is kept by its client",
            ),
            ({"evaluation": {"measures": ["bleu"]}}, "measures"),
            ({"evaluation": {"measures": ["accuracy"], "label_words": ["yes"]}}, "two or more different words"),
            ({"evaluation": {"measures": ["accuracy"], "label_words": ["yes", "yes"]}}, "different words"),
            ({"evaluation": {"label_words": ["yes", "no"]}}, "are for classification"),
            (
                {"evaluation": {"measures": ["rouge_l"]}, "link": {"max_cache_tokens": 575}},
                "more than link.max_cache_tokens = 575",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_be_measured_is_refused(self, settings: dict[str, Any], why: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(why)):
            ServerConfig.from_tree(merged(MODEL, settings), source="test")
