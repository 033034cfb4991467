"""What `splitfl check` says of a server: it binds the address, reads keys and model, and lets go of them again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from server_backbone.disk_space import room_for
from server_backbone.host import listen, security_of
from server_backbone.run_folder import search
from splitfl.config.own import default_cache_dir
from splitfl.config.trees import ServerConfig
from splitfl.models.content import content_sha256
from splitfl.models.cut import Cut
from splitfl.models.origin import locate
from splitfl.models.source import empty_cut, lacking, weights_in
from splitfl.session.limits import limits_of
from splitfl.session.terms import Terms
from splitfl.telemetry.findings import Finding
from splitfl.telemetry.units import counted, format_bytes
from splitfl.training.backbones import backbone_of
from splitfl.training.device import open_device
from splitfl.training.forecast import Part, evaluations_of, memory_of, sight_of, steps_of, wire_of
from splitfl.training.terms import terms_of
from splitfl.transport.security import ServerSecurity


def check_server(path: Path, overrides: Sequence[str]) -> Iterator[Finding]:
    """Look at all that a server needs, what is quick to look at first."""
    config = ServerConfig.load(path, overrides)
    open_device(config.server.device, "server.device")
    yield Finding(topic="config", sentences=(f"{path} is a server's, for {config.model.model_name_or_path}.",))
    security = security_of(config)
    yield _keys(security)
    yield _address(config, security)
    cut, model = _model(config)
    yield model
    yield from _run(config)
    terms = terms_of(config, cut)
    backbone, client = (Part.of(cut, side, config.optimizer) for side in ("server", "client"))
    yield steps_of(config)
    yield evaluations_of(config)
    yield wire_of(config, terms)
    yield from backbone_of(config).memory_of(backbone, config, clients=config.server.max_clients)
    yield memory_of(client, "Each client holds", topic="clients")
    yield _limits(config, terms)
    yield room_for(config, cut)
    yield sight_of(config)


def _keys(security: ServerSecurity | None) -> Finding:
    if security is None:
        said = (
            "No keys: anybody who reaches the address is let in, and nothing is encrypted. Only this machine can reach"
            " it."
        )
        return Finding(topic="keys", sentences=(said,), numbers={"encrypted": False, "authorized": []})
    names = sorted(security.allow_list.keys())
    who = f"Let in: {', '.join(names)}." if names else "Nobody is let in yet: run `splitfl authorize` for each client."
    sentences = ("Encryption and authentication are on.", who)
    return Finding(topic="keys", sentences=sentences, numbers={"encrypted": True, "authorized": names})


def _address(config: ServerConfig, security: ServerSecurity | None) -> Finding:
    with listen(config, security) as listener:
        listener.self_test()
    return Finding(
        topic="address",
        sentences=(f"{config.server.address} is free and can be listened at.",),
        numbers={"address": config.server.address},
    )


def _model(config: ServerConfig) -> tuple[Cut, Finding]:
    origin = locate(config.model.model_name_or_path, config.server.cache_dir or default_cache_dir())
    cut, notes = empty_cut(origin.directory, config)
    middle = cut.layers_of("backbone")
    sentences = [
        f"A {cut.whole.config.model_type} of {counted(cut.anatomy.num_blocks, 'block')}: {config.model.bottom_layers}"
        " below and"
        f" {config.model.top_layers} above on each client, {len(middle)} here.",
        *(f"Note: {note}." for note in notes),
    ]
    if lacking(weights_in(origin, cut, seed=config.seed), cut, "client", "server"):
        sentences.append(
            "Its checkpoint is stored otherwise than it is computed: the server converts it once, which takes memory"
            " for the whole model."
        )
    numbers = {"blocks": cut.anatomy.num_blocks, "server_blocks": len(middle)}
    return cut, Finding(topic="model", sentences=tuple(sentences), numbers=numbers)


def _run(config: ServerConfig) -> Iterator[Finding]:
    """Say which run a start would be; of a model on the hub that would take all of it, so nothing is said."""
    cache_dir = config.server.cache_dir or default_cache_dir()
    origin = locate(config.model.model_name_or_path, cache_dir)
    if origin.hub_id:
        return
    run = search(config, resumes=True).settle(content_sha256(origin, cache_dir))
    sentences = [f"A start goes on with {run.path}." if run.is_resumed else "A start begins a new run."]
    if run.changes:
        sentences.append(f"Changed since its last start: {'; '.join(map(str, run.changes))}.")
    sentences += [f"Note: {note}." for note in run.notes]
    numbers = {"goes_on": run.is_resumed, "checkpoint_sha256": run.config.model.checkpoint_sha256}
    yield Finding(topic="run", sentences=tuple(sentences), numbers=numbers)


def _limits(config: ServerConfig, terms: Terms) -> Finding:
    limits = limits_of(terms, config.link, clients=config.server.max_clients)
    return Finding(
        topic="limits",
        sentences=(
            f"At most {counted(limits.clients, 'client')} at once; each may have the server hold"
            f" {format_bytes(limits.bytes_per_client)} of messages and"
            f" {counted(limits.micro_batches_in_flight, 'graph')}.",
            f"Round 1 opens when {counted(config.federation.min_available_clients, 'client is', 'clients are')} ready.",
        ),
        numbers=limits.announced(),
    )
