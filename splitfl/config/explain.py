"""Puts pydantic's findings into sentences: the value, the rule, and the setting that was meant."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from splitfl.config.patterns import NAME_PATTERN, PROXY_PATTERN, SHA256_PATTERN
from splitfl.config.section import Section, is_section

# What is wrong with a value of the wrong kind, by the name of pydantic's finding.
_WANTED = {
    "int_type": "must be a whole number, without quotes and decimal point",
    "float_type": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "string_type": "must be text, in quotes",
    "tuple_type": 'must be a list of texts, as in ["a", "b"]',
    "dict_type": "must be names and values, as in { name = value }",
}

# What a text must look like, by its pattern.
_RULES = {
    NAME_PATTERN: "must be 1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    SHA256_PATTERN: "must be 64 hexadecimal digits, or empty",
    PROXY_PATTERN: "must be HOST:PORT, such as localhost:1080",
}

# Names that other programs have for our settings; the first one is meant that the tree at hand has.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    other: names
    for names, others in {
        ("model.model_name_or_path",): "model name_or_path model_name model_path model_id base_model",
        ("model.bottom_layers",): "split_layer cut_layer",
        ("model.dtype",): "torch_dtype precision bf16",
        ("train.bottom",): "train",
        ("train.embeddings",): "train_embeddings",
        ("lora.r",): "rank lora_r lora_rank",
        ("lora.alpha",): "lora_alpha",
        ("lora.dropout",): "lora_dropout",
        ("lora.target_modules",): "modules lora_target_modules",
        ("optimizer.optim",): "optimizer type optimizer_type",
        ("optimizer.learning_rate",): "lr step_size",
        ("optimizer.lr_scheduler_type",): "scheduler schedule lr_scheduler lr_schedule",
        ("optimizer.warmup_steps",): "warmup warmup_ratio",
        ("optimizer.max_grad_norm",): "clip grad_clip gradient_clipping max_norm clip_norm",
        ("optimizer.adam_beta1",): "beta1 betas",
        ("optimizer.adam_beta2",): "beta2",
        ("optimizer.adam_epsilon",): "eps epsilon adam_eps",
        ("federation.num_rounds",): "rounds n_rounds num_server_rounds global_rounds communication_rounds",
        ("federation.local_steps",): "steps num_steps max_steps epochs num_epochs local_epochs num_train_epochs",
        ("federation.per_device_train_batch_size",): "batch batch_size train_batch_size micro_batch_size bs",
        ("federation.gradient_accumulation_steps",): "grad_accum accumulation_steps gradient_accumulation",
        ("federation.per_device_eval_batch_size",): "eval_batch_size",
        ("federation.min_available_clients",): "num_clients n_clients clients min_clients",
        ("federation.min_train_clients",): "min_fit_clients",
        ("federation.fraction_train",): "fraction_fit client_fraction",
        ("federation.strategy",): "strategy aggregator aggregation",
        ("federation.server_mode",): "mode",
        ("strategy.proximal_mu",): "mu",
        ("text.max_seq_length",): "max_length max_len max_seq_len seq_length seq_len block_size context_length",
        ("server.address", "client.server_address"): "server address host port listen bind url",
        ("server.run_id",): "name run_name",
        ("server.runs_dir", "client.output_dir"): "out output out_dir save_dir run_dir",
        ("server.num_threads", "client.num_threads"): "threads",
        ("client.client_id",): "client id",
        ("data.path",): "data data_path dataset train_file train_path file",
        ("data.eval_path",): "eval_file validation_file test_file",
        ("data.eval_fraction",): "val_fraction test_size holdout",
    }.items()
    for other in others.split()
}


def explain(tree: type[Section], error: ValidationError) -> str:
    """Put pydantic's findings into one sentence a person can act on."""
    return "; ".join(_explain_one(tree, finding) for finding in error.errors())


def _explain_one(tree: type[Section], finding: Any) -> str:
    where = [str(part) for part in finding["loc"]]
    name = ".".join(where)
    match finding["type"]:
        case "extra_forbidden":
            return f"unknown setting {name}{_nearest(tree, where)}"
        case "model_type":
            return _no_section(tree, where, finding["input"])
        case kind if kind in _WANTED:
            return f"{name} = {_as_toml(finding['input'])}: {_WANTED[kind]}"
        case "string_pattern_mismatch" if rule := _RULES.get(finding["ctx"]["pattern"].removeprefix("^$|")):
            return f"{name} = {finding['input']!r}: {rule}"
        case "literal_error":
            return f"{name} = {_as_toml(finding['input'])}: {_one_of(finding)}"
    message = finding["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if finding["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {_as_toml(finding['input'])}: {message}"


def _one_of(finding: Any) -> str:
    """Say what is known, and what was meant if it was nearly that."""
    known, given = finding["ctx"]["expected"], str(finding["input"]).lower()
    names = {name.lower(): name for name in re.findall("'([^']*)'", known)}
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    return f"must be {known}" + (f"; did you mean {names[close[0]]!r}?" if close else "")


def _no_section(tree: type[Section], where: Sequence[str], value: object) -> str:
    """Say how a section is written to someone who has written something else under its name."""
    name = ".".join(where)
    if isinstance(value, list):
        return f"{name} is one section, and the file has a list of them: write [{name}], in single brackets"
    meant = _other_name(tree, where)
    return f"{name} = {_as_toml(value)}: {name} is a section" + (f"; did you mean {meant}?" if meant else "")


def _as_toml(value: object) -> str:
    """Write a value as it was written: true and not True."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _nearest(tree: type[Section], where: Sequence[str]) -> str:
    """Name the known setting that is meant by an unknown one, or that is most like it, here or in another section."""
    if meant := _other_name(tree, where):
        return f"; did you mean {meant}?"
    here = known_settings(tree)
    same_key = [name for name in here if name.split(".")[-1] == where[-1]]
    close = same_key or difflib.get_close_matches(".".join(where), [*tree.model_fields, *here], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(_siblings(tree, where))}"


def _other_name(tree: type[Section], where: Sequence[str]) -> str:
    """Return the setting that other programs call this, "" if none is known or this tree has none."""
    known = known_settings(tree)
    return next((name for name in OTHER_NAMES.get(where[-1].lower(), ()) if name in known), "")


def _siblings(tree: type[Section], where: Sequence[str]) -> Iterable[str]:
    for part in where[:-1]:
        field = tree.model_fields.get(part)
        if field is None or not is_section(field.annotation):
            break
        tree = field.annotation
    return tree.model_fields


def known_settings(tree: type[Section], prefix: str = "") -> list[str]:
    """Name all settings of a tree, as `section.key`."""
    names = []
    for name, field in tree.model_fields.items():
        if is_section(field.annotation):
            names += known_settings(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
