"""`connect`: a model of transformers whose middle is on a server, for a loop of the user's own."""

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from client_edge.connection.connection import Connection
from client_edge.consent.consent import Answer
from client_edge.consent.gate import Gate, accepts_with, folder_of, says_why
from client_edge.link.files import Files
from client_edge.link.received import fetch_description, fetch_layers
from client_edge.loops import Loop, check_loop
from client_edge.own_loop.optimizer_hook import watch_optimizers_of
from client_edge.own_loop.own_link import OwnLoopLink
from client_edge.own_loop.owner_thread import OwnerThread
from client_edge.own_loop.proxies import Proxies
from client_edge.own_loop.remote_backbone import RemoteBackbone
from client_edge.own_loop.remote_blocks import OwnLoopBlocks
from client_edge.own_loop.server_stand_in import ServerStandIn
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.durability.disk import make_private_dir
from splitfl.errors import ConfigError, DataError, ModelError
from splitfl.models.cut import Cut
from splitfl.models.deferred import defer_logits
from splitfl.models.loss import IGNORED_LABEL
from splitfl.models.packing import check_packing
from splitfl.session.own_loop import OwnLoopClientSession
from splitfl.training.device import open_device
from splitfl.training.terms import terms_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Connected:
    """What belongs to a model from `connect`."""

    cut: Cut
    close: "weakref.finalize[..., Any]"


_connected: weakref.WeakKeyDictionary[PreTrainedModel, _Connected] = weakref.WeakKeyDictionary()


def connect(
    address: str = "",
    *,
    config: Path | str | None = None,
    accept: bool = False,
    policy: Mapping[str, Any] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Join a server's run and return the model, of its original class, whose blocks in the middle are the server's.

    `settings` belong to `[client]` of a client's file (docs/configuration.md), and are laid over the file `config` if
    there is one; `client_id` is the one that is needed. With `keys` and no `enrolment`, the enrolment file is
    CLIENT_ID.enrolment.toml in that folder. Config and tokenizer are in the folder `model.name_or_path`.

    With `train.loss = "chunked"` the loss of `model(..., labels=...)` is taken without logits, which are computed when
    somebody reads them; "plain" is the library's own way, for equality bit for bit.

    What the run's settings let the server see has to be accepted once, by `accept=True`; the error without it says what
    that is. `policy` are settings of `[policy]`, what this client takes part in at all.

    Raises `ConfigError` for settings that are wrong or a server with rounds, `NotAccepted` and `NotAllowed` as above,
    `Refused` when the server says no, and `PeerGone` when none answers.
    """
    own = _settings(address, config, settings, policy or {})
    client, answer = own.client, accepts_with("accept=True") if accept else says_why
    device = open_device(client.device, "client.device")
    with ExitStack() as undo:
        thread = OwnerThread("remote-backbone")
        undo.callback(thread.end)
        connection = thread.call(lambda: _join(own, answer))
        undo.callback(thread.call, connection.close)
        folder = folder_of(client, connection.welcome.run_id)
        make_private_dir(folder)
        files = Files(connection)
        directory = thread.call(lambda: fetch_description(files, client, folder))
        cut = thread.call(lambda: fetch_layers(files, client, directory, device))
        thread.call(lambda: connection.agree(lambda run: OwnLoopClientSession(terms_of(run, cut))))
        model = _model_around(cut, OwnLoopLink(connection), thread)
        undo.pop_all()
    model.config._name_or_path = model.name_or_path = str(directory)
    return model


def disconnect(model: nn.Module) -> None:
    """Leave the run; twice is fine. It happens by itself when the model is no longer used, or the program ends."""
    _of(model).close()


def own_layers(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains on this side by the run's settings, by its name in the whole model, without copying."""
    return {name: parameter.detach() for name, parameter in _of(model).cut.trainable("client").items()}


def _settings(
    address: str, config: Path | str | None, settings: dict[str, Any], policy: Mapping[str, Any]
) -> ClientConfig:
    tree: dict[str, dict[str, Any]] = {"client": {}, "policy": {}}
    if config is not None:
        read = ClientConfig.load(Path(config))
        tree = {name: getattr(read, name).model_dump(exclude_unset=True) for name in tree}
    tree["client"] |= settings | ({"server_address": address} if address else {})
    tree["policy"] |= policy
    own = ClientConfig.from_tree(tree, source="client_edge.connect")
    client = own.client
    if client.keys is not None and client.enrolment is None:
        enrolment = client.keys / f"{client.client_id}.enrolment.toml"
        return own.model_copy(update={"client": client.model_copy(update={"enrolment": enrolment})})
    return own


def _join(own: ClientConfig, answer: Answer) -> Connection:
    connection = Connection(own.client, Gate(own.client, own.policy, answer))
    connection.leaving = "disconnected"
    try:
        check_loop(connection.run, connection.address, Loop.OWN)
    except ConfigError:
        connection.close()
        raise
    return connection


def _model_around(cut: Cut, link: OwnLoopLink, thread: OwnerThread) -> PreTrainedModel:
    run, dtype = link.connection.run, link.session.terms.dtype
    backbone = RemoteBackbone(link, thread)
    proxies = Proxies(cut.trainable("server"))
    remote = OwnLoopBlocks(backbone, proxies, dtype, check_packing=lambda: _check_packing(cut, run))
    model = cut.client_model(remote, ServerStandIn)
    head = cut.top().deferrable_head() if run.train.loss == "chunked" else None
    if head is not None:
        defer_logits(model, head)
    zero_grad_of = weakref.WeakMethod(model.zero_grad)  # the model holds the backbone, not the other way round

    def drop_gradients() -> None:
        zero_grad = zero_grad_of()
        if zero_grad is not None:
            zero_grad()

    backbone.tell_refused(drop_gradients)
    model.register_forward_pre_hook(_refuse_router_losses, with_kwargs=True)
    model.register_forward_pre_hook(_refuse_batches_that_cannot_be, with_kwargs=True)
    watch_optimizers_of(model, remote)
    _connected[model] = _Connected(cut=cut, close=weakref.finalize(model, backbone.close))
    return model.eval()


def _check_packing(cut: Cut, run: RunConfig) -> None:
    for segment in (cut.bottom(), cut.top()):
        check_packing(segment.base, max_seq_length=run.text.max_seq_length)


def _refuse_router_losses(model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_router_logits")
    if asked or (asked is None and getattr(model.config, "output_router_logits", False)):
        raise ModelError(
            "output_router_logits is on: the routers' auxiliary loss needs the logits of the server's blocks, which do"
            " not cross; set model.config.output_router_logits = False"
        )


def _refuse_batches_that_cannot_be(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `DataError` for no ids, ids that the embedding has no row for, and a training loss over no label at all."""
    ids = args[0] if args else kwargs.get("input_ids")
    if isinstance(ids, Tensor) and not ids.numel():
        raise DataError(f"input_ids of shape {list(ids.shape)}: no row, or rows of no token")
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if isinstance(ids, Tensor) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise DataError(
            f"input_ids from {int(ids.min())} to {int(ids.max())}, but the model knows those from 0 to {size - 1}: use"
            " the tokenizer in the folder model.name_or_path"
        )
    labels = kwargs.get("labels")
    is_mean = kwargs.get("num_items_in_batch") is None  # else it is a share of a larger batch's loss, and may be 0
    if model.training and is_mean and isinstance(labels, Tensor) and bool((labels[:, 1:] == IGNORED_LABEL).all()):
        raise DataError(
            "every label of this batch is -100 (the first of each row predicts nothing): its loss is a mean over no"
            " token, so leave the batch out"
        )


def _of(model: nn.Module) -> _Connected:
    for candidate in (model, *model.modules()):
        if isinstance(candidate, PreTrainedModel) and candidate in _connected:
            return _connected[candidate]
    raise ModelError(f"a {type(model).__name__} that is not from client_edge.connect")
