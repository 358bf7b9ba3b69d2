"""The configuration's loader: reading, including, overriding, and one clear sentence for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatune.config import Config, config_as_dict, config_digest, describe, dump_config, load_config
from megatune.config.suggest import ALIASES, suggest
from megatune.config.yaml_reader import MAX_VALUES, read_yaml, write_yaml
from megatune.errors import ConfigError

BASE = "model: {path: m}\ndata: {train: [a.jsonl]}\ncheckpoint: {folder: runs/x}\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.replace(str(path), "FILE") for line in str(caught.value).splitlines()]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, BASE)


def test_defaults_are_filled_in(base: Path) -> None:
    config = load_config(base)
    assert (
        config.method.type == "full" and config.train.epochs == 1.0 and config.checkpoint.export == ["model"]
    )


def test_one_training_file_needs_no_list(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("[a.jsonl]", "a.jsonl"))
    assert load_config(str(path)).data.train == ["a.jsonl"]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=3", "optim.lr", 3.0),
        ("data.train=[b.jsonl, c.parquet]", "data.train", ["b.jsonl", "c.parquet"]),
        ("data.train=b.jsonl", "data.train", ["b.jsonl"]),
        ("data.system=yes", "data.system", "yes"),
        ("data.packing=no", "data.packing", False),
        ("data.system='You are: helpful = good'", "data.system", "You are: helpful = good"),
        ("model.path=/a=b/c", "model.path", "/a=b/c"),
        ("data.eval=", "data.eval", None),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.early_stop.patience=7", "train.early_stop", {"patience": 7, "min_delta": 0.0}),
        ("ops.backend={attention: reference}", "ops.backend", {"attention": "reference"}),
        ("track.wandb={project: 12:30}", "track.wandb", {"project": "12:30"}),
    ],
)
def test_overrides_are_yaml(base: Path, override: str, key: str, value: Any) -> None:
    section, name = key.split(".")
    enough = ["data.eval=e.jsonl", "train.eval_every=5"]  # for early_stop
    assert config_as_dict(load_config(base, [*enough, override]))[section][name] == value


def test_early_stop_without_evaluations_is_refused(base: Path) -> None:
    for given in ([], ["data.eval=e.jsonl"], ["train.eval_every=5"]):
        with pytest.raises(ConfigError, match=r"train\.early_stop needs train\.eval_every"):
            load_config(base, [*given, "train.early_stop={}"])


def test_later_overrides_win(base: Path) -> None:
    assert load_config(base, ["optim.lr=1", "optim.lr=2", "optim={clip: 3}"]).optim.clip == 3.0
    assert load_config(base, ["optim={clip: 3}", "optim.lr=2"]).optim.lr == 2.0


def test_a_new_type_replaces_the_method_whatever_the_order(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "method: {type: lora, rank: 4, alpha: 8}\n")
    assert load_config(path, ["method.type=full"]).method.model_dump() == {"type": "full"}
    assert load_config(path, ["method.rank=5"]).method.model_dump()["alpha"] == 8.0
    for overrides in (
        ["method.type=freeze", "method.last_layers=2"],
        ["method.last_layers=2", "method.type=freeze"],
    ):
        assert load_config(path, overrides).method.model_dump() == {
            "type": "freeze",
            "last_layers": 2,
            "modules": [],
        }


def test_include_merges_depth_first_and_later_wins(tmp_path: Path) -> None:
    write(tmp_path, "model: {path: low, dtype: fp32}\noptim: {lr: 1e-3, clip: 2}\n", "parts/low.yaml")
    write(
        tmp_path, "include: low.yaml\nmodel: {path: high}\ndata: {train: [x], system: s}\n", "parts/high.yaml"
    )
    write(tmp_path, "optim: {clip: 3}\n", "other.yaml")
    path = write(
        tmp_path,
        "include: [parts/high.yaml, other.yaml]\ncheckpoint: {folder: r}\ndata: {train: [y]}\noptim:\n",
    )
    config = load_config(path)
    assert (config.model.path, config.model.dtype) == ("high", "fp32")
    assert (config.optim.lr, config.optim.clip) == (1e-3, 3.0)
    assert (config.data.train, config.data.system) == (["y"], "s")


def test_include_may_meet_a_file_twice_but_not_itself(tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.yaml")
    write(tmp_path, "include: base.yaml\n", "a.yaml")
    assert load_config(write(tmp_path, "include: [a.yaml, base.yaml]\n", "twice.yaml")).model.path == "m"
    write(tmp_path, "include: c.yaml\n", "b.yaml")
    path = write(tmp_path, "include: b.yaml\n", "c.yaml")
    with pytest.raises(ConfigError, match=r"includes itself \(c.yaml -> b.yaml -> c.yaml\)"):
        load_config(path)


def test_include_cannot_explode(tmp_path: Path) -> None:
    for level in range(8):
        write(tmp_path, f"include: [{', '.join([f'{level + 1}.yaml'] * 8)}]\n", f"{level}.yaml")
    write(tmp_path, BASE, "8.yaml")
    with pytest.raises(ConfigError, match="includes more than 50 files"):
        load_config(tmp_path / "0.yaml")


def test_an_error_names_the_included_file_and_its_line(tmp_path: Path) -> None:
    write(tmp_path, "optim:\n  clip: 1\n  lr: fast\n", "part.yaml")
    path = write(tmp_path, "include: part.yaml\n" + BASE)
    part = tmp_path / "part.yaml"
    assert problems(path) == [f"`optim.lr` in {part}, line 3 is fast but must be a number > 0"]
    assert problems(path, "optim.lr=slow") == [
        "`optim.lr` in override `optim.lr=slow` is slow but must be a number > 0"
    ]
    write(tmp_path, "include: gone.yaml\n" + BASE)
    with pytest.raises(
        ConfigError, match=r"there is no configuration file .*gone.yaml \(included by .*run.yaml\)"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {learning_rate: 1e-4}", ["unknown key `optim.learning_rate` @4; did you mean `optim.lr`?"]),
        ("train: {lr: 1}", ["unknown key `train.lr` @4; did you mean `optim.lr`?"]),
        ("tp: 2", ["unknown key `tp` @4; did you mean `parallel.tensor`?"]),
        ("trian: {steps: 2}", ["unknown key `trian` @4; did you mean `train`?"]),
        ("lora: {rank: 2}", ["unknown key `lora` @4; did you mean `method`?"]),
        ("seed: 3", ["unknown key `seed` @4; did you mean `train.seed`?"]),
        ("train: {schedule: x}", ["unknown key `train.schedule` @4"
         "; did you mean `parallel.schedule` or `optim.schedule`?"]),
        ("train: {early_stop: {patient: 3}}", ["unknown key `train.early_stop.patient` @4"
         "; did you mean `train.early_stop.patience`?"]),
        ("ops: {zzz: 1}", ["unknown key `ops.zzz` @4; the keys of `ops` are backend"]),
        ("track: {wnadb: {project: x}}", ["unknown key `track.wnadb` @4; did you mean `track.wandb`?"]),
        ("method: {type: full, rank: 3}", ["unknown key `method.rank` @4; it belongs to `method.type`: lora"]),
        ("method: {type: lora, lora_r: 3}", ["unknown key `method.lora_r` @4; did you mean `method.rank`?"]),
        ("method: {rank: 3}", ["missing key `method.type` @4: one of full, freeze or lora"]),
        ("method: {type: lara}", ["`method.type` @4 is lara but must be one of full, freeze or lora"
         "; did you mean lora?"]),
        ("method: lora", ["`method` @4 is lora but must be a mapping with `type`: full, freeze or lora"]),
        ("method: {type: freeze}", ["`method` @4: freeze trains nothing: set last_layers or modules"]),
        ("optim: {schedule: cosin}", ["`optim.schedule` @4 is cosin but must be one of cosine, linear, constant or wsd"
         "; did you mean cosine?"]),
        ("optim: {beta1: 1.0}", ["`optim.beta1` @4 is 1.0 but must be a number >= 0 and < 1"]),
        ("optim: {lr: .inf}", ["`optim.lr` @4 is inf but must be a number > 0"]),
        ("launch: {nproc: many}", ["`launch.nproc` @4 is many but must be auto or a whole number >= 1"]),
        ("parallel: {recompute: 0}", ["`parallel.recompute` @4: every n-th layer needs n >= 1"]),
        ("optim: {momentum: 0.9}", ["`optim` @4: momentum: 0.9 is for name: muon, and adamw has none: leave it out "
         "(its decay rates are beta1 and beta2), or set name to muon"]),
        ("train: 3", ["`train` @4 is 3 but must be a mapping"]),
        ("train: {steps: 3, epochs: 2}", ["`train` @4: give steps or epochs, not both"]),
        (
            "train: {steps: 0, log_every: 1.5}\noptim:\n  clip: [1]",
            [
                "`train.steps` @4 is 0 but must be a whole number >= 1 or null",
                "`train.log_every` @4 is 1.5 but must be a whole number >= 1",
                "`optim.clip` @6 is [1] but must be a number >= 0",
            ],
        ),
    ],
)  # fmt: skip
def test_one_sentence_for_each_mistake(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, BASE + text + "\n")
    assert problems(path) == [line.replace("@", "in FILE, line ") for line in said]


def test_wrong_items_of_a_list_and_wrong_combinations(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("folder: runs/x", "folder: r, export: [model, mergd]"))
    assert problems(path) == [
        "`checkpoint.export` in FILE, line 3 is [model, mergd] but must be a list of adapter, merged, model or null"
        "; did you mean merged?"
    ]
    assert problems(path, "checkpoint.export=[adapter]") == [
        "FILE: checkpoint.export: adapter does not fit method.type: full (use model)"
    ]


def test_missing_keys_say_what_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\n  system: x\nmodel: {path: m}\n")
    assert problems(path) == [
        "missing key `data.train` in FILE, line 1: Training files: .jsonl, .json, .parquet or .csv",
        "missing key `checkpoint.folder` in FILE: The run's folder: checkpoints, logs, metrics, exports",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", "override `optim.lr` must read section.key=value, for example optim.lr=1e-4"),
        ("=3", "override `=3` must read section.key=value, for example optim.lr=1e-4"),
        ("a..b=3", "override `a..b=3` must read section.key=value, for example optim.lr=1e-4"),
        ("include=x.yaml", "override `include=x.yaml`: include works in files only"),
        ("tp=3", "unknown key `tp` in override `tp=3`; did you mean `parallel.tensor`?"),
        ("data.train=[a", "override `data.train=[a`, line 1 is not valid YAML"
         ": expected ',' or ']', but got '<stream end>'"),
        ("data.train.0=a", "`data.train` in override `data.train.0=a` is a mapping but must be a list of text"),
    ],
)  # fmt: skip
def test_bad_overrides(base: Path, override: str, said: str) -> None:
    assert problems(base, override) == [said]


def test_overrides_may_not_contradict_each_other(base: Path) -> None:
    (said,) = problems(base, "train.seed=1", "train.seed.x=2")
    assert said.startswith("override `train.seed.x=2` contradicts override `train.seed=1`")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "must be a mapping of sections"),
        (b"model: {path: a}\nmodel: {path: b}\n", "line 2 gives the key `model` again .first in line 1"),
        (b"optim:\n  lr: 1\n  clip: 2\n  lr: 3\n", "line 4 gives the key `optim.lr` again .first in line 2"),
        (b"optim: {lr: 1\n", "line 2 is not valid YAML"),
        (b"optim:\n\tlr: 1\n", "line 2 is not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "line 2 is not valid YAML: .*another document"),
        (b"a: \x07\n", "is not valid YAML"),
        (b"a: \xff\xfe\n", "is not UTF-8 text .byte 3"),
        (
            b"a: !!python/object/apply:os.system [true]\n",
            "line 1 has the tag .*, which a configuration may not use",
        ),
        (b"a: !!timestamp 2020-01-01\n", "line 1 has the tag !!timestamp"),
        (b"a: &x {b: 1}\nc:\n  <<: *x\n", "line 3 uses a merge key"),
        (b"? [1, 2]\n: 3\n", "line 1 has a key that is not text"),
        (b"a: &x [*x]\n", "nested deeper than 24 levels"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "nested deeper than 24 levels"),
        (b"a: " + b"9" * 5000, "line 1 has a number that cannot be read"),
        (b"include: 3\n", "`include` in .* must be a file name or a list of them"),
        (b"a: " + b"x" * (1 << 20), "is larger than 1 MiB"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file .*none.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_alias_bombs_are_refused_and_plain_aliases_work(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match=f"more than {MAX_VALUES} values"):
        read_yaml("\n".join(levels), "FILE")
    value, lines = read_yaml("a: &x {b: [1]}\nc: *x\n", "FILE")
    assert value == {"a": {"b": [1]}, "c": {"b": [1]}} and lines[("c",)] == 2
    value["a"]["b"].append(2)
    assert value["c"]["b"] == [1], "an alias is a copy, so that merging one cannot change the other"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("2E5", 2e5), ("1.5e3", 1500.0), (".5", 0.5), ("1.", 1.0), ("-.inf", float("-inf")),
        ("+.5", 0.5), ("-.5e-1", -0.05), ("1_000", 1000), ("0x1F", 31), ("007", 7), ("-3", -3),
        ("yes", "yes"), ("off", "off"), ("12:30", "12:30"), ("2020-01-01", "2020-01-01"), ("1.2.3", "1.2.3"),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None), ("'1e-4'", "1e-4"), ("-", [None]),
        ("e5", "e5"), ("1e", "1e"), ("nan", "nan"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    found = read_yaml(text, "FILE")[0]
    assert found == value and type(found) is type(value)


def test_dump_round_trips(tmp_path: Path, base: Path) -> None:
    overrides = [
        "model.path='1e-4'",
        "data.system='yes'",
        "optim.lr=1e-5",
        "method={type: lora, targets: [q_proj]}",
        "track.wandb={name: '12:30', tags: ['null', ünder]}",
        "train={early_stop: {}, eval_every: 5}",
        "data.eval=e.jsonl",
        "parallel.recompute=2",
    ]
    config = load_config(base, overrides)
    path = write(tmp_path, dump_config(config), "dumped.yaml")
    again = load_config(path)
    assert again == config and config_digest(again) == config_digest(config)
    assert Config.model_validate(yaml.safe_load(path.read_text())) == config, "other YAML readers agree"
    assert config.model.path == "1e-4" and config.data.system == "yes"


@pytest.mark.parametrize(
    "value", ["1e-4", "1.", "yes", "0x1F", "~", "", "12:30", "a: b", "- x", "é\n\ttab", "'", "1_0"]
)
def test_text_stays_text(value: str) -> None:
    assert (
        read_yaml(write_yaml({"key": value}), "FILE")[0]
        == {"key": value}
        == yaml.safe_load(write_yaml({"key": value}))
    )


def test_digest_depends_on_values_not_on_how_they_were_written(tmp_path: Path, base: Path) -> None:
    digest = config_digest(load_config(base))
    assert digest == config_digest(load_config(base, ["optim.lr=2.0e-5"])), (
        "a default written out changes nothing"
    )
    assert digest == config_digest(
        load_config(write(tmp_path, "\n".join(reversed(BASE.splitlines())), "turned.yaml"))
    )
    assert digest != config_digest(load_config(base, ["optim.lr=2.1e-5"]))
    assert len(digest) == 64


def test_environment_variables_are_not_expanded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert load_config(base, ["model.path=$SECRET/${SECRET}"]).model.path == "$SECRET/${SECRET}"


def test_aliases_point_at_keys_and_hide_none() -> None:
    known = set(describe.all_keys())
    assert set(ALIASES.values()) <= known
    assert not {key.rsplit(".", 1)[-1] for key in known} & ALIASES.keys()
    assert suggest(("learning-rate",)) == ["optim.lr"]
    assert suggest(("gradient_checkpointin",)) == ["parallel.recompute"]
    assert suggest(("qqqqqq",)) == []


def test_every_key_is_described() -> None:
    for key in describe.all_keys():
        node = describe.find(tuple(key.split(".")))
        assert node is not None
        if not describe.sections(node):
            assert node.get("description", "").endswith("."), (
                f"{key} needs a description that ends in a full stop"
            )
        assert describe.describe(node)


def test_the_page_on_the_configuration_is_up_to_date(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    fresh = tmp_path / "config.md"
    subprocess.run(
        [sys.executable, str(root / "tools/make_config_docs.py"), str(fresh)], check=True, timeout=60
    )
    assert fresh.read_text() == (root / "docs/config.md").read_text(), "run `make docs`"
    for key in describe.all_keys():
        node = describe.find(tuple(key.split(".")))
        assert describe.sections(node) or f"`{key}`" in fresh.read_text() or key == "method.type"
